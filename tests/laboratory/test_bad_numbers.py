"""A picture of NaN or infinite numbers is left out of every measure, or is an attempt that failed, and is told."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bad_images import spoil_in
from PIL import Image
from test_steering import DOUBLE, SAES
from tiny_flux import COLOURS, SETTINGS, SHAPES

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.stream import ImageSet
from fluxsae.flux import FluxPipeline
from fluxsae.laboratory.arms import Arm
from fluxsae.laboratory.bench import Bench
from fluxsae.laboratory.concept_tables import concepts_text
from fluxsae.laboratory.concepts import evaluate_concepts
from fluxsae.laboratory.config import AuditConfig, EvaluationConfig, LaboratoryConfig
from fluxsae.laboratory.evaluate import _Work
from fluxsae.laboratory.outcomes import FAILED, Outcome, compare_scenes
from fluxsae.laboratory.pairs import feature_responses, run_pairs
from fluxsae.laboratory.sample import gather_sample
from fluxsae.laboratory.steering import _Laboratory
from fluxsae.laboratory.swaps import run_swaps
from fluxsae.laboratory.truths import CONCEPTS
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, sample_scene
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import ImageRow, encode_webp
from fluxsae.steering.edits import SteeringEdit

HERE = {DOUBLE: SAES[DOUBLE]}
PROMPTS = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)[:40]
IMAGES = ImageSet(PROMPTS, tuple(range(40)))
CONCEPT, OTHER, *_ = CONCEPTS
DRAWN = sample_scene(np.random.default_rng(0), n_objects=1)
SHOWN = [
    Scene((replace(DRAWN.objects[0], **{CONCEPT.attribute: concept.value}),), DRAWN.background)
    for concept in (CONCEPT, OTHER)
]
TOLD = "At step 1 of transformer_blocks.1.ff, the activations of"


@pytest.fixture(autouse=True)
def told(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.fixture
def two_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader sees one of two scenes by turns, whatever the tiny FLUX made."""
    for module in ("concepts", "sample"):
        turns = cycle(SHOWN)
        monkeypatch.setattr(f"fluxsae.laboratory.{module}.read_scene", lambda _, turns=turns: next(turns))


def test_concepts_leave_it_out_and_count_it(
    tiny_flux: FluxPipeline, two_scenes: None, told: pytest.LogCaptureFixture
) -> None:
    with spoil_in(tiny_flux, 1):
        report = evaluate_concepts(tiny_flux, HERE, IMAGES, {DOUBLE: [1]}, settings=SETTINGS, batch_size=20, draws=10)[
            DOUBLE
        ]
    assert (report.n_images, report.n_unread, report.n_left_out) == (39, 0, 1)
    assert f"image 21 of 40 is left out. {TOLD}" in told.text
    assert "1 for NaN or infinite numbers" in concepts_text(report)
    assert all(np.isfinite(score.methods["SAE feature"].auc.value) for score in report.concepts)


def test_a_sample_leaves_it_out(tiny_flux: FluxPipeline, two_scenes: None, told: pytest.LogCaptureFixture) -> None:
    with spoil_in(tiny_flux, 0):
        sample = gather_sample(
            tiny_flux, DOUBLE, IMAGES, [1], settings=SETTINGS, batch_size=20, can_read=True,
            embeddings=torch.arange(40.0)[:, None],
        )  # fmt: skip
    assert sample.embeddings is not None
    assert sample.embeddings[:, 0].tolist() == [0, *range(2, 40)]
    assert sample.prompts == (PROMPTS[0], *PROMPTS[2:])
    assert sample.x.shape[0] == 39
    assert sample.x.isfinite().all()
    assert sample.truth is not None
    assert len(sample.truth.covers) == len(sample.truth.halves.truth) == 39
    assert f"image 1 of 40 is left out. {TOLD}" in told.text


def test_the_audit_trains_on_no_row_of_it(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    run, thumbnail = RunFolder(tmp_path), encode_webp(Image.new("RGB", (32, 32)), longest_side=32)
    run.save_images([ImageRow(0, "a red star", 5, thumbnail, None)])
    config = EvaluationConfig(audit=AuditConfig(n_images=1, n_training_images=20, batch_size=10))
    work = _Work(run, tiny_flux, HERE, {DOUBLE: [1]}, SETTINGS, config, ())
    with spoil_in(tiny_flux, 0):
        rows = work._training_rows(DOUBLE, None)
    assert rows.shape[0] == 19 * 16
    assert rows.isfinite().all()


def bench_of(pipe: FluxPipeline, scene: Scene, **changes: Any) -> Bench:
    """A bench whose reader sees `scene` in every picture."""

    def read(pictures: Sequence[Image.Image]) -> list[Scene]:
        return [scene for _ in pictures]

    return Bench(pipe, SETTINGS, LaboratoryConfig(**changes), (), read, None)


def test_the_means_of_the_concepts_leave_it_out(tiny_flux: FluxPipeline, told: pytest.LogCaptureFixture) -> None:
    laboratory = _Laboratory(bench_of(tiny_flux, SHOWN[0], n_moment_images=20, batch_size=10), HERE, {}, [CONCEPT])
    whole = laboratory._moments()[DOUBLE]
    with spoil_in(tiny_flux, 1):
        moments = laboratory._moments()[DOUBLE]
    assert f"image 11 of 20 is left out. {TOLD} picture 11" in told.text
    assert moments.acts.isfinite().all()
    assert moments.total.isfinite().all()
    assert 0 < moments.count.sum() < whole.count.sum()


def test_a_pair_with_it_counts_against_a_feature(tiny_flux: FluxPipeline, told: pytest.LogCaptureFixture) -> None:
    saes, matches = (SAES[DOUBLE], SAES[DOUBLE]), ({3: CONCEPT}, {3: CONCEPT})
    as_drawn = replace(SETTINGS, height=128, width=128)
    with spoil_in(tiny_flux, 0):
        report = run_pairs(tiny_flux, DOUBLE, saes, matches, step=1, settings=as_drawn, n_pairs=3, batch_size=20)
    assert report.to_dict()["n_left_out"] == 1
    assert f"image 1 of 21 is left out. {TOLD} picture 1" in told.text
    names = list(ATTRIBUTES)
    acts = np.ones((2, 1 + len(names)))
    acts[0, 1] = np.nan
    acts[1, 0] = np.nan
    found = feature_responses(acts, names[0])
    assert found[0].tolist() == [False] * len(names)  # to its own attribute it did not fall
    assert found[1].tolist() == [False] + [True] * (len(names) - 1)
    assert feature_responses(acts, names[1])[0].tolist() == [True] + [False] * (len(names) - 1)


def test_an_unedited_or_edited_picture_of_it_is_a_failed_attempt(
    tiny_flux: FluxPipeline, told: pytest.LogCaptureFixture
) -> None:
    bench, key = (
        bench_of(tiny_flux, SHOWN[1], batch_size=4),
        ("select", CONCEPT, "amplify"),
    )
    with spoil_in(tiny_flux, 0):
        bench.draw_cases({key: (4, 0)})
    assert (len(bench.cases[key]), bench.unread[key]) == (3, 1)
    assert "image 1 of" in told.text
    assert "is left out. The latents of seed 1 (" in told.text

    def compare(_: object, before: Scene | None, after: Scene | None) -> Outcome:
        return compare_scenes(before, after, CONCEPT)

    arm = Arm("features", (SteeringEdit(DOUBLE, 3, "add", 2.0, steps=(2, 4)),))
    with spoil_in(tiny_flux, 0):
        (outcomes,) = bench.outcomes(bench.cases[key], [arm], attribute=CONCEPT.attribute, saes=HERE, compare=compare)
    assert [outcome == FAILED for outcome in outcomes] == [False, True, False]
    assert "), features hold NaN or infinite numbers" in told.text
    assert len(bench.left_out.image_ids) == 2


def test_a_swap_of_it_is_a_failed_attempt(tiny_flux: FluxPipeline, told: pytest.LogCaptureFixture) -> None:
    bench = bench_of(tiny_flux, SHOWN[0], n_swaps=4, batch_size=4)
    with spoil_in(tiny_flux):
        results = run_swaps(bench, lambda _: [])
    assert sum(tally.n for result in results for tally in result.arms.values()) == 4
    assert {outcome for result in results for outcome in result.arms["another prompt"].outcomes} == {FAILED}
    assert "is left out. The latents of seed" in told.text


def test_the_laboratory_stops_where_too_many_are_bad(tiny_flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsae.flux.bad_numbers.MAX_BAD_SHARE", 0.0)
    bench = bench_of(tiny_flux, SHOWN[0])
    with spoil_in(tiny_flux), pytest.raises(FluxSaeError, match=r"too many to go on\. The latents of seed 2"):
        bench.plain_scenes(["a red star", "a blue star"], [1, 2])
