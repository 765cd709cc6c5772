"""Measures what early exit and shards save when activations are collected: seconds and bytes.

python -m train.benchmarks collection

Early exit runs no block after the last wanted one and decodes no image; what it is compared with generates the whole
image and keeps the same tokens. At FLUX.1-dev's size `python -m train.benchmarks gpu` measures the early exit.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxsae.activations.collection import CaptureRequest, ImagePlan, build_manifests, build_request, collect
from fluxsae.flux import OutputType, capture, execution_device, generate
from fluxsae.flux.hookpoints import HookPoint
from train.benchmarks.options import CollectionConfig
from train.benchmarks.steering import timed


@dataclass(frozen=True)
class CollectionSpeed:
    """Medians over the repeats."""

    collect_seconds: float
    """The whole of `collect`: early exit and the shard on disk."""
    early_seconds: float
    """Generation that ends after the captured block."""
    full_seconds: float
    """Whole generation with the same capture, images decoded."""
    denoised_seconds: float
    """Whole generation with the same capture, no image decoded."""
    blocks_share: float
    """Blocks that early exit runs, of all blocks of all steps: about the ratio of denoising times."""
    n_bytes: int
    """Bytes of the folder of shards."""
    all_steps_bytes: int
    """The same tokens of every step as fp32."""

    def lines(self) -> list[str]:
        """The figures in words."""
        return [
            f"early exit {self.early_seconds:.2f} s, whole generation {self.full_seconds:.2f} s: "
            f"{self.early_seconds / self.full_seconds:.3f} of it; without decoding {self.denoised_seconds:.2f} s: "
            f"{self.early_seconds / self.denoised_seconds:.3f} of it (blocks run: {self.blocks_share:.3f})",
            f"collection with shards on disk {self.collect_seconds:.2f} s",
            f"on disk {self.n_bytes / 1e6:.2f} MB, all steps in fp32 {self.all_steps_bytes / 1e6:.2f} MB: "
            f"{self.all_steps_bytes / self.n_bytes:.1f} times as much",
        ]


def main(config: CollectionConfig, *, pipe: Any = None) -> CollectionSpeed:
    """Prints and returns the figures; `pipe` is an already opened FLUX, if there is one."""
    pipe = pipe if pipe is not None else config.open()
    plan = config.build_plan(config.n_images, purpose="collect", settings=config.settings(pipe))
    speed = measure(pipe, plan, config)
    print("\n".join(speed.lines()))
    return speed


def measure(pipe: Any, plan: ImagePlan, config: CollectionConfig) -> CollectionSpeed:
    """Times collection, generation with early exit, and whole generations of the same images, in turn."""
    settings = config.settings(pipe)
    request = build_request(pipe, [config.hookpoint], [config.step], settings=settings, batch_size=config.batch_size)
    manifests = build_manifests(pipe, plan, request)
    place = request.hookpoints[0]
    sizes = []

    def collected() -> None:
        with tempfile.TemporaryDirectory() as folder:
            collect(pipe, plan, request, folders={place: folder}, manifests=manifests)
            sizes.append(sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()))

    works: dict[str, Callable[[], None]] = {
        "collect": collected,
        "early": lambda: _generate(pipe, plan, request, stop_early=True, output_type="latent"),
        "full": lambda: _generate(pipe, plan, request, stop_early=False, output_type="pil"),
        "denoised": lambda: _generate(pipe, plan, request, stop_early=False, output_type="latent"),
    }
    seconds = timed(works, repeats=config.repeats, device=execution_device(pipe))
    n_steps, manifest = request.settings.num_inference_steps, manifests[place]
    return CollectionSpeed(
        collect_seconds=seconds["collect"],
        early_seconds=seconds["early"],
        full_seconds=seconds["full"],
        denoised_seconds=seconds["denoised"],
        blocks_share=blocks_share(pipe, place, step=config.step, n_steps=n_steps),
        n_bytes=sizes[-1],
        all_steps_bytes=len(plan) * n_steps * manifest.n_tokens * manifest.d_model * 4,
    )


def blocks_share(pipe: Any, place: HookPoint, *, step: int, n_steps: int) -> float:
    """Share of all blocks of all steps that run until a hook point of a step has been seen."""
    n_double = len(pipe.transformer.transformer_blocks)
    n_blocks = n_double + len(pipe.transformer.single_transformer_blocks)
    last = place.block_index + (n_double if place.block_kind == "single" else 0) + 1
    return (step * n_blocks + last) / (n_steps * n_blocks)


def _generate(
    pipe: Any, plan: ImagePlan, request: CaptureRequest, *, stop_early: bool, output_type: OutputType
) -> None:
    for start in range(0, len(plan), request.batch_size):
        ids = range(start, min(start + request.batch_size, len(plan)))
        with capture(pipe, request.hookpoints, request.steps, stop_early=stop_early):
            generate(
                pipe,
                [plan.prompts[i] for i in ids],
                seeds=[plan.seed(i) for i in ids],
                settings=request.settings,
                output_type=output_type,
            )
