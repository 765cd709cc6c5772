"""What requests are refused, and in which words."""

import contextlib
import math
from dataclasses import fields
from typing import Any

import pytest
from desk_data import EARLY, LATE
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.steering import Condition, SteeringEdit
from fluxsae.ui.serve import arguments
from fluxsae.ui.serve.arguments import Limits
from fluxsae.ui.serve.guard import validator
from fluxsae.ui.serve.schemas import (
    DirectionsRequest,
    ExplainRequest,
    FeatureRequest,
    FeaturesAtRequest,
    HeatmapRequest,
    Request,
    RequestError,
    SearchRequest,
    SteerRequest,
    SweepRequest,
)

LIMITS = Limits(hookpoints={EARLY: 64, LATE: 128}, rows=16, cols=16, default_steps=20, height=256, width=256)


EDIT = {"hookpoint": LATE, "feature": 3, "mode": "add", "strength": 1.0}


HEATMAP = {"prompt": "a circle", "hookpoint": LATE, "seed": 0, "num_inference_steps": 20, "step": None, "limit": 8}


SWEEP = {
    "prompt": "a circle", "hookpoint": LATE, "feature": 3, "mode": "add", "strengths": [0.5, 1], "steps": None,
    "region": None, "seed": 0, "num_inference_steps": 20,
}  # fmt: skip


EXPLAIN = {**HEATMAP, "feature": 3, "row": None, "column": None}


GOOD: list[tuple[type[Request], dict[str, Any]]] = [
    (HeatmapRequest, HEATMAP),
    (FeaturesAtRequest, {**HEATMAP, "row": 15, "column": 0}),
    (SearchRequest, {"query": "", "hookpoint": LATE, "limit": 1}),
    (FeatureRequest, {"hookpoint": LATE, "feature": 127}),
    (DirectionsRequest, {"hookpoint": EARLY, "feature": 63, "n_neighbours": 12}),
    (SteerRequest, {"prompt": "a circle", "edits": [EDIT], "seed": 0, "num_inference_steps": 20}),
    (SweepRequest, SWEEP),
    (ExplainRequest, EXPLAIN),
    (ExplainRequest, {**EXPLAIN, "row": 0, "column": 15, "step": 3}),
]


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
        (ExplainRequest, {**EXPLAIN, "row": 3}, "row is 3 and column is None; give both for one patch, or neither"),
        (ExplainRequest, {**EXPLAIN, "column": 3}, "row is None and column is 3; give both"),
        (ExplainRequest, {**EXPLAIN, "row": 16, "column": 3}, "row is 16; give a whole number from 0 to 15, or null"),
        (ExplainRequest, {**EXPLAIN, "limit": 33}, "limit is 33; give a whole number from 1 to 32"),
        (ExplainRequest, {**EXPLAIN, "step": 20}, "step is 20; give a whole number from 0 to 19, or null"),
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
    marks = validator(lambda values: HeatmapRequest.parse(LIMITS, **values), names)(*{**HEATMAP, "seed": -1}.values())
    assert [mark["is_valid"] for mark in marks] == [name != "seed" for name in names]


def test_the_schema_of_an_edit_names_every_field_that_is_read() -> None:
    told = arguments.EDIT["properties"]
    (condition,) = [kind for kind in told["when"]["anyOf"] if kind.get("type") == "object"]
    assert set(told) == {field.name for field in fields(SteeringEdit)}
    assert set(condition["properties"]) == {field.name for field in fields(Condition)}
