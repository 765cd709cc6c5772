"""FLUX itself: load, generate, read pictures and hook. Nothing else in the package imports diffusers.

Hook points and settings are plain data; they load without diffusers.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.flux.clock import FluxLike
    from fluxsae.flux.devices import execution_device, is_offloaded
    from fluxsae.flux.families import Embeddings
    from fluxsae.flux.generation import (
        OnStep,
        OutputType,
        denoise_to,
        generate,
        generate_from,
        schedule_sigmas,
        token_grid,
        unknown_words,
        unread_tokens,
    )
    from fluxsae.flux.ground import Ground, call_ground, settings_ground
    from fluxsae.flux.hookpoints import HookPoint, TokenGrid
    from fluxsae.flux.hooks import BlockCall, BlockHandler, Captured, block_hooks, capture
    from fluxsae.flux.identity import FluxIdentity, flux_identity, is_exact, why_inexact
    from fluxsae.flux.latents import (
        Snapshot,
        decode_latents,
        embed_prompts,
        encode_images,
        initial_noise,
        velocity,
    )
    from fluxsae.flux.loading import compile_blocks, default_settings, hookpoint_width, load_flux
    from fluxsae.flux.pipelines import AnyFlux, Flux2KleinPipeline, Flux2Pipeline, FluxPipeline
    from fluxsae.flux.previews import draw_latents, fit_colours, is_quick_to_decode, watch_estimates
    from fluxsae.flux.reading import noised_picture, read_picture
    from fluxsae.flux.schedules import nearest_step
    from fluxsae.flux.settings import GenerationSettings

__all__ = [
    "AnyFlux",
    "BlockCall",
    "BlockHandler",
    "Captured",
    "Embeddings",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "FluxIdentity",
    "FluxLike",
    "FluxPipeline",
    "GenerationSettings",
    "Ground",
    "HookPoint",
    "OnStep",
    "OutputType",
    "Snapshot",
    "TokenGrid",
    "block_hooks",
    "call_ground",
    "capture",
    "compile_blocks",
    "decode_latents",
    "default_settings",
    "denoise_to",
    "draw_latents",
    "embed_prompts",
    "encode_images",
    "execution_device",
    "fit_colours",
    "flux_identity",
    "generate",
    "generate_from",
    "hookpoint_width",
    "initial_noise",
    "is_exact",
    "is_offloaded",
    "is_quick_to_decode",
    "load_flux",
    "nearest_step",
    "noised_picture",
    "read_picture",
    "schedule_sigmas",
    "settings_ground",
    "token_grid",
    "unknown_words",
    "unread_tokens",
    "velocity",
    "watch_estimates",
    "why_inexact",
]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "AnyFlux": "pipelines",
        "BlockCall": "hooks",
        "BlockHandler": "hooks",
        "Captured": "hooks",
        "Embeddings": "families",
        "Flux2KleinPipeline": "pipelines",
        "Flux2Pipeline": "pipelines",
        "FluxIdentity": "identity",
        "FluxLike": "clock",
        "FluxPipeline": "pipelines",
        "GenerationSettings": "settings",
        "Ground": "ground",
        "HookPoint": "hookpoints",
        "OnStep": "generation",
        "OutputType": "generation",
        "Snapshot": "latents",
        "TokenGrid": "hookpoints",
        "block_hooks": "hooks",
        "call_ground": "ground",
        "capture": "hooks",
        "compile_blocks": "loading",
        "decode_latents": "latents",
        "default_settings": "loading",
        "denoise_to": "generation",
        "draw_latents": "previews",
        "embed_prompts": "latents",
        "encode_images": "latents",
        "execution_device": "devices",
        "fit_colours": "previews",
        "flux_identity": "identity",
        "generate": "generation",
        "generate_from": "generation",
        "hookpoint_width": "loading",
        "initial_noise": "latents",
        "is_exact": "identity",
        "is_offloaded": "devices",
        "is_quick_to_decode": "previews",
        "load_flux": "loading",
        "nearest_step": "schedules",
        "noised_picture": "reading",
        "read_picture": "reading",
        "schedule_sigmas": "generation",
        "settings_ground": "ground",
        "token_grid": "generation",
        "unknown_words": "generation",
        "unread_tokens": "generation",
        "velocity": "latents",
        "watch_estimates": "previews",
        "why_inexact": "identity",
    },
)
