"""The price of a recipe: figures worked out by hand, the pipeline's own counts, bad requests, sources named."""

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from fluxsae.activations.collection import build_manifests, build_request
from fluxsae.errors import FluxSaeError
from fluxsae.flux import default_settings
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import SaeConfig
from train import cost_constants as constants
from train.cost import Config, Machine, Plan, Stage, main, stages
from train.flux_options import default_steps
from train.recipes import RECIPES, build_recipe, build_stage_configs

if TYPE_CHECKING:
    from diffusers import FluxPipeline

ONE = Config.from_recipe(
    "flux-dev", hookpoints=("layer15",), steps=(13,), set=("collect.images=500", "collect.tokens_per_image=4096")
)
H100 = Machine(constants.GPUS["H100"])


def stage(config: Config, name: str, machine: Machine = H100) -> Stage:
    return next(stage for stage in stages(Plan.build(config), machine) if stage.name == name)


def test_stored_activations_of_one_step_are_those_of_the_arithmetic() -> None:
    # 500 images * 4096 tokens * (3072 * 2 bytes + its place, 4 bytes) = 12.6 GB, and a seed of 8 bytes an image
    assert stage(ONE, "collect").disk == 500 * 4096 * (3072 * 2 + 4) + 500 * 8
    four = replace(ONE, hookpoints=("layer5", "layer15"), steps=(9, 13))
    assert stage(four, "collect").disk == 4 * 500 * 4096 * (3072 * 2 + 4) + 2 * 500 * 8


def test_an_image_on_an_h100_takes_what_was_published() -> None:
    assert 28 * H100.step_seconds(Plan.build(ONE)) == pytest.approx(6.6, rel=0.02)


def test_collection_ends_after_the_last_wanted_block() -> None:
    # 13 steps and 16 of 57 blocks: 13.28 of 28 steps' work, beside the text encoder
    plan = Plan.build(ONE)
    text, step = H100.text_seconds(plan), H100.step_seconds(plan)
    assert stage(ONE, "collect").seconds / 500 - text == pytest.approx((13 + 16 / 57) * step)
    later = replace(ONE, hookpoints=("layer5", "single_transformer_blocks.37"))
    assert stage(later, "collect").seconds / 500 - text == pytest.approx(14 * step)


def test_more_gpus_share_the_work_and_not_the_memory() -> None:
    one, eight = stage(ONE, "score"), stage(ONE, "score", replace(H100, gpus=8))
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert (eight.memory, eight.disk) == (one.memory, one.disk)


def test_the_counts_are_those_of_the_pipeline_and_of_the_run_that_was_made(miniature: "FluxPipeline") -> None:
    config = Config.from_recipe("miniature")
    plan, recipe, run = Plan.build(config), build_recipe(config), RunFolder(miniature_path("run"))
    (collect,) = build_stage_configs("collect", recipe, run)
    (score,) = build_stage_configs("score", recipe, run)
    settings = default_settings(miniature)
    request = build_request(
        miniature,
        collect.hookpoints,
        collect.steps or default_steps(settings),
        tokens_per_image=collect.tokens_per_image,
    )
    images = collect.build_plan(
        collect.images, purpose="collect", settings=settings, held_out_every=collect.held_out_every
    )
    made = build_manifests(miniature, images, request)
    assert plan.collect.images == len(images)
    assert {place: manifest.bytes_on_disk for place, manifest in plan.manifests.items()} == {
        place: manifest.bytes_on_disk for place, manifest in made.items()
    }
    for fit in plan.trained:
        manifest = made[fit.hookpoint]
        n_train = sum(not manifest.is_held_out(image) for image in range(len(images)))
        assert fit.n_rows == n_train * len(manifest.steps) * manifest.tokens_per_image == 576_000
    # the committed run, made with this recipe
    info = run.load_info()
    assert (info.steps, [str(place) for place in plan.hookpoints]) == (plan.steps, [*info.hookpoints])
    assert plan.score.images == score.images == len(run.load_images())
    for fit in plan.trained:
        (sae,) = fit.saes
        assert SaeConfig.from_dict({**run.load_sae_config(fit.hookpoint), "trained_on": None}) == sae
    assert stage(config, "collect").disk / 1e6 == pytest.approx(info.stages["collect"].megabytes, rel=0.01)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "miniature"])
def test_every_bundled_recipe_has_a_thousand_distinct_tokens_a_feature(name: str) -> None:
    plan = Plan.build(Config.from_recipe(name))
    of_klein = ["transformer_blocks.4", "transformer_blocks.4.ff", "single_transformer_blocks.9"]
    of_flux1 = ["transformer_blocks.5.ff", "transformer_blocks.15.ff", "transformer_blocks.18"]
    assert [str(fit.hookpoint) for fit in plan.trained] == (of_klein if "klein" in name else of_flux1)
    assert all(fit.n_rows >= 1000 * sae.n_features for fit in plan.trained for sae in fit.saes)


def test_klein_fits_a_card_of_24_gb_whole_and_a_step_costs_what_its_products_do() -> None:
    plan, card = Plan.build(Config.from_recipe("flux2-klein")), Machine(constants.GPUS["RTX4090"])
    found = stages(plan, card)
    assert all(stage.memory <= 24e9 and "DOES NOT FIT" not in stage.note for stage in found)
    assert found[0].note == "preset full"
    # 25 blocks * (26 C^2 N + 4 N^2 C), C = 3072, N = 4096 + 512: 34.8 TFLOP
    assert card.step_seconds(plan) * card.gpu.peak_tflops * card.step_share.value == pytest.approx(34.8, rel=0.01)


def test_the_evening_ends_within_six_hours_of_an_h100() -> None:
    assert sum(stage.seconds for stage in stages(Plan.build(Config.from_recipe("flux-dev-evening")), H100)) <= 6 * 3600


def test_what_is_changed_of_a_recipe_changes_its_price() -> None:
    whole = Config.from_recipe("flux-dev")
    half = replace(whole, set=("collect.images=10_000", "fit.k=[32, 64]"))
    assert stage(half, "collect").seconds == pytest.approx(stage(whole, "collect").seconds / 2)
    assert stage(half, "fit").disk == 2 * stage(whole, "fit").disk
    assert "render" not in {found.name for found in stages(Plan.build(replace(whole, skip=("render",))), H100)}


def test_a_small_gpu_is_told_that_its_preset_changes_the_activations_and_its_batch_is_too_large(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(replace(ONE, gpu=("RTX4090",)))
    printed = capsys.readouterr().out
    assert "CHANGES activations, refused for collection" in printed
    assert "DOES NOT FIT, choose a smaller batch_size" in printed
    main(replace(ONE, gpu=("H100",)))
    assert "DOES NOT FIT" not in capsys.readouterr().out


def test_every_gpu_stage_and_source_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(ONE)
    printed = capsys.readouterr().out
    found = ("collect", "fit", "score", "analyze", "embed", "select", "directions", "render", "all")
    assert all(printed.count(f"\n{name} ") == 3 for name in found)
    assert all(f"1 x {gpu}: " in printed for gpu in ("H100", "A100-80GB", "RTX4090"))
    assert f"step on H100: {constants.GPUS['H100'].step_share.kind}" in printed
    assert "decoder: calculated" in printed


def test_every_figure_of_every_gpu_says_what_it_is_and_why() -> None:
    for gpu in constants.GPUS.values():
        for figure in (gpu.step_share, gpu.compiled_share, gpu.training_share):
            assert 0 < figure.value < 1
            assert figure.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": ("H9000",)}, "Allowed are H100, H200"), ({"height": 1000}, "multiple of 16"), ({"gpus": 0}, "gpus=0"),
        ({"set": ("collect.images=0",)}, "n_images"), ({"hookpoints": ("layer19",)}, "blocks are 0 to 18"),
        ({"hookpoints": ("nowhere",)}, "names no hook point"), ({"steps": (28,)}, "from 0 to 27"),
        ({"hookpoints": ("single_transformer_blocks.38",)}, "blocks are 0 to 37"), ({"steps": (-1,)}, "step=-1"),
        ({"set": ("fit.hookpoints=layer3",)}, "does not collect"), ({"set": ("fit.from_flux=true",)}, "from_flux"),
        ({"flux": "a/b"}, "sizes of a/b are not known"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(FluxSaeError, match=words):
        main(replace(ONE, **change))  # type: ignore[arg-type]
