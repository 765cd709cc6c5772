"""Images of the random tiny pipeline: shared prefixes, seeds, batches, velocities and latents."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flux_calls import CFG, PROMPTS, WIDE, count_calls, count_hooks, pixels, record
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    capture,
    decode_latents,
    denoise_to,
    embed_prompts,
    encode_images,
    generate,
    generate_from,
    initial_noise,
    schedule_sigmas,
    velocity,
)
from fluxsae.flux.families import pack_cells, token_places, unpack_cells
from fluxsae.flux.hookpoints import TokenGrid

# Shared prefix


@pytest.mark.parametrize("shift", [True, False], ids=["dynamic-shift", "fixed-shift"])
@pytest.mark.parametrize("settings", [SETTINGS, replace(CFG, width=48)], ids=["plain", "negative-prompt"])
def test_going_on_from_a_snapshot_is_bit_equal_to_never_stopping(shift, settings):
    pipe = build_tiny_flux(scheduler={"use_dynamic_shifting": shift})
    whole = pixels(pipe, settings=settings)
    for step in range(settings.num_inference_steps):
        snapshot = denoise_to(pipe, PROMPTS, seeds=[1, 2], settings=settings, step=step)
        assert np.array_equal(generate_from(pipe, snapshot, output_type="np"), whole)


def test_hooks_see_the_full_schedules_steps_after_a_restart(tiny_flux):
    snapshot = denoise_to(tiny_flux, PROMPTS, seeds=[1, 2], settings=SETTINGS, step=2)
    reached: list[tuple[int, int]] = []
    with capture(tiny_flux, ["layer1"]) as captured:
        generate_from(tiny_flux, snapshot, on_step=lambda step, n_steps: reached.append((step, n_steps)))
    assert captured.steps == [2, 3]
    assert [captured.sigma(step) for step in (2, 3)] == schedule_sigmas(tiny_flux, SETTINGS)[2:]
    assert reached == [(2, 4), (3, 4)]
    with capture(tiny_flux, ["layer1"]) as captured:
        pixels(tiny_flux)
    assert captured.steps == [0, 1, 2, 3]


def test_a_shared_prefix_costs_its_steps_once(tiny_flux):
    def sweep():
        snapshot = denoise_to(tiny_flux, PROMPTS[0], seeds=1, settings=SETTINGS, step=2)
        for _ in range(3):
            generate_from(tiny_flux, snapshot, output_type="latent")

    assert count_calls(tiny_flux, sweep)["double0"] == 2 + 3 * 2


def test_repeats_are_copies_side_by_side(tiny_flux):
    snapshot = denoise_to(tiny_flux, PROMPTS, seeds=[1, 2], settings=SETTINGS, step=1)
    images = generate_from(tiny_flux, snapshot, repeat=3, output_type="np")
    assert len(images) == 6
    np.testing.assert_allclose(images[0], images[2], atol=1e-5)
    np.testing.assert_allclose(images[[0, 3]], pixels(tiny_flux), atol=1e-5)


@pytest.mark.parametrize(
    "name", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"]
)
def test_a_schedule_whose_tail_is_another_schedule_cannot_be_restarted(name):
    pipe = build_tiny_flux(scheduler={name: True})
    with pytest.raises(FluxSaeError, match=name):
        assert count_calls(pipe, lambda: denoise_to(pipe, "a star", seeds=1, settings=SETTINGS, step=1)) == {}


@pytest.mark.parametrize("step", [-1, 4, 100])
def test_a_snapshot_outside_the_schedule_is_refused(tiny_flux, step):
    with pytest.raises(FluxSaeError, match="allowed are 0 to 3"):
        denoise_to(tiny_flux, "a star", seeds=1, settings=SETTINGS, step=step)


# Generation


def test_prompt_and_seed_name_the_same_image_in_any_batch(tiny_flux):
    both = pixels(tiny_flux)
    for i in range(2):
        np.testing.assert_allclose(pixels(tiny_flux, PROMPTS[i : i + 1], [i + 1])[0], both[i], atol=1e-5)
    swapped = pixels(tiny_flux, PROMPTS[::-1], [2, 1])
    np.testing.assert_allclose(swapped[::-1], both, atol=1e-5)


def test_the_same_call_gives_the_same_bits(tiny_flux):
    assert np.array_equal(pixels(tiny_flux), pixels(tiny_flux))


def test_generation_neither_reads_nor_moves_the_global_generator(tiny_flux):
    before = torch.random.get_rng_state()
    first = pixels(tiny_flux)
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert np.array_equal(pixels(tiny_flux), first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": "  "}, "blank"), ({"prompts": ""}, "blank"),
        ({"prompts": ["a star", "\n"], "seeds": [1, 2]}, "blank"),
        ({"prompts": []}, "No prompts"), ({"prompts": "x" * 10_000}, "10000 characters.*at most 2000"),
        ({"prompts": [7]}, "text, not int"), ({"seeds": -1}, "seed=-1: allowed"), ({"seeds": 2**64}, "seed="),
        ({"seeds": True}, "seed=True"), ({"seeds": [1, 2]}, "1 prompts but 2 seeds"), ({"seeds": [1.5]}, "seed=1.5"),
        ({"settings": replace(SETTINGS, height=36)}, "multiple of 8"),
        ({"settings": replace(SETTINGS, max_sequence_length=77)}, "at most 8 text tokens"),
        ({"output_type": "jpeg"}, "output_type"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_before_any_model_work(tiny_flux, change, words):
    arguments = {"prompts": "a red star", "seeds": 1, "settings": SETTINGS, **change}
    prompts = arguments.pop("prompts")

    def run():
        with pytest.raises(FluxSaeError, match=words):
            generate(tiny_flux, prompts, **arguments)

    assert count_calls(tiny_flux, run) == {}


def test_a_cancelled_generation_leaves_the_next_one_exact(tiny_flux):
    plain = pixels(tiny_flux)
    seen: list[tuple[int, int]] = []

    def cancel(step: int, n_steps: int):
        seen.append((step, n_steps))
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), capture(tiny_flux, ["layer1"]):
        pixels(tiny_flux, on_step=cancel)
    assert seen == [(0, 4), (1, 4)]
    assert count_hooks(tiny_flux) == 0
    assert np.array_equal(plain, pixels(tiny_flux))


def test_output_types_are_pictures_numbers_and_packed_latents(tiny_flux):
    [image] = generate(tiny_flux, "a star", seeds=1, settings=WIDE)
    assert image.size == (48, 32)
    latents = generate(tiny_flux, "a star", seeds=1, settings=WIDE, output_type="latent")
    assert latents.shape == (1, 24, 16)
    [decoded] = decode_latents(tiny_flux, latents, WIDE)
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


def test_velocity_is_the_transformers_answer_at_that_step(tiny_flux):
    answers: list[torch.Tensor] = []
    handle = tiny_flux.transformer.register_forward_hook(lambda module, args, output: answers.append(output[0]))
    pixels(tiny_flux, settings=WIDE)
    handle.remove()
    embeddings = embed_prompts(tiny_flux, PROMPTS, WIDE)
    for step in (0, 2):
        latents = denoise_to(tiny_flux, PROMPTS, seeds=[1, 2], settings=WIDE, step=step).latents
        assert torch.equal(velocity(tiny_flux, latents, embeddings, step=step, settings=WIDE), answers[step])
    start = denoise_to(tiny_flux, PROMPTS, seeds=[1, 2], settings=WIDE, step=0).latents
    assert torch.equal(initial_noise(tiny_flux, [1, 2], WIDE), start)


def test_hooks_around_velocity_see_its_step(tiny_flux):
    embeddings = embed_prompts(tiny_flux, PROMPTS, SETTINGS)
    latents = initial_noise(tiny_flux, [1, 2], SETTINGS)

    def run():
        for step in (3, 3, 1):
            velocity(tiny_flux, latents, embeddings, step=step, settings=SETTINGS)

    calls = record(tiny_flux, "layer1", run)
    assert [(call.step, call.is_conditional) for call in calls] == [(3, True), (3, True), (1, True)]
    with pytest.raises(FluxSaeError, match="do not fit"):
        velocity(tiny_flux, latents, embeddings, step=0, settings=WIDE)


def test_packing_is_that_of_the_pipeline(tiny_flux):
    latents = torch.randn(2, 4, 6, 10)
    packed = pack_cells(latents)
    assert torch.equal(packed, tiny_flux._pack_latents(latents, *latents.shape))
    assert torch.equal(unpack_cells(packed, TokenGrid(3, 5)), latents)
    places = tiny_flux._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(token_places(TokenGrid(3, 5)), places)


def test_images_become_latents_that_decode_to_the_autoencoders_own_picture(tiny_flux):
    images = generate(tiny_flux, PROMPTS, seeds=[1, 2], settings=WIDE)
    latents = encode_images(tiny_flux, images)
    assert latents.shape == (2, 24, 16)
    pixels_in = tiny_flux.image_processor.preprocess(images)
    with torch.no_grad():
        expected = tiny_flux.vae.decode(tiny_flux.vae.encode(pixels_in).latents).sample
    expected = tiny_flux.image_processor.postprocess(expected, output_type="pil")
    for got, wanted in zip(decode_latents(tiny_flux, latents, WIDE), expected, strict=True):
        assert np.abs(np.asarray(got, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1
