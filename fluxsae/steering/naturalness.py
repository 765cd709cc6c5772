"""Whether FLUX takes a picture for one of its own: how well it denoises the picture when noise is laid over it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from PIL import Image

from fluxsae.flux import embed_prompts, encode_images, initial_noise, schedule_sigmas, velocity
from fluxsae.flux.settings import GenerationSettings

NOISE_LEVEL: Final = 0.5
"""Sigma at which pictures are denoised: above it the noise hides what is odd, below it every picture is easy."""
NOISE_SEEDS: Final = (0, 1000)
_SCHEDULE_STEPS: Final = 20


@torch.no_grad()
def denoising_errors(pipe: Any, images: Sequence[Image.Image], settings: GenerationSettings) -> list[float]:
    """FLUX's error on each picture, half noise, without a prompt: mean squared error of its velocity.

    Low where FLUX could have painted the picture, whatever it shows; patterns and smears that FLUX never paints make
    it rise. It also grows with how much there is in a picture, so that errors are compared between pictures of one
    prompt and seed. The noise is the same for all pictures. Level and bound were found on the miniature alone.
    """
    settings = replace(settings, num_inference_steps=_SCHEDULE_STEPS, guidance_scale=1.0, true_cfg_scale=1.0)
    sigmas = schedule_sigmas(pipe, settings)
    step = min(range(len(sigmas)), key=lambda place: abs(sigmas[place] - NOISE_LEVEL))
    noise = initial_noise(pipe, NOISE_SEEDS, settings)
    embeddings = embed_prompts(pipe, [""] * len(noise), settings)
    errors = []
    for clean in [encode_images(pipe, [image]).to(noise) for image in images]:  # first all, where parts are offloaded
        noisy = (1 - sigmas[step]) * clean + sigmas[step] * noise
        found = velocity(pipe, noisy, embeddings, step=step, settings=settings)
        errors.append(float((found.float() - (noise.float() - clean.float())).square().mean()))
    return errors
