"""What a recipe will cost, before anything is downloaded: time, memory and disk of each stage of that very run.

    python -m train.cost --recipe flux-dev
    python -m train.cost --recipe flux-dev-evening --gpu H100 --gpus 8
    python -m train.cost --recipe flux-dev --hookpoints layer15 --set collect.images=5000 fit.n_features=6144

Every figure goes back to the table in train/cost_constants.py, which says what was measured and what is calculated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from train import collect, score
from train import cost_constants as constants
from train.collect import CollectConfig
from train.command import start
from train.cost_constants import Figure, Gpu, Model
from train.embed import REAL_CLIP, EmbedConfig
from train.fit import FitConfig, build_sae_configs
from train.flux_options import default_hookpoints, default_steps
from train.recipes import RecipeOptions, build_recipe, build_stage_configs, parse_recipe_options
from train.render import RenderConfig
from train.score import ScoreConfig
from train.stages import STAGES

if TYPE_CHECKING:
    from fluxsae.activations.shards import ActivationManifest
    from fluxsae.sae.config import SaeConfig


@dataclass(frozen=True, kw_only=True)
class Config(RecipeOptions):
    """The recipe to be priced, and the machines."""

    gpu: tuple[str, ...] = ("H100", "A100-80GB", "RTX4090")
    """GPUs to compare: H100, H200, A100-80GB, A100-40GB, L40S, A6000, RTX4090, A10G."""
    gpus: int = 1
    """How many of each."""
    compiled: bool = False
    """Blocks compiled by torch.compile."""
    host_gb: float = 64.0
    """Memory of the host, 10^9 bytes."""


@dataclass(frozen=True)
class Stage:
    """One stage's cost on all GPUs of a kind together."""

    name: str
    seconds: float
    memory: float
    """Device memory of each GPU, bytes."""
    disk: float
    """Bytes it leaves."""
    note: str = ""


@dataclass(frozen=True)
class Fit:
    """SAEs that are trained in one pass over one hook point's rows."""

    hookpoint: HookPoint
    saes: tuple[SaeConfig, ...]
    n_rows: int
    """Distinct rows of the training split."""
    n_trained: int
    """Rows that go through each SAE, over all epochs."""
    steps: tuple[int, ...]


@dataclass(frozen=True)
class _Rows:
    """What `build_sae_configs` asks of a source."""

    d_model: int
    batch_size: int
    n_batches: int


@dataclass(frozen=True)
class Plan:
    """What a recipe makes, counted with the code that makes it."""

    model: Model
    settings: GenerationSettings
    collect: CollectConfig
    fits: tuple[FitConfig, ...]
    score: ScoreConfig
    embed: EmbedConfig
    render: RenderConfig
    skip: tuple[str, ...]

    @classmethod
    def build(cls, config: RecipeOptions) -> Plan:
        """The plan of a recipe.

        Raises:
            FluxSaeError: a FLUX that is not known, or a recipe that stores no activations or generates no images.
        """
        from fluxsae.runs.folder import RunFolder

        recipe, run = build_recipe(config), RunFolder("run")
        ((collect,), fits, (score,), (embed,), (render,)) = (
            build_stage_configs(stage, recipe, run) for stage in ("collect", "fit", "score", "embed", "render")
        )
        if config.pictures is not None or any(fit.from_flux for fit in fits):
            raise FluxSaeError(
                "train.cost prices runs that generate images and store activations, not --pictures or fit.from_flux. "
                "Leave these out of the recipe."
            )
        model = find_model(config.flux)
        names = ("height", "width", "num_inference_steps", "guidance_scale")
        asked = {name: value for name in names if (value := getattr(config, name)) is not None}
        settings = GenerationSettings(**{**model.settings.to_dict(), **asked})
        plan = cls(model, settings, collect, tuple(fits), score, embed, render, config.skip)
        for hookpoint in plan.hookpoints:
            _check_block(hookpoint, model)
        for step in (*plan.steps, *score.steps):
            if not 0 <= step < settings.num_inference_steps:
                raise FluxSaeError(
                    f"step={step}: allowed are whole numbers from 0 to {settings.num_inference_steps - 1}."
                )
        return plan

    @property
    def n_collected(self) -> int:
        """Images whose activations are collected."""
        return collect.DEFAULT_IMAGES if self.collect.images is None else self.collect.images

    @property
    def n_scored(self) -> int:
        """Images that are scored."""
        return score.DEFAULT_IMAGES if self.score.images is None else self.score.images

    @property
    def hookpoints(self) -> tuple[HookPoint, ...]:
        """Where activations are collected."""
        named = [HookPoint.parse(name) for name in self.collect.hookpoints]
        return tuple(sorted(set(named or default_hookpoints(self.model.n_double))))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that are collected."""
        return tuple(sorted(set(self.collect.steps or default_steps(self.settings))))

    @property
    def grid(self) -> TokenGrid:
        """Image tokens."""
        return TokenGrid.from_size(self.settings.height, self.settings.width, patch=self.model.patch)

    def n_tokens(self, hookpoint: HookPoint) -> int:
        """Tokens of a hook point's stream."""
        return self.settings.max_sequence_length if hookpoint.stream == "text" else self.grid.n_tokens

    def width(self, hookpoint: HookPoint) -> int:
        """Width of a hook point's rows."""
        return self.model.d_model * (4 if hookpoint.submodule == "proj_mlp" else 1)

    @cached_property
    def manifests(self) -> dict[HookPoint, ActivationManifest]:
        """What the folders of the collection will hold."""
        from fluxsae.activations.shards import ActivationManifest

        return {
            hookpoint: ActivationManifest(
                hookpoint=str(hookpoint),
                d_model=self.width(hookpoint),
                flux_id=self.collect.flux,
                flux_revision=None,
                settings=self.settings,
                steps=self.steps,
                sigmas=(0.0,) * len(self.steps),
                n_tokens=self.n_tokens(hookpoint),
                tokens_per_image=min(
                    self.n_tokens(hookpoint), self.collect.tokens_per_image or self.n_tokens(hookpoint)
                ),
                n_images=self.n_collected,
                images_per_shard=self.collect.images_per_shard,
                prompts_hash="",
                seed=self.collect.seed,
                held_out_every=self.collect.held_out_every,
            )
            for hookpoint in self.hookpoints
        }

    @cached_property
    def trained(self) -> list[Fit]:
        """Every SAE that is trained, by hook point."""
        named = [(fit, SaeName.parse(name)) for fit in self.fits for name in (fit.hookpoints or self.hookpoints)]
        return [self._fit(fit, name.place) for fit, name in named]

    def _fit(self, fit: FitConfig, hookpoint: HookPoint) -> Fit:
        if hookpoint not in self.manifests:
            raise FluxSaeError(f"[fit] names {hookpoint}, which the recipe does not collect. Add it to [pipeline].")
        manifest, steps = self.manifests[hookpoint], tuple(sorted(set(fit.steps))) or self.steps
        n_images = sum(manifest.in_split(image, "train") for image in range(manifest.n_images))
        rows = n_images * len(steps) * manifest.tokens_per_image
        source = _Rows(manifest.d_model, fit.batch_size, rows // fit.batch_size)
        saes = build_sae_configs(fit, cast(Any, source), None)
        n_trained = fit.training().n_steps(source.n_batches) * fit.batch_size
        return Fit(hookpoint, tuple(saes.values()), rows, n_trained, steps)


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, and what they reach."""

    gpu: Gpu
    gpus: int = 1
    compiled: bool = False
    host_gb: float = 64.0

    @classmethod
    def build(cls, config: Config, name: str) -> Machine:
        """The machine of a name.

        Raises:
            FluxSaeError: it is not in the table.
        """
        if name not in constants.GPUS:
            raise FluxSaeError(f"gpu={name!r} is not in the table. Allowed are {', '.join(constants.GPUS)}.")
        if config.gpus < 1:
            raise FluxSaeError(f"gpus={config.gpus}: allowed is a whole number from 1.")
        return cls(constants.GPUS[name], config.gpus, config.compiled, config.host_gb)

    @property
    def step_share(self) -> Figure:
        """Share of the GPU's peak that a step reaches."""
        return self.gpu.compiled_share if self.compiled else self.gpu.step_share

    def seconds(self, operations: float, share: float) -> float:
        """Time that operations take on all GPUs."""
        return operations / (self.gpu.peak_tflops * 1e12 * share) / self.gpus

    def step_seconds(self, plan: Plan) -> float:
        """One step of one image (at 1024 px and 512 text tokens FLUX.1: 74 TFLOP, FLUX.2 klein 4B: 35)."""
        width, n = plan.model.d_model, plan.grid.n_tokens + plan.settings.max_sequence_length
        blocks = plan.model.n_double + plan.model.n_single
        one_block = plan.model.block_operations * width**2 * n + 4 * n**2 * width
        return self.seconds(blocks * one_block, self.step_share.value)

    def text_seconds(self, plan: Plan) -> float:
        """The large text encoder on one prompt."""
        size = max(size for part, size in plan.model.bytes.items() if part.startswith("text_encoder"))
        operations = constants.TEXT_OPERATIONS_PER_BYTE.value * size * plan.settings.max_sequence_length
        return self.seconds(operations, self.gpu.step_share.value)

    def decode_seconds(self, plan: Plan) -> float:
        """The decoder on one image."""
        operations = constants.DECODE_OPERATIONS_PER_PIXEL.value * plan.settings.height * plan.settings.width
        return self.seconds(operations, constants.DECODE_SHARE.value)


def stages(plan: Plan, machine: Machine) -> list[Stage]:
    """The stages of a run, in order, without those that the recipe skips."""
    found = [_fitted(stage, machine) for stage in (*_flux_stages(plan, machine), *_later_stages(plan, machine))]
    return sorted((s for s in found if s.name not in plan.skip), key=lambda stage: list[str](STAGES).index(stage.name))


def _fitted(stage: Stage, machine: Machine) -> Stage:
    """The stage, with a note where the GPU has too little memory for it."""
    if stage.memory <= machine.gpu.memory_gb * 1e9:
        return stage
    return replace(stage, note=f"DOES NOT FIT, choose a smaller batch_size; {stage.note}")


def _flux_stages(plan: Plan, machine: Machine) -> Iterator[Stage]:
    preset, weights, note = _preset(plan, machine)
    moved = sum(plan.model.bytes.values()) / constants.OFFLOAD_BYTES_PER_SECOND.value / machine.gpus
    fixed = machine.text_seconds(plan) + (moved if preset == "offload" else 0.0)
    step = machine.step_seconds(plan)

    n_scored = plan.n_scored
    collected = plan.n_collected * (fixed + _steps_run(plan) * step)
    memory = weights + _further_images(plan, plan.collect.batch_size)
    disk = sum(manifest.bytes_on_disk for manifest in plan.manifests.values())
    yield Stage("collect", collected, memory, disk, note)
    yield _fit_stage(plan, machine)
    saes = [(fit, sae) for fit in plan.trained for sae in fit.saes]
    encoding = sum(
        2 * sae.d_model * sae.n_features * plan.n_tokens(fit.hookpoint) * len(plan.score.steps or fit.steps)
        for fit, sae in saes
    )
    scored = fixed + plan.settings.num_inference_steps * step + machine.decode_seconds(plan)
    scored += machine.seconds(encoding, machine.gpu.training_share.value)
    memory = weights + _further_images(plan, plan.score.batch_size) + _sae_bytes([sae for _, sae in saes])
    n_features = sum(sae.n_features for _, sae in saes)
    maps = n_features * plan.score.n_top * plan.grid.n_tokens
    # An image and feature: S and token in the file (4 bytes) and in the parts, to which images can be added (8).
    score_disk = n_scored * (12 * n_features + constants.THUMBNAIL_BYTES.value) + maps
    yield Stage("score", n_scored * scored, memory, score_disk, f"{note}; disk is an upper bound")


def _later_stages(plan: Plan, machine: Machine) -> Iterator[Stage]:
    figure = clip_figure(plan)
    n_scored = plan.n_scored
    embedded = n_scored * machine.seconds(figure.value, machine.gpu.step_share.value)
    yield Stage("embed", embedded, 2e9, n_scored * constants.CLIP_WIDTH * 4)
    n_features = sum(sae.n_features for fit in plan.trained for sae in fit.saes)
    for name, per_feature in constants.SECONDS_PER_FEATURE.items():
        disk = n_features * constants.BYTES_PER_FEATURE[name].value
        yield Stage(name, n_features * per_feature.value, 0.0, disk, "on the CPU")
    n_saes = sum(len(fit.saes) for fit in plan.trained)
    sheets = [n_saes * figure.value for figure in (constants.RENDER_SECONDS, constants.RENDER_BYTES)]
    yield Stage("render", sheets[0], 0.0, sheets[1], "on the CPU")


def _fit_stage(plan: Plan, machine: Machine) -> Stage:
    computing = reading = 0.0
    for fit in plan.trained:
        rows_bytes = fit.n_trained * plan.width(fit.hookpoint) * 2
        operations = sum(10 * sae.d_model * sae.n_features for sae in fit.saes) * fit.n_trained
        computing += machine.seconds(operations, machine.gpu.training_share.value)
        reading += rows_bytes / constants.DISK_BYTES_PER_SECOND.value
    batch = max(fit.batch_size for fit in plan.fits)
    # weights, two moments and gradients; acts of a batch and what is computed of them
    memory = max(4 * _sae_bytes(fit.saes) + 4 * 4 * batch * max(s.n_features for s in fit.saes) for fit in plan.trained)
    note = "bound by reading the activations" if reading > computing else "bound by the products"
    return Stage("fit", max(computing, reading), memory, sum(_sae_bytes(fit.saes) for fit in plan.trained), note)


def _sae_bytes(saes: Sequence[SaeConfig]) -> float:
    return float(sum(2 * sae.d_model * sae.n_features * 4 for sae in saes))


def clip_figure(plan: Plan) -> Figure:
    """Operations of the recipe's CLIP on one image."""
    name = (plan.embed.model or REAL_CLIP).partition("/")[0]
    return constants.CLIP_OPERATIONS_PER_IMAGE.get(name, constants.OTHER_CLIP)


def _further_images(plan: Plan, batch_size: int) -> float:
    """Working room of a batch beside that of the one image of 1024 px which the preset's figure holds."""
    from fluxsae.flux.presets import WORKING_BYTES

    images = batch_size * plan.settings.height * plan.settings.width / 1024**2
    return max(0.0, images - 1) * WORKING_BYTES


def _preset(plan: Plan, machine: Machine) -> tuple[str, float, str]:
    """Preset, device memory it takes, and what to say about it."""
    import torch

    from fluxsae.flux.presets import Machine as Room
    from fluxsae.flux.presets import choose_preset, required_bytes

    room = Room(torch.device("cuda"), int(machine.gpu.memory_gb * 1e9), int(machine.host_gb * 1e9))
    preset = choose_preset(plan.model.bytes, room).preset
    note = f"preset {preset}"
    if preset in ("int8", "nf4"):
        note += ": CHANGES activations, refused for collection unless --allow-inexact"
    return preset, float(required_bytes(preset, plan.model.bytes)), note


def _steps_run(plan: Plan) -> float:
    """Steps of work until the last wanted block of the last wanted step."""
    blocks = plan.model.n_double + plan.model.n_single
    last = max(_blocks_before(hookpoint, plan.model) + 1 for hookpoint in plan.hookpoints)
    return max(plan.steps) + last / blocks


def _blocks_before(hookpoint: HookPoint, model: Model) -> int:
    return hookpoint.block_index + (model.n_double if hookpoint.block_kind == "single" else 0)


def _check_block(hookpoint: HookPoint, model: Model) -> None:
    n_blocks = model.n_double if hookpoint.block_kind == "double" else model.n_single
    if hookpoint.block_index >= n_blocks:
        raise FluxSaeError(
            f"This FLUX has no {hookpoint}: its {hookpoint.block_kind}-stream blocks are 0 to {n_blocks - 1}."
        )


def find_model(flux: str) -> Model:
    """A published FLUX, the miniature, or one in a local folder.

    Raises:
        FluxSaeError: none of these.
    """
    from fluxsae.miniature import miniature_path

    folder = miniature_path("flux") if flux == "miniature" else Path(flux)
    if flux in constants.MODELS:
        return constants.MODELS[flux]
    if not (folder / "transformer" / "config.json").is_file():
        raise FluxSaeError(
            f"The sizes of {flux} are not known. Known are {', '.join(constants.MODELS)}, the miniature and local "
            "folders."
        )
    transformer, vae = (_read(folder / part / "config.json") for part in ("transformer", "vae"))
    files = {part: [*(folder / part).glob("*.safetensors")] for part in constants.MODELS[DEV].bytes}
    own = folder / "generation_settings.json"
    return Model(
        n_double=transformer["num_layers"],
        n_single=transformer["num_single_layers"],
        d_model=transformer["num_attention_heads"] * transformer["attention_head_dim"],
        patch=2 ** len(vae["block_out_channels"]),
        bytes={part: sum(file.stat().st_size for file in found) for part, found in files.items()},
        settings=GenerationSettings(**_read(own)) if own.is_file() else GenerationSettings(),
        block_operations=constants.BLOCK_OPERATIONS[transformer["_class_name"]],
    )


DEV = "black-forest-labs/FLUX.1-dev"


def _read(path: Path) -> Mapping[str, Any]:
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def table(found: Sequence[Stage]) -> str:
    """The stages of one machine, with their totals."""
    lines = [f"{'stage':<11}{'time':>9}{'GPU memory':>13}{'disk':>11}  notes"]
    lines += [_line(stage.name, stage.seconds, stage.memory, stage.disk, stage.note) for stage in found]
    memory = max(stage.memory for stage in found)
    lines.append(_line("all", sum(s.seconds for s in found), memory, sum(s.disk for s in found), ""))
    return "\n".join(lines)


def sources(plan: Plan, machines: Mapping[str, Machine]) -> str:
    """Where the figures come from."""
    figures: dict[str, Figure] = {}
    for name, machine in machines.items():
        figures |= {f"step on {name}": machine.step_share, f"SAE training on {name}": machine.gpu.training_share}
    figures |= {
        "text encoder": constants.TEXT_OPERATIONS_PER_BYTE,
        "decoder": constants.DECODE_OPERATIONS_PER_PIXEL,
        "reading": constants.DISK_BYTES_PER_SECOND,
        "CLIP": clip_figure(plan),
        **constants.SECONDS_PER_FEATURE,
        "render": constants.RENDER_SECONDS,
    }
    return "\n".join(f"{name}: {figure.kind} ({figure.source})" for name, figure in figures.items())


def _line(name: str, seconds: float, memory: float, disk: float, note: str) -> str:
    return f"{name:<11}{_time(seconds):>9}{memory / 1e9:>10.0f} GB{_size(disk):>11}  {note}".rstrip()


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _size(size: float) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.1f} GB"


def describe(plan: Plan) -> str:
    """What the recipe makes: images, and a line for each SAE."""
    collected = (
        f"{plan.collect.flux}: {plan.n_collected:,} images of {plan.settings.width} x {plan.settings.height} px "
        f"collected, steps {', '.join(map(str, plan.steps))} of {plan.settings.num_inference_steps}; "
        f"{plan.n_scored:,} scored"
    )
    return "\n".join([collected, *(_describe_sae(fit, sae) for fit in plan.trained for sae in fit.saes)])


def _describe_sae(fit: Fit, sae: SaeConfig) -> str:
    return (
        f"{fit.hookpoint}: {sae.architecture} SAE of {sae.n_features:,} features, {fit.n_rows:,} distinct training "
        f"tokens ({fit.n_rows // sae.n_features:,} a feature)"
    )


def main(config: Config) -> str:
    """Prints the estimate."""
    plan = Plan.build(config)
    machines = {name: Machine.build(config, name) for name in config.gpu}
    tables = [
        f"{config.gpus} x {name}: {machine.step_seconds(plan) * config.gpus:.3g} s a step\n"
        f"{table(stages(plan, machine))}"
        for name, machine in machines.items()
    ]
    text = "\n\n".join([describe(plan), *tables, sources(plan, machines)])
    print(text)
    return text


def parse_arguments(arguments: Sequence[str]) -> Config:
    """The config of a command line."""
    return parse_recipe_options(Config, arguments, __doc__)


if __name__ == "__main__":
    start(main, parse_arguments)
