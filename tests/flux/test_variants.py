"""What would be captured or generated wrongly without a word is refused: steps, models, caches and layouts."""

from dataclasses import replace

import diffusers
import pytest
import torch
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    FluxPipeline,
    block_hooks,
    capture,
    default_settings,
    denoise_to,
    embed_prompts,
    generate,
    generate_from,
    initial_noise,
    load_flux,
    settings_ground,
    velocity,
)
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.schedules import build_schedule
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import SteeringEdit

PROMPT = "a red circle"
CFG = replace(SETTINGS, true_cfg_scale=2.0, negative_prompt="a green ring")


def run(pipe, settings=SETTINGS, **arguments):
    return generate(pipe, PROMPT, seeds=1, settings=settings, output_type="latent", **arguments)


# Steps that are never reached


@pytest.mark.parametrize("stop_early", [False, True])
def test_a_step_before_the_one_where_a_generation_is_taken_up_is_refused(tiny_flux, stop_early):
    snapshot = denoise_to(tiny_flux, PROMPT, seeds=1, settings=SETTINGS, step=2)
    refusal = r"Steps 0 were to be captured but never reached, in a schedule of 4 steps \(.*: 3\).*from step 0"
    with pytest.raises(FluxSaeError, match=refusal), capture(tiny_flux, ["layer1"], [0, 3], stop_early=stop_early):
        generate_from(tiny_flux, snapshot, output_type="latent")


def test_a_step_after_the_one_where_a_generation_was_ended_is_refused(tiny_flux):
    def cancel(step: int, n_steps: int) -> None:
        if step == 1:
            raise InterruptedError

    with (
        pytest.raises(FluxSaeError, match="Steps 2, 3 were to be captured"),
        capture(tiny_flux, ["layer1"], [1, 2, 3]),
        pytest.raises(InterruptedError),
    ):
        run(tiny_flux, on_step=cancel)


def test_an_error_on_its_way_out_is_not_hidden_by_unreached_steps(tiny_flux):
    with pytest.raises(ZeroDivisionError), capture(tiny_flux, ["layer1"], [3]):
        run(tiny_flux, on_step=lambda step, n_steps: 1 // 0)


def test_a_context_in_which_nothing_ran_is_no_error(tiny_flux):
    with capture(tiny_flux, ["layer1"], [50]) as captured:
        pass
    assert captured.steps == []


def test_steps_may_be_reached_in_several_runs(tiny_flux):
    embeddings, latents = embed_prompts(tiny_flux, [PROMPT], SETTINGS), initial_noise(tiny_flux, [1], SETTINGS)
    calls: list[BlockCall] = []
    with capture(tiny_flux, ["layer1"], [1, 3], sink=calls.append):
        for step in (1, 3):
            velocity(tiny_flux, latents, embeddings, step=step, settings=SETTINGS)
    assert [call.step for call in calls] == [1, 3]


# Models that need more than a prompt


@pytest.fixture(scope="module")
def fill():
    """As FLUX.1 Fill: the transformer also reads the masked image and the mask."""
    return build_tiny_flux(in_channels=96, out_channels=16)


def test_a_model_that_needs_more_than_a_prompt_is_not_opened(fill, tmp_path, monkeypatch):
    fill.save_pretrained(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(FluxSaeError, match=r"takes 96 channels and returns 16: .*Fill, Depth, Canny.*FLUX.1-dev"):
        load_flux(tmp_path)


def run_captured(pipe) -> None:
    with capture(pipe, ["layer1"]):
        pipe(PROMPT)


@pytest.mark.parametrize("work", [run, lambda pipe: denoise_to(pipe, PROMPT, seeds=1, step=1), run_captured])
def test_a_model_that_needs_more_than_a_prompt_is_refused_before_any_work(fill, work, monkeypatch):
    monkeypatch.setattr(fill.text_encoder, "forward", lambda *_, **__: pytest.fail("the model worked"))
    with pytest.raises(FluxSaeError, match="takes 96 channels and returns 16"):
        work(fill)


def test_a_model_that_says_how_many_channels_it_returns_is_no_other():
    assert run(build_tiny_flux(out_channels=16)).shape == (1, 16, 16)


# Step caches


@pytest.fixture
def cached():
    pipe = build_tiny_flux()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    return pipe


def open_handler(pipe):
    return block_hooks(pipe, {HookPoint.parse("transformer_blocks.1"): lambda call: None})


@pytest.mark.parametrize("hooked", [lambda pipe: capture(pipe, ["layer1"]), open_handler], ids=["capture", "handler"])
def test_a_step_cache_is_refused_with_the_remedy_and_the_remedy_helps(cached, hooked):
    with pytest.raises(FluxSaeError, match=r"step cache .*pipe.transformer.disable_cache\(\)"), hooked(cached):
        pass
    cached.transformer.disable_cache()
    with hooked(cached):
        assert torch.equal(run(cached), run(build_tiny_flux()))


def test_a_step_cache_enabled_while_hooks_are_open_is_refused():
    pipe = build_tiny_flux()
    with capture(pipe, ["layer1"]):
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
        with pytest.raises(FluxSaeError, match="disable_cache"):
            run(pipe)


def test_a_step_cache_may_be_used_where_no_block_is_hooked(cached):
    assert run(cached).isfinite().all()
    snapshot = denoise_to(cached, PROMPT, seeds=1, settings=SETTINGS, step=2)
    assert generate_from(cached, snapshot, output_type="latent").isfinite().all()


# Outputs that are not laid out as the table of hook points says


LAYOUT_FAULTS = {
    "swapped": ("transformer_blocks.1", lambda out: out[::-1], "gave 8 x 32 .*this call has 16 image tokens"),
    "swapped-text": ("transformer_blocks.1.attn:text", lambda out: out[::-1], "gave 16 x 32 .*call has 8 text tokens"),
    "narrower": ("transformer_blocks.1.ff", lambda out: out[..., :24], "gave 16 x 24 .*width there is 32"),
    "image-only": ("single_transformer_blocks.0.attn", lambda out: out[:, 8:], "gave 8 x 32 .*has 16 image tokens"),
    "joined": (
        "transformer_blocks.1",
        lambda out: torch.cat(out, dim=1),
        r"one tensor, not a tuple of 2 \(text, image",
    ),
    "split": ("transformer_blocks.1.ff", lambda out: (out, out), "a tuple of 2, not one tensor"),
}


@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_an_output_that_is_laid_out_otherwise_is_refused_with_both_shapes(fault):
    name, change, words = LAYOUT_FAULTS[fault]
    pipe = build_tiny_flux()
    module = pipe.transformer.get_submodule(name.removesuffix(":text"))
    module.register_forward_hook(lambda module, args, output: change(output))
    with pytest.raises(FluxSaeError, match=words), capture(pipe, [name]):
        run(pipe)


def test_a_third_part_of_attention_as_an_ip_adapter_adds_is_let_through():
    name = "transformer_blocks.1.attn"
    pipe = build_tiny_flux()
    with capture(pipe, [name], [0]) as plain:
        run(pipe)
    module = pipe.transformer.get_submodule(name)
    module.register_forward_hook(lambda module, args, output: (*output, torch.zeros_like(output[0])))
    with capture(pipe, [name], [0]) as adapted:
        run(pipe)
    assert torch.equal(plain.get(name, 0), adapted.get(name, 0))


# Steps with equal timesteps


CLOSE = replace(SETTINGS, num_inference_steps=28)


@pytest.fixture(scope="module")
def close():
    """In bfloat16, with a shift so strong that some of 28 steps have the same timestep, as FLUX.1-dev at 1792 px."""
    pipe = build_tiny_flux(scheduler={"base_shift": 3.0}).to(torch.bfloat16)
    assert len(build_schedule(pipe, CLOSE).timesteps.bfloat16().unique()) < 28
    return pipe


def steps_of(pipe, work) -> list[tuple[int, bool]]:
    calls: list[BlockCall] = []
    with block_hooks(pipe, {HookPoint.parse("layer1"): calls.append}):
        work()
    sigmas = build_schedule(pipe, CLOSE).sigmas.tolist()
    assert [call.sigma for call in calls] == [sigmas[call.step] for call in calls]
    return [(call.step, call.is_conditional) for call in calls]


def test_steps_with_equal_timesteps_are_told_apart_by_the_scheduler(close):
    twice = [(step, True) for step in range(28)] * 2
    assert steps_of(close, lambda: [run(close, CLOSE), run(close, CLOSE)]) == twice
    guided = replace(CFG, num_inference_steps=28)
    both = [(step, is_conditional) for step in range(28) for is_conditional in (True, False)]
    assert steps_of(close, lambda: run(close, guided)) == both


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_steps_with_equal_timesteps_are_right_after_a_restart(close, first):
    snapshot = denoise_to(close, PROMPT, seeds=1, settings=CLOSE, step=first)
    steps = steps_of(close, lambda: generate_from(close, snapshot, output_type="latent"))
    assert steps == [(step, True) for step in range(first, 28)]
    assert torch.equal(generate_from(close, snapshot, output_type="latent"), run(close, CLOSE))


def test_steps_with_equal_timesteps_are_right_where_an_image_is_taken_up(close):
    pipe = diffusers.FluxImg2ImgPipeline(**close.components)
    pipe.set_progress_bar_config(disable=True)
    image = generate(close, PROMPT, seeds=1, settings=SETTINGS)[0]
    sizes = {"height": 32, "width": 32, "max_sequence_length": 8, "output_type": "latent"}
    steps = steps_of(pipe, lambda: pipe(PROMPT, image=image, strength=0.95, num_inference_steps=28, **sizes))
    assert steps == [(step, True) for step in range(1, 28)]


def test_a_single_step_with_the_timestep_of_another_is_the_one_asked_for(close):
    embeddings, latents = embed_prompts(close, [PROMPT], CLOSE), initial_noise(close, [1], CLOSE)
    run(close, SETTINGS)  # leaves the scheduler at another step

    def work() -> None:
        for step in (2, 0, 1):
            velocity(close, latents, embeddings, step=step, settings=CLOSE)

    assert steps_of(close, work) == [(2, True), (0, True), (1, True)]


def test_steps_that_neither_timestep_nor_scheduler_tells_apart_are_refused(close):
    embeddings, latents = embed_prompts(close, [PROMPT], CLOSE), initial_noise(close, [1], CLOSE)
    close.scheduler.set_timesteps(28, mu=3.0)
    refusal = r"28 steps has only \d+ distinct timesteps in bfloat16.*the scheduler does not say.*float32"
    with pytest.raises(FluxSaeError, match=refusal), capture(close, ["layer1"]):
        close.transformer(
            hidden_states=latents,
            timestep=close.scheduler.timesteps[:1].bfloat16() / 1000,
            encoder_hidden_states=embeddings.prompt,
        )


# Pipelines of other kinds, on the same transformer


def sizes(**changes):
    return {"height": 32, "width": 32, "max_sequence_length": 8, "output_type": "latent", **changes}


@pytest.fixture
def picture(tiny_flux):
    return generate(tiny_flux, PROMPT, seeds=1, settings=SETTINGS)[0]


def kontext(pipe):
    other = diffusers.FluxKontextPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("name", ["layer1", "transformer_blocks.1", "single_transformer_blocks.1"])
def test_tokens_of_a_reference_image_are_neither_captured_nor_edited(picture, name):
    pipe, outputs = kontext(build_tiny_flux()), []

    def edit_picture() -> None:
        asked = sizes(image=picture, prompt=PROMPT, num_inference_steps=1, _auto_resize=False, max_area=1024)
        pipe(**asked, generator=torch.Generator().manual_seed(0))

    hookpoint = HookPoint.parse(name)
    module = pipe.transformer.get_submodule(hookpoint.path)
    handler = {hookpoint: lambda call: torch.zeros_like(call.tokens)}
    for handlers in ({}, handler):
        with block_hooks(pipe, handlers):
            # Registered last, so that it sees what goes on through the model.
            handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
            edit_picture()
            handle.remove()
    before, after = (hookpoint.split(output, 8, family_of(pipe).layout(hookpoint)) for output in outputs)
    assert before.shape[1] == 32
    assert torch.equal(after[:, :16], torch.zeros_like(after[:, :16]))
    assert torch.equal(after[:, 16:], before[:, 16:])
    assert not torch.equal(before[:, :16], torch.zeros_like(before[:, :16]))
    with capture(pipe, [name], [0]) as captured:
        edit_picture()
    assert torch.equal(captured.get(name, 0), before[:, :16])


def test_image_to_image_is_steered_at_the_steps_it_runs(tiny_flux, picture):
    pipe = diffusers.FluxImg2ImgPipeline(**tiny_flux.components)
    pipe.set_progress_bar_config(disable=True)
    trained_on = TrainedOn(
        flux_id="unknown", hookpoint="transformer_blocks.1.ff", steps=(2,), sigmas=(0.6,), height=32, width=32,
        guidance_scale=3.5, n_tokens=16, dataset_hash="", sigma_tolerance=0.3,
    )  # fmt: skip
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=32, n_features=8, trained_on=trained_on))
    sae.reference_acts.fill_(1.0)
    here, edited = HookPoint.parse("layer1"), []
    arguments = sizes(prompt=PROMPT, image=picture, strength=0.5, num_inference_steps=4, guidance_scale=3.5)
    plain = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    edits = [SteeringEdit(here, 3, "add", 4.0)]
    with steer(pipe, {here: sae}, edits, on_edit=lambda done: edited.append(done.call.step)):
        steered = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert edited == [2, 3]
    assert not torch.equal(plain, steered)


# Models of other names


def named(name: str, **transformer):
    pipe = build_tiny_flux(**transformer)
    pipe.generation_settings = None
    pipe.transformer.register_to_config(_name_or_path=name)
    return pipe


def test_schnell_and_krea_have_their_own_settings_and_no_guidance_is_no_mismatch():
    krea, dev = named("black-forest-labs/FLUX.1-Krea-dev"), named("black-forest-labs/FLUX.1-dev")
    assert default_settings(krea).guidance_scale == 4.5
    assert default_settings(dev).guidance_scale == 3.5
    schnell = named("black-forest-labs/FLUX.1-schnell", guidance_embeds=False)
    own = default_settings(schnell)
    assert (own.num_inference_steps, own.guidance_scale, own.max_sequence_length) == (4, 0.0, 256)
    assert settings_ground(schnell, own, "layer1").guidance_scale is None
    assert settings_ground(krea, default_settings(krea), "layer1").guidance_scale == 4.5
    with capture(schnell, ["layer1"], [0]) as captured:
        run(schnell)
    assert captured.get("layer1", 0).shape == (1, 16, 32)
