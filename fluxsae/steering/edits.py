"""Steering edits and recipes as data: checked when made, JSON in, JSON out."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard, get_args

from PIL import Image, PngImagePlugin

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings

Mode = Literal["scale", "add", "clamp", "ablate", "project_out"]

MODES: Final[tuple[str, ...]] = get_args(Mode)
IDENTITY: Final[Mapping[str, float | None]] = {
    "scale": 1.0,
    "add": 0.0,
    "clamp": None,
    "ablate": 0.0,
    "project_out": 0.0,
}
"""Strength at which a mode changes nothing; `clamp` has none."""
NEEDS_REFERENCE: Final = ("add", "clamp")
"""Modes whose strength is in multiples of the feature's reference activation."""
MAX_STRENGTH: Final = 10_000.0
MAX_EDITS: Final = 64
"""Most edits on one image."""
PNG_KEY: Final = "fluxsae.recipes"
RECIPE_SCHEMA: Final = 1


@dataclass(frozen=True, init=False)
class HeatmapRegion:
    """The tokens where the edited feature itself fires above `threshold`.

    `threshold` is a fraction of the feature's reference activation, at least 0. With 0: wherever it fires at all.
    """

    threshold: float = 0.0

    def __init__(self, threshold: object = 0.0) -> None:
        if not _is_number(threshold) or not 0 <= threshold <= MAX_STRENGTH:
            raise FluxSaeError(
                f"region.heatmap is {_short(threshold)}; it is a fraction of the feature's reference activation, "
                f"a number from 0 to {MAX_STRENGTH:g}. Use 0 for every token where the feature fires."
            )
        object.__setattr__(self, "threshold", float(threshold))


GridMask = tuple[tuple[bool, ...], ...]
Region = GridMask | HeatmapRegion


@dataclass(frozen=True, init=False)
class SteeringEdit:
    """One change of one feature at one hook point.

    Args:
        hookpoint: a `HookPoint` or its text; where the SAE reads and the edit writes.
        feature: index in the SAE, from 0.
        mode: one of `MODES`.
        strength: `scale`: factor on the activation (1 = no change); `add`, `clamp`: multiples of the feature's
            reference activation; `ablate`, `project_out`: fraction removed, 0 to 1.
        steps: half-open window (start, stop) of 0-based steps of the schedule; None: the sigmas the SAE was trained on.
        region: rows of booleans on the token grid, or a `HeatmapRegion`; None: everywhere.

    Raises:
        FluxSaeError: a field is out of range; the message names it.
    """

    hookpoint: HookPoint
    feature: int
    mode: str
    strength: float
    steps: tuple[int, int] | None = None
    region: Region | None = None

    # The parameters are `object` because they are checked here, one by one, with a message for the user.
    def __init__(  # noqa: PLR0917
        self,
        hookpoint: object,
        feature: object,
        mode: object,
        strength: object,
        steps: object = None,
        region: object = None,
    ) -> None:
        checked = {
            "hookpoint": _hookpoint(hookpoint),
            "feature": _feature(feature),
            "mode": _mode(mode),
            "strength": _strength(_mode(mode), strength),
            "steps": _steps(steps),
            "region": _region(region),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def is_identity(self) -> bool:
        """Whether this edit changes nothing, whatever the image: identity strength, empty window or empty region."""
        is_empty_region = isinstance(self.region, tuple) and not any(map(any, self.region))
        is_empty_window = self.steps is not None and self.steps[0] == self.steps[1]
        return self.strength == IDENTITY[self.mode] or is_empty_region or is_empty_window

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON values; `region` is null, rows of 0 and 1, or {"heatmap": threshold}."""
        return {
            "hookpoint": str(self.hookpoint),
            "feature": self.feature,
            "mode": self.mode,
            "strength": self.strength,
            "steps": None if self.steps is None else list(self.steps),
            "region": _region_to_json(self.region),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "SteeringEdit":
        """The edit of a JSON object.

        Raises:
            FluxSaeError: not an object, a key is missing or unknown, or a value is out of range.
        """
        required = ("hookpoint", "feature", "mode", "strength")
        return cls(**_checked_keys(values, "edit", required, ("steps", "region")))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "SteeringEdit":
        """Inverse of `to_json`."""
        return cls.from_dict(_loads(text, "edit"))


def parse_edits(values: Any) -> tuple[SteeringEdit, ...]:
    """The edits of one image, from a JSON list (or its text).

    Raises:
        FluxSaeError: not a list, more than `MAX_EDITS`, or an edit is wrong; the message gives its place in the list.
    """
    loaded = _loads(values, "edits") if isinstance(values, str) else values
    if not isinstance(loaded, (list, tuple)):
        raise FluxSaeError(f"edits is {_short(loaded)}; it is a JSON list of edits, for no edit the empty list [].")
    check_count(loaded)
    edits = []
    for place, value in enumerate(loaded):
        try:
            edits.append(value if isinstance(value, SteeringEdit) else SteeringEdit.from_dict(value))
        except FluxSaeError as error:
            raise FluxSaeError(f"edits[{place}]: {error}") from error
    return tuple(edits)


def check_count(edits: Sequence[Any]) -> None:
    """Refuses more than `MAX_EDITS` edits on one image."""
    if len(edits) > MAX_EDITS:
        raise FluxSaeError(
            f"{len(edits)} edits were given for one image; at most {MAX_EDITS} are allowed. Leave some out."
        )


def is_batched(edits: Sequence[SteeringEdit] | Sequence[Sequence[SteeringEdit]]) -> bool:
    """Whether `edits` holds one list an image (True) or one flat list for all images (False).

    Raises:
        FluxSaeError: the two are mixed, or an element is neither.
    """
    if isinstance(edits, (str, bytes)) or not isinstance(edits, Sequence):
        raise FluxSaeError(f"edits is {_short(edits)}; give a list of SteeringEdit, or one such list an image.")
    flat = [isinstance(item, SteeringEdit) for item in edits]
    nested = [
        isinstance(item, (list, tuple)) and all(isinstance(edit, SteeringEdit) for edit in item) for item in edits
    ]
    if not (all(flat) or all(nested)):
        raise FluxSaeError(
            "edits mixes SteeringEdit with other things; give a flat list for all images or a list of lists."
        )
    return bool(edits) and all(nested)


@dataclass(frozen=True)
class SaeSource:
    """Where the SAE of a hook point is loaded from: a folder or Hub repository, and its revision."""

    hookpoint: HookPoint
    path: str
    subfolder: str = ""
    revision: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON values; the key is not "path", which Gradio's clients would try to download."""
        return {
            "hookpoint": str(self.hookpoint),
            "source": self.path,
            "subfolder": self.subfolder,
            "revision": self.revision,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "SaeSource":
        """Inverse of `to_dict`."""
        fields = _checked_keys(values, "saes", ("hookpoint", "source"), ("subfolder", "revision"))
        fields["path"] = fields.pop("source")
        _checked_texts(fields, ("path", "subfolder"), ("revision",))
        return cls(**{**fields, "hookpoint": _hookpoint(fields["hookpoint"])})


@dataclass(frozen=True)
class Recipe:
    """All that is needed to make one steered image again, bit for bit on the same machine.

    Rounding depends on the batch an image was made in, so the recipe holds the edits of the whole batch
    (`batch`: one tuple an image), this image's place in it (`index`), and how many steps were shared before the
    batch was spread out (`shared_steps`; those ran at batch 1).
    """

    prompt: str
    seed: int
    settings: GenerationSettings
    flux_id: str
    saes: tuple[SaeSource, ...] = ()
    batch: tuple[tuple[SteeringEdit, ...], ...] = ((),)
    index: int = 0
    shared_steps: int = 0
    flux_revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    flux_weights: str | None = None
    adapters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _checked_int("seed", self.seed, 0, 2**63 - 1)
        _checked_int("index", self.index, 0, len(self.batch) - 1)
        _checked_int("shared_steps", self.shared_steps, 0, self.settings.num_inference_steps)

    @property
    def edits(self) -> tuple[SteeringEdit, ...]:
        """This image's own edits."""
        return self.batch[self.index]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        return {
            "schema_version": RECIPE_SCHEMA,
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": self.settings.to_dict(),
            "flux_id": self.flux_id,
            "flux_revision": self.flux_revision,
            "saes": [source.to_dict() for source in self.saes],
            "batch": [[edit.to_dict() for edit in edits] for edits in self.batch],
            "index": self.index,
            "shared_steps": self.shared_steps,
            "dtype": self.dtype,
            "device": self.device,
            "flux_weights": self.flux_weights,
            "adapters": None if self.adapters is None else list(self.adapters),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Inverse of `to_dict`.

        Raises:
            FluxSaeError: a key is missing or unknown, a value is out of range, or the schema is another one.
        """
        required = ("schema_version", "prompt", "seed", "settings", "flux_id", "saes", "batch", "index")
        fields = _checked_keys(
            values, "recipe", required, ("shared_steps", "flux_revision", "dtype", "device", "flux_weights", "adapters")
        )
        version = fields.pop("schema_version")
        if version != RECIPE_SCHEMA:
            raise FluxSaeError(f"recipe.schema_version is {version!r}; this version of fluxsae reads {RECIPE_SCHEMA}.")
        _checked_texts(fields, ("prompt", "flux_id", "dtype", "device"), ("flux_revision", "flux_weights"))
        for name in ("seed", "index", "shared_steps"):
            _checked_int(name, fields.get(name, 0), 0, 2**63 - 1)
        if not isinstance(fields["settings"], Mapping):
            raise FluxSaeError(f"settings is {_short(fields['settings'])}; it is a JSON object.")
        fields["settings"] = GenerationSettings.from_dict(fields["settings"])
        if fields.get("adapters") is not None:
            fields["adapters"] = tuple(str(adapter) for adapter in _checked_list("adapters", fields["adapters"]))
        fields["saes"] = tuple(SaeSource.from_dict(source) for source in _checked_list("saes", fields["saes"]))
        fields["batch"] = tuple(parse_edits(edits) for edits in _checked_list("batch", fields["batch"]))
        return cls(**fields)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of `to_json`."""
        return cls.from_dict(_loads(text, "recipe"))


def png_bytes(image: Image.Image, recipes: Sequence[Recipe]) -> bytes:
    """The image as PNG with its recipes (several for a grid) in the file's text metadata."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps([recipe.to_dict() for recipe in recipes]))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def load_recipes(path: str | Path) -> list[Recipe]:
    """The recipes of a PNG that fluxsae wrote, or of a JSON file (one recipe or a list).

    Raises:
        FluxSaeError: the file does not exist or holds no recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FluxSaeError(f"{path} is not a file; give a PNG or JSON file that fluxsae wrote.")
    loaded = _loads(_recipe_text(path), str(path))
    return [Recipe.from_dict(values) for values in (loaded if isinstance(loaded, list) else [loaded])]


def _recipe_text(path: Path) -> str:
    """By what the file holds, whatever it is called."""
    content = path.read_bytes()
    if content.startswith(b"\x89PNG") or path.suffix.lower() == ".png":
        return _png_text(path)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FluxSaeError(
            f"{path} is neither a PNG nor JSON text; give a PNG or JSON file that fluxsae wrote."
        ) from error


def _png_text(path: Path) -> str:
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(PNG_KEY)
    except OSError as error:
        raise FluxSaeError(
            f"{path} is not a readable PNG ({error}); give a PNG or JSON file that fluxsae wrote."
        ) from error
    if text is None:
        raise FluxSaeError(
            f"{path} carries no {PNG_KEY} metadata; give a PNG that fluxsae wrote, unedited, or its JSON."
        )
    return str(text)


def _hookpoint(value: Any) -> HookPoint:
    if isinstance(value, HookPoint):
        return value
    if not isinstance(value, str):
        raise FluxSaeError(f"hookpoint is {_short(value)}; give text such as 'layer15' or 'transformer_blocks.15.ff'.")
    return HookPoint.parse(value)


def _feature(value: Any) -> int:
    _checked_int("feature", value, 0, 2**31 - 1)
    return int(value)


def _mode(value: object) -> str:
    if not isinstance(value, str) or value not in MODES:
        raise FluxSaeError(f"mode is {_short(value)}; allowed are {', '.join(MODES)}.")
    return value


def _strength(mode: str, value: object) -> float:
    low, high = (0.0, 1.0) if mode in ("ablate", "project_out") else (-MAX_STRENGTH, MAX_STRENGTH)
    if not _is_number(value) or not low <= value <= high:
        raise FluxSaeError(f"strength is {_short(value)}; in mode {mode} it is a number from {low:g} to {high:g}.")
    return float(value)


def _steps(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(_is_int(bound) for bound in value):
        raise FluxSaeError(f"steps is {_short(value)}; it is a pair of whole numbers [start, stop], or null.")
    start, stop = value
    if not 0 <= start <= stop:
        raise FluxSaeError(f"steps is [{start}, {stop}]; 0 <= start <= stop is needed (stop itself is not edited).")
    return int(start), int(stop)


def _region(value: Any) -> Region | None:
    if value is None or isinstance(value, HeatmapRegion):
        return value
    if isinstance(value, Mapping):
        return HeatmapRegion(_checked_keys(value, "region", ("heatmap",), ())["heatmap"])
    is_grid = (
        isinstance(value, (list, tuple)) and value and all(isinstance(row, (list, tuple)) and row for row in value)
    )
    if not is_grid or len({len(row) for row in value}) != 1 or not all(_is_bit(cell) for row in value for cell in row):
        raise FluxSaeError(
            f"region is {_short(value)}; it is null, rows of 0 and 1 of equal length (one row of the token grid each), "
            'or {"heatmap": fraction of the reference activation}.'
        )
    return tuple(tuple(bool(cell) for cell in row) for row in value)


def _region_to_json(region: Region | None) -> Any:
    if region is None:
        return None
    if isinstance(region, HeatmapRegion):
        return {"heatmap": region.threshold}
    return [[int(cell) for cell in row] for row in region]


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bit(value: Any) -> bool:
    return isinstance(value, (bool, int)) and value in (0, 1)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _checked_int(name: str, value: Any, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:
        raise FluxSaeError(f"{name} is {_short(value)}; it is a whole number from {low} to {high}.")


def _checked_texts(fields: Mapping[str, Any], names: Sequence[str], nullable: Sequence[str]) -> None:
    for name in (*names, *nullable):
        value = fields.get(name, "")
        if not isinstance(value, str) and not (value is None and name in nullable):
            raise FluxSaeError(f"{name} is {_short(value)}; it is text.")


def _checked_list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise FluxSaeError(f"{name} is {_short(value)}; it is a JSON list.")
    return value


def _checked_keys(values: Any, name: str, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise FluxSaeError(f"{name} is {_short(values)}; it is a JSON object with {', '.join((*required, *optional))}.")
    missing = [key for key in required if key not in values]
    unknown = [key for key in values if key not in (*required, *optional)]
    if missing or unknown:
        fault = f"lacks {', '.join(missing)}" if missing else f"has the unknown key {_short(unknown[0])}"
        raise FluxSaeError(
            f"{name} {fault}; required: {', '.join(required)}; optional: {', '.join(optional) or 'none'}."
        )
    return dict(values)


def _loads(text: str, name: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except FluxSaeError:
        raise
    except (ValueError, RecursionError) as error:
        raise FluxSaeError(f"{name} is not valid JSON ({error}); it was {_short(text)}.") from error


def _refuse_constant(constant: str) -> None:
    raise FluxSaeError(f"{constant} is not a number; give a finite one.")
