"""The cost estimate: figures worked out by hand, bad requests, sources named."""

from dataclasses import replace

import pytest

from fluxsae.errors import FluxSaeError
from train import cost_constants as constants
from train.cost import Config, Plan, main, stages

ONE = Config(images=500, hookpoints="layer15", step="13")


def stage(config: Config, name: str):
    return next(stage for stage in stages(Plan.build(config)) if stage.name == name)


def test_stored_activations_of_one_step_are_those_of_the_arithmetic():
    # 500 images * 4096 tokens * 3072 * 2 bytes = 12.6 GB
    assert stage(ONE, "collect").disk == 500 * 4096 * 3072 * 2
    assert stage(replace(ONE, tokens_per_image=512), "collect").disk == 500 * 512 * 3072 * 2
    assert stage(replace(ONE, hookpoints="layer5,layer15", step="9,13"), "collect").disk == 4 * 500 * 4096 * 3072 * 2


def test_an_image_on_an_h100_takes_what_was_published():
    assert 28 * Plan.build(ONE).step_seconds == pytest.approx(6.6, rel=0.02)


def test_collection_ends_after_the_last_wanted_block():
    # 13 steps and 16 of 57 blocks: 13.28 of 28 steps' work, beside the text encoder
    plan = Plan.build(ONE)
    per_image = stage(ONE, "collect").seconds / 500
    assert per_image - plan.text_seconds == pytest.approx((13 + 16 / 57) * plan.step_seconds)
    later = replace(ONE, hookpoints="layer5,single_transformer_blocks.37")
    assert stage(later, "collect").seconds / 500 - plan.text_seconds == pytest.approx(14 * plan.step_seconds)


def test_more_gpus_share_the_work_and_not_the_memory():
    one, eight = stage(ONE, "score"), stage(replace(ONE, gpus=8), "score")
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert (eight.memory, eight.disk) == (one.memory, one.disk)


def test_a_small_gpu_is_told_that_its_preset_changes_the_activations(capsys):
    main(replace(ONE, gpu="RTX4090"))
    assert "CHANGES activations, refused for collection" in capsys.readouterr().out


def test_every_stage_and_every_source_is_printed(capsys):
    main(ONE)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in ("collect", "fit", "score", "embed", "analyze", "all"))
    assert f"step on H100: {constants.GPUS['H100'].step_share.kind}" in printed
    assert "decoder: calculated" in printed


def test_every_figure_of_every_gpu_says_what_it_is_and_why():
    for gpu in constants.GPUS.values():
        for figure in (gpu.step_share, gpu.compiled_share, gpu.training_share):
            assert 0 < figure.value < 1
            assert figure.source


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": "H9000"}, "Allowed are H100, H200"), ({"size": 1000}, "multiple of 16"), ({"images": 0}, "images=0"),
        ({"hookpoints": "layer19"}, "blocks are 0 to 18"), ({"hookpoints": "nowhere"}, "names no hook point"),
        ({"hookpoints": "single_transformer_blocks.38"}, "blocks are 0 to 37"), ({"step": "28"}, "from 0 to 27"),
        ({"step": "1,x"}, "step='x'"), ({"step": "-1"}, "step='-1'"), ({"gpus": 0}, "gpus=0"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused(change, words):
    with pytest.raises(FluxSaeError, match=words):
        main(replace(ONE, **change))
