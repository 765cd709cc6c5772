"""Several users of one pipeline: threads, nested runs, nested contexts, generators that are never finished."""

import threading
from dataclasses import replace

import diffusers
import pytest
import torch
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    block_hooks,
    capture,
    denoise_to,
    embed_prompts,
    generate,
    generate_from,
    initial_noise,
    schedule_sigmas,
    velocity,
)
from fluxsae.flux.hookpoints import HookPoint

PROMPT, PLACE = "a red circle", HookPoint.parse("layer1")
LONGER = replace(SETTINGS, num_inference_steps=6)


@pytest.fixture(scope="module")
def pipe():
    return build_tiny_flux()


def run(pipe, settings=SETTINGS, **arguments):
    return generate(pipe, PROMPT, seeds=1, settings=settings, output_type="latent", **arguments)


def in_thread(work) -> list[BaseException]:
    """What `work` raised in a thread of its own."""
    raised: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name="second")
    thread.start()
    thread.join()
    return raised


# Threads


@pytest.mark.parametrize("work", ["generation", "plain", "capture"])
def test_a_second_thread_is_refused_and_the_first_is_right(pipe, work) -> None:
    def second() -> None:
        if work == "generation":
            run(pipe)
        elif work == "plain":
            pipe(PROMPT, output_type="latent")
        else:
            with capture(pipe, [PLACE]):
                pass

    with capture(pipe, [PLACE], [0]) as alone:
        expected = run(pipe)
    raised: list[BaseException] = []
    with capture(pipe, [PLACE], [0]) as captured:
        image = run(pipe, on_step=lambda step, n: raised.extend(in_thread(second)) if step == 1 else None)
    assert isinstance(raised[0], FluxSaeError)
    assert "in use by the thread 'MainThread'" in str(raised[0])
    assert torch.equal(image, expected)
    assert torch.equal(captured.get(PLACE, 0), alone.get(PLACE, 0))
    assert not in_thread(lambda: run(pipe))


def test_a_plain_diffusers_pipeline_is_refused_in_a_second_thread(pipe) -> None:
    plain = diffusers.FluxPipeline(**pipe.components)
    plain.set_progress_bar_config(disable=True)

    def second() -> None:
        plain(PROMPT, height=32, width=32, num_inference_steps=2, max_sequence_length=8, output_type="latent")

    with capture(plain, [PLACE]):
        assert isinstance(in_thread(second)[0], FluxSaeError)
    assert not in_thread(second)


def test_the_pipeline_is_free_again_after_an_exception(pipe) -> None:
    with pytest.raises(ZeroDivisionError), capture(pipe, [PLACE], [3]):
        run(pipe, on_step=lambda step, n: 1 // 0)
    assert not in_thread(lambda: run(pipe))


def test_a_generator_that_is_never_finished_holds_the_pipeline_until_it_is_dropped(pipe) -> None:
    def captures():
        with capture(pipe, [PLACE]) as captured:
            yield captured

    unfinished = captures()
    next(unfinished)
    assert isinstance(in_thread(lambda: run(pipe))[0], FluxSaeError)
    with capture(pipe, [PLACE], [0]) as captured:  # in the same thread both contexts see what runs
        run(pipe)
    assert captured.steps == [0]
    del unfinished
    assert not pipe.transformer._forward_pre_hooks
    assert not in_thread(lambda: run(pipe))


# Runs inside runs


def test_a_generation_inside_a_generation_is_refused(pipe) -> None:
    with pytest.raises(FluxSaeError, match="in the middle of a generation"):
        run(pipe, on_step=lambda step, n: run(pipe))
    assert run(pipe).isfinite().all()


def test_steps_are_right_around_a_single_pass_inside_a_restarted_generation(pipe) -> None:
    embeddings, latents = embed_prompts(pipe, [PROMPT], LONGER), initial_noise(pipe, [1], LONGER)
    snapshot = denoise_to(pipe, PROMPT, seeds=1, settings=LONGER, step=2)
    calls: list[BlockCall] = []

    def look_aside(step: int, n_steps: int) -> None:
        if step == 3:
            velocity(pipe, latents, embeddings, step=1, settings=SETTINGS)

    with block_hooks(pipe, {PLACE: calls.append}):
        image = generate_from(pipe, snapshot, output_type="latent", on_step=look_aside)
    assert [call.step for call in calls] == [2, 3, 1, 4, 5]
    longer, shorter = schedule_sigmas(pipe, LONGER), schedule_sigmas(pipe, SETTINGS)
    assert [call.sigma for call in calls] == [longer[2], longer[3], shorter[1], longer[4], longer[5]]
    assert all(call.is_conditional for call in calls)
    assert torch.equal(image, run(pipe, LONGER))


def test_a_capture_that_would_mix_two_runs_is_refused(pipe) -> None:
    embeddings, latents = embed_prompts(pipe, [PROMPT], SETTINGS), initial_noise(pipe, [1], SETTINGS)
    with pytest.raises(FluxSaeError, match="would be a mixture"), capture(pipe, [PLACE]):
        run(pipe, on_step=lambda step, n: velocity(pipe, latents, embeddings, step=0, settings=SETTINGS))


# Contexts inside contexts


def test_an_outer_early_exit_is_not_taken_for_the_inner_ones(pipe) -> None:
    with capture(pipe, [PLACE], [1], stop_early=True) as outer, capture(pipe, [PLACE], [3], stop_early=True) as inner:
        run(pipe)
    assert (outer.steps, inner.steps) == ([1], [])


def test_an_early_exit_around_a_shared_prefix_ends_it(pipe) -> None:
    with capture(pipe, [PLACE], [1], stop_early=True) as captured:
        denoise_to(pipe, PROMPT, seeds=1, settings=SETTINGS, step=3)
        raise AssertionError("not reached")
    assert captured.steps == [1]


# Schedules of another kind


def test_heuns_schedule_is_refused_with_the_remedy() -> None:
    pipe = build_tiny_flux()
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(FluxSaeError, match=r"FlowMatchHeunDiscreteScheduler.*Use FlowMatchEulerDiscreteScheduler"):
        schedule_sigmas(pipe, SETTINGS)
    with pytest.raises(FluxSaeError, match=r"FlowMatchHeunDiscreteScheduler.*Use FlowMatchEulerDiscreteScheduler"):
        run(pipe)
    pipe.scheduler.set_timesteps(4)
    latents, embeddings = initial_noise(pipe, [1], SETTINGS), embed_prompts(pipe, [PROMPT], SETTINGS)
    with pytest.raises(FluxSaeError, match="more than once"), capture(pipe, [PLACE]):
        pipe.transformer(
            hidden_states=latents,
            timestep=pipe.scheduler.timesteps[:1] / 1000,
            encoder_hidden_states=embeddings.prompt,
        )
