"""The kinds of arguments that endpoints take: type, allowed range and description, stated once.

Every refusal names the field, the value (shortened) and what is allowed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ValidationInfo, WithJsonSchema

from fluxsae.errors import FluxSaeError
from fluxsae.runs.names import SaeName
from fluxsae.runs.prompts import control_character
from fluxsae.steering.edits import MODES, Region, SteeringEdit, parse_edits
from fluxsae.ui.serve.given import MAX_PICTURE_BYTES, GivenPicture, take_picture

MAX_PROMPT_CHARACTERS = 2_000
MAX_QUERY_CHARACTERS = 200
MAX_JSON_CHARACTERS = 400_000
MAX_SEED = 2**32 - 1
MAX_RESULTS = 100
MAX_STRENGTHS = 9
MAX_TRIED = 32
MAX_BEST = 8
LEAST_CHANGE = 0.1
WHOLE_NUMBERS = {"type": "array", "items": {"type": "integer"}}
WINDOW: tuple[list[Any], str] = (
    [WHOLE_NUMBERS, "null"],
    "Steps [start, stop) in which the edit acts; null: where the SAE was trained.",
)
REGION: tuple[list[Any], str] = (
    [
        {"type": "array", "items": WHOLE_NUMBERS},
        {"type": "object", "properties": {"heatmap": {"type": "number"}}},
        "null",
    ],
    "Where the edit acts: rows of 0 and 1 on the token grid; wherever the feature fires above a share of its usual "
    'activation, {"heatmap": share}; or null for everywhere.',
)
WHEN: tuple[list[Any], str] = (
    [
        {
            "type": "object",
            "properties": {
                "label": {"type": "string"},
                "features": WHOLE_NUMBERS,
                "above": {"type": "number"},
                "at": {"type": "string", "enum": ["image", "token"]},
                "least": {"type": "integer"},
                "weights": {"type": "array", "items": {"type": "number"}},
            },
        },
        "null",
    ],
    "The edit acts only in images (or at tokens) where this is there before it: any feature of a label, or any of some "
    "features (least: so many of them), or their sum by weights, above a multiple of the usual activation (0.5); null "
    "for always.",
)
STRENGTH = (
    "scale: factor on the activation, 1 changes nothing; add, clamp: multiples of the feature's usual activation; "
    "ablate, project_out: fraction removed, 0 to 1."
)
PICTURE = (
    "Your own picture: a data URL (data:image/png;base64,...) or an uploaded file (in Python: handle_file(path)), at "
    f"most {MAX_PICTURE_BYTES // 2**20} MB. It is cropped to the run's shape, and not kept."
)
EXAMPLE_EDIT = "__EXAMPLE_EDIT__"
"""Stands for an edit of the served run; an endpoint that is served puts one in."""


@dataclass(frozen=True)
class Limits:
    """What the served run allows; the schemas are checked against it."""

    hookpoints: Mapping[str, int]
    """Name of each SAE (module path, with @variant where there are several) -> its number of features."""
    rows: int
    """Rows of the token grid."""
    cols: int
    """Columns of the token grid."""
    default_steps: int
    """Denoising steps unless asked otherwise."""
    height: int
    """Of an image, pixels."""
    width: int
    max_steps: int = 60
    """Most denoising steps of one request."""

    def steps_of(self, values: Mapping[str, Any]) -> int:
        """Denoising steps of a request whose checked values these are."""
        return int(values.get("num_inference_steps", self.default_steps))

    @property
    def default_hookpoint(self) -> str:
        """The main SAE of the latest hook point: where meaning is richest."""
        places = [SaeName.parse(name) for name in self.hookpoints]
        return str(next(name for name in places if name.place == places[-1].place))

    @property
    def first_hookpoint(self) -> str:
        """The earliest hook point."""
        return next(iter(self.hookpoints))


@dataclass(frozen=True)
class OfRun:
    """Default of an argument that the served run decides."""

    name: Literal["default_hookpoint", "first_hookpoint", "default_steps"]


RUN_HOOKPOINT: Final[Any] = OfRun("default_hookpoint")
FIRST_HOOKPOINT: Final[Any] = OfRun("first_hookpoint")
RUN_STEPS: Final[Any] = OfRun("default_steps")


def shortened(value: Any) -> str:
    """A value in at most some 60 characters, to be named in a refusal."""
    text = repr(value[:60]) if isinstance(value, str) else repr(value)[:60]
    return f"{text}..." if len(text) >= 60 else text


def _refuse(info: ValidationInfo, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{info.field_name} is {shortened(value)}; give {allowed}.")


def _limits(info: ValidationInfo) -> Limits:
    assert isinstance(info.context, Limits)
    return info.context


def _as_whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return None
    return int(value)


def _whole(low: int, high: Callable[[ValidationInfo], int], *, optional: bool = False) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> int | None:
        if value is None and optional:
            return None
        number, most = _as_whole(value), high(info)
        if number is None or not low <= number <= most:
            alternative = ", or null" if optional else ""
            raise _refuse(info, value, f"a whole number from {low} to {most}{alternative}")
        return number

    return BeforeValidator(check)


def _text(most: int, *, blank: bool) -> BeforeValidator:
    def check(value: Any, info: ValidationInfo) -> str:
        if not isinstance(value, str):
            raise _refuse(info, value, f"text of {0 if blank else 1} to {most:,} characters")
        if len(value) > most:
            raise ValueError(f"{info.field_name} has {len(value):,} characters; give at most {most:,}.")
        if not blank and not value.strip():
            raise ValueError(f"{info.field_name} is blank; describe the image in 1 to {most:,} characters.")
        if control_character(value):
            raise ValueError(f"{info.field_name} holds control characters; give plain text.")
        return " ".join(value.split())

    return BeforeValidator(check)


def _check_hookpoint(value: Any, info: ValidationInfo) -> str:
    known = _limits(info).hookpoints
    if value is None:
        return _limits(info).default_hookpoint
    if isinstance(value, str) and len(value) <= 100:
        try:
            path = str(SaeName.parse(value))
        except FluxSaeError:
            path = ""
        if path in known:
            return path
    raise _refuse(info, value, f"one of this run's hook points: {', '.join(known)}")


def _loaded(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > MAX_JSON_CHARACTERS:
        raise ValueError(f"{info.field_name} has {len(value):,} characters; give at most {MAX_JSON_CHARACTERS:,}.")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise _refuse(info, value, "valid JSON") from None


def _check_edits(value: Any, info: ValidationInfo) -> tuple[SteeringEdit, ...]:
    try:
        edits = parse_edits(_loaded(value, info))
    except (FluxSaeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    for place, edit in enumerate(edits):
        _check_edit(edit, f"edits[{place}].", info)
    return edits


def _check_edit(edit: SteeringEdit, prefix: str, info: ValidationInfo) -> None:
    limits, path = _limits(info), str(edit.hookpoint)
    if path not in limits.hookpoints:
        allowed = ", ".join(limits.hookpoints)
        raise ValueError(f"{prefix}hookpoint is {path}; give one of this run's hook points: {allowed}.")
    most = limits.hookpoints[path] - 1
    asked = edit.when.features if edit.when is not None else ()
    for name, feature in (("feature", edit.feature), *(("when.features", feature) for feature in asked)):
        if feature > most:
            raise ValueError(f"{prefix}{name} is {feature}; give a whole number from 0 to {most}.")
    _check_grid(edit.region, prefix, info)


def _check_grid(region: Region | None, prefix: str, info: ValidationInfo) -> None:
    limits = _limits(info)
    if isinstance(region, tuple) and (len(region), len(region[0])) != (limits.rows, limits.cols):
        raise ValueError(
            f"{prefix}region has {len(region)} x {len(region[0])} cells; "
            f"give {limits.rows} rows of {limits.cols} cells of 0 and 1, or null."
        )


def _check_strengths(value: Any, info: ValidationInfo) -> tuple[float, ...]:
    strengths = _loaded(value, info)
    mode = info.data.get("mode", "add")
    low, high = (0, 1) if mode in ("ablate", "project_out") else (-100, 100)
    allowed = f"a list of 1 to {MAX_STRENGTHS} finite numbers from {low} to {high}"
    if not isinstance(strengths, (list, tuple)) or not 1 <= len(strengths) <= MAX_STRENGTHS:
        raise _refuse(info, strengths, allowed)
    for strength in strengths:
        is_number = isinstance(strength, (int, float)) and not isinstance(strength, bool)
        if not is_number or not low <= strength <= high:
            raise _refuse(info, strength, allowed)
    return tuple(float(strength) for strength in strengths)


def _check_pair(column: int | None, info: ValidationInfo) -> int | None:
    row = info.data.get("row", column)  # a row that was refused is told by itself
    if (row is None) != (column is None):
        raise ValueError(f"row is {row} and column is {column}; give both for one patch, or neither.")
    return column


def _check_picture(value: Any, info: ValidationInfo) -> GivenPicture:
    if isinstance(value, GivenPicture):
        return value
    limits = _limits(info)
    try:
        return take_picture(value, height=limits.height, width=limits.width)
    except FluxSaeError as error:
        raise ValueError(str(error)) from None


def _check_source(value: Any, info: ValidationInfo) -> GivenPicture | None:
    if value is not None:
        return _check_picture(value, info)
    if info.data.get("prompt") == "":
        raise ValueError(f"prompt is blank; describe the image in 1 to {MAX_PROMPT_CHARACTERS:,} characters.")
    return None


def _check_change(value: Any, info: ValidationInfo) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not LEAST_CHANGE <= value <= 1:
        raise _refuse(info, value, f"a number from {LEAST_CHANGE} to 1")
    return float(value)


def _check_mode(value: Any, info: ValidationInfo) -> str:
    if not isinstance(value, str) or value not in MODES:
        raise _refuse(info, value, f"one of {', '.join(MODES)}")
    return value


def _check_window(value: Any, info: ValidationInfo) -> tuple[int, int] | None:
    window = _loaded(value, info) if value != "" else None
    if window is None:
        return None
    bounds = [_as_whole(bound) for bound in window] if isinstance(window, (list, tuple)) else []
    start, stop = bounds if len(bounds) == 2 else (None, None)
    most = _limits(info).max_steps
    if start is None or stop is None or not 0 <= start <= stop <= most:
        raise _refuse(info, window, f"two whole numbers [start, stop] with 0 <= start <= stop <= {most}, or null")
    return start, stop


def _check_region(value: Any, info: ValidationInfo) -> Region | None:
    region = _loaded(value, info) if value != "" else None
    try:
        edit = SteeringEdit(SaeName.parse(_limits(info).default_hookpoint), 0, "add", 0.0, region=region)
    except (FluxSaeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    _check_grid(edit.region, "", info)
    return edit.region


def _described(kind: str | list[Any], description: str, **more: Any) -> dict[str, Any]:
    kinds: dict[str, Any] = {"type": kind}
    if not isinstance(kind, str):
        kinds = {"anyOf": [{"type": each} if isinstance(each, str) else each for each in kind]}
    return {**kinds, "description": description, **more}


def _schema(kind: str | list[Any], description: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema(_described(kind, description, **more))


EDIT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "hookpoint": _described("string", "Where the edit is made: a module path of this run."),
        "feature": _described("integer", "Number of the feature, from 0."),
        "mode": _described("string", "How to edit.", enum=list(MODES)),
        "strength": _described("number", STRENGTH),
        "steps": _described(*WINDOW),
        "region": _described(*REGION),
        "when": _described(*WHEN),
    },
    "required": ["hookpoint", "feature", "mode", "strength"],
}
"""What an edit is for a client: the keys of `SteeringEdit.from_dict`."""


Prompt = Annotated[
    str,
    _text(MAX_PROMPT_CHARACTERS, blank=False),
    _schema("string", f"What the image shows, 1 to {MAX_PROMPT_CHARACTERS:,} characters."),
]
Label = Annotated[
    str,
    _text(MAX_QUERY_CHARACTERS, blank=False),
    _schema("string", "Name of features of this run, as their labels say it."),
]
Caption = Annotated[
    str,
    _text(MAX_PROMPT_CHARACTERS, blank=True),
    _schema("string", f"What the picture shows, at most {MAX_PROMPT_CHARACTERS:,} characters; may be empty."),
]
PromptOrCaption = Annotated[
    str,
    _text(MAX_PROMPT_CHARACTERS, blank=True),
    _schema(
        "string",
        f"What the image shows, 1 to {MAX_PROMPT_CHARACTERS:,} characters; may be empty where a picture is given.",
    ),
]
Picture = Annotated[GivenPicture, BeforeValidator(_check_picture), _schema("string", PICTURE)]
PictureOrNone = Annotated[
    GivenPicture | None,
    BeforeValidator(_check_source),
    _schema(["string", "null"], f"{PICTURE} null: the image that the prompt makes."),
]
Change = Annotated[
    float,
    BeforeValidator(_check_change),
    _schema("number", f"How much of your picture may change, {LEAST_CHANGE} to 1: the share of noise put over it."),
]
Query = Annotated[
    str,
    _text(MAX_QUERY_CHARACTERS, blank=True),
    _schema("string", "A feature number, words of a label, or any words (compared with the images by CLIP)."),
]
HookPointPath = Annotated[
    str,
    BeforeValidator(_check_hookpoint),
    _schema("string", "The SAE, by its place in FLUX: a module path, with @variant where there are several."),
]
OtherHookPoint = Annotated[
    str, BeforeValidator(_check_hookpoint), _schema("string", "Another module path of this run, to compare with.")
]
Seed = Annotated[
    int, _whole(0, lambda info: MAX_SEED), _schema("integer", f"Random seed, 0 to {MAX_SEED}; same seed, same image.")
]
Steps = Annotated[
    int, _whole(1, lambda info: _limits(info).max_steps), _schema("integer", "Denoising steps of the image.")
]
Step = Annotated[
    int | None,
    _whole(0, lambda info: _limits(info).steps_of(info.data) - 1, optional=True),
    _schema(["integer", "null"], "Denoising step to look at, from 0; null: the steps the SAE was trained on."),
]
OneStep = Annotated[
    int | None,
    _whole(0, lambda info: _limits(info).steps_of(info.data) - 1, optional=True),
    _schema(["integer", "null"], "Denoising step to explain, from 0; null: the first that the SAE was trained on."),
]
TriedFeatures = Annotated[
    int,
    _whole(1, lambda info: MAX_TRIED),
    _schema("integer", f"How many earlier features are taken away and measured, 1 to {MAX_TRIED}."),
]
Limit = Annotated[
    int, _whole(1, lambda info: MAX_RESULTS), _schema("integer", f"How many results, 1 to {MAX_RESULTS}.")
]
TakenWords = Annotated[
    int,
    _whole(1, lambda info: MAX_RESULTS),
    _schema(
        "integer",
        f"Words of each caption that are taken away at most, 1 to {MAX_RESULTS}; first those that most captions have.",
    ),
]
BestImages = Annotated[
    int,
    _whole(1, lambda info: MAX_BEST),
    _schema("integer", f"How many of its best images, 1 to {MAX_BEST}, of different captions where there are."),
]
Feature = Annotated[
    int,
    _whole(0, lambda info: _limits(info).hookpoints.get(info.data.get("hookpoint", ""), 1) - 1),
    _schema("integer", "Number of the feature, from 0."),
]
Row = Annotated[
    int, _whole(0, lambda info: _limits(info).rows - 1), _schema("integer", "Row of the patch, from the top, from 0.")
]
Column = Annotated[
    int, _whole(0, lambda info: _limits(info).cols - 1), _schema("integer", "Column of the patch, from the left.")
]
PatchRow = Annotated[
    int | None,
    _whole(0, lambda info: _limits(info).rows - 1, optional=True),
    _schema(["integer", "null"], "Row of one patch, from the top, from 0; null, as the column: the whole image."),
]
PatchColumn = Annotated[
    int | None,
    _whole(0, lambda info: _limits(info).cols - 1, optional=True),
    AfterValidator(_check_pair),
    _schema(["integer", "null"], "Column of that patch, from the left, from 0; null, as the row: the whole image."),
]
Mode = Annotated[str, BeforeValidator(_check_mode), _schema("string", f"How to edit: {', '.join(MODES)}.")]
Strengths = Annotated[
    tuple[float, ...],
    BeforeValidator(_check_strengths),
    _schema("array", f"1 to {MAX_STRENGTHS} strengths. {STRENGTH}", items={"type": "number"}),
]
Edits = Annotated[
    tuple[SteeringEdit, ...],
    BeforeValidator(_check_edits),
    _schema(
        "array",
        f"Edits, for no edit the empty list; steps, region and when may be left out. Example: [{EXAMPLE_EDIT}].",
        items=EDIT,
    ),
]
Window = Annotated[
    tuple[int, int] | None,
    BeforeValidator(_check_window),
    _schema(*WINDOW),
]
RegionField = Annotated[
    Any,
    BeforeValidator(_check_region),
    _schema(*REGION),
]
