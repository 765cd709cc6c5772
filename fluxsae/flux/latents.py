"""Latents and embeddings: what goes into the transformer and comes out, outside a whole generation."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.devices import execution_device
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.schedules import build_grid, build_schedule, check_step, full_schedule
from fluxsae.flux.settings import GenerationSettings


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Encoded prompts: token embeddings, pooled embeddings, and the negative prompt's where it is in use."""

    prompt: Float[Tensor, "batch text d_text"]
    pooled: Float[Tensor, "batch d_pooled"]
    negative_prompt: Float[Tensor, "batch text d_text"] | None = None
    negative_pooled: Float[Tensor, "batch d_pooled"] | None = None

    def repeat(self, n: int) -> "Embeddings":
        """Every item n times in a row."""
        copies = [
            None if part is None else repeat(part, "batch ... -> (batch n) ...", n=n)
            for part in (self.prompt, self.pooled, self.negative_prompt, self.negative_pooled)
        ]
        return Embeddings(*copies)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A generation before step `step`: what `generate_from` needs to go on as if it had never stopped."""

    latents: Float[Tensor, "batch tokens channels"]
    step: int
    settings: GenerationSettings
    embeddings: Embeddings


@torch.no_grad()
def embed_prompts(pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
    """The prompts through both text encoders, with the negative prompt where `true_cfg_scale` is above 1."""
    length = settings.max_sequence_length
    prompt, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
    if settings.true_cfg_scale <= 1:
        return Embeddings(prompt, pooled)
    negative = [settings.negative_prompt] * len(prompts)
    negative_prompt, negative_pooled, _ = pipe.encode_prompt(negative, max_sequence_length=length)
    return Embeddings(prompt, pooled, negative_prompt, negative_pooled)


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
    guidance = torch.full([len(latents)], settings.guidance_scale, device=device, dtype=torch.float32)
    with full_schedule(pipe, schedule._replace(step=step)):
        outputs: tuple[Tensor] = pipe.transformer(
            hidden_states=latents.to(device),
            timestep=schedule.timesteps[step].expand(len(latents)).to(dtype) / 1000,
            guidance=guidance if pipe.transformer.config.guidance_embeds else None,
            pooled_projections=embeddings.pooled,
            encoder_hidden_states=embeddings.prompt,
            txt_ids=torch.zeros(embeddings.prompt.shape[1], 3, device=device, dtype=dtype),
            img_ids=token_places(grid).to(device, dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )
    return outputs[0]


def token_places(grid: TokenGrid) -> Float[Tensor, "tokens 3"]:
    """What FLUX's rotary embedding takes of each image token: 0, its row and its column."""
    rows, cols = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.cols), indexing="ij")
    return rearrange([torch.zeros_like(rows), rows, cols], "part row col -> (row col) part").float()


def pack(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
    """Latents as the transformer takes them: a token for each 2 x 2 of them."""
    return rearrange(latents, "b c (row i) (col j) -> b (row col) (c i j)", i=2, j=2)


def unpack(
    latents: Float[Tensor, "batch tokens packed"], grid: TokenGrid
) -> Float[Tensor, "batch channels height width"]:
    """Packed latents as the autoencoder takes them."""
    return rearrange(latents, "b (row col) (c i j) -> b c (row i) (col j)", row=grid.rows, i=2, j=2)


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
    raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return pack((raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)


@torch.no_grad()
def decode_latents(
    pipe: Any, latents: Float[Tensor, "batch tokens channels"], settings: GenerationSettings
) -> list[Image]:
    """Packed latents as PIL images, as FluxPipeline decodes them."""
    unpacked = (
        unpack(latents, build_grid(pipe, settings)) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    )
    with image_by_image(pipe):
        pixels = pipe.vae.decode(unpacked.to(execution_device(pipe), pipe.vae.dtype), return_dict=False)[0]
    images: list[Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
    return images
