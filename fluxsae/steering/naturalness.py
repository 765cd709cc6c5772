"""Whether FLUX takes a picture for one of its own: how well it denoises the picture when noise is laid over it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from PIL import Image

from fluxsae.flux import embed_prompts, encode_images, initial_noise, schedule_sigmas, velocity
from fluxsae.flux.settings import GenerationSettings

NOISE_LEVEL: Final = 0.5
"""Sigma at which pictures are denoised: above it the noise hides what is odd, below it every picture is easy."""
NOISE_SEEDS: Final = (0, 1000)
_SCHEDULE_STEPS: Final = 20
FALSE_ALARMS: Final = 0.05
"""Share of FLUX's own unedited pictures that may be called unnatural."""


@dataclass(frozen=True)
class NaturalRange:
    """Up to where an edited picture looks natural: the bounds, and what they were calibrated on.

    The bounds of a run that was never calibrated were found by eye, on other pictures of the miniature.
    """

    out_of_distribution: float = 0.1
    """Share of the edited tokens that are out of distribution."""
    denoising_error_ratio: float = 1.5
    """FLUX's error on the edited picture over that on the unedited one."""
    false_alarms: float | None = None
    """Share of unedited pictures that lie beyond a bound, at most; None where it was not calibrated."""
    n_pictures: int = 0
    """Unedited pictures of the run that the bounds were calibrated on."""

    def holds(self, out_of_distribution: float, denoising_error_ratio: float | None) -> bool:
        """Whether both measurements lie within the bounds; a ratio that was not measured counts as within."""
        is_odd = denoising_error_ratio is not None and denoising_error_ratio > self.denoising_error_ratio
        return out_of_distribution <= self.out_of_distribution and not is_odd


def calibrated_range(measured: Sequence[tuple[float, float]], *, false_alarms: float = FALSE_ALARMS) -> NaturalRange:
    """The bounds that at most `false_alarms` of further unedited pictures exceed, from shares and ratios of some.

    Each measurement has half of the rate. A bound is the smallest measured value that a further picture of the kind
    stays below so often (Vovk, Gammerman & Shafer 2005); with fewer than 2 / rate - 1 pictures it is the largest, and
    the rate that is told is then what so many pictures allow. Without any, nothing is calibrated.
    """
    if not measured:
        return NaturalRange()
    n = len(measured)
    rank = min(n, math.ceil((n + 1) * (1 - false_alarms / 2) - 1e-9))
    share, ratio = (sorted(values)[rank - 1] for values in zip(*measured, strict=True))
    return NaturalRange(share, ratio, false_alarms=max(false_alarms, 2 * (1 - rank / (n + 1))), n_pictures=n)


@torch.no_grad()
def denoising_errors(pipe: Any, images: Sequence[Image.Image], settings: GenerationSettings) -> list[float]:
    """FLUX's error on each picture, half noise, without a prompt: mean squared error of its velocity.

    Low where FLUX could have painted the picture, whatever it shows; patterns and smears that FLUX never paints make
    it rise. It also grows with how much there is in a picture, so that errors are compared between pictures of one
    prompt and seed. The noise is the same for all pictures. The level was found on the miniature alone.
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
