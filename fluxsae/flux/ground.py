"""What a generation is, as far as an SAE that reads or edits it cares."""

from dataclasses import dataclass
from typing import Any

from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.identity import FluxIdentity, flux_identity
from fluxsae.flux.settings import GenerationSettings


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Where activations come from; None stands for what is not known."""

    flux: FluxIdentity | None = None
    hookpoint: str | None = None
    height: int | None = None
    """Image height, pixels."""
    width: int | None = None
    """Image width, pixels."""
    guidance_scale: float | None = None
    """Distilled guidance; None also where the model has none."""
    true_cfg_scale: float | None = None
    max_sequence_length: int | None = None
    """Text tokens."""


def settings_ground(pipe: Any, settings: GenerationSettings, hookpoint: HookPoint | str) -> Ground:
    """The ground of the generations that these settings give."""
    return Ground(
        flux=flux_identity(pipe),
        hookpoint=str(HookPoint.parse(hookpoint).place),
        height=settings.height,
        width=settings.width,
        guidance_scale=settings.guidance_scale if pipe.transformer.config.guidance_embeds else None,
        true_cfg_scale=settings.true_cfg_scale,
        max_sequence_length=settings.max_sequence_length,
    )


def call_ground(pipe: Any, inputs: dict[str, Any], grid: TokenGrid, hookpoint: HookPoint | str) -> Ground:
    """The ground of a running generation, read off one call of its transformer."""
    patch, guidance = 2 * pipe.vae_scale_factor, inputs.get("guidance")
    return Ground(
        flux=flux_identity(pipe),
        hookpoint=str(HookPoint.parse(hookpoint).place),
        height=grid.rows * patch,
        width=grid.cols * patch,
        guidance_scale=None if guidance is None else float(guidance.flatten()[0]),
        max_sequence_length=inputs["encoder_hidden_states"].shape[1],
    )
