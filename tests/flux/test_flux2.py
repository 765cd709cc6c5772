"""FLUX.2 klein on a random tiny pipeline: the same laws as FLUX.1's, where the two families differ."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_flux2 import D_MODEL, N_TEXT, SETTINGS, build_tiny_flux2, build_tiny_flux2_dev

from fluxsae import FluxSaeError, SteeringEdit, capture, generate, load_flux, read_picture, steer
from fluxsae.flux import (
    Flux2KleinPipeline,
    Snapshot,
    block_hooks,
    decode_latents,
    default_settings,
    denoise_to,
    embed_prompts,
    encode_images,
    flux_identity,
    generate_from,
    hookpoint_width,
    initial_noise,
    schedule_sigmas,
    settings_ground,
    token_grid,
    unread_tokens,
    velocity,
)
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.attribution import Target, explain
from fluxsae.steering.measurements import EditRecorder

PROMPTS = ["a red circle", "a small blue star"]
GUIDED = replace(SETTINGS, true_cfg_scale=2.0, negative_prompt="a green ring")
IMAGE, TEXT = slice(N_TEXT, None), slice(None, N_TEXT)
STEPS = (0, 4)

# docs/flux-dev.md's table of FLUX.2, written out once more: how to take each stream from the module's raw output.
ROWS: dict[str, Callable] = {
    "transformer_blocks.1.ff": lambda out: out,
    "transformer_blocks.1.ff_context": lambda out: out,
    "transformer_blocks.1": lambda out: out[1],
    "transformer_blocks.1:text": lambda out: out[0],
    "transformer_blocks.1.attn": lambda out: out[0],
    "transformer_blocks.1.attn:text": lambda out: out[1],
    "single_transformer_blocks.1": lambda out: out[:, IMAGE],
    "single_transformer_blocks.1:text": lambda out: out[:, TEXT],
    "single_transformer_blocks.1.attn": lambda out: out[:, IMAGE],
    "single_transformer_blocks.1.attn:text": lambda out: out[:, TEXT],
}


@pytest.fixture(scope="module")
def klein() -> Flux2KleinPipeline:
    return build_tiny_flux2()


@pytest.fixture(scope="module")
def base() -> Flux2KleinPipeline:
    """As klein's base models: not distilled, with classifier-free guidance."""
    return build_tiny_flux2(is_distilled=False)


def pixels(pipe, prompts=PROMPTS, seeds=(1, 2), settings=SETTINGS) -> np.ndarray:
    return generate(pipe, list(prompts), seeds=list(seeds), settings=settings, output_type="np")


def picture(*, width: int = 48, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def build_sae(seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=D_MODEL, n_features=64, k=8), seed=seed)
    sae.reference_acts.fill_(1.0)
    return sae


@pytest.mark.parametrize("name", ROWS)
def test_every_row_gives_its_streams_tokens_and_takes_others_for_that_stream_alone(klein, name):
    hookpoint, seen, raw = HookPoint.parse(name), [], []
    module = klein.transformer.get_submodule(hookpoint.path)
    first = module.register_forward_hook(lambda _, inputs, output: raw.append(output))
    with block_hooks(klein, {hookpoint: lambda call: (seen.append(call.tokens), torch.zeros_like(call.tokens))[1]}):
        last = module.register_forward_hook(lambda _, inputs, output: raw.append(output))
        velocity_at(klein, step=1)
        last.remove()
    first.remove()
    before, after = raw
    n_tokens = N_TEXT if hookpoint.stream == "text" else 4 * 6
    assert seen[0].shape == (2, n_tokens, hookpoint_width(klein, hookpoint))
    assert torch.equal(seen[0], ROWS[name](before))
    assert not ROWS[name](after).any()
    twin = ROWS.get(name.removesuffix(":text") if name.endswith(":text") else f"{name}:text")
    if twin is not None:
        assert torch.equal(twin(after), twin(before))


def velocity_at(pipe, *, step: int) -> torch.Tensor:
    latents = initial_noise(pipe, [1, 2], SETTINGS)
    return velocity(pipe, latents, embed_prompts(pipe, PROMPTS, SETTINGS), step=step, settings=SETTINGS)


@pytest.mark.parametrize("name", ["single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.proj_mlp"])
def test_a_module_of_flux1_alone_is_refused_with_those_that_there_are(klein, name):
    with pytest.raises(FluxSaeError, match=r"FLUX.2 has no .*Allowed are single_transformer_blocks.0.attn"):
        hookpoint_width(klein, HookPoint.parse(name))


def test_returning_the_same_tokens_leaves_the_image_bit_identical(klein):
    plain = pixels(klein)
    with block_hooks(klein, {HookPoint.parse(name): lambda call: call.tokens.clone() for name in ROWS}):
        assert np.array_equal(pixels(klein), plain)


@pytest.mark.parametrize(("height", "width", "n_steps"), [(32, 48, 4), (64, 64, 7), (32, 32, 50)])
def test_sigmas_and_the_grid_are_those_the_pipeline_uses(klein, height, width, n_steps):
    settings = replace(SETTINGS, height=height, width=width, num_inference_steps=n_steps)
    calls = []
    with block_hooks(klein, {HookPoint.parse("layer0"): calls.append}):
        generate(klein, PROMPTS[0], seeds=0, settings=settings, output_type="latent")
    assert [call.sigma for call in calls] == schedule_sigmas(klein, settings)
    assert torch.equal(klein.scheduler.sigmas[:-1], torch.tensor(schedule_sigmas(klein, settings)))
    assert token_grid(klein, settings) == TokenGrid(height // 8, width // 8)
    assert calls[0].tokens.shape[1] == token_grid(klein, settings).n_tokens


def test_with_classifier_free_guidance_each_step_is_seen_twice_the_prompts_own_pass_first(base):
    calls = []
    with block_hooks(base, {HookPoint.parse("layer0"): calls.append}):
        generate(base, PROMPTS, seeds=[1, 2], settings=GUIDED, output_type="latent")
    assert [(call.step, call.is_conditional) for call in calls] == [
        (step, is_own) for step in range(4) for is_own in (True, False)
    ]
    other = replace(GUIDED, negative_prompt="a blue star")
    assert not np.array_equal(pixels(base, settings=GUIDED), pixels(base, settings=other))


def test_settings_that_a_distilled_model_cannot_run_are_refused(klein, base):
    with pytest.raises(FluxSaeError, match=r"true_cfg_scale=2: .*Set true_cfg_scale=1"):
        generate(klein, PROMPTS[0], seeds=0, settings=GUIDED)
    guided = build_tiny_flux2(guidance_embeds=True, is_distilled=False)
    with pytest.raises(FluxSaeError, match="true_cfg_scale=2"):
        generate(guided, PROMPTS[0], seeds=0, settings=GUIDED)


def test_defaults_are_the_families_own():
    for arguments, expected in (
        ({}, (4, 0.0, 1.0)),
        ({"is_distilled": False}, (50, 0.0, 4.0)),
        ({"is_distilled": False, "guidance_embeds": True}, (50, 4.0, 1.0)),
    ):
        pipe = build_tiny_flux2(**arguments)
        pipe.generation_settings = None
        found = default_settings(pipe)
        assert (found.num_inference_steps, found.guidance_scale, found.true_cfg_scale) == expected
        assert found.height == found.width == 128 * pipe.vae_scale_factor


def test_the_ground_says_which_guidance_there_is(klein, base):
    assert settings_ground(klein, SETTINGS, "layer1").guidance_scale is None
    assert settings_ground(base, GUIDED, "layer1").true_cfg_scale == 2.0


def test_prompt_and_seed_name_the_same_image_in_any_batch(klein):
    together = pixels(klein)
    alone = pixels(klein, PROMPTS[1:], [2])
    np.testing.assert_allclose(together[1:], alone, atol=1e-4)
    assert not np.allclose(together[0], together[1], atol=1e-2)


@pytest.mark.parametrize("guided", [False, True])
def test_going_on_from_a_snapshot_is_bit_equal_to_never_stopping(klein, base, guided):
    pipe, settings = (base, GUIDED) if guided else (klein, SETTINGS)
    whole = pixels(pipe, settings=settings)
    calls = []
    for step in (1, 3):
        snapshot = denoise_to(pipe, PROMPTS, seeds=[1, 2], settings=settings, step=step)
        with block_hooks(pipe, {HookPoint.parse("layer0"): calls.append}):
            assert np.array_equal(generate_from(pipe, snapshot, output_type="np"), whole)
        assert sorted({call.step for call in calls}) == list(range(step, 4))
        calls.clear()


def test_early_exit_runs_no_later_block_and_no_decode(klein):
    ran = []
    watched = {
        "last": klein.transformer.transformer_blocks[1], "later": klein.transformer.single_transformer_blocks[0],
        "decoder": klein.vae.decoder,
    }  # fmt: skip
    handles = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in watched.items()]
    with capture(klein, ["transformer_blocks.1"], [1], stop_early=True) as captured:
        generate(klein, PROMPTS, seeds=[1, 2], settings=SETTINGS)
    for handle in handles:
        handle.remove()
    assert ran == ["last", "later", "last"]
    with capture(klein, ["transformer_blocks.1"], [1]) as full:
        pixels(klein)
    assert torch.equal(captured.get("transformer_blocks.1", 1), full.get("transformer_blocks.1", 1))


def test_packed_latents_decode_to_the_pipelines_own_picture(klein):
    latents = generate(klein, PROMPTS, seeds=[1, 2], settings=SETTINGS, output_type="latent")
    assert latents.shape == (2, 24, 16)
    pictures = generate(klein, PROMPTS, seeds=[1, 2], settings=SETTINGS)
    decoded = decode_latents(klein, latents, SETTINGS)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(decoded, pictures, strict=True))


def test_images_become_latents_as_the_pipeline_encodes_its_reference_images(klein):
    own = klein._encode_vae_image(klein.image_processor.preprocess(picture()), generator=None)
    assert torch.equal(encode_images(klein, [picture()]), klein._pack_latents(own))
    again = encode_images(klein, decode_latents(klein, encode_images(klein, [picture()]), SETTINGS))
    assert again.shape == (1, 24, 16)


@pytest.mark.parametrize("step", [0, 2])
def test_a_read_equals_the_pass_that_the_pipeline_itself_makes_there(klein, step):
    sigma = schedule_sigmas(klein, SETTINGS)[step]
    noisy = (1 - sigma) * encode_images(klein, [picture()]) + sigma * initial_noise(klein, [5], SETTINGS)
    start = Snapshot(noisy, step, SETTINGS, embed_prompts(klein, PROMPTS[:1], SETTINGS))
    places = ["layer1", "single_transformer_blocks.1"]
    with capture(klein, places, [step], stop_early=True) as expected:
        generate_from(klein, start, output_type="latent")
    read = read_picture(klein, picture(), prompt=PROMPTS[0], hookpoints=places, steps=[step], seeds=5)
    assert read.sigma(step) == sigma
    for place in places:
        torch.testing.assert_close(read.get(place, step), expected.get(place, step), rtol=1e-4, atol=1e-5)


def test_tokens_of_a_reference_image_are_not_image_tokens(klein):
    seen = []
    with block_hooks(klein, {HookPoint.parse("single_transformer_blocks.0"): seen.append}):
        klein(prompt=PROMPTS[0], image=picture(width=64, height=64), num_inference_steps=1)
    assert seen[0].tokens.shape[1] == 24


def test_a_cache_of_reference_images_is_refused_while_hooks_are_open():
    cached = diffusers.Flux2KleinKVPipeline(**build_tiny_flux2().components)  # it changes the transformer
    cached.set_progress_bar_config(disable=True)
    arguments = {
        "prompt": PROMPTS[0],
        "image": picture(width=64, height=64),
        "height": 32,
        "width": 48,
        "num_inference_steps": 2,
    }
    with pytest.raises(FluxSaeError, match="Hooks need Flux2KleinPipeline"), capture(cached, ["layer0"]):
        cached(**arguments, max_sequence_length=N_TEXT)


def test_a_plain_call_makes_what_generate_makes(klein):
    (plain,) = klein(prompt=PROMPTS[0], generator=torch.Generator().manual_seed(3)).images
    (ours,) = generate(klein, PROMPTS[0], seeds=3)
    assert plain.size == (48, 32)
    assert np.array_equal(plain, ours)


def test_a_saved_folder_loads_through_diffusers_own_pipeline_and_gives_the_same_image(klein, tmp_path):
    klein.save_pretrained(tmp_path / "klein")
    again = load_flux(tmp_path / "klein")
    assert type(again) is Flux2KleinPipeline
    assert again.config.is_distilled
    assert default_settings(again) == SETTINGS
    assert np.array_equal(pixels(again), pixels(klein))
    identity = flux_identity(again)
    assert identity.flux_id == "klein"
    assert identity.weights
    index = tmp_path / "klein" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "Flux2KleinKVPipeline"}))
    with pytest.raises(FluxSaeError, match="Flux2KleinKVPipeline, which needs more than a prompt"):
        load_flux(tmp_path / "klein")


def test_text_tokens_are_found_in_the_prompt_inside_the_chat_message(klein):
    prompt = "a red circle"
    spans = family_of(klein).token_spans(klein, prompt)
    assert [prompt[start:stop] for start, stop in spans] == ["", "", "a", "red", "circle", "", ""]
    assert family_of(klein).token_spans(klein, "user") == [(0, 0), (0, 0), (0, 4), (0, 0), (0, 0)]
    assert unread_tokens(klein, prompt, SETTINGS) == 0
    assert unread_tokens(klein, " ".join(["red"] * 10), SETTINGS) == 2


def test_flux2_dev_goes_through_its_own_pipeline_with_distilled_guidance():
    dev = build_tiny_flux2_dev()
    settings = default_settings(dev)
    whole = pixels(dev, settings=settings)
    assert not np.array_equal(whole, pixels(dev, settings=replace(settings, guidance_scale=1.0)))
    snapshot = denoise_to(dev, PROMPTS, seeds=[1, 2], settings=settings, step=2)
    assert np.array_equal(generate_from(dev, snapshot, output_type="np"), whole)
    with capture(dev, ["layer1"], [0], stop_early=True) as expected:
        generate(dev, PROMPTS[0], seeds=5, settings=settings)
    read = read_picture(dev, picture(), prompt=PROMPTS[0], hookpoints=["layer1"], steps=[0], seeds=5)
    torch.testing.assert_close(read.get("layer1", 0), expected.get("layer1", 0), rtol=1e-4, atol=1e-5)
    assert settings_ground(dev, settings, "layer1").guidance_scale == 4.0
    assert [PROMPTS[0][start:stop] for start, stop in family_of(dev).token_spans(dev, PROMPTS[0])] == [
        "", "", "a", "red", "circle", ""
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["layer1", "transformer_blocks.0.attn", "single_transformer_blocks.1.attn"])
def test_edits_act_on_their_image_of_a_batch_and_at_zero_change_no_bit(klein, name):
    place, plain = HookPoint.parse(name), pixels(klein)
    saes = {place: build_sae()}
    with steer(klein, saes, [SteeringEdit(place, 3, "add", 0.0, steps=STEPS)]):
        assert np.array_equal(pixels(klein), plain)
    edits = [[], [SteeringEdit(place, 3, "add", 4.0, steps=STEPS)]]
    with steer(klein, saes, edits):
        steered = pixels(klein)
    assert np.array_equal(steered[0], plain[0])
    assert not np.allclose(steered[1], plain[1], atol=1e-3)


# Not a double block's attn: the block's own ff answers to the edit, too.
@pytest.mark.parametrize("name", ["layer1", "transformer_blocks.1.ff_context", "single_transformer_blocks.1.attn"])
def test_an_edits_size_is_measured_behind_the_gate(klein, name):
    """The stream behind the block moves by the gated edit: the same number, measured from two runs."""
    place = HookPoint.parse(name)
    block = HookPoint(place.block_kind, place.block_index, "", place.stream)
    saes, edits = {place: build_sae()}, [SteeringEdit(place, 3, "add", 2.0, steps=(0, 1))]
    recorder = EditRecorder(klein, saes, [[], edits])
    streams = []
    for first, variant in enumerate([[replace(edits[0], strength=0.0)], edits]):
        with (
            capture(klein, [block], [0]) as captured,
            recorder.watch(),
            steer(klein, saes, variant, on_edit=partial(recorder.record, first=first)),
        ):
            generate(klein, PROMPTS[0], seeds=1, settings=replace(SETTINGS, num_inference_steps=1))
        streams.append(captured.get(block, 0)[0])
    clean, steered = streams
    expected = ((steered - clean).norm(dim=-1) / clean.norm(dim=-1)).mean()
    assert recorder.recorded[1].relative_sizes == [pytest.approx(float(expected), rel=1e-3)]


def test_an_explanation_names_the_prompts_words(klein):
    place = HookPoint.parse("single_transformer_blocks.1")
    saes = {place: build_sae(), HookPoint.parse("layer1"): build_sae(1)}
    with capture(klein, [place], [1], stop_early=True) as captured:
        generate(klein, PROMPTS[0], seeds=1, settings=SETTINGS)
    feature = int(saes[place].encode(captured.get(place, 1)).amax((0, 1)).argmax())
    found = explain(
        klein, saes, Target(place, feature, 1), prompt=PROMPTS[0], seed=1, settings=SETTINGS, limit=2,
    )  # fmt: skip
    assert {effect.source.text for effect in found.words} == {"red", "circle"}
    assert found.drive > 0
    assert all(effect.measured is not None and effect.predicted != 0 for effect in found.words)
    assert list(found.explained) == [HookPoint.parse("layer1")]
