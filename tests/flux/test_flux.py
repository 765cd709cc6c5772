"""FLUX on the random tiny pipeline: what hooks see, when, and that they leave nothing behind."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from tiny_flux import D_MODEL, N_DOUBLE, N_SINGLE, N_TEXT, SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    block_hooks,
    capture,
    compile_blocks,
    decode_latents,
    default_settings,
    denoise_to,
    embed_prompts,
    encode_images,
    flux_identity,
    generate,
    generate_from,
    hookpoint_width,
    initial_noise,
    load_flux,
    nearest_step,
    schedule_sigmas,
    token_grid,
    unknown_words,
    velocity,
)
from fluxsae.flux.families import pack_cells, token_places, unpack_cells
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.hooks import step_clock
from fluxsae.miniature import miniature_path

PROMPTS = ["a red circle", "a small blue star"]
WIDE = replace(SETTINGS, height=32, width=48)
CFG = replace(SETTINGS, true_cfg_scale=2.0, negative_prompt="a green ring")
IMAGE, TEXT = slice(N_TEXT, None), slice(None, N_TEXT)

# The hook-point table of DESIGN section 4, written out once more: how to take each stream from the module's raw output.
ROWS: dict[str, Callable] = {
    "transformer_blocks.1.ff": lambda out: out,
    "transformer_blocks.1.ff_context": lambda out: out,
    "transformer_blocks.1": lambda out: out[1],
    "transformer_blocks.1:text": lambda out: out[0],
    "transformer_blocks.1.attn": lambda out: out[0],
    "transformer_blocks.1.attn:text": lambda out: out[1],
    "single_transformer_blocks.0": lambda out: out[1],
    "single_transformer_blocks.0:text": lambda out: out[0],
    **{f"single_transformer_blocks.0.{name}": lambda out: out[:, IMAGE] for name in ("attn", "proj_mlp", "proj_out")},
    **{
        f"single_transformer_blocks.0.{name}:text": lambda out: out[:, TEXT]
        for name in ("attn", "proj_mlp", "proj_out")
    },
}


def pixels(pipe, prompts=PROMPTS, seeds=(1, 2), settings=SETTINGS, **arguments) -> np.ndarray:
    return generate(pipe, list(prompts), seeds=list(seeds), settings=settings, output_type="np", **arguments)


def count_hooks(pipe) -> int:
    modules = pipe.transformer.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def count_calls(pipe, run: Callable[[], object]) -> dict[str, int]:
    """How often each block, and the decoder, ran inside `run`."""
    counts: dict[str, int] = {}
    watched = {
        **{f"double{i}": block for i, block in enumerate(pipe.transformer.transformer_blocks)},
        **{f"single{i}": block for i, block in enumerate(pipe.transformer.single_transformer_blocks)},
        "text": pipe.text_encoder,
        "decoder": pipe.vae.decoder,
    }

    def counter(name: str):
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    handles = [module.register_forward_pre_hook(counter(name)) for name, module in watched.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def record(pipe, hookpoint: str, run: Callable[[], object]) -> list[BlockCall]:
    calls: list[BlockCall] = []
    with block_hooks(pipe, {HookPoint.parse(hookpoint): calls.append}):
        run()
    return calls


# Hook points


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_table_gives_its_streams_tokens_on_a_grid_that_is_not_square(tiny_flux, name):
    hookpoint = HookPoint.parse(name)
    raw: list[torch.Tensor] = []
    module = tiny_flux.transformer.get_submodule(name.removesuffix(":text"))
    handle = module.register_forward_hook(lambda module, args, output: raw.append(ROWS[name](output).clone()))
    with capture(tiny_flux, [hookpoint], [2]) as captured:
        pixels(tiny_flux, settings=WIDE)
    handle.remove()
    acts = captured.get(hookpoint, 2)
    n_tokens = N_TEXT if hookpoint.stream == "text" else 24
    assert acts.shape == (2, n_tokens, hookpoint_width(tiny_flux, hookpoint))
    assert torch.equal(acts, raw[2])
    assert acts.std() > 0


@pytest.mark.parametrize("name", ROWS)
def test_tokens_that_a_handler_returns_replace_those_of_its_stream_alone(tiny_flux, name):
    hookpoint = HookPoint.parse(name)
    seen: list[BlockCall] = []
    module = tiny_flux.transformer.get_submodule(name.removesuffix(":text"))
    outputs: list = []
    with block_hooks(tiny_flux, {hookpoint: lambda call: seen.append(call) or call.tokens + 1.0}):
        handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
        changed = pixels(tiny_flux, settings=WIDE)
        handle.remove()
    assert torch.equal(ROWS[name](outputs[0]), seen[0].tokens + 1.0)
    if len(outputs[0]) == 2 and isinstance(outputs[0], tuple):
        other = HookPoint.parse(name.removesuffix(":text") + ("" if name.endswith(":text") else ":text"))
        untouched = record(tiny_flux, str(other), lambda: pixels(tiny_flux, settings=WIDE))[0].tokens
        assert torch.equal(ROWS[str(other).replace(".text", ":text")](outputs[0]), untouched)
    assert not np.array_equal(changed, pixels(tiny_flux, settings=WIDE))


@pytest.mark.parametrize("name", ROWS)
def test_returning_the_same_tokens_leaves_the_image_bit_identical(tiny_flux, name):
    with block_hooks(tiny_flux, {HookPoint.parse(name): lambda call: call.tokens.clone()}):
        steered = pixels(tiny_flux)
    assert np.array_equal(steered, pixels(tiny_flux))


def test_a_context_opened_later_sees_what_an_earlier_one_returned(tiny_flux):
    layer = HookPoint.parse("layer1")
    with block_hooks(tiny_flux, {layer: lambda call: call.tokens * 0}), capture(tiny_flux, [layer]) as captured:
        pixels(tiny_flux)
    assert captured.get(layer, 0).abs().max() == 0


def test_tokens_of_another_shape_are_refused(tiny_flux):
    handlers = {HookPoint.parse("layer1"): lambda call: call.tokens[:, :3]}
    with pytest.raises(FluxSaeError, match="must keep the shape"), block_hooks(tiny_flux, handlers):
        pixels(tiny_flux)


@pytest.mark.parametrize("name", [f"layer{N_DOUBLE}", f"single_transformer_blocks.{N_SINGLE}", "layer999"])
def test_a_block_that_the_model_lacks_is_refused_before_any_model_work(tiny_flux, name):
    def run():
        with capture(tiny_flux, ["layer0", name]):
            pixels(tiny_flux)

    with pytest.raises(FluxSaeError, match=r"allowed are \w+\.0 to \.\d"):
        assert count_calls(tiny_flux, run) == {}
    assert count_hooks(tiny_flux) == 0


def test_width_is_that_of_the_residual_stream_but_for_the_wide_projection(tiny_flux):
    assert hookpoint_width(tiny_flux, HookPoint.parse("layer1")) == D_MODEL
    assert hookpoint_width(tiny_flux, HookPoint.parse("single_transformer_blocks.0.proj_mlp")) == 4 * D_MODEL


def test_shapes_are_checked_while_the_tests_run():
    with pytest.raises(TypeCheckError):
        decode_latents(None, torch.zeros(4, 2), SETTINGS)


# The step clock


@pytest.mark.parametrize("n_steps", [1, 2, 5, 20])
def test_each_step_is_seen_once_in_order_without_guidance_by_negative_prompt(tiny_flux, n_steps):
    settings = replace(SETTINGS, num_inference_steps=n_steps)
    calls = record(tiny_flux, "layer1", lambda: pixels(tiny_flux, settings=settings))
    assert [call.step for call in calls] == list(range(n_steps))
    assert [call.sigma for call in calls] == schedule_sigmas(tiny_flux, settings)
    assert all(call.is_conditional and call.n_steps == n_steps and len(call.tokens) == 2 for call in calls)


@pytest.mark.parametrize("n_steps", [1, 4])
def test_with_a_negative_prompt_each_step_is_seen_twice_the_prompts_own_pass_first(tiny_flux, n_steps):
    settings = replace(CFG, num_inference_steps=n_steps)
    calls = record(tiny_flux, "layer1", lambda: pixels(tiny_flux, settings=settings))
    assert [(call.step, call.is_conditional) for call in calls] == [
        (step, is_conditional) for step in range(n_steps) for is_conditional in (True, False)
    ]
    plain = record(tiny_flux, "layer1", lambda: pixels(tiny_flux, settings=replace(settings, true_cfg_scale=1.0)))
    assert torch.equal(calls[0].tokens, plain[0].tokens), "the first pass is the one with the prompt"
    negative = replace(settings, true_cfg_scale=1.0)
    other = record(tiny_flux, "layer1", lambda: pixels(tiny_flux, ["a green ring"] * 2, settings=negative))
    assert torch.equal(calls[1].tokens, other[0].tokens), "the second pass is the one with the negative prompt"


def test_capture_keeps_the_conditional_pass(tiny_flux):
    with capture(tiny_flux, ["layer1"]) as captured:
        pixels(tiny_flux, settings=CFG)
    calls = record(tiny_flux, "layer1", lambda: pixels(tiny_flux, settings=CFG))
    for step in range(4):
        assert torch.equal(captured.get("layer1", step), calls[2 * step].tokens)


def test_runs_of_one_step_inside_one_context_are_told_apart(tiny_flux):
    settings = replace(SETTINGS, num_inference_steps=1)

    def run_twice():
        pixels(tiny_flux, settings=settings)
        pixels(tiny_flux, settings=settings)

    calls = record(tiny_flux, "layer1", run_twice)
    assert [(call.step, call.is_conditional) for call in calls] == [(0, True), (0, True)]


def test_a_run_after_one_that_was_cancelled_in_the_same_context_starts_afresh(tiny_flux):
    def cancel(step, n_steps):
        if step == 1:
            raise InterruptedError

    calls: list[BlockCall] = []
    with block_hooks(tiny_flux, {HookPoint.parse("layer1"): calls.append}):
        with pytest.raises(InterruptedError):
            pixels(tiny_flux, on_step=cancel)
        pixels(tiny_flux)
    assert [call.step for call in calls] == [0, 1, 0, 1, 2, 3]
    assert all(call.is_conditional for call in calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_clock_is_right_in_half_precision(dtype):
    pipe = build_tiny_flux().to(dtype)
    settings = replace(CFG, num_inference_steps=20)
    calls = record(pipe, "layer1", lambda: pixels(pipe, settings=settings))
    assert [call.step for call in calls] == [step for step in range(20) for _ in range(2)]
    assert [call.sigma for call in calls][::2] == schedule_sigmas(pipe, settings)


def test_a_call_outside_the_schedule_is_refused(tiny_flux):
    embeddings = embed_prompts(tiny_flux, PROMPTS[:1], SETTINGS)
    latents = initial_noise(tiny_flux, [0], SETTINGS)
    pixels(tiny_flux)
    arguments = {
        "hidden_states": latents,
        "timestep": torch.tensor([0.123456]),
        "guidance": torch.tensor([3.5]),
        "pooled_projections": embeddings.pooled,
        "encoder_hidden_states": embeddings.prompt,
        "txt_ids": torch.zeros(N_TEXT, 3),
        "img_ids": torch.zeros(16, 3),
    }
    with pytest.raises(FluxSaeError, match="not a step of the schedule"):
        record(tiny_flux, "layer1", lambda: tiny_flux.transformer(**arguments))


@pytest.mark.parametrize("shift", [True, False])
def test_sigmas_are_those_the_pipeline_uses(shift):
    pipe = build_tiny_flux(scheduler={"use_dynamic_shifting": shift})
    for settings in (SETTINGS, WIDE, replace(SETTINGS, num_inference_steps=9)):
        pixels(pipe, settings=settings)
        assert schedule_sigmas(pipe, settings) == pipe.scheduler.sigmas[:-1].tolist()


def test_the_nearest_step_is_by_noise_level_and_refused_beyond_the_tolerance():
    sigmas = [1.0, 0.9, 0.6, 0.2]
    assert nearest_step(sigmas, 0.65, 0.1) == 2
    assert nearest_step(sigmas, 0.6, 0.0) == 2
    with pytest.raises(FluxSaeError, match=r"nearest is step 2 at sigma 0.600"):
        nearest_step(sigmas, 0.45, 0.1)


# Capture


def test_capture_leaves_the_pixels_bit_identical(tiny_flux):
    plain = pixels(tiny_flux, settings=WIDE)
    with capture(tiny_flux, list(ROWS)):
        watched = pixels(tiny_flux, settings=WIDE)
    assert np.array_equal(plain, watched)


def test_hooks_are_gone_after_the_context_however_it_ends(tiny_flux):
    with capture(tiny_flux, list(ROWS)):
        assert count_hooks(tiny_flux) > 0
    assert count_hooks(tiny_flux) == 0
    with pytest.raises(ZeroDivisionError), capture(tiny_flux, list(ROWS)):
        pixels(tiny_flux, on_step=lambda step, n_steps: 1 // 0)
    assert count_hooks(tiny_flux) == 0
    with capture(tiny_flux, ["layer1"], [0], stop_early=True):
        pixels(tiny_flux)
    assert count_hooks(tiny_flux) == 0


def test_a_handler_that_raises_ends_the_run_and_leaves_the_next_one_exact(tiny_flux):
    plain = pixels(tiny_flux)

    def fail(call: BlockCall):
        if call.step == 2:
            raise RuntimeError("from a handler")

    with pytest.raises(RuntimeError, match="from a handler"), block_hooks(tiny_flux, {HookPoint.parse("layer2"): fail}):
        pixels(tiny_flux)
    assert count_hooks(tiny_flux) == 0
    assert np.array_equal(plain, pixels(tiny_flux))


@pytest.mark.parametrize("settings", [SETTINGS, CFG], ids=["plain", "negative-prompt"])
def test_early_exit_runs_no_later_block_and_no_decode(tiny_flux, settings):
    passes = 1 if settings.true_cfg_scale == 1 else 2

    def run():
        with capture(tiny_flux, ["layer0", "layer1"], [0, 2], stop_early=True) as captured:
            pixels(tiny_flux, settings=settings)
        assert captured.steps == [0, 2]

    counts = count_calls(tiny_flux, run)
    before = 2 * passes
    assert counts["double0"] == counts["double1"] == before + 1
    assert counts["double2"] == counts["single0"] == counts["single1"] == before
    assert "decoder" not in counts
    assert pixels(tiny_flux).shape == (2, 32, 32, 3), "the pipeline still works"


def test_early_exit_captures_what_a_full_run_captures(tiny_flux):
    with capture(tiny_flux, list(ROWS), [1, 3]) as full:
        pixels(tiny_flux)
    with capture(tiny_flux, list(ROWS), [1, 3], stop_early=True) as early:
        pixels(tiny_flux)
    assert all(torch.equal(full.get(name, step), early.get(name, step)) for name in ROWS for step in (1, 3))


def test_a_sink_gets_every_wanted_call_and_nothing_is_held(tiny_flux):
    calls: list[BlockCall] = []
    with capture(tiny_flux, ["layer0", "layer2"], [1, 3], sink=calls.append) as captured:
        pixels(tiny_flux)
    assert [(str(call.hookpoint)[19], call.step) for call in calls] == [("0", 1), ("2", 1), ("0", 3), ("2", 3)]
    with pytest.raises(FluxSaeError, match="No activations"):
        captured.get("layer0", 1)
    assert captured.sigma(3) == calls[-1].sigma


def test_a_second_run_replaces_the_first(tiny_flux):
    with capture(tiny_flux, ["layer1"]) as captured:
        pixels(tiny_flux)
        pixels(tiny_flux, ["a red circle"], [3], replace(SETTINGS, num_inference_steps=2))
    assert captured.steps == [0, 1]
    assert captured.get("layer1", 0).shape[0] == 1


@pytest.mark.parametrize(("hookpoints", "steps"), [([], None), ("layer1", None), (["layer1"], []), (["layer1"], [-1])])
def test_a_capture_of_nothing_or_of_impossible_steps_is_refused(tiny_flux, hookpoints, steps):
    with pytest.raises(FluxSaeError), capture(tiny_flux, hookpoints, steps):
        pass


def test_a_step_beyond_the_schedule_is_refused_before_the_first_block(tiny_flux):
    def run():
        with pytest.raises(FluxSaeError, match="allowed are 0 to 3"), capture(tiny_flux, ["layer1"], [2, 4]):
            pixels(tiny_flux)

    assert "double0" not in count_calls(tiny_flux, run)


def test_what_was_not_captured_is_refused_with_what_was(tiny_flux):
    with capture(tiny_flux, ["layer1"], [1, 2]) as captured:
        with pytest.raises(FluxSaeError, match="run the pipeline first"):
            captured.get("layer1", 1)
        pixels(tiny_flux)
    with pytest.raises(FluxSaeError, match=r"Captured are transformer_blocks.1.ff at steps 1, 2"):
        captured.get("layer2", 1)
    with pytest.raises(FluxSaeError, match="Step 3 was not captured"):
        captured.sigma(3)


def test_a_step_cache_that_skips_blocks_does_not_mislead_the_clock(tiny_flux):
    pipe = build_tiny_flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    settings = replace(SETTINGS, num_inference_steps=8)
    steps: list[int] = []
    with step_clock(pipe, lambda call: steps.append(call.step)):
        pixels(pipe, settings=settings)
    assert steps == list(range(8))


def test_compiled_blocks_that_are_tapped_run_eager_and_hooks_work(tiny_flux):
    pipe = build_tiny_flux(num_layers=2, num_single_layers=1)
    plain = pixels(pipe)
    compile_blocks(pipe, backend="eager")
    compiled = pixels(pipe)
    np.testing.assert_allclose(compiled, plain, atol=1e-5)
    block = pipe.transformer.transformer_blocks[1]
    before = block._compiled_call_impl
    with capture(pipe, ["layer1"]) as captured:
        assert block._compiled_call_impl is None
        np.testing.assert_array_equal(pixels(pipe), compiled)
    assert block._compiled_call_impl is before is not None
    assert captured.steps == [0, 1, 2, 3]
    with block_hooks(pipe, {HookPoint.parse("layer1"): lambda call: call.tokens * 0}):
        assert not np.allclose(pixels(pipe), compiled, atol=1e-5)


def test_a_transformer_compiled_as_a_whole_is_refused_with_the_remedy():
    pipe = build_tiny_flux()
    pipe.transformer.compile(backend="eager")
    with pytest.raises(FluxSaeError, match="compile_blocks"), capture(pipe, ["layer1"]):
        pass


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


# On a GPU


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16_clock_capture_and_restart_hold():
    pipe = build_tiny_flux().to("cuda", torch.bfloat16)
    calls = record(pipe, "layer1", lambda: pixels(pipe, settings=CFG))
    assert [(call.step, call.is_conditional) for call in calls[:4]] == [(0, True), (0, False), (1, True), (1, False)]
    whole = pixels(pipe, settings=WIDE)
    with capture(pipe, list(ROWS), [2]) as captured:
        assert np.array_equal(pixels(pipe, settings=WIDE), whole)
    assert captured.get("layer1", 2).device.type == "cuda"
    snapshot = denoise_to(pipe, PROMPTS, seeds=[1, 2], settings=WIDE, step=2)
    assert np.array_equal(generate_from(pipe, snapshot, output_type="np"), whole)


@pytest.mark.gpu
def test_on_a_gpu_compiled_blocks_keep_hooks_working():
    pipe = build_tiny_flux().to("cuda")
    plain = pixels(pipe)
    compile_blocks(pipe)
    np.testing.assert_allclose(pixels(pipe), plain, atol=1e-3)
    with capture(pipe, ["layer1"]) as captured:
        pixels(pipe)
    assert captured.steps == [0, 1, 2, 3]
