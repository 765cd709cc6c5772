"""What the page refuses, in which words, and the plain services behind it."""

import contextlib
import math
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
import whole_run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.silencing import prompts_without_words
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.grids import join_pictures
from fluxsae.sae.acts import SparseActs
from fluxsae.steering.demos import DemoConfig
from fluxsae.steering.edits import Recipe, SteeringEdit
from fluxsae.steering.measurements import MAX_OUT_OF_DISTRIBUTION
from fluxsae.ui.kit.shell import with_progress
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.kit.views import (
    decode_view,
    encode_view,
    features_at,
    first_thing,
    ranked_features,
    standing_out,
    view_of,
    with_alike,
)
from fluxsae.ui.serve.guard import guarded, validator
from fluxsae.ui.serve.lane import Cancelled, Done, FluxLane, StepDone
from fluxsae.ui.serve.reading import Reading, SparseMaps
from fluxsae.ui.serve.schemas import (
    DirectionsRequest,
    FeatureRequest,
    FeaturesAtRequest,
    HeatmapRequest,
    Limits,
    Request,
    RequestError,
    SearchRequest,
    SteerRequest,
    SweepRequest,
)
from fluxsae.ui.serve.session import ReadJob, ResultCache, Workbench, open_workbench
from fluxsae.ui.serve.visitors import WINDOW, VisitorLimits
from fluxsae.ui.tabs.gallery.desk import GalleryDesk
from fluxsae.ui.tabs.gallery.words import WordsDesk
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk
from fluxsae.ui.tabs.steer.desk import STRIP, SteerDesk
from fluxsae.ui.tabs.steer.job import Steered, SteerJob
from fluxsae.ui.tabs.steer.words import safe_turns, share_seen, where_it_changed

EARLY, LATE = whole_run.EARLY, whole_run.LATE
LIMITS = Limits(hookpoints={EARLY: 64, LATE: 128}, rows=16, cols=16, default_steps=20)
EDIT = {"hookpoint": LATE, "feature": 3, "mode": "add", "strength": 1.0}
HEATMAP = {"prompt": "a circle", "hookpoint": LATE, "seed": 0, "num_inference_steps": 20, "step": None, "limit": 8}
SWEEP = {
    "prompt": "a circle", "hookpoint": LATE, "feature": 3, "mode": "add", "strengths": [0.5, 1], "steps": None,
    "region": None, "seed": 0, "num_inference_steps": 20,
}  # fmt: skip
GOOD: list[tuple[type[Request], dict[str, Any]]] = [
    (HeatmapRequest, HEATMAP),
    (FeaturesAtRequest, {**HEATMAP, "row": 15, "column": 0}),
    (SearchRequest, {"query": "", "hookpoint": LATE, "limit": 1}),
    (FeatureRequest, {"hookpoint": LATE, "feature": 127}),
    (DirectionsRequest, {"hookpoint": EARLY, "feature": 63, "n_neighbours": 12}),
    (SteerRequest, {"prompt": "a circle", "edits": [EDIT], "seed": 0, "num_inference_steps": 20}),
    (SweepRequest, SWEEP),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(whole_run.build(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize(("schema", "values"), GOOD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_good_request_is_taken_as_it_is(schema: type[Request], values: dict[str, Any]) -> None:
    assert schema.parse(LIMITS, **values)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", "  ", "prompt is blank"),
        ("prompt", "x" * 10_000, "prompt has 10,000 characters; give at most 2,000"),
        ("prompt", "x" * 2_000_000, "prompt has 2,000,000 characters"),
        ("prompt", ["a circle"], "prompt is ['a circle']; give text"),
        ("prompt", None, "prompt is None"),
        ("prompt", "a\x00circle", "prompt holds control characters"),
        ("prompt", "a \ud800 circle", "prompt holds control characters"),
        ("hookpoint", "layer99", "hookpoint is 'layer99'; give one of this run's hook points: " + EARLY),
        ("hookpoint", "../../etc/passwd", "hookpoint is '../../etc/passwd'; give one of"),
        ("hookpoint", 3, "hookpoint is 3; give one of"),
        ("seed", -1, "seed is -1; give a whole number from 0 to 4294967295"),
        ("seed", 2**32, "seed is 4294967296; give a whole number"),
        ("seed", True, "seed is True; give a whole number"),
        ("seed", "7", "seed is '7'; give a whole number"),
        ("seed", math.nan, "seed is nan; give a whole number"),
        ("seed", 1e309, "seed is inf; give a whole number"),
        ("seed", 1.5, "seed is 1.5; give a whole number"),
        ("num_inference_steps", 0, "num_inference_steps is 0; give a whole number from 1 to 60"),
        ("num_inference_steps", 10**9, "num_inference_steps is 1000000000"),
        ("step", 20, "step is 20; give a whole number from 0 to 19, or null"),
        ("step", "", "step is ''; give a whole number"),
        ("limit", 0, "limit is 0; give a whole number from 1 to 100"),
        ("limit", 10**30, "limit is 1000"),
    ],
)
def test_a_refusal_names_field_value_and_allowed_range(field: str, value: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        HeatmapRequest.parse(LIMITS, **{**HEATMAP, field: value})
    assert words in refused.value.problems[field]
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("schema", "values", "words"),
    [
        (FeaturesAtRequest, {**GOOD[1][1], "row": 16}, "row is 16; give a whole number from 0 to 15"),
        (FeatureRequest, {"hookpoint": EARLY, "feature": 64}, "feature is 64; give a whole number from 0 to 63"),
        (FeatureRequest, {"hookpoint": LATE, "feature": "../7"}, "feature is '../7'; give a whole number"),
        (SearchRequest, {"query": "x" * 201, "hookpoint": LATE, "limit": 1}, "query has 201 characters"),
        (SweepRequest, {**SWEEP, "strengths": []}, "strengths is []; give a list of 1 to 9"),
        (SweepRequest, {**SWEEP, "strengths": [math.nan]}, "strengths is nan; give a list of 1 to 9 finite"),
        (SweepRequest, {**SWEEP, "strengths": [True]}, "strengths is True"),
        (SweepRequest, {**SWEEP, "mode": "ablate", "strengths": [2]}, "finite numbers from 0 to 1"),
        (SweepRequest, {**SWEEP, "mode": "explode"}, "mode is 'explode'; give one of scale, add"),
        (SweepRequest, {**SWEEP, "steps": [5, 2]}, "steps is [5, 2]; give two whole numbers"),
        (SweepRequest, {**SWEEP, "region": [[1, 0], [0, 1]]}, "region has 2 x 2 cells; give 16 rows of 16"),
        (SweepRequest, {**SWEEP, "region": "{not json"}, "region is '{not json'; give valid JSON"),
        (SteerRequest, {**GOOD[5][1], "edits": "[" * 100_000}, "give valid JSON"),
        (SteerRequest, {**GOOD[5][1], "edits": [{**EDIT, "strength": 1e309}]}, "edits[0]"),
        (SteerRequest, {**GOOD[5][1], "edits": [{**EDIT, "colour": "red"}]}, "edits[0]"),
        (SteerRequest, {**GOOD[5][1], "edits": [{**EDIT, "feature": 128}]}, "edits[0].feature is 128"),
        (SteerRequest, {**GOOD[5][1], "edits": [{**EDIT, "hookpoint": "layer2"}]}, "edits[0].hookpoint is"),
        (SteerRequest, {**GOOD[5][1], "edits": [EDIT] * 1000}, "1000 edits"),
        (HeatmapRequest, {**HEATMAP, "surprise": 1}, "surprise is not an argument of this endpoint"),
    ],
)
def test_every_endpoint_refuses_what_is_out_of_range(schema: type[Request], values: Any, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        schema.parse(LIMITS, **values)
    assert words in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), case=st.sampled_from(GOOD), value=JSON)
def test_no_json_value_gets_past_a_schema_as_anything_but_a_refusal(data: Any, case: Any, value: Any) -> None:
    schema, good = case
    field = data.draw(st.sampled_from(sorted(good)))
    with contextlib.suppress(RequestError):
        assert schema.parse(LIMITS, **{**good, field: value})


def test_short_names_and_integral_floats_are_understood() -> None:
    request = HeatmapRequest.parse(LIMITS, **{**HEATMAP, "hookpoint": "layer1", "seed": 7.0, "prompt": " a \n circle "})
    assert (request.hookpoint, request.seed, request.prompt) == (EARLY, 7, "a circle")


def test_the_validator_marks_only_the_wrong_argument() -> None:
    names = list(HEATMAP)
    marks = validator(HeatmapRequest, LIMITS, names)(*{**HEATMAP, "seed": -1}.values())
    assert [mark["is_valid"] for mark in marks] == [name != "seed" for name in names]


def test_a_users_mistake_is_shown_and_ours_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as shown:
        guarded(fail)(FluxSaeError("<b>seed</b> is -1"))
    assert "&lt;b&gt;seed&lt;/b&gt; is -1" in shown.value.message
    with pytest.raises(gr.Error) as hidden:
        guarded(fail)(RuntimeError("/secret/path token=abc"))
    reference = hidden.value.message.rsplit(" ", 1)[1].rstrip(".")
    assert "secret" not in hidden.value.message
    assert reference in caplog.text


# The lane


@dataclass(frozen=True)
class Counting:
    """A job of steps that notes what it does."""

    n_steps: int
    seen: list[Any]
    before_step: Callable[[int], None] = lambda step: None
    n_passes: int = 1
    n_pictures: int = 1

    def run(self, bench: Any, on_step: Callable[[int, int], None]) -> str:
        self.seen.append("in")
        try:
            for step in range(self.n_steps):
                self.before_step(step)
                self.seen.append(step)
                on_step(step, self.n_steps)
            return "whole"
        finally:
            self.seen.append("out")


def test_the_lane_tells_each_step_and_then_the_result() -> None:
    events = list(FluxLane().stream(Counting(3, []), None))
    assert events == [StepDone(1, 3), StepDone(2, 3), StepDone(3, 3), Done("whole")]


def test_a_cancelled_job_ends_within_one_step_and_the_next_one_is_whole() -> None:
    lane, gate, seen = FluxLane(), threading.Semaphore(1), []
    stream = lane.stream(Counting(20, seen, lambda step: gate.acquire(timeout=5) and None), None)
    assert next(stream) == StepDone(1, 20)
    stream.close()
    gate.release(20)
    assert list(lane.stream(Counting(2, []), None))[-1] == Done("whole")
    assert [item for item in seen if isinstance(item, int)] in ([0], [0, 1])
    assert seen[-1] == "out"


def test_an_error_in_a_job_reaches_the_visitor_and_the_lane_goes_on() -> None:
    lane = FluxLane()

    def explode(step: int) -> None:
        raise FluxSaeError("no")

    with pytest.raises(FluxSaeError, match="no"):
        list(lane.stream(Counting(1, [], explode), None))
    assert list(lane.stream(Counting(1, []), None))[-1] == Done("whole")


def test_cancelled_is_no_error_that_a_handler_could_swallow() -> None:
    assert not issubclass(Cancelled, Exception)


# Jobs, cache, visitors


def test_jobs_and_results_can_be_sent_to_another_process() -> None:
    edit = SteeringEdit(HookPoint.parse(LATE), 3, "add", 1.0)
    for job in (ReadJob("a circle", 0, 20), SteerJob(((), (edit,)), "a circle", 0, 20, -1)):
        assert pickle.loads(pickle.dumps(job)) == job
        assert hash(job) == hash(pickle.loads(pickle.dumps(job)))
        assert job.n_passes >= 20 * job.n_pictures
    assert pickle.loads(pickle.dumps(reading())).prompt == "a circle"


def test_the_cache_keeps_the_latest_within_its_bound() -> None:
    cache = ResultCache(max_bytes=100, max_entries=3)
    for key in "abcd":
        cache.put(key, key, n_bytes=10)
    assert (cache.get("a"), cache.get("d"), len(cache)) == (None, "d", 3)
    cache.put("large", "large", n_bytes=95)
    assert len(cache) == 1


def test_visitors_share_flux_and_the_share_comes_back() -> None:
    now = [0.0]
    limits = VisitorLimits(2, clock=lambda: now[0])
    limits.take("ann")
    limits.take("ann")
    limits.take("bob")
    with pytest.raises(FluxSaeError, match="It goes on in 600 s"):
        limits.take("ann")
    now[0] = WINDOW + 1
    limits.take("ann")


# Readings


def maps_of(steps: tuple[int, ...], values: np.ndarray, features: np.ndarray, n_features: int) -> SparseMaps:
    """Maps of all their own steps: `features` at `values`, both (steps, tokens, width); 0 pads."""
    dense = torch.zeros(*values.shape[:2], n_features)
    dense.scatter_reduce_(2, torch.from_numpy(features).long(), torch.from_numpy(values).float(), "amax")
    acts = {step: SparseActs.from_dense(part) for step, part in zip(steps, dense, strict=True)}
    return SparseMaps.build(acts, sigmas=[0.8 - 0.1 * place for place in range(len(steps))], own_steps=steps)


def reading() -> Reading:
    """Four patches, two features, two steps: feature 1 fires at patch 0 early, feature 2 at patch 3 late."""
    values = np.array([[[2, 0], [0, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [3, 0]]], dtype=np.float32)
    indices = np.array([[[1, 0], [0, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [2, 0]]], dtype=np.int32)
    maps = maps_of((4, 8), values, indices, whole_run.N_FEATURES)
    picture = Image.new("RGB", (16, 16))
    return Reading("a circle", 0, GenerationSettings(height=16, width=16), picture, TokenGrid(2, 2), {LATE: maps})


def test_a_map_is_the_most_over_the_saes_steps_or_one_step() -> None:
    maps = reading().maps[LATE]
    assert maps.acts(1, None).tolist() == [2, 0, 0, 0]
    assert maps.acts(1, 8).tolist() == [1, 0, 0, 0]
    assert maps.acts(2, 4).tolist() == [0, 0, 0, 0]
    assert maps.peaks(None)[[1, 2]].tolist() == [2, 3]
    assert maps.at(3, None) == {2: 3.0}
    with pytest.raises(FluxSaeError, match="Give one of 4, 8, or null"):
        maps.acts(1, 5)


def test_ranked_features_fire_and_say_how_strongly(bench: Workbench) -> None:
    ranked = ranked_features(reading().maps[LATE], bench.cards[LATE], step=None, limit=5)
    assert {feature["feature"] for feature in ranked} == {1, 2}
    assert all(0 < feature["relative"] <= 1 for feature in ranked)
    at = features_at(reading().maps[LATE], bench.cards[LATE], token=0, step=None, limit=5)
    assert [feature["feature"] for feature in at] == [1]
    assert features_at(reading().maps[LATE], bench.cards[LATE], token=1, step=None, limit=5) == []


def test_means_are_over_patches_and_steps() -> None:
    values = np.array([[[2.0, 0.0], [4.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]]])
    indices = np.array([[[1, 0], [1, 2]], [[1, 0], [1, 0]]])
    maps = maps_of((2, 6), values, indices, 4)
    assert maps.means(None).tolist() == [0, 2, 0.25, 0]
    assert maps.means(6).tolist() == [0, 1, 0, 0]


def test_a_spread_is_the_share_of_patches_above_half_the_peak() -> None:
    values = np.array([[[4.0, 1.0], [2.5, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    indices = np.array([[[1, 2], [1, 2], [1, 0], [1, 0]]])
    maps = maps_of((2,), values, indices, 4)
    assert maps.spreads(None).tolist() == [0, 0.5, 0.5, 0]


def test_what_glows_on_a_speck_or_everywhere_stands_out_less() -> None:
    speck, thing, everywhere = standing_out(np.array([0.01, 0.15, 0.6]), np.array([0.01, 0.2, 0.9]))
    assert thing > speck
    assert thing > everywhere
    assert standing_out(np.array([0.6]), np.array([1.0]))[0] > 0  # a style is everywhere and still something


def test_heat_is_first_shown_on_a_thing_not_on_its_background() -> None:
    told = [{"feature": n, "label": label} for n, label in enumerate(["brown background", None, "red"])]
    assert first_thing(told[:1]) == 0
    assert first_thing([told[0], told[2]]) == 2
    assert first_thing([]) is None


def test_a_surprise_is_an_image_of_the_run(bench: Workbench) -> None:
    found = {HeatmapDesk(bench).surprise() for _ in range(40)}
    assert found <= set(zip(bench.images.prompts, bench.images.seeds, [bench.limits.default_steps] * 24, strict=True))
    assert len(found) > 5


def test_another_hook_points_example_is_what_its_patches_are_asked_of(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = HeatmapDesk(bench)
    monkeypatch.setattr(desk, "example", lambda name: {"prompt": f"a circle at {name}", "seed": 4})
    nothing = {**desk.example_request(), "prompt": ""}
    assert desk.change_hookpoint(EARLY, nothing) == (None, {**nothing, "hookpoint": EARLY})
    page, values = desk.change_hookpoint(EARLY, {**nothing, "prompt": "a star"})
    assert (page["prompt"], page["seed"]) == (values["prompt"], values["seed"]) == (f"a circle at {EARLY}", 4)
    assert values["hookpoint"] == EARLY


def test_a_feature_without_a_name_is_no_guess(bench: Workbench) -> None:
    cards = bench.cards[LATE]
    unnamed = [f for f in ranked_features(reading().maps[LATE], cards, step=None, limit=5) if f["label"] is None]
    assert unnamed
    assert {feature["label_confidence_here"] for feature in unnamed} == {None}


def test_the_miniatures_words_are_told_and_anothers_are_not(bench: Workbench, tmp_path: Path) -> None:
    words = bench.vocabulary.replace(";", "").split()
    assert {"heart", "cyan", "dotted", "small", "bottom", "brown"} <= set(words)
    assert Workbench(whole_run.build(tmp_path / "run", flux_id="someone/flux")).vocabulary == ""


def test_a_patch_tells_each_label_once_and_the_rest_of_it_behind(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = bench.cards[LATE]
    labels = [None, "red", "red", "red", "blue", *[None] * (len(cards) - 5)]
    monkeypatch.setattr(cards, "labels", labels)
    monkeypatch.setattr(cards, "features", cards.features.with_columns({"label": labels}))
    values, indices = np.full((1, 1, 4), 2.0), np.array([[[1, 2, 3, 4]]])
    maps = maps_of((4,), values, indices, len(cards))
    shown = replace(reading(), grid=TokenGrid(1, 1), maps={LATE: maps})
    monkeypatch.setattr(bench, "read", lambda *_: iter([Done(shown)]))
    request = {"prompt": "a circle", "hookpoint": LATE, "seed": 0, "num_inference_steps": 20}
    *_, done = HeatmapDesk(bench).patch(request, {"row": 0, "column": 0, "step": None})
    told = [feature["label"] for feature in done.value["features"]]
    assert done.value["at"] > 0
    assert sorted(told[:2]) == ["blue", "red"]
    assert told[2:] == ["red", "red"]
    assert {key: done.value[key] for key in request} == request


def test_features_of_one_label_stand_together_behind_the_most_telling() -> None:
    ranked = [
        {"feature": n, "label": label} for n, label in enumerate(["red", "star", None, "red", "blue", None, "red"])
    ]
    shown = with_alike(ranked, 3)
    assert [feature["feature"] for feature in shown] == [0, 1, 2, 3, 6]


# Browsing


def test_the_ready_example_comes_from_the_run_alone(bench: Workbench) -> None:
    example = HeatmapDesk(bench).example(LATE)
    assert example is None or (example["kind"] == "example" and example["features"])


def test_the_gallery_filters_and_counts(bench: Workbench) -> None:
    desk = GalleryDesk(bench)
    everything = desk.gallery("", LATE, "any", False, "number", 5)
    assert [card["feature"] for card in everything["cards"]] == [0, 1, 2, 3, 4]
    dead = desk.gallery("", LATE, "dead", False, "best")
    assert [card["feature"] for card in dead["cards"]] == [0]
    assert desk.gallery("4", LATE, "any", False, "best")["cards"][0]["feature"] == 4
    with pytest.raises(FluxSaeError, match="feature is None"):
        desk.page({"hookpoint": LATE, "feature": None})


def test_the_word_that_silences_a_feature_is_told_with_what_is_left(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def read(prompt: str, seed: int, num_inference_steps: int) -> Any:
        asked.append((prompt, seed))
        values = np.zeros((2, 4, 2), np.float32)
        values[0, 0, 0] = 2.0 if "circle" in prompt else 0.5
        maps = maps_of((4, 8), values, np.full((2, 4, 2), 1), len(bench.cards[LATE]))
        yield StepDone(1, 2)
        yield Done(replace(reading(), prompt=prompt, seed=seed, maps={LATE: maps}))

    monkeypatch.setattr(bench, "read", read)
    best = bench.cards[LATE][1].top_images[0]
    assert "circle" in best.prompt
    *steps, done = WordsDesk(bench).silence({"hookpoint": LATE, "feature": 1})
    variants = prompts_without_words(best.prompt)
    assert asked == [(prompt, best.seed) for prompt in (best.prompt, *variants.values())]
    assert steps == [StepDone(1 + 2 * place, 2 * len(asked)) for place in range(len(asked))]
    left = {item["word"]: item["left"] for item in done.value["without"]}
    assert left == {word: 0.25 if word == "circle" else 1.0 for word in variants}
    assert next(iter(left)) == "circle"
    with pytest.raises(FluxSaeError, match="Feature 0 never fired in this run"):
        list(WordsDesk(bench).silence({"hookpoint": LATE, "feature": 0}))


def test_browsing_never_imports_diffusers(bench: Workbench) -> None:
    program = (
        "import sys\n"
        "from fluxsae.runs.folder import RunFolder\n"
        "from fluxsae.ui.serve.session import Workbench\n"
        "from fluxsae.ui.build import build_app\n"
        "from fluxsae.ui.tabs.gallery.desk import GalleryDesk\n"
        "from fluxsae.ui.tabs.directions.desk import DirectionsDesk\n"
        f"bench = Workbench(RunFolder({str(bench.run.path)!r}))\n"
        "build_app(bench)\n"
        f"chosen = {{'hookpoint': {LATE!r}, 'feature': 3}}\n"
        "assert GalleryDesk(bench).page(chosen) and DirectionsDesk(bench).near(chosen)\n"
        f"assert DirectionsDesk(bench).map({LATE!r})\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] == 'diffusers']\n"
        "assert not loaded, loaded[:3]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# Sliders, links, code


def test_a_sliders_middle_changes_nothing_and_its_ends_are_two_modes(bench: Workbench) -> None:
    desk = SteerDesk(bench)
    slider = {"hookpoint": LATE, "feature": 3, "label": "red"}
    edits = [desk._edit({**slider, "turn": turn}) for turn in (-1, -0.25, 0, 0.5)]
    assert [(edit.mode, edit.strength) for edit in edits] == [("scale", -2), ("scale", 0.25), ("add", 0), ("add", 0.5)]
    assert edits[2].is_identity
    assert [desk._slider_of(edit)["turn"] for edit in edits] == [-1, -0.25, 0, 0.5]
    with pytest.raises(FluxSaeError, match="turn is nan"):
        desk._edit({**slider, "turn": math.nan})


@pytest.mark.parametrize(
    ("mode", "strength"), [("add", 2.0), ("add", -0.5), ("scale", 3.0), ("scale", -2.5), ("clamp", 1.0)]
)
def test_an_edit_that_no_slider_stands_for_is_refused_not_bent(bench: Workbench, mode: str, strength: float) -> None:
    desk = SteerDesk(bench)
    with pytest.raises(FluxSaeError, match=f"No slider stands for {mode} {strength:g}"):
        desk.sliders([SteeringEdit(HookPoint.parse(LATE), 3, mode, strength)])


def test_a_feature_that_was_just_added_is_shown_unturned_with_one_image(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SteerJob] = []

    def cached(job: SteerJob) -> Any:
        asked.append(job)
        recipe = Recipe("a circle", 0, GenerationSettings(height=16, width=16), "miniature", batch=((),) * 3)
        yield Done(Steered((Image.new("RGB", (16, 16)),) * 3, (recipe,) * 3, (None,) * 3))

    monkeypatch.setattr(bench, "cached", cached)
    desk = SteerDesk(bench)
    slider = desk.find("3", {"edits": []})["add"]
    assert (slider["feature"], slider["turn"]) == (3, 0)
    *_, done = desk.turn("a circle", 0, 20, {"edits": [slider]})
    assert asked[0].variants == ((), (), ())
    assert done.value["words"] == ["Nothing is turned yet: move a slider."]
    assert done.value["measurement"] is None
    view = decode_view(done.value["link"])
    assert [(edit["feature"], edit["strength"]) for edit in view["edits"]] == [(3, 0)]


def demo_of(feature: int, less: float, label_less: float | None) -> dict[str, Any]:
    edit = SteeringEdit(HookPoint.parse(LATE), feature, "scale", 0.0)
    recipe = Recipe("a circle", 1, GenerationSettings(height=16, width=16), "miniature", batch=((edit,),))
    score = {"less": less, "collateral": 0.2, "out_of_distribution": 0.0, "label_less": label_less}
    recipes = dict.fromkeys(("less", "before", "more"), recipe.to_dict())
    return {"feature": feature, "image": "none", "score": score, "recipes": recipes}


def test_starters_are_the_clear_demos_in_which_clip_sees_the_label_go(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    demos = [
        demo_of(1, 0.3, -0.2),
        demo_of(2, 0.9, -0.01),  # far, but what its name says stays
        demo_of(3, 0.6, -0.1),
        demo_of(5, 0.2, None),  # made without CLIP
        demo_of(6, 0.5, 0.3),  # comes nearer to its label
    ]
    monkeypatch.setattr(bench.run, "load_demos", lambda name: demos if str(name) == LATE else [])
    monkeypatch.setattr(bench.run, "demo_image_path", lambda *_: Path("none"))
    started = SteerDesk(bench).starters()
    assert [starter["edits"][0]["feature"] for starter in started] == [3, 1, 5]


def test_a_step_window_ends_with_the_picture(bench: Workbench) -> None:
    windows = ([3, 60], None, [1, 5])
    known = {"hookpoint": LATE, "feature": 3, "turn": 0.0}
    kept = SteerDesk(bench)._within({"edits": [{**known, "steps": window} for window in windows]}, 20)["edits"]
    assert [slider["steps"] for slider in kept] == [[3, 20], None, [1, 5]]


def test_the_handle_splits_what_changed() -> None:
    before = Image.new("RGB", (40, 10), (0, 0, 0))
    after = before.copy()
    assert where_it_changed(before, after) == 0.5
    after.paste((255, 0, 0), (30, 0, 40, 10))
    assert where_it_changed(before, after) == pytest.approx(0.875)


def test_a_demo_that_nobody_sees_change_is_no_starter(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, subtle, clear = (Image.new("RGB", (32, 32), (level, level, level)) for level in (100, 120, 100))
    clear.paste((200, 20, 20), (0, 0, 8, 8))
    assert share_seen(before, subtle) == 0
    assert share_seen(before, clear) == 1 / 16
    for name, less in (("subtle", subtle), ("clear", clear)):
        join_pictures([less, before, before]).save(tmp_path / f"{name}.png")
    demos = [{**demo_of(1, 0.9, -0.2), "image": "subtle"}, {**demo_of(3, 0.3, -0.2), "image": "clear"}]
    monkeypatch.setattr(bench.run, "load_demos", lambda name: demos if str(name) == LATE else [])
    monkeypatch.setattr(bench.run, "demo_image_path", lambda _, name: tmp_path / f"{name}.png")
    assert [starter["edits"][0]["feature"] for starter in SteerDesk(bench).starters()] == [3]


def test_a_swap_puts_a_name_where_the_old_one_fires_and_says_what_it_cannot_do() -> None:
    bench = open_workbench("")
    desk = SteerDesk(bench)
    prompt = "a large red star on the left and a small blue circle on the right on a black background"
    *steps, done = desk.swap(prompt, 1000344, 20, "red", "green")
    assert steps
    *asked, page = done.value
    assert asked == [prompt, 1000344, 20]
    assert page["unread"] is None
    old, *new = page["edits"]
    assert (old["label"], {slider["label"] for slider in new}) == ("red", {"green"})
    assert old["turn"] < 0 < new[0]["turn"]
    region = np.array(old["region"])
    assert all(slider["region"] == old["region"] for slider in new)
    assert region[:, : bench.limits.cols // 2].sum() > 0.8 * region.sum() > 0  # the star is on the left
    for names, refused in (
        (("triangle", "green"), "No feature of “triangle” surely fires"),
        (("red", "red"), "cannot take its own place"),
        (("red", "attic"), "'attic' is no name"),
        ((["red"], "green"), "is no name"),
    ):
        with pytest.raises(FluxSaeError, match=refused):
            list(desk.swap(prompt, 1000344, 20, *names))


@pytest.mark.parametrize(
    ("wrong", "refused"),
    [
        ({"feature": 10**9}, "feature"),
        ({"hookpoint": "attic"}, "hookpoint"),
        ({"region": [[1] * 4000] * 3000}, "region is not"),
        ({"region": [[1], 2]}, "region is not"),
        ({"turn": "much"}, "turn is much"),
        ({"turn": True}, "turn is True"),
        ({"steps": "all"}, "steps"),
    ],
)
def test_a_slider_that_the_page_never_made_is_refused_before_work(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], refused: str
) -> None:
    monkeypatch.setattr(bench, "cached", lambda _: pytest.fail("worked"))
    desk = SteerDesk(bench)
    page = {"edits": [{"hookpoint": LATE, "feature": 3, "turn": 0.5, "label": "x" * 10**6, **wrong}]}
    for ask in (desk.turn, desk.strip) if "turn" not in wrong else (desk.turn,):
        with pytest.raises(FluxSaeError, match=refused):
            list(ask("a circle", 0, 20, page))
    assert desk._edits_of({"edits": [{**page["edits"][0], **{"hookpoint": LATE, "feature": 3, "region": None}}]})[0][
        "label"
    ] != "x" * 10**6  # fmt: skip


def test_the_strip_holds_the_strengths_that_demos_use(bench: Workbench) -> None:
    desk = SteerDesk(bench)
    edits = [desk._edit({"hookpoint": LATE, "feature": 3, "turn": turn}) for turn in STRIP]
    demos = DemoConfig()
    assert {edit.strength for edit in edits if edit.mode == "scale"} == set(demos.suppress)
    assert {edit.strength for edit in edits if edit.mode == "add"} >= {0, *demos.amplify}


def test_a_broken_picture_is_not_called_safe_though_its_tokens_are_usual() -> None:
    bench = open_workbench("")
    hookpoint = bench.limits.default_hookpoint
    pink = bench.cards[hookpoint].labels.index("pink")
    request = SweepRequest.parse(
        bench.limits,
        prompt="a large red star on a black background",
        hookpoint=hookpoint,
        feature=pink,
        mode="add",
        strengths=[0.1, 0.6],
        steps=None,
        region=None,
        seed=0,
        num_inference_steps=20,
    )
    *_, done = SteerDesk(bench).sweep(request)
    _, (little, much) = done.value
    assert little["is_safe"]
    assert much["out_of_distribution"] <= MAX_OUT_OF_DISTRIBUTION
    assert not much["is_safe"]


def test_the_safe_range_is_unbroken_around_the_middle() -> None:
    points = [(-1.0, True), (-0.5, False), (0.0, True), (0.25, True), (0.5, False), (1.0, True)]
    assert safe_turns(points) == [0.0, 0.25]
    assert safe_turns([(0.5, False), (-0.5, False)]) is None


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=5))
def test_a_link_opens_what_it_was_made_of(values: dict[str, Any]) -> None:
    assert decode_view(encode_view(values)) == values


@pytest.mark.parametrize("text", ["", "x", "!!!", "eNo", encode_view({"a": 1})[:-3], "A" * 5000])
def test_a_damaged_link_is_refused_in_words(text: str) -> None:
    with pytest.raises(FluxSaeError, match="link is damaged"):
        decode_view(text)


def test_a_link_that_unpacks_to_too_much_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="link is damaged"):
        decode_view(encode_view({"a": "x" * 10_000_000}))


def test_a_hand_written_link_names_a_feature() -> None:
    assert view_of({"hookpoint": LATE, "feature": "7"}) == {"tab": "gallery", "hookpoint": LATE, "feature": 7}
    assert view_of({"feature": "seven"})["feature"] == "seven"


def test_snippets_carry_the_values_on_screen() -> None:
    code = snippets("heatmap", {"prompt": "it's <b>", "seed": 3, "step": None}, "image, features, overlays")
    compile(code["Python"], "snippet", "exec")
    assert "seed=3" in code["Python"]
    assert "\"it'\\''s <b>\", 3, null" in code["curl"]
    assert '"name": "heatmap"' in code["MCP"]


# What cannot be served


def test_a_run_that_cannot_be_served_gives_the_miniature_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (Path(__file__).parents[2] / "fluxsae" / "miniature" / "run" / "run.json").is_file():
        pytest.fail("the embedded run is missing")
    whole_run.build(tmp_path / "run", flux_id="black-forest-labs/FLUX.1-dev")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    bench = open_workbench(str(tmp_path / "run"))
    assert bench.is_miniature
    assert "needs a GPU" in bench.notice
    assert open_workbench("no/such/folder/here").notice.startswith("no/such/folder/here cannot be used here")


def test_progress_names_what_is_dimmed_until_it_is_made() -> None:
    told = [status for status, _ in with_progress([StepDone(1, 2), StepDone(2, 2), Done("made")], makes="steer-result")]
    assert [status.get("makes") for status in told] == ["steer-result", "steer-result", None]
    assert [status["state"] for status in told] == ["working", "working", "idle"]
