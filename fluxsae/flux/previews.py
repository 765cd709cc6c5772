"""What an image looks like on its way: each step's own estimate of the clean image, drawn cheaply."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from fluxsae.flux.clock import step_clock
from fluxsae.flux.latents import decode_latents, encode_images
from fluxsae.flux.schedules import build_grid
from fluxsae.flux.settings import GenerationSettings

RIDGE = 1e-3
"""Weight of the squared map beside a mean squared error: keeps channels that hardly vary from large weights."""
Colours = Float[Tensor, "channels_and_one colours"]
"""A packed latent with a 1 behind it -> red, green and blue (0 to 1) of the 2 x 2 cells of its patch."""


@contextmanager
def watch_estimates(pipe: Any, on_estimate: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, `on_estimate(step, x0)` sees what each pass takes the clean latents for: x0 = x_t - sigma v.

    x0 is packed, (batch, tokens, channels) in float32. Under classifier-free guidance the conditional pass is meant.
    """
    with step_clock(pipe) as now:

        def after_forward(module: nn.Module, args: Any, output: Any) -> None:
            call = now()
            if call.is_conditional:
                n_tokens = call.grid.n_tokens  # those of reference images come behind
                x_t, velocity = (part[:, :n_tokens].float() for part in (call.inputs["hidden_states"], output[0]))
                on_estimate(call.step, x_t - call.sigma * velocity)

        handle = pipe.transformer.register_forward_hook(after_forward)
        try:
            yield
        finally:
            handle.remove()


def is_quick_to_decode(pipe: Any) -> bool:
    """Whether the autoencoder is so small that a preview may be decoded at every step."""
    return isinstance(pipe.vae, AutoencoderTiny)


@torch.no_grad()
def fit_colours(pipe: Any, pictures: Sequence[Image.Image]) -> Colours:
    """The linear map from packed latents to colours that fits some pictures of one size best (least squares)."""
    latents = encode_images(pipe, pictures).float().cpu()
    width, height = pictures[0].size
    patch = 2 * pipe.vae_scale_factor
    small = (2 * width // patch, 2 * height // patch)
    pixels = np.stack([np.asarray(picture.resize(small, Image.Resampling.BOX)) for picture in pictures])
    wanted = rearrange(torch.from_numpy(pixels).float() / 255, "b (r p) (c q) k -> (b r c) (p q k)", p=2, q=2)
    known = _with_one(rearrange(latents, "b t c -> (b t) c"))
    eye = torch.eye(known.shape[1]) * RIDGE * len(known)
    colours: Tensor = torch.linalg.solve(known.T @ known + eye, known.T @ wanted)
    return colours


@torch.no_grad()
def draw_latents(
    pipe: Any,
    latents: Float[Tensor, "tokens channels"],
    settings: GenerationSettings,
    colours: Colours | None,
) -> Image.Image:
    """One image's packed latents as a picture: decoded, or where `colours` are given two by two pixels a patch."""
    if colours is None:
        return decode_latents(pipe, latents[None].to(pipe.vae.dtype), settings)[0]
    grid = build_grid(pipe, settings)
    values = _with_one(latents.float().cpu()) @ colours
    pixels = rearrange(values, "(r c) (p q k) -> (r p) (c q) k", r=grid.rows, c=grid.cols, p=2, q=2)
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())


def _with_one(latents: Float[Tensor, "rows channels"]) -> Float[Tensor, "rows channels_and_one"]:
    return torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
