"""The step clock on the random tiny pipeline: which step each call of the transformer is at."""

from dataclasses import replace

import diffusers
import pytest
import torch
from flux_calls import CFG, PROMPTS, WIDE, pixels, record
from tiny_flux import N_TEXT, SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    block_hooks,
    capture,
    embed_prompts,
    initial_noise,
    nearest_step,
    schedule_sigmas,
)
from fluxsae.flux.clock import step_clock
from fluxsae.flux.hookpoints import HookPoint


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


def test_a_step_cache_that_skips_blocks_does_not_mislead_the_clock(tiny_flux):
    pipe = build_tiny_flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    settings = replace(SETTINGS, num_inference_steps=8)
    steps: list[int] = []
    with step_clock(pipe, lambda call: steps.append(call.step)):
        pixels(pipe, settings=settings)
    assert steps == list(range(8))
