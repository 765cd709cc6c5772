import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering import DOUBLE, SAES
from tiny_flux import SETTINGS

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, token_grid
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.laboratory.arms import control_seed
from fluxsae.laboratory.bench import Bench, Case, reading
from fluxsae.laboratory.config import DIRECTIONS, LaboratoryConfig
from fluxsae.laboratory.outcomes import (
    FAILED,
    OBJECT_ATTRIBUTES,
    RATES,
    Outcome,
    Tally,
    compare_scenes,
    compare_swap,
    draw_subject,
)
from fluxsae.laboratory.steering import candidate_features, run_laboratory
from fluxsae.laboratory.steering_report import ConceptResult, EditSettings, LaboratoryReport
from fluxsae.laboratory.steering_tables import laboratory_text
from fluxsae.laboratory.swaps import draw_swap
from fluxsae.laboratory.truths import CONCEPTS, Concept
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, prompted_attributes, sample_scene
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import SteeringEdit

RED = Concept("colour", "red")
SMALL: dict[str, Any] = {"clamp": (), "profile": (), "n_others": 0, "starts": (0.5,), "curve": (), "n_swaps": 0}
"""Options that leave few ways to try."""


def scene(*, n_objects: int = 1, **changes: str) -> Scene:
    drawn = sample_scene(np.random.default_rng(3), n_objects=n_objects)
    background = changes.pop("background", drawn.background)
    first, *others = drawn.objects
    return Scene((replace(first, **changes), *others), background)


def test_a_scene_compared_with_itself_is_unchanged() -> None:
    before = scene(colour="blue")
    outcome = compare_scenes(before, before, RED)
    assert outcome.keeps_others
    assert outcome.is_idle
    assert not outcome.is_specific  # an edit that does nothing is never specific
    assert (outcome.n_others, outcome.n_unchanged) == (5, 5)  # thing, texture, size, position and background
    assert not outcome.is_success(wanted=True)
    assert outcome.is_success(wanted=False)


@pytest.mark.parametrize("concept", CONCEPTS, ids=str)
def test_the_attribute_that_was_meant_does_not_count_as_collateral(concept: Concept) -> None:
    other = next(value for value in ATTRIBUTES[concept.attribute] if value != concept.value)
    before = scene(**{concept.attribute: other})
    if concept.attribute == "background":
        after = replace(before, background=concept.value)
    else:
        after = Scene((replace(before.objects[0], **{concept.attribute: concept.value}),), before.background)
    outcome = compare_scenes(before, after, concept)
    assert outcome.is_success(wanted=True)
    assert outcome.is_specific


def test_every_other_change_counts_once() -> None:
    before = scene(colour="blue", texture="solid", background="white")
    after = scene(colour="red", texture="dotted", background="black")
    outcome = compare_scenes(before, after, RED)
    assert (outcome.n_others, outcome.n_unchanged) == (5, 3)
    assert outcome.share_unchanged == 0.6


def test_an_empty_picture_is_no_success_and_not_specific() -> None:
    before = scene(colour="red")
    outcome = compare_scenes(before, Scene((), before.background), RED)
    assert not outcome.is_success(wanted=False)
    assert (outcome.n_others, outcome.n_unchanged) == (5, 1)  # the background is what is left


def test_objects_are_paired_by_place_and_newcomers_count_against() -> None:
    before = scene(n_objects=2)
    swapped = Scene(before.objects[::-1], before.background)
    assert compare_scenes(before, swapped, RED).keeps_others
    lonely = Scene(before.objects[:1], before.background)
    assert compare_scenes(lonely, before, RED).n_others == 4 * 2 + 1
    assert not compare_scenes(lonely, before, RED).is_specific


@given(st.sampled_from(CONCEPTS), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=80, deadline=None)
def test_subjects_say_what_they_should(concept: Concept, has_concept: bool, seed: int) -> None:
    subject = draw_subject(concept, has_concept=has_concept, seed=seed)
    assert subject == draw_subject(concept, has_concept=has_concept, seed=seed)
    before, after = (_named(prompt, concept) for prompt in (subject.prompt, subject.edited_prompt))
    if has_concept:
        assert before == concept.value
        assert after not in (None, concept.value)
    else:
        assert before != concept.value
        assert after == concept.value


@given(st.sampled_from(CONCEPTS), st.booleans(), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_prompt_names_all_that_an_edit_is_not_about_unless_told_otherwise(
    concept: Concept, has_concept: bool, seed: int
) -> None:
    others = [Concept(name, "") for name in ATTRIBUTES if name != concept.attribute]
    full = draw_subject(concept, has_concept=has_concept, seed=seed).prompt
    assert all(_named(full, other) is not None or other.attribute == "thing" for other in others)
    bare = draw_subject(concept, has_concept=has_concept, seed=seed, named=0.0).prompt
    assert all(_named(bare, other) is None or other.attribute == "thing" for other in others)


@given(st.sampled_from(CONCEPTS), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_prompt_editing_leaves_the_other_words_for_objects_without_the_concept(concept: Concept, seed: int) -> None:
    subject = draw_subject(concept, has_concept=False, seed=seed)
    for attribute in ATTRIBUTES:
        if attribute != concept.attribute:
            other = Concept(attribute, "")
            assert _named(subject.prompt, other) == _named(subject.edited_prompt, other)


def _named(prompt: str, concept: Concept) -> str | None:
    objects, background = prompted_attributes(prompt)
    return background if concept.attribute == "background" else objects[0].get(concept.attribute)


def test_an_edited_picture_that_cannot_be_read_is_a_failed_attempt() -> None:
    before = scene(colour="blue")
    assert compare_scenes(before, replace(scene(colour="red"), confidence=0.01), RED) == FAILED
    assert compare_swap(before, replace(scene(colour="red"), confidence=0.01), RED, at=0) == FAILED


def test_a_swap_is_of_one_object_and_leaves_the_other() -> None:
    before = scene(n_objects=2, colour="blue")
    first, second = before.objects
    done = Scene((replace(first, colour="red"), second), before.background)
    found = compare_swap(before, done, RED, at=0)
    assert found.is_success(wanted=True)
    assert found.is_specific
    assert found.n_others == 2 * 5 - 1 + 1
    both = Scene((replace(first, colour="red"), replace(second, colour="red")), before.background)
    other = compare_swap(before, both, RED, at=0)
    assert other.is_success(wanted=True) != (second.colour == "red") or other.n_unchanged < other.n_others
    assert not compare_swap(before, before, RED, at=0).is_specific
    assert compare_swap(before, Scene((first,), before.background), RED, at=0) == FAILED


def outcome(*, has: bool, unchanged: int = 5, moved: bool = True) -> Outcome:
    return Outcome(has, True, 5, unchanged, moved)


def test_rates_are_over_all_attempts_and_nothing_done_is_not_specific() -> None:
    idle = outcome(has=False, moved=False)
    tally = Tally.of(
        [outcome(has=True), outcome(has=True, unchanged=4), outcome(has=False), idle], wanted=True, n_failed=1
    )
    assert tally.n == 5
    rates = {rate: tally.rate(rate).value for rate in RATES}
    assert rates == pytest.approx(
        {"success": 2 / 5, "specificity": 2 / 5, "both": 1 / 5, "idle": 1 / 5, "unchanged": (1 + 0.8 + 1 + 1 + 0) / 5}
    )
    assert tally.keeps_others == 3 / 5
    success = tally.rate("success")
    assert success.low <= success.value <= success.high


def test_candidates_are_the_matched_features_the_best_first() -> None:
    best = {"methods": {"SAE feature": {"candidate": 7}}}
    report = {
        "matches": {"9": "colour red", "2": "background black", "4": "colour red", "11": "colour red"},
        "concepts": [{"attribute": "colour", "value": value, **best} for value in ("red", "purple")],
    }
    found = candidate_features(report, limit=2)
    assert found == {RED: [9, 4], Concept("colour", "purple"): [7], Concept("background", "black"): [2]}


def test_every_attribute_but_the_background_belongs_to_objects() -> None:
    assert set(OBJECT_ATTRIBUTES) == set(ATTRIBUTES) - {"background"}


@pytest.fixture
def read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the reader on the random tiny FLUX: red and orange by turns, whatever the picture."""
    colours = cycle(("red", "orange", "orange"))
    monkeypatch.setattr("fluxsae.laboratory.bench.read_scene", lambda _: scene(colour=next(colours)))


def test_the_laboratory_chooses_on_some_pictures_and_reports_on_others(
    tiny_flux: FluxPipeline, read_in_turn: None
) -> None:
    orange = Concept("colour", "orange")
    report = run_laboratory(
        tiny_flux,
        {DOUBLE: SAES[DOUBLE]},
        {DOUBLE: {RED: [3, 5], orange: [7]}},
        settings=SETTINGS,
        config=LaboratoryConfig(
            **SMALL | {"curve": (0.5,)}, n_select=2, n_report=2, add=(5.0, 2.0), scale=(-3.0, -1.0), seed=1
        ),
    )
    assert {(r.concept, r.direction) for r in report.results} == {(c, d) for c in (RED, orange) for d in DIRECTIONS}
    for result in report.results:
        assert {"features", "random direction", "another prompt"} <= set(result.arms)
        assert all(tally.n == 2 for tally in result.arms.values())
        chosen = result.settings["features"]
        tried = [t for t in report.trials if t.direction == result.direction and t.settings.method == "features"]
        assert chosen in {trial.settings for trial in tried}
        assert chosen.steps == (2, 4)
    assert json.loads(json.dumps(report.to_dict()))["results"][0]["arms"]["features"]["both"]["value"] >= 0
    text = laboratory_text(report)
    both = report.rate("amplify", "features", "both")
    assert both is not None
    assert f"{both.value:.2f} [{both.low:.2f}, {both.high:.2f}]" in text
    assert "colour orange" in text


def test_features_are_turned_together_and_their_rivals_are_taken_away() -> None:
    chosen = EditSettings(DOUBLE, "add", 0.5, (6, 20), together=2, without_rivals=True)
    assert chosen.edits([3, 5], [7], strength=0.25) == (
        SteeringEdit(DOUBLE, 3, "add", 0.25, steps=(6, 20)),
        SteeringEdit(DOUBLE, 5, "add", 0.25, steps=(6, 20)),
        SteeringEdit(DOUBLE, 7, "scale", 0.0, steps=(6, 20)),
    )
    assert len(replace(chosen, without_rivals=False).edits([3, 5], [7])) == 2


def test_every_way_of_turning_features_is_tried(tiny_flux: FluxPipeline, read_in_turn: None) -> None:
    """Each feature alone, all together, and to amplify also without the rivals of red: orange's."""
    features = {RED: [3, 5, 6], Concept("colour", "orange"): [7]}
    config = LaboratoryConfig(
        **SMALL, n_select=1, n_report=1, add=(5.0,), scale=(0.0,), together=(1, 3), without_rivals=(False, True),
        where=("everywhere",), methods=("features",),
    )  # fmt: skip
    report = run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: features}, settings=SETTINGS, config=config)
    ways = {direction: set() for direction in DIRECTIONS}
    for trial in report.trials:
        ways[trial.direction].add((trial.settings.together, trial.settings.without_rivals))
    assert ways["amplify"] == {(1, False), (1, True), (3, False), (3, True)}
    assert ways["suppress"] == {(1, False), (3, False)}
    for result in report.results:
        together = result.settings["features"].together
        assert len(result.features) == (min(together, 3) if result.concept == RED else 1)
        assert result.to_dict()["features"] == list(result.features)


def test_strengths_below_zero_turn_features_down() -> None:
    config = LaboratoryConfig(add=(0.5, -0.5), clamp=(1.0, -0.25), scale=(0.0,), project_out=(1.0,))
    assert config.modes("amplify") == [("add", 0.5), ("clamp", 1.0)]
    assert config.modes("suppress") == [("scale", 0.0), ("project_out", 1.0), ("add", -0.5), ("clamp", -0.25)]


def test_rivals_taken_away_alone_are_a_control(tiny_flux: FluxPipeline, read_in_turn: None) -> None:
    config = LaboratoryConfig(
        **SMALL, n_select=2, n_report=2, add=(5.0,), scale=(0.0,), together=(1,), without_rivals=(True,),
        rivals_alone=True, methods=("features",), controls=(),
    )  # fmt: skip
    features = {RED: [3], Concept("colour", "orange"): [7]}
    report = run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: features}, settings=SETTINGS, config=config)
    assert {"rivals alone" in result.arms for result in report.results if result.direction == "amplify"} == {True}
    assert {"rivals alone" in result.arms for result in report.results if result.direction == "suppress"} == {False}


def test_a_rate_is_the_mean_over_targeted_concepts_and_resamples_concepts_too() -> None:
    hit, miss = outcome(has=True), outcome(has=False, moved=False)
    settled = [Tally.of([hit] * 20, wanted=True), Tally.of([miss] * 20, wanted=True)]
    concepts = (RED, Concept("texture", "dotted"), Concept("thing", "cat"))
    results = [
        ConceptResult(concept, "amplify", {}, (3,), {"features": tally}, {})
        for concept, tally in zip(concepts, (*settled, settled[0]), strict=True)
    ]
    report = LaboratoryReport((), tuple(results))
    both = report.rate("amplify", "features", "both")
    assert both is not None
    assert (both.low, both.value, both.high) == (
        0.0,
        0.5,
        1.0,
    )  # the pictures of each concept agree, the concepts do not
    assert report.rate("suppress", "features", "both") is None


def test_a_concept_that_no_feature_can_turn_is_a_failed_attempt(tiny_flux: FluxPipeline, read_in_turn: None) -> None:
    features = {RED: [3], Concept("colour", "orange"): []}
    config = LaboratoryConfig(
        **SMALL, n_select=2, n_report=2, add=(5.0,), scale=(-3.0,), methods=("features",), controls=()
    )
    report = run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: features}, settings=SETTINGS, config=config)
    for result in report.results:
        if result.concept != RED:
            assert result.arms["features"].n == 2
            assert result.arms["features"].rate("both").value == 0


def test_pictures_that_cannot_be_read_are_failed_attempts(
    tiny_flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = cycle([scene(colour="orange"), replace(scene(colour="orange"), confidence=0.01)])
    monkeypatch.setattr("fluxsae.laboratory.bench.read_scene", lambda _: next(readings))
    config = LaboratoryConfig()
    with reading(0) as read:
        bench = Bench(tiny_flux, SETTINGS, config, (), read, None)
        key = ("report", RED, "amplify")
        bench.draw_cases({key: (6, 0)})
    assert len(bench.cases[key]) == bench.unread[key] == 3
    failed = Tally.of([outcome(has=True)] * 3, wanted=True, n_failed=bench.unread[key])
    assert failed.rate("both").value == 0.5


def test_swaps_draw_both_names_from_all_values() -> None:
    drawn = [draw_swap("colour", seed) for seed in range(120)]
    assert {concept.value for concept, _, _ in drawn} == {old for _, old, _ in drawn} == set(ATTRIBUTES["colour"])
    for concept, old, subject in drawn:
        before, after = (
            [thing.get("colour") for thing in prompted_attributes(prompt)[0]]
            for prompt in (subject.prompt, subject.edited_prompt)
        )
        assert before.count(old) == 1
        assert concept.value not in before
        assert [concept.value if value == old else value for value in before] == after


def test_an_object_is_painted_where_it_is_and_the_background_where_no_object_is() -> None:
    grid = TokenGrid(8, 8)
    case = Case(draw_subject(RED, has_concept=True, seed=5), scene(size="small", position="left"))
    thing, rest = (np.array(case.painted(name, grid)) for name in ("colour", "background"))
    assert 0 < thing.sum() < rest.sum() < grid.n_tokens
    assert (thing | rest).all()
    assert np.argwhere(thing)[:, 1].max() < grid.cols - 1
    assert not rest[thing].all()


def test_a_painted_edit_gets_the_region_of_its_own_picture(
    tiny_flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch, read_in_turn: None
) -> None:
    given: list[SteeringEdit] = []

    def spy(pipe: FluxPipeline, saes: Any, edits: Any, **named: Any) -> Any:
        given.extend(edit for item in edits for edit in item)
        return steer(pipe, saes, edits, **named)

    monkeypatch.setattr("fluxsae.laboratory.bench.steer", spy)
    config = LaboratoryConfig(
        **SMALL, n_select=1, n_report=1, add=(5.0,), scale=(-3.0,), where=("painted",), methods=("features",)
    )
    report = run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: {RED: [3]}}, settings=SETTINGS, config=config)
    assert {trial.settings.where for trial in report.trials} <= {"painted"}
    case = Case(draw_subject(RED, has_concept=True, seed=0), scene())
    assert {edit.region for edit in given} == {case.painted("colour", token_grid(tiny_flux, SETTINGS))}


def test_pictures_are_compared_inside_one_batch(tiny_flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a batch of another size changes pixels."""
    batch_of: dict[int, int] = {}
    pictures: list[Scene] = []

    @contextmanager
    def reading(_: int) -> Iterator[Callable[[Sequence[Any]], list[Scene]]]:
        number, colours = count(), cycle(("red", "orange", "orange"))

        def read(images: Sequence[Any]) -> list[Scene]:
            read = [scene(colour=next(colours)) for _ in images]
            batch_of.update(dict.fromkeys(map(id, read), next(number)))
            pictures.extend(read)
            return read

        yield read

    compared: list[tuple[int, int]] = []

    def compare(before: Scene, after: Scene, concept: Concept) -> Outcome:
        compared.append((batch_of[id(before)], batch_of[id(after)]))
        return compare_scenes(before, after, concept)

    monkeypatch.setattr("fluxsae.laboratory.steering.reading", reading)
    monkeypatch.setattr("fluxsae.laboratory.bench.Bench.is_exact", False)
    monkeypatch.setattr("fluxsae.laboratory.steering.compare_scenes", compare)
    config = LaboratoryConfig(
        **SMALL | {"starts": (0.25, 0.5)}, n_select=3, n_report=3, add=(5.0,), scale=(-3.0,), batch_size=5,
        methods=("features",),
    )  # fmt: skip
    run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: {RED: [3]}}, settings=SETTINGS, config=config)
    assert len(compared) > 20
    assert all(before == after for before, after in compared)


def test_controls_differ_from_picture_to_picture_and_from_feature_to_feature() -> None:
    subjects = [draw_subject(concept, has_concept=True, seed=5) for concept in (RED, Concept("texture", "dotted"))]
    kinds = ("random direction", "random feature")
    edits = [SteeringEdit(DOUBLE, feature, "add", 1.0) for feature in (3, 5)]
    assert len({control_seed(s, edit, kind, 0) for s in subjects for edit in edits for kind in kinds}) == 8


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_report": 0}, "n_report is 0"),
        ({"together": (0, 3)}, "together is"),
        ({"without_rivals": ()}, "without_rivals is empty"),
        ({"starts": (0.5, 1.2)}, "starts is"),
        ({"add": (-0.5,), "clamp": (), "profile": ()}, "No strength is left to amplify"),
        ({"methods": ("LEACE",)}, "methods is"),
        ({"named": 1.5}, "named is 1.5"),
    ],
)
def test_a_laboratory_that_cannot_work_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(FluxSaeError, match=told):
        LaboratoryConfig(**changes)


def test_a_laboratory_without_matches_is_refused(tiny_flux: FluxPipeline) -> None:
    with pytest.raises(FluxSaeError, match="nothing to steer"):
        run_laboratory(tiny_flux, {DOUBLE: SAES[DOUBLE]}, {DOUBLE: {}}, settings=SETTINGS)
