"""Previews: a step's estimate of the clean image, and colours where decoding is slow."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsae.flux import (
    FluxPipeline,
    decode_latents,
    default_settings,
    draw_latents,
    encode_images,
    fit_colours,
    generate,
    generate_from,
    initial_noise,
    noised_picture,
    schedule_sigmas,
    watch_estimates,
)
from fluxsae.miniature.scenes import render_scene, sample_scene

PROMPT = "a large red circle on a black background"


def scenes(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(render_scene(sample_scene(rng, held_out=None))) for _ in range(n)]


def test_watching_changes_no_image_and_the_last_estimate_is_the_image(miniature: FluxPipeline) -> None:
    settings, seen = default_settings(miniature), dict[int, torch.Tensor]()
    asked = {"seeds": 1, "settings": settings}
    with watch_estimates(miniature, lambda step, estimate: seen.update({step: estimate})):
        (watched,) = generate(miniature, PROMPT, **asked)
    (plain,) = generate(miniature, PROMPT, **asked)
    assert watched.tobytes() == plain.tobytes()
    assert list(seen) == list(range(settings.num_inference_steps))
    last = draw_latents(miniature, seen[settings.num_inference_steps - 1][0], settings, None)
    assert np.abs(np.asarray(last, dtype=int) - np.asarray(plain, dtype=int)).max() <= 2  # x0 = x_t - sigma v, and 0
    first = draw_latents(miniature, seen[0][0], settings, None)
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(plain, dtype=int)).mean() > 2


def test_fitted_colours_give_the_pictures_colours_patch_by_patch(miniature: FluxPipeline) -> None:
    settings, pictures = default_settings(miniature), scenes(12)
    colours = fit_colours(miniature, pictures[:8])
    drawn = [draw_latents(miniature, each, settings, colours) for each in encode_images(miniature, pictures[8:])]
    assert {picture.size for picture in drawn} == {(16, 16)}
    small = [picture.resize((16, 16), Image.Resampling.BOX) for picture in pictures[8:]]
    wanted, found = (np.stack([np.asarray(one, dtype=float) for one in some]) for some in (small, drawn))
    assert np.square(found - wanted).mean() < 0.3 * wanted.var(axis=(0, 1, 2)).mean()


@pytest.mark.parametrize("step", [10, 19])
def test_a_noised_picture_is_what_a_step_reads_and_paints_on_towards_the_picture(
    miniature: FluxPipeline, step: int
) -> None:
    settings, (picture,) = default_settings(miniature), scenes(1)
    snapshot = noised_picture(miniature, picture, prompt="", seed=5, settings=settings, step=step)
    sigma = schedule_sigmas(miniature, settings)[step]
    clean, noise = encode_images(miniature, [picture]), initial_noise(miniature, [5], settings)
    torch.testing.assert_close(snapshot.latents, (1 - sigma) * clean + sigma * noise)
    painted = generate_from(miniature, snapshot)[0]
    away = np.abs(np.asarray(painted, dtype=float) - np.asarray(decode_latents(miniature, clean, settings)[0])).mean()
    assert away < (6 if step == 19 else 60)  # little noise, little change
