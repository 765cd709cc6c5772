"""FLUX on the random tiny pipeline: what hooks see, when, and that they leave nothing behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flux_calls import CFG, PROMPTS, ROWS, WIDE, count_calls, count_hooks, pixels, record
from jaxtyping import TypeCheckError
from tiny_flux import D_MODEL, N_DOUBLE, N_SINGLE, N_TEXT, SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    block_hooks,
    capture,
    compile_blocks,
    decode_latents,
    denoise_to,
    generate_from,
    hookpoint_width,
)
from fluxsae.flux.hookpoints import HookPoint

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
