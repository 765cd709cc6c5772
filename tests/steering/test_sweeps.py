from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering import DOUBLE, SAES, SINGLE, n_hooks
from tiny_flux import SETTINGS, build_tiny_flux

import train.benchmarks.steering
from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, block_hooks, generate
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import Recipe, SaeSource, SteeringEdit
from fluxsae.steering.sweeps import (
    MAX_VARIANTS,
    Origin,
    batch_within_memory,
    first_edited_step,
    reproduce,
    strength_variants,
    sweep,
    with_strength,
)
from train.benchmarks.options import SteeringConfig

PROMPT, SEED = "a red circle on a black background", 3
HOW = replace(SETTINGS, num_inference_steps=6)
EDIT = SteeringEdit(DOUBLE, 5, "add", 1.0, steps=(3, 6))
VARIANTS = strength_variants(EDIT, [-8.0, -2.0, 0.0, 2.0, 8.0])


def separate(pipe: FluxPipeline, edits, n: int = 1):
    with steer(pipe, SAES, list(edits)):
        return generate(pipe, [PROMPT] * n, seeds=[SEED] * n, settings=HOW, output_type="latent")


def run(pipe: FluxPipeline, variants=VARIANTS, **options):
    return sweep(pipe, SAES, variants, prompt=PROMPT, seed=SEED, settings=HOW, **options)


@pytest.mark.parametrize("max_batch", [None, 1, 4])
def test_a_sweep_equals_separate_runs(tiny_flux: FluxPipeline, max_batch: int | None) -> None:
    found = run(tiny_flux, max_batch=max_batch)
    for variant, edits in zip(found, VARIANTS, strict=True):
        assert variant.edits == edits
        torch.testing.assert_close(variant.latents[None], separate(tiny_flux, edits), rtol=0, atol=1e-4)
    assert (found[1].latents - found[0].latents).abs().max() > 1e-3


def test_at_batch_one_a_sweep_equals_separate_runs_bit_for_bit(tiny_flux: FluxPipeline) -> None:
    for variant, edits in zip(run(tiny_flux, max_batch=1), VARIANTS, strict=True):
        assert torch.equal(variant.latents[None], separate(tiny_flux, edits))


def test_an_identity_strength_equals_the_baseline_bit_for_bit(tiny_flux: FluxPipeline) -> None:
    found = run(tiny_flux)
    assert torch.equal(found[3].latents, found[0].latents)
    assert found[3].image.tobytes() == found[0].image.tobytes()


@given(
    starts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    strengths=st.lists(st.sampled_from([-3.0, 0.5, 4.0]), min_size=1, max_size=3, unique=True),
    max_batch=st.sampled_from([1, 2, 5]),
)
@settings(max_examples=8, deadline=None)
def test_sweeps_of_any_windows_equal_separate_runs(tiny_flux: FluxPipeline, starts, strengths, max_batch: int) -> None:
    edits = [
        SteeringEdit(place, 7, "add", 1.0, steps=(start, 6))
        for place, start in zip([DOUBLE, SINGLE, DOUBLE], starts, strict=False)
    ]
    variants = strength_variants(edits, strengths)
    assert first_edited_step(tiny_flux, SAES, variants, HOW) == min(starts)
    for variant in run(tiny_flux, variants, max_batch=max_batch):
        torch.testing.assert_close(variant.latents[None], separate(tiny_flux, variant.edits), rtol=0, atol=1e-4)


def test_the_steps_before_the_first_edit_run_once(tiny_flux: FluxPipeline) -> None:
    calls: list[tuple[int, int]] = []
    handler = {HookPoint.parse("transformer_blocks.0"): lambda call: calls.append((call.step, len(call.tokens)))}
    with block_hooks(tiny_flux, handler):
        run(tiny_flux, max_batch=4)
    prefix, batch = [(step, 1) for step in range(3)], [(step, 3) for step in (3, 4, 5)]
    assert calls == prefix + batch + batch


def test_a_recipe_makes_the_same_image_bit_for_bit(tiny_flux: FluxPipeline) -> None:
    for variant in run(tiny_flux, max_batch=4):
        recipe = Recipe.from_json(variant.recipe.to_json())
        again = reproduce(tiny_flux, SAES, recipe)
        assert torch.equal(again.latents, variant.latents)
        assert again.image.tobytes() == variant.image.tobytes()
        assert again.recipe == variant.recipe


def test_a_sweep_works_under_true_cfg(tiny_flux: FluxPipeline) -> None:
    how = replace(HOW, true_cfg_scale=2.5, negative_prompt="a blue star")
    found = sweep(tiny_flux, SAES, VARIANTS[:2], prompt=PROMPT, seed=SEED, settings=how, max_batch=1)
    with steer(tiny_flux, SAES, list(VARIANTS[1])):
        alone = generate(tiny_flux, PROMPT, seeds=SEED, settings=how, output_type="latent")
    torch.testing.assert_close(found[1].latents[None], alone, rtol=0, atol=1e-4)


def test_controls_count_variants_not_places_in_a_batch(tiny_flux: FluxPipeline) -> None:
    asked: set[int] = set()

    def direction_of(edit: SteeringEdit, item: int) -> None:
        asked.add(item)

    run(tiny_flux, max_batch=2, direction_of=direction_of)
    assert asked == {1, 2, 3, 4, 5}


def test_progress_counts_to_its_total_and_a_cancel_leaves_no_hooks(tiny_flux: FluxPipeline) -> None:
    seen: list[tuple[int, int]] = []
    run(tiny_flux, max_batch=4, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 9) for done in range(1, 10)]  # 3 shared steps + 2 batches of 3 steps

    def cancel(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    before = n_hooks(tiny_flux)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_flux, on_progress=cancel)
    assert n_hooks(tiny_flux) == before


@pytest.mark.parametrize(
    ("variants", "match"),
    [
        ([], "0 variants"),
        ([()] * (MAX_VARIANTS + 1), "variants"),
        ([(), (SteeringEdit(DOUBLE, 5, "add", 1.0, steps=(3, 7)),)], "schedule has 6 steps"),
        ([(), (SteeringEdit(DOUBLE, 500, "add", 1.0, steps=(3, 6)),)], "feature is 500"),
    ],
)
def test_a_wrong_sweep_is_refused_before_model_work(tiny_flux: FluxPipeline, variants, match: str) -> None:
    ran: list[object] = []
    with (
        block_hooks(tiny_flux, {HookPoint.parse("transformer_blocks.0"): ran.append}),
        pytest.raises(FluxSaeError, match=match),
    ):
        run(tiny_flux, variants)
    assert not ran


def test_a_batch_of_no_images_is_refused(tiny_flux: FluxPipeline) -> None:
    with pytest.raises(FluxSaeError, match="max_batch is 0"):
        run(tiny_flux, max_batch=0)


def test_strengths_keep_the_rest_of_the_edit() -> None:
    edit = SteeringEdit(DOUBLE, 5, "ablate", 0.5, steps=(3, 6), region=[[1, 0]])
    assert with_strength(edit, 1.0) == SteeringEdit(DOUBLE, 5, "ablate", 1.0, steps=(3, 6), region=[[1, 0]])
    with pytest.raises(FluxSaeError, match="strength"):
        strength_variants(edit, [0.5, 1.5])
    with pytest.raises(FluxSaeError, match="strengths"):
        strength_variants(edit, [])


def test_less_memory_gives_smaller_batches_but_never_none(tiny_flux: FluxPipeline) -> None:
    sizes = [batch_within_memory(tiny_flux, HOW, free_bytes=free) for free in (0, 10**6, 10**7, 10**12)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1 < sizes[-1]


def test_the_benchmark_reports_sweeps_and_edits(tiny_flux: FluxPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    config = SteeringConfig(n_strengths=2, repeats=1)
    speed = train.benchmarks.steering.main(config, pipe=tiny_flux)
    assert speed.floor == pytest.approx((2 + 3 * 2) / (3 * 4))
    assert speed.sweep_ratio > 0
    assert "target 0.62" in capsys.readouterr().out


@pytest.mark.bench
def test_a_sweep_of_six_strengths_from_halfway_takes_at_most_0_62_of_separate_runs(miniature: FluxPipeline) -> None:
    speed = train.benchmarks.steering.main(SteeringConfig(), pipe=miniature)
    assert speed.sweep_ratio <= 0.62


@pytest.mark.parametrize("max_batch", [1, 2, 4, 6])
def test_all_images_of_a_sweep_come_from_batches_of_one_size(tiny_flux: FluxPipeline, max_batch: int) -> None:
    """In bfloat16 another batch size changes pixels; of 5 variants the last batch is filled up."""
    sizes = []
    with block_hooks(tiny_flux, {DOUBLE: lambda call: sizes.append(len(call.tokens))}):
        assert len(run(tiny_flux, VARIANTS[:5], max_batch=max_batch)) == 5
    n_shared = 3  # steps before the first edited one, at batch 1
    assert len(set(sizes[n_shared:])) == 1


def test_in_bfloat16_strength_0_of_the_last_batch_is_the_baseline_bit_for_bit() -> None:
    pipe = build_tiny_flux()
    pipe.to(torch.bfloat16)
    variants = strength_variants(EDIT, [8.0, 2.0, -2.0, 0.0])
    found = run(pipe, variants, max_batch=4)
    assert torch.equal(found[-1].latents, found[0].latents)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("flux", {"flux_id": "user/other", "flux_weights": "0" * 64}),
        ("adapters", {"adapters": ("adapter 0",)}),
        ("is_exact", {"is_exact": False}),
    ],
)
def test_a_recipe_of_another_flux_is_refused_or_allowed_by_name(name: str, changes: dict[str, object]) -> None:
    pipe = build_tiny_flux()
    pipe.transformer.register_to_config(_name_or_path="user/tiny")
    recipe = run(pipe, VARIANTS[:1])[0].recipe
    assert (recipe.flux_id, recipe.adapters) == ("user/tiny", ())
    other = replace(recipe, **changes)
    with pytest.raises(FluxSaeError, match=rf"The recipe was made elsewhere: .*allow what differs by name: {name} \("):
        reproduce(pipe, SAES, other)
    reproduce(pipe, SAES, other, allow_mismatch=[name])


def test_a_recipe_of_another_sae_of_the_same_name_is_refused_or_allowed_by_name(tiny_flux: FluxPipeline) -> None:
    def recipe(fingerprint: str | None) -> Recipe:
        source = SaeSource(DOUBLE, "user/name", fingerprint=fingerprint)
        return run(tiny_flux, VARIANTS[:2], origin=Origin("unknown", saes=(source,)))[1].recipe

    reproduce(tiny_flux, SAES, recipe(SAES[DOUBLE].fingerprint))
    reproduce(tiny_flux, SAES, recipe(None))
    with pytest.raises(FluxSaeError, match=rf"the SAE of {DOUBLE} is another one.*by name: sae \("):
        reproduce(tiny_flux, SAES, recipe("0" * 16))
    reproduce(tiny_flux, SAES, recipe("0" * 16), allow_mismatch=["sae"])
