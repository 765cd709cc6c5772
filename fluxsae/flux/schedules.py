"""The full schedule of a generation: its noise levels, the nearest step, and where it may be taken up midway."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.flux.sharing import held


class Schedule(NamedTuple):
    """A full schedule: the scheduler's timesteps and the noise levels, one a step, without the final 0.

    `step` is set where a single step runs outside the pipeline's loop, so that the scheduler does not know it.
    """

    timesteps: Float[Tensor, " steps"]
    sigmas: Float[Tensor, " steps"]
    step: int | None = None


def build_grid(pipe: Any, settings: GenerationSettings) -> TokenGrid:
    """The grid of image tokens at these settings' size: a token is 2 x 2 cells of the autoencoder's grid."""
    return TokenGrid.from_size(settings.height, settings.width, patch=2 * pipe.vae_scale_factor)


def build_schedule(pipe: Any, settings: GenerationSettings, *, device: torch.device | None = None) -> Schedule:
    """The schedule that the pipeline would set for these settings, worked out on a copy of its scheduler."""
    scheduler = copy.deepcopy(pipe.scheduler)
    config, n_steps = scheduler.config, settings.num_inference_steps
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise FluxSaeError(
            f"{type(scheduler).__name__} takes no sigmas, with which FLUX sets its schedule. "
            "Use FlowMatchEulerDiscreteScheduler."
        )
    mu = family_of(pipe).mu(pipe, n_tokens=build_grid(pipe, settings).n_tokens, n_steps=n_steps)
    if config.get("use_flow_sigmas", False):
        scheduler.set_timesteps(n_steps, device=device, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n_steps, n_steps), device=device, mu=mu)
    return Schedule(scheduler.timesteps, scheduler.sigmas[: len(scheduler.timesteps)])


@contextmanager
def full_schedule(pipe: Any, schedule: Schedule) -> Iterator[None]:
    """While open, steps count in `schedule`, of which the scheduler itself may hold only the tail."""
    with held(pipe):
        before = getattr(pipe, "_full_schedule", None)
        pipe._full_schedule = schedule
        try:
            yield
        finally:
            pipe._full_schedule = before


def refuse_repeats(schedule: Schedule, scheduler: Any) -> None:
    """Raises a FluxSaeError for a schedule that visits a noise level twice, as Heun's: a step is then not one pass."""
    if not (schedule.timesteps[1:] < schedule.timesteps[:-1]).all():
        raise FluxSaeError(
            f"{type(scheduler).__name__} visits a noise level more than once, so a step is no single pass of the "
            "transformer and its activations cannot be named by a step. Use FlowMatchEulerDiscreteScheduler."
        )


def nearest_step(sigmas: Sequence[float], sigma: float, tolerance: float) -> int:
    """The step whose noise level is nearest to `sigma`; of two as near, the earlier.

    Raises:
        FluxSaeError: none lies within `tolerance` (absolute).
    """
    step = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma))
    if abs(sigmas[step] - sigma) > tolerance:
        raise FluxSaeError(
            f"No step of this schedule of {len(sigmas)} is at sigma {sigma:.3f} (allowed: within {tolerance:g}); the "
            f"nearest is step {step} at sigma {sigmas[step]:.3f}. Use more steps or the size the SAE was trained at, "
            "or pass the flag that allows use outside the recorded range."
        )
    return step


def check_step(step: int, settings: GenerationSettings) -> None:
    """Raises a FluxSaeError for a step outside the settings' schedule."""
    if not 0 <= step < settings.num_inference_steps:
        raise FluxSaeError(
            f"step={step} is outside the schedule of {settings.num_inference_steps} steps: "
            f"allowed are 0 to {settings.num_inference_steps - 1}."
        )


def refuse_unrestartable(pipe: Any) -> None:
    """Raises a FluxSaeError where the tail of the schedule, passed as sigmas, would not be the same schedule."""
    config = pipe.scheduler.config
    # Each of these makes a sigma depend on the whole list, or draws fresh noise: a tail is then another schedule.
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "stochastic_sampling")
    for name in names:
        if config.get(name, False):
            raise FluxSaeError(
                f"This scheduler has {name} set, so a generation cannot be taken up in the middle. Allowed are plain "
                f"flow-matching sigmas: load the scheduler with {name}=False, or generate each image from the start."
            )
