"""Models as they are saved, loaded, identified and refused; and the miniature as one of them."""

import inspect
import json
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from flux_calls import WIDE, count_calls, pixels, record
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    capture,
    default_settings,
    denoise_to,
    flux_identity,
    generate,
    generate_from,
    load_flux,
    token_grid,
    unknown_words,
    velocity,
)
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.miniature import miniature_path

# Models


def test_a_plain_call_uses_the_models_own_size_and_steps(tiny_flux):
    calls = record(tiny_flux, "layer1", lambda: tiny_flux("a red circle"))
    assert len(calls) == SETTINGS.num_inference_steps
    assert tiny_flux("a red circle").images[0].size == (32, 32)
    assert tiny_flux("a red circle", width=48, num_inference_steps=2).images[0].size == (48, 32)
    latents = generate(tiny_flux, "a red circle", seeds=1, settings=SETTINGS, output_type="latent")
    generator = torch.Generator("cpu").manual_seed(1)
    assert torch.equal(tiny_flux("a red circle", generator=generator, output_type="latent").images, latents)


def test_a_saved_folder_loads_with_its_settings_and_gives_the_same_image(tiny_flux, tiny_flux_folder):
    pipe = load_flux(tiny_flux_folder)
    assert default_settings(pipe) == SETTINGS
    # Not bit for bit: weights mapped from a file lie at other addresses, where the CPU adds in another order.
    np.testing.assert_allclose(pixels(pipe), pixels(tiny_flux), atol=1e-5)
    assert np.array_equal(pixels(pipe), pixels(load_flux(str(tiny_flux_folder))))
    assert pipe.transformer.dtype == torch.float32


def test_diffusers_alone_opens_a_saved_folder(tiny_flux, tiny_flux_folder):
    for opener in (diffusers.FluxPipeline, diffusers.DiffusionPipeline):
        pipe = opener.from_pretrained(tiny_flux_folder)
        assert type(pipe) is diffusers.FluxPipeline
        pipe.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(pixels(pipe), pixels(tiny_flux), atol=1e-5)
        with capture(pipe, ["layer1"], [1]) as captured:
            pixels(pipe)
        assert captured.steps == [1]


def test_identity_is_the_folders_name_and_a_digest_of_its_weights(tiny_flux_folder, tmp_path):
    first, second = flux_identity(load_flux(tiny_flux_folder)), flux_identity(load_flux(tiny_flux_folder))
    assert first == second
    assert first.flux_id == "tiny-flux"
    assert len(first.revision) == 12
    build_tiny_flux(seed=1).save_pretrained(tmp_path / "tiny-flux")
    assert flux_identity(load_flux(tmp_path / "tiny-flux")).revision != first.revision


@pytest.mark.parametrize(
    "name", ["", "nowhere", "../nowhere", "/nowhere/at/all", "a/b/c", "http://localhost/x", "user/na me", "x" * 5000]
)
def test_what_is_no_model_is_refused_with_what_is(name):
    with pytest.raises(FluxSaeError, match=r"black-forest-labs/FLUX.1-dev|no FLUX folder"):
        load_flux(name)


def test_a_folder_without_flux_in_it_is_refused(tmp_path, tiny_flux_folder):
    with pytest.raises(FluxSaeError, match=r"model_index.json is missing"):
        load_flux(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FluxSaeError, match="no transformer folder"):
        load_flux(tmp_path)


def test_damaged_generation_settings_are_refused(tmp_path):
    build_tiny_flux().save_pretrained(tmp_path)
    (tmp_path / "generation_settings.json").write_text(json.dumps({"height": -1}))
    with pytest.raises(FluxSaeError, match="height is -1"):
        load_flux(tmp_path)


def test_damaged_weights_are_refused(tmp_path):
    build_tiny_flux().save_pretrained(tmp_path)
    [weights] = (tmp_path / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FluxSaeError, match="could not be opened as FLUX"):
        load_flux(tmp_path)


def test_models_without_a_guidance_embedding_default_to_few_steps():
    pipe = build_tiny_flux(guidance_embeds=False)
    pipe.generation_settings = None
    settings = default_settings(pipe)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.max_sequence_length) == (4, 0.0, 256)
    assert settings.height == pipe.default_sample_size * pipe.vae_scale_factor
    assert pixels(pipe, settings=replace(SETTINGS, guidance_scale=0.0)).shape == (2, 32, 32, 3)


def test_the_token_grid_follows_the_autoencoder(tiny_flux):
    assert token_grid(tiny_flux, WIDE) == TokenGrid(4, 6)


def test_words_outside_the_vocabulary_are_named_once_in_order(tiny_flux):
    assert unknown_words(tiny_flux, "A Zebra and a RED unicorn, and a zebra") == ["zebra", "unicorn", ","]
    assert unknown_words(tiny_flux, "a large red circle") == []


def test_public_functions_have_no_positional_flags():
    for function in (generate, denoise_to, generate_from, load_flux, velocity):
        kinds = [p.kind for p in inspect.signature(function).parameters.values()]
        assert sum(kind is not inspect.Parameter.KEYWORD_ONLY for kind in kinds) <= 3


# The miniature


def test_a_plain_call_of_the_miniature_makes_its_picture(miniature):
    counts = count_calls(miniature, lambda: miniature("a red circle"))
    assert counts["double0"] == default_settings(miniature).num_inference_steps == 20
    generator = torch.Generator("cpu").manual_seed(3)
    [image] = miniature("a red circle", generator=generator).images
    assert image.size == (128, 128)
    [same] = generate(miniature, "a red circle", seeds=3)
    assert np.array_equal(np.asarray(image), np.asarray(same))


def test_diffusers_alone_makes_the_miniatures_picture(miniature):
    settings = default_settings(miniature)
    pipe = diffusers.FluxPipeline.from_pretrained(miniature_path("flux"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    [image] = pipe(
        "a red circle",
        height=128,
        width=128,
        num_inference_steps=20,
        guidance_scale=settings.guidance_scale,
        max_sequence_length=settings.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(3),
    ).images
    [same] = generate(miniature, "a red circle", seeds=3)
    assert np.array_equal(np.asarray(image), np.asarray(same))


def test_the_miniature_has_the_shape_that_everything_else_expects(miniature):
    settings = default_settings(miniature)
    assert (settings.height, settings.width) == (128, 128)
    assert token_grid(miniature, settings).n_tokens >= 64
    assert len(miniature.transformer.transformer_blocks) >= 4
    assert len(miniature.transformer.single_transformer_blocks) >= 4
    assert miniature.transformer.config.guidance_embeds
    assert flux_identity(miniature).flux_id == "miniature"
    assert unknown_words(miniature, "a large red striped circle on the left and a Small blue star") == []
    assert unknown_words(miniature, "a red unicorn") == ["unicorn"]
