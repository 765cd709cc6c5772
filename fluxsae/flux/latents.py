"""Latents and embeddings: what goes into the transformer and comes out, outside a whole generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.devices import execution_device
from fluxsae.flux.families import Embeddings, family_of
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.schedules import build_grid, build_schedule, check_step, full_schedule
from fluxsae.flux.settings import GenerationSettings


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A generation before step `step`: what `generate_from` needs to go on as if it had never stopped."""

    latents: Float[Tensor, "batch tokens channels"]
    step: int
    settings: GenerationSettings
    embeddings: Embeddings


@torch.no_grad()
def embed_prompts(pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
    """The prompts through the text encoders, with the negative prompt where `true_cfg_scale` is above 1."""
    return family_of(pipe).embed(pipe, prompts, settings)


def initial_noise(
    pipe: Any,
    seeds: Sequence[int],
    settings: GenerationSettings,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """The packed noise that `generate` starts from with these seeds."""
    build_grid(pipe, settings)
    latents, _ = pipe.prepare_latents(
        len(seeds),
        pipe.transformer.config.in_channels // 4,
        settings.height,
        settings.width,
        dtype or pipe.transformer.dtype,
        execution_device(pipe),
        [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    )
    assert isinstance(latents, Tensor)
    return latents


@torch.no_grad()
def velocity(
    pipe: Any,
    latents: Float[Tensor, "batch tokens channels"],
    embeddings: Embeddings,
    *,
    step: int,
    settings: GenerationSettings,
) -> Float[Tensor, "batch tokens channels"]:
    """The transformer's velocity (noise - image) for packed latents at one step of the schedule: the conditional pass.

    Hooks opened around it see this step. With distilled guidance where the model has it.

    Raises:
        FluxSaeError: a step outside the schedule, or latents that do not fit the settings' size.
    """
    return differentiable_velocity(pipe, latents, embeddings, step=step, settings=settings)


def differentiable_velocity(
    pipe: Any,
    latents: Float[Tensor, "batch tokens channels"],
    embeddings: Embeddings,
    *,
    step: int,
    settings: GenerationSettings,
) -> Float[Tensor, "batch tokens channels"]:
    """As `velocity`, with a gradient to latents and embeddings wherever autograd is on."""
    check_step(step, settings)
    grid, device, dtype = build_grid(pipe, settings), execution_device(pipe), latents.dtype
    if latents.shape[1] != grid.n_tokens:
        raise FluxSaeError(
            f"Latents of {latents.shape[1]} tokens do not fit {settings.height} x {settings.width} pixels, which have "
            f"{grid.n_tokens}. Pass settings of the latents' own size."
        )
    schedule = build_schedule(pipe, settings, device=device)
    inputs = family_of(pipe).transformer_inputs(pipe, latents.to(device), embeddings, grid=grid, settings=settings)
    with full_schedule(pipe, schedule._replace(step=step)):
        outputs: tuple[Tensor] = pipe.transformer(
            timestep=schedule.timesteps[step].expand(len(latents)).to(dtype) / 1000,
            joint_attention_kwargs={},
            return_dict=False,
            **inputs,
        )
    return outputs[0]


@contextmanager
def image_by_image(pipe: Any) -> Iterator[None]:
    """The autoencoder takes the images of a batch one by one: it is the memory peak at 1024 px, and no image then
    depends on its neighbours."""
    before, pipe.vae.use_slicing = pipe.vae.use_slicing, True
    try:
        yield
    finally:
        pipe.vae.use_slicing = before


@torch.no_grad()
def encode_images(pipe: Any, images: Sequence[Image]) -> Float[Tensor, "batch tokens channels"]:
    """Images as packed latents (the mode, where the autoencoder is variational), scaled as the transformer sees them.

    Raises:
        FluxSaeError: a side is not a multiple of the model's patch.
    """
    width, height = images[0].size
    TokenGrid.from_size(height, width, patch=2 * pipe.vae_scale_factor)
    pixels = pipe.image_processor.preprocess(list(images)).to(execution_device(pipe), pipe.vae.dtype)
    with image_by_image(pipe):
        encoded = pipe.vae.encode(pixels)
    return family_of(pipe).pack(pipe, encoded)


@torch.no_grad()
def decode_latents(
    pipe: Any, latents: Float[Tensor, "batch tokens channels"], settings: GenerationSettings
) -> list[Image]:
    """Packed latents as PIL images, as the pipeline decodes them."""
    unpacked = family_of(pipe).unpack(pipe, latents, build_grid(pipe, settings))
    with image_by_image(pipe):
        pixels = pipe.vae.decode(unpacked.to(execution_device(pipe), pipe.vae.dtype), return_dict=False)[0]
    images: list[Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return images
