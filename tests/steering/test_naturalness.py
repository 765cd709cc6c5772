from dataclasses import replace

import numpy as np
import pytest
from bad_images import spoil_in
from PIL import Image
from test_steering import DOUBLE, SAES
from tiny_flux import SETTINGS

from fluxsae.flux import FluxPipeline, default_settings, generate
from fluxsae.steering.measurements import TokenLimits, measure_token_limits, measure_unedited
from fluxsae.steering.naturalness import NaturalRange, calibrated_range, denoising_errors


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


def test_bounds_are_the_values_that_a_further_picture_stays_below_so_often() -> None:
    # 99 pictures, half of 6 % for each measurement: the 97th of the 100 places that a further picture can take
    found = calibrated_range([(value, value / 10) for value in range(99)], false_alarms=0.06)
    assert (found.out_of_distribution, found.denoising_error_ratio, found.n_pictures) == (96, 9.6, 99)
    assert found.false_alarms == pytest.approx(0.06)
    few = calibrated_range([(0.3, 1.0), (0.1, 2.0)], false_alarms=0.06)
    assert (few.out_of_distribution, few.denoising_error_ratio) == (0.3, 2.0)
    assert calibrated_range([]) == NaturalRange()
    assert few.false_alarms == pytest.approx(2 / 3)  # two pictures allow no lower rate: 1 of 3 a measurement


def test_unedited_pictures_are_called_unnatural_at_the_stated_rate() -> None:
    rng, flagged = np.random.default_rng(0), []
    for _ in range(200):
        pictures = list(zip(rng.exponential(0.02, 160), rng.lognormal(0, 0.3, 160), strict=True))
        bounds = calibrated_range(pictures[:80], false_alarms=0.1)
        flagged += [not bounds.holds(*pair) for pair in pictures[80:]]
    assert 0.08 < np.mean(flagged) < 0.105


def test_a_picture_is_natural_within_both_bounds() -> None:
    bounds = NaturalRange(0.2, 1.3)
    assert bounds.holds(0.2, 1.3)
    assert bounds.holds(0.0, None)
    assert not bounds.holds(0.21, 1.0)
    assert not bounds.holds(0.0, 1.31)


def test_bounds_come_from_unedited_pictures_and_survive_the_run_folder(tiny_flux: FluxPipeline) -> None:
    sae = SAES[DOUBLE]
    how = {"prompts": ["a red circle", "star", "a blue star", "a big pink heart"], "seeds": [0, 1, 2, 3]}
    limits = measure_token_limits(tiny_flux, sae, DOUBLE, **how, settings=SETTINGS, steps=[1, 2])
    natural = calibrated_range(measure_unedited(tiny_flux, sae, DOUBLE, limits, **how, settings=SETTINGS))
    assert natural.n_pictures == 3  # nothing is left of a prompt of one word
    assert 0 <= natural.out_of_distribution < 0.5
    assert natural.denoising_error_ratio > 0
    kept = replace(limits, natural=natural)
    assert TokenLimits.from_dict(kept.to_dict()) == kept
    older = {name: value for name, value in kept.to_dict().items() if name != "natural"}
    assert TokenLimits.from_dict(older).natural == NaturalRange()


def test_bounds_leave_an_image_of_nan_out_and_tell_it(
    tiny_flux: FluxPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    how = {"prompts": ["a red circle"] * 20, "seeds": list(range(20)), "settings": SETTINGS}
    with spoil_in(tiny_flux):
        limits = measure_token_limits(tiny_flux, SAES[DOUBLE], DOUBLE, **how, steps=[1, 2])
        assert "image 1 of 20 is left out. At step 1 of transformer_blocks.1.ff" in caplog.text
        measured = measure_unedited(tiny_flux, SAES[DOUBLE], DOUBLE, limits, **how)
    assert np.isfinite([limits.norm_low, limits.norm_high, limits.residual_high]).all()
    assert "image 1 of 20 is left out. The latents of 'a red circle'" in caplog.text
    assert len(measured) == 19
