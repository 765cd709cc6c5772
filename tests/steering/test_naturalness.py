from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny_flux import SETTINGS

from fluxsae.flux import FluxPipeline, default_settings, generate
from fluxsae.steering.naturalness import denoising_errors


def grid_over(image: Image.Image) -> Image.Image:
    """The picture under a pattern of dashes, as edits leave it that were added everywhere."""
    pixels = np.asarray(image).copy()
    pixels[::8, ::3] = (130, 60, 210)
    return Image.fromarray(pixels)


def test_flux_errs_more_on_pictures_it_never_paints(miniature: FluxPipeline) -> None:
    star, circle = generate(
        miniature, ["a red star on a black background", "a blue circle on a white background"], seeds=[0, 1]
    )
    sound_star, sound_circle, broken_star, broken_circle = denoising_errors(
        miniature, [star, circle, grid_over(star), grid_over(circle)], default_settings(miniature)
    )
    assert broken_star > 2 * sound_star
    assert broken_circle > 2 * sound_circle


def test_the_error_is_of_the_picture_alone(tiny_flux: FluxPipeline) -> None:
    images = generate(tiny_flux, ["a red circle", "a blue star"], seeds=[0, 1], settings=SETTINGS)
    first, second = denoising_errors(tiny_flux, images, SETTINGS)
    assert denoising_errors(tiny_flux, [images[1]], SETTINGS) == pytest.approx([second])
    assert min(first, second) > 0


def test_pictures_that_are_not_square_are_judged_at_their_own_size(tiny_flux: FluxPipeline) -> None:
    wide = replace(SETTINGS, width=2 * SETTINGS.height)
    (image,) = generate(tiny_flux, ["a red circle"], seeds=[0], settings=wide)
    (found,) = denoising_errors(tiny_flux, [image], wide)
    assert found > 0
    assert denoising_errors(tiny_flux, [image.resize((32, 32))], SETTINGS) != [found]


def test_the_error_is_taken_without_guidance(tiny_flux: FluxPipeline) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    guided, strong = (
        denoising_errors(tiny_flux, [picture], replace(SETTINGS, guidance_scale=scale)) for scale in (3.5, 50.0)
    )
    assert guided == strong
