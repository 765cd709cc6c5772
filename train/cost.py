"""What a run on FLUX.1-dev will cost, before anything is downloaded: time, memory and disk of each stage.

    python -m train.cost --images 20000 --size 1024 --hookpoints layer5,layer15 --step 13
    python -m train.cost --gpu A100-80GB --gpus 8 --images 20000 --tokens-per-image 512

Every figure goes back to the table in train/cost_constants.py, which says what was measured and what is calculated.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from train import cost_constants as constants
from train.command import start
from train.cost_constants import Figure, Gpu

PATCH = 16


@dataclass(frozen=True, kw_only=True)
class Config:
    """The run to be estimated."""

    gpu: str = "H100"
    """Name of the GPU: H100, H200, A100-80GB, A100-40GB, L40S, A6000, RTX4090 or A10G."""
    gpus: int = 1
    """How many of them."""
    images: int = 20_000
    """Images whose activations are collected."""
    score_images: int | None = None
    """Images that are scored; left out, as many as are collected."""
    size: int = 1024
    """Height and width, pixels."""
    hookpoints: str = "layer5,layer15"
    """Hook points, separated by commas."""
    step: str = "13"
    """Captured steps of the schedule (0-based), separated by commas."""
    num_inference_steps: int = 28
    """Steps of the schedule."""
    text_tokens: int = 512
    """Text tokens of a prompt."""
    tokens_per_image: int | None = None
    """Tokens kept of each image, step and hook point; left out, all of them."""
    n_features: int = 12_288
    """Features of each SAE."""
    epochs: int = 1
    """Passes over the activations in training."""
    compiled: bool = False
    """Blocks compiled by torch.compile."""
    host_gb: float = 64.0
    """Memory of the host, 10^9 bytes."""


@dataclass(frozen=True)
class Stage:
    """One stage's cost on all GPUs together."""

    name: str
    seconds: float
    memory: float
    """Device memory of each GPU, bytes."""
    disk: float
    """Bytes it leaves."""
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """A checked configuration and what follows from it."""

    config: Config
    gpu: Gpu
    hookpoints: tuple[HookPoint, ...]
    steps: tuple[int, ...]
    n_image_tokens: int

    @classmethod
    def build(cls, config: Config) -> "Plan":
        """The plan of a configuration.

        Raises:
            FluxSaeError: an unknown GPU or hook point, a step outside the schedule, a size off the patch.
        """
        if config.gpu not in constants.GPUS:
            raise FluxSaeError(f"gpu={config.gpu!r} is not in the table. Allowed are {', '.join(constants.GPUS)}.")
        for name in ("gpus", "images", "num_inference_steps", "n_features", "epochs", "text_tokens"):
            if getattr(config, name) < 1:
                raise FluxSaeError(f"{name}={getattr(config, name)}: allowed is a whole number from 1.")
        hookpoints = tuple(HookPoint.parse(name) for name in config.hookpoints.split(","))
        for hookpoint in hookpoints:
            _check_block(hookpoint)
        steps = tuple(_parse_step(text, config.num_inference_steps) for text in config.step.split(","))
        grid = TokenGrid.from_size(config.size, config.size, patch=PATCH)
        return cls(config, constants.GPUS[config.gpu], hookpoints, steps, grid.n_tokens)

    @property
    def n_tokens(self) -> int:
        """Image and text tokens of one image."""
        return self.n_image_tokens + self.config.text_tokens

    @property
    def step_share(self) -> Figure:
        """Share of the GPU's peak that a step reaches."""
        return self.gpu.compiled_share if self.config.compiled else self.gpu.step_share

    def seconds(self, operations: float, share: float) -> float:
        """Time that operations take on all GPUs."""
        return operations / (self.gpu.peak_tflops * 1e12 * share) / self.config.gpus

    @property
    def step_seconds(self) -> float:
        """One step of one image (1024 px and 512 text tokens: 74 TFLOP)."""
        n, width = self.n_tokens, constants.D_MODEL
        blocks = constants.N_DOUBLE + constants.N_SINGLE
        return self.seconds(blocks * (24 * width**2 * n + 4 * n**2 * width), self.step_share.value)

    @property
    def text_seconds(self) -> float:
        """The text encoder on one prompt."""
        return self.seconds(
            constants.T5_OPERATIONS_PER_TOKEN.value * self.config.text_tokens, self.gpu.step_share.value
        )

    @property
    def decode_seconds(self) -> float:
        """The decoder on one image."""
        operations = constants.DECODE_OPERATIONS_PER_PIXEL.value * self.config.size**2
        return self.seconds(operations, constants.DECODE_SHARE.value)

    @property
    def rows(self) -> int:
        """Token rows kept of each hook point."""
        kept = self.config.tokens_per_image or self.n_image_tokens
        return self.config.images * min(kept, self.n_image_tokens) * len(self.steps)


def stages(plan: Plan) -> Iterator[Stage]:
    """The stages of a run, in order."""
    config = plan.config
    preset, weights, note = _preset(plan)
    moved = sum(constants.DEV_BYTES.values()) / constants.OFFLOAD_BYTES_PER_SECOND.value / config.gpus
    fixed = plan.text_seconds + (moved if preset == "offload" else 0.0)
    widths = [_width(hookpoint) for hookpoint in plan.hookpoints]
    encoding = sum(2 * plan.n_image_tokens * width * config.n_features for width in widths) * len(plan.steps)
    score_images = config.images if config.score_images is None else config.score_images

    collected = config.images * (fixed + _steps_run(plan) * plan.step_seconds)
    yield Stage("collect", collected, weights, plan.rows * sum(widths) * 2, note)
    yield _fit_stage(plan, widths)
    scored = fixed + config.num_inference_steps * plan.step_seconds + plan.decode_seconds
    scored += plan.seconds(encoding, plan.gpu.training_share.value)
    saes = 2 * config.n_features * sum(widths) * 4
    score_bytes = score_images * (config.n_features * (2 + 2) * len(widths) + constants.THUMBNAIL_BYTES.value)
    yield Stage("score", score_images * scored, weights + saes, score_bytes, note)
    embedded = plan.seconds(constants.CLIP_OPERATIONS_PER_IMAGE.value, plan.gpu.step_share.value)
    yield Stage("embed", score_images * embedded, 2e9, score_images * 768 * 4)
    maps = config.n_features * constants.HEATMAP_TOP_IMAGES * plan.n_image_tokens * len(widths)
    yield Stage("analyze", 0.0, 0.0, maps, "seconds to minutes on the CPU; disk is an upper bound")


def _fit_stage(plan: Plan, widths: list[int]) -> Stage:
    config = plan.config
    operations = sum(10 * width * config.n_features for width in widths) * plan.rows * config.epochs
    widest = max(widths) * config.n_features
    memory = 2 * widest * 4 * 4 + 8192 * config.n_features * 4 * 4  # weights, moments, gradients; acts of a batch
    disk = 2 * config.n_features * sum(widths) * 4
    computing = plan.seconds(operations, plan.gpu.training_share.value)
    reading = plan.rows * sum(widths) * 2 * config.epochs / constants.DISK_BYTES_PER_SECOND.value
    note = "bound by reading the activations" if reading > computing else "bound by the products"
    return Stage("fit", max(computing, reading), memory, disk, note)


def _preset(plan: Plan) -> tuple[str, float, str]:
    """Preset, device memory it takes, and what to say about it."""
    import torch

    from fluxsae.flux.presets import Machine, choose_preset, required_bytes

    machine = Machine(torch.device("cuda"), int(plan.gpu.memory_gb * 1e9), int(plan.config.host_gb * 1e9))
    preset = choose_preset(constants.DEV_BYTES, machine).preset
    note = f"preset {preset}"
    if preset in ("int8", "nf4"):
        note += ": CHANGES activations, refused for collection unless --allow-inexact"
    return preset, float(required_bytes(preset, constants.DEV_BYTES)), note


def _steps_run(plan: Plan) -> float:
    """Steps of work until the last wanted block of the last wanted step."""
    blocks = constants.N_DOUBLE + constants.N_SINGLE
    last = max(_blocks_before(hookpoint) + 1 for hookpoint in plan.hookpoints)
    return max(plan.steps) + last / blocks


def _blocks_before(hookpoint: HookPoint) -> int:
    return hookpoint.block_index + (constants.N_DOUBLE if hookpoint.block_kind == "single" else 0)


def _width(hookpoint: HookPoint) -> int:
    return constants.D_MODEL * (4 if hookpoint.submodule == "proj_mlp" else 1)


def _check_block(hookpoint: HookPoint) -> None:
    n_blocks = constants.N_DOUBLE if hookpoint.block_kind == "double" else constants.N_SINGLE
    if hookpoint.block_index >= n_blocks:
        raise FluxSaeError(
            f"FLUX.1 has no {hookpoint}: its {hookpoint.block_kind}-stream blocks are 0 to {n_blocks - 1}."
        )


def _parse_step(text: str, n_steps: int) -> int:
    if not text.strip().isdecimal() or not 0 <= int(text) < n_steps:
        raise FluxSaeError(f"step={text.strip()!r}: allowed are whole numbers from 0 to {n_steps - 1}.")
    return int(text)


def table(plan: Plan) -> str:
    """The estimate as a table with its totals and sources."""
    found = list(stages(plan))
    lines = [f"{'stage':<9}{'time':>10}{'GPU memory':>13}{'disk':>11}  notes"]
    lines += [_line(stage.name, stage.seconds, stage.memory, stage.disk, stage.note) for stage in found]
    memory = max(stage.memory for stage in found)
    lines.append(_line("all", sum(s.seconds for s in found), memory, sum(s.disk for s in found), ""))
    figures = {
        f"step on {plan.config.gpu}": plan.step_share,
        f"SAE training on {plan.config.gpu}": plan.gpu.training_share,
        "text encoder": constants.T5_OPERATIONS_PER_TOKEN,
        "decoder": constants.DECODE_OPERATIONS_PER_PIXEL,
        "reading": constants.DISK_BYTES_PER_SECOND,
        "CLIP": constants.CLIP_OPERATIONS_PER_IMAGE,
    }
    lines += ["", *(f"{name}: {figure.kind} ({figure.source})" for name, figure in figures.items())]
    return "\n".join(lines)


def _line(name: str, seconds: float, memory: float, disk: float, note: str) -> str:
    return f"{name:<9}{_time(seconds):>10}{memory / 1e9:>10.0f} GB{_size(disk):>11}  {note}".rstrip()


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB"


def main(config: Config) -> str:
    """Prints the estimate."""
    plan = Plan.build(config)
    count = f"{config.gpus} x {config.gpu}" if config.gpus > 1 else config.gpu
    text = (
        f"FLUX.1-dev on {count}: {config.images} images of {config.size} px, {', '.join(map(str, plan.hookpoints))}, "
        f"steps {', '.join(map(str, plan.steps))} of {config.num_inference_steps}; "
        f"{plan.step_seconds * config.gpus:.3f} s a step\n\n{table(plan)}"
    )
    print(text)
    return text


if __name__ == "__main__":
    start(main, Config, __doc__)
