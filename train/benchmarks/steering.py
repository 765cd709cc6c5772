"""Measures what sweeps save and what an edit costs, denoising only.

python -m train.benchmarks steering

At FLUX.1-dev's size, with random weights and on a GPU, `python -m train.benchmarks gpu` measures the same.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fluxsae.flux import (
    default_settings,
    denoise_to,
    execution_device,
    generate,
    generate_from,
    hookpoint_width,
    load_flux,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.sweeps import strength_variants
from train.benchmarks.options import SteeringConfig


@dataclass(frozen=True)
class SteeringSpeed:
    """Medians over the repeats."""

    separate_seconds: float
    """Baseline and strengths, one generation each."""
    sweep_seconds: float
    """The same images as one sweep."""
    floor: float
    """Least possible ratio: the shared steps once, the others once an image."""
    plain_seconds: float
    """One generation without edits."""
    edited_seconds: dict[str, float]
    """Mode -> one generation with an edit at every step."""

    @property
    def sweep_ratio(self) -> float:
        """Sweep over separate generations."""
        return self.sweep_seconds / self.separate_seconds

    def lines(self) -> list[str]:
        """The figures in words."""
        return [
            f"sweep {self.sweep_seconds:.3f} s, separate {self.separate_seconds:.3f} s: "
            f"{self.sweep_ratio:.3f} of it (floor {self.floor:.3f}, target 0.62)",
            *(
                f"one {mode} edit adds {seconds / self.plain_seconds - 1:+.1%} to a step"
                for mode, seconds in self.edited_seconds.items()
            ),
        ]


def main(config: SteeringConfig, *, pipe: Any = None) -> SteeringSpeed:
    """Prints and returns the figures; `pipe` is an already opened FLUX, if there is one."""
    pipe = pipe if pipe is not None else load_flux(config.flux, device=config.device)
    settings = default_settings(pipe)
    settings = replace(settings, num_inference_steps=config.num_inference_steps or settings.num_inference_steps)
    place = HookPoint.parse(config.hookpoint)
    sae = random_sae(hookpoint_width(pipe, place), config).to(execution_device(pipe))
    speed = measure(pipe, {place: sae}, settings, config)
    print("\n".join(speed.lines()))
    return speed


def random_sae(d_model: int, config: SteeringConfig) -> SparseAutoencoder:
    """A top-k SAE of the wanted size whose every feature may be steered."""
    sizes = SaeConfig(architecture="topk", d_model=d_model, n_features=config.expansion_factor * d_model, k=config.k)
    sae = SparseAutoencoder(sizes).requires_grad_(False)
    sae.reference_acts.fill_(1.0)
    return sae


def measure(
    pipe: Any, saes: dict[HookPoint, SparseAutoencoder], settings: GenerationSettings, config: SteeringConfig
) -> SteeringSpeed:
    """Times separate generations against a sweep, and generations with an edit against those without."""
    (place,) = saes
    n_steps = settings.num_inference_steps
    first = round(config.start * n_steps)
    edit = SteeringEdit(place, 0, "add", 1.0, steps=(first, n_steps))
    variants = strength_variants(edit, [0.5 * (index + 1) for index in range(config.n_strengths)])
    prompt, seed = "a large red circle on a black background", 0

    def one(edits: Sequence[SteeringEdit]) -> None:
        with steer(pipe, saes, list(edits)):
            generate(pipe, prompt, seeds=seed, settings=settings, output_type="latent")

    def separate() -> None:
        for edits in variants:
            one(edits)

    def swept() -> None:
        snapshot = denoise_to(pipe, prompt, seeds=seed, settings=settings, step=first)
        with steer(pipe, saes, variants):
            generate_from(pipe, snapshot, repeat=len(variants), output_type="latent")

    n = len(variants)
    edits = {mode: SteeringEdit(place, 0, mode, 1.0, steps=(0, n_steps)) for mode in ("add", "scale", "project_out")}
    works: dict[str, Callable[[], None]] = {"separate": separate, "swept": swept, "plain": lambda: one([])}
    works |= {mode: lambda edit=edit: one([edit]) for mode, edit in edits.items()}  # type: ignore[misc]
    seconds = timed(works, repeats=config.repeats, device=execution_device(pipe))
    return SteeringSpeed(
        separate_seconds=seconds["separate"],
        sweep_seconds=seconds["swept"],
        floor=(first + n * (n_steps - first)) / (n * n_steps),
        plain_seconds=seconds["plain"],
        edited_seconds={mode: seconds[mode] for mode in edits},
    )


def timed(works: dict[str, Callable[[], None]], *, repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turn so that a busy moment falls on all of them; the first round warms up."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(repeats + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number:
                samples[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in samples.items()}
