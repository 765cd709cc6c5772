"""Steering edits and recipes as data: checked when made, JSON in, JSON out."""

import codecs
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

from PIL import Image, PngImagePlugin
from pydantic import BeforeValidator, Field, GetPydanticSchema, InstanceOf, SkipValidation

from fluxsae.checked import FromList, checked, from_object, made_from, short
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from fluxsae.sae.config import Mismatch
from fluxsae.steering.conditions import Condition, FeaturesOf, filled_in

if TYPE_CHECKING:
    from fluxsae.flux.identity import FluxIdentity

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
MAX_PIXELS: Final = 64 * 2**20
"""Pixels of the largest image that is opened for its recipe."""
PNG_KEY: Final = "fluxsae.recipes"
RECIPE_SCHEMA: Final = 1


@checked()
class HeatmapRegion:
    """The tokens where the edited feature itself fires above `threshold`.

    `threshold` is a fraction of the feature's reference activation, at least 0. With 0: wherever it fires at all.
    """

    threshold: Annotated[float, Field(ge=0, le=MAX_STRENGTH)] = 0.0


GridMask = tuple[tuple[bool, ...], ...]
Region = GridMask | HeatmapRegion


def _parsed(value: object) -> object:
    return SaeName.parse(value) if isinstance(value, str | HookPoint) else value


def _region(value: Any) -> Region | None:
    if value is None or isinstance(value, HeatmapRegion):
        return value
    if isinstance(value, Mapping) and set(value) == {"heatmap"}:
        return HeatmapRegion(threshold=value["heatmap"])
    is_grid = isinstance(value, list | tuple) and value and all(isinstance(row, list | tuple) and row for row in value)
    if not is_grid or len({len(row) for row in value}) != 1 or not all(_is_bit(cell) for row in value for cell in row):
        raise FluxSaeError(
            f"It is {short(value)}. Give null, rows of 0 and 1 of equal length (one row of the token grid each), "
            'or {"heatmap": fraction of the reference activation}.'
        )
    return tuple(tuple(bool(cell) for cell in row) for row in value)


def _is_bit(value: Any) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


Place = Annotated[InstanceOf[HookPoint], BeforeValidator(_parsed)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


@checked()
class SteeringEdit:
    """One change of one feature at one hook point.

    Args:
        hookpoint: the name of the SAE, or its text: a hook point, or `hookpoint@variant`.
        feature: index in the SAE, from 0.
        mode: one of `MODES`.
        strength: `scale`: factor on the activation (1 = no change); `add`, `clamp`: multiples of the feature's
            reference activation; `ablate`, `project_out`: fraction removed, 0 to 1.
        steps: half-open window (start, stop) of 0-based steps of the schedule; None: the sigmas the SAE was trained on.
        region: rows of booleans on the token grid, or a `HeatmapRegion`; None: everywhere.
        when: a `Condition` on what is there before the edit; None: always. Where it does not hold, no bit changes.

    Raises:
        FluxSaeError: a field is out of range; the message names it.
    """

    hookpoint: Place
    feature: Annotated[int, Field(ge=0, le=2**31 - 1)]
    mode: Annotated[str, GetPydanticSchema(lambda _, schema: schema(Mode))]
    strength: Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]
    steps: Annotated[tuple[int, int], FromList] | None = None
    region: Annotated[SkipValidation[Region | None], BeforeValidator(_region)] = None
    when: Annotated[Condition | None, from_object(Condition)] = None

    def __post_init__(self) -> None:
        if self.mode in ("ablate", "project_out") and not 0 <= self.strength <= 1:
            raise FluxSaeError(f"strength is {self.strength}. In mode {self.mode} it must be a number from 0 to 1.")
        if self.steps is not None and not 0 <= self.steps[0] <= self.steps[1]:
            raise FluxSaeError(
                f"steps is {self.steps}. It must be [start, stop] with 0 <= start <= stop (stop itself is not edited)."
            )

    @property
    def is_identity(self) -> bool:
        """Whether this edit changes nothing, whatever the image: identity strength, empty window or empty region."""
        is_empty_region = isinstance(self.region, tuple) and not any(map(any, self.region))
        is_empty_window = self.steps is not None and self.steps[0] == self.steps[1]
        return self.strength == IDENTITY[self.mode] or is_empty_region or is_empty_window

    def to_dict(self) -> dict[str, Any]:
        """The edit as JSON values; `region` is null, rows of 0 and 1, or {"heatmap": threshold}.

        `when` is there where the edit has a condition.
        """
        return {
            "hookpoint": str(self.hookpoint),
            "feature": self.feature,
            "mode": self.mode,
            "strength": self.strength,
            "steps": None if self.steps is None else list(self.steps),
            "region": _region_to_json(self.region),
            **({} if self.when is None else {"when": self.when.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "SteeringEdit":
        """The edit of a JSON object.

        Raises:
            FluxSaeError: not an object, a key is missing or unknown, or a value is out of range.
        """
        return made_from(cls, values)

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
        raise FluxSaeError(f"edits is {short(loaded)}; it is a JSON list of edits, for no edit the empty list [].")
    check_count(loaded)
    edits = []
    for place, value in enumerate(loaded):
        try:
            edits.append(value if isinstance(value, SteeringEdit) else SteeringEdit.from_dict(value))
        except FluxSaeError as error:
            raise FluxSaeError(f"edits[{place}]: {error}") from error
    return tuple(edits)


def with_features(edits: Sequence[SteeringEdit], features_of: FeaturesOf) -> tuple[SteeringEdit, ...]:
    """The edits, with the features of the labels that their conditions name.

    Raises:
        FluxSaeError: no feature carries such a label.
    """
    return tuple(
        edit if edit.when is None else replace(edit, when=filled_in(edit.when, features_of, hookpoint=edit.hookpoint))
        for edit in edits
    )


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
        raise FluxSaeError(f"edits is {short(edits)}; give a list of SteeringEdit, or one such list an image.")
    flat = [isinstance(item, SteeringEdit) for item in edits]
    nested = [
        isinstance(item, (list, tuple)) and all(isinstance(edit, SteeringEdit) for edit in item) for item in edits
    ]
    if not (all(flat) or all(nested)):
        raise FluxSaeError(
            "edits mixes SteeringEdit with other things; give a flat list for all images or a list of lists."
        )
    return bool(edits) and all(nested)


@checked()
class SaeSource:
    """Where the SAE of a hook point is loaded from: a folder or Hub repository, and its revision."""

    hookpoint: Place
    path: str
    subfolder: str = ""
    revision: str | None = None
    fingerprint: str | None = None
    """What tells the SAE from another of the same name; None in recipes of before this field."""

    def to_dict(self) -> dict[str, Any]:
        """The source as JSON values; the key is not "path", which Gradio's clients would try to download."""
        return {
            "hookpoint": str(self.hookpoint),
            "source": self.path,
            "subfolder": self.subfolder,
            "revision": self.revision,
            **({} if self.fingerprint is None else {"fingerprint": self.fingerprint}),
        }

    @classmethod
    def from_dict(cls, values: Any) -> "SaeSource":
        """Inverse of `to_dict`."""
        if isinstance(values, Mapping) and "source" in values:
            values = {"path" if name == "source" else name: value for name, value in values.items()}
        return made_from(cls, values)


def _sources(values: object) -> object:
    if not isinstance(values, list | tuple):
        return values
    return tuple(value if isinstance(value, SaeSource) else SaeSource.from_dict(value) for value in values)


def _batch(values: object) -> object:
    return tuple(map(parse_edits, values)) if isinstance(values, list | tuple) else values


@checked()
class Recipe:
    """All that is needed to make one steered image again, bit for bit on the same machine.

    Rounding depends on the batch an image was made in, so the recipe holds the edits of the whole batch
    (`batch`: one tuple an image), this image's place in it (`index`), and how many steps were shared before the
    batch was spread out (`shared_steps`; those ran at batch 1).
    """

    prompt: str
    seed: Seed
    settings: Annotated[GenerationSettings, from_object(GenerationSettings)]
    flux_id: str
    saes: Annotated[tuple[SaeSource, ...], BeforeValidator(_sources)] = ()
    batch: Annotated[tuple[tuple[SteeringEdit, ...], ...], BeforeValidator(_batch)] = ((),)
    index: int = 0
    shared_steps: int = 0
    flux_revision: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    flux_weights: str | None = None
    adapters: Annotated[tuple[str, ...], FromList] | None = None
    is_exact: bool | None = None
    """False where FLUX was quantised or cached; None in recipes of before this field."""

    def __post_init__(self) -> None:
        for name, most in (("index", len(self.batch) - 1), ("shared_steps", self.settings.num_inference_steps)):
            if not 0 <= getattr(self, name) <= most:
                raise FluxSaeError(f"{name} is {getattr(self, name)}. It must be a whole number from 0 to {most}.")

    @property
    def edits(self) -> tuple[SteeringEdit, ...]:
        """This image's own edits."""
        return self.batch[self.index]

    @property
    def identity(self) -> "FluxIdentity":
        """The FLUX that made the image."""
        from fluxsae.flux.identity import FluxIdentity  # loads torch, which `--help` can do without

        return FluxIdentity(self.flux_id, self.flux_revision, self.flux_weights, self.adapters, self.is_exact)

    def differences(self, flux: "FluxIdentity", fingerprints: Mapping[str, str | None]) -> dict[Mismatch, str]:
        """What differs between where it was made and here, in words; what one side does not know is no difference.

        `fingerprints` are those of the SAEs here, by name.
        """
        from fluxsae.flux.identity import identity_differences

        found: dict[Mismatch, str] = dict(identity_differences(self.identity, flux).items())
        edited = {str(edit.hookpoint) for edits in self.batch for edit in edits}
        others = [
            name
            for source in self.saes
            if (name := str(source.hookpoint)) in edited
            and None not in (source.fingerprint, fingerprints.get(name))
            and source.fingerprint != fingerprints[name]
        ]
        if others:
            found["sae"] = f"the SAE of {', '.join(others)} is another one, whose features mean something else"
        return found

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
            "is_exact": self.is_exact,
        }

    @classmethod
    def from_dict(cls, values: Any) -> "Recipe":
        """Inverse of `to_dict`.

        Raises:
            FluxSaeError: a key is missing or unknown, a value is out of range, or the schema is another one.
        """
        if not isinstance(values, Mapping) or values.get("schema_version") != RECIPE_SCHEMA:
            raise FluxSaeError(f"{short(values)} is no recipe of schema_version {RECIPE_SCHEMA}, which is read here.")
        missing = [name for name in ("saes", "batch", "index") if name not in values]
        if missing:
            raise FluxSaeError(f"The recipe lacks {', '.join(missing)}. Give one that fluxsae wrote, unedited.")
        return made_from(cls, {name: value for name, value in values.items() if name != "schema_version"})

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
    if loaded == []:
        raise FluxSaeError(f"{path} is an empty list; give a PNG or JSON file that fluxsae wrote.")
    return [Recipe.from_dict(values) for values in (loaded if isinstance(loaded, list) else [loaded])]


def _recipe_text(path: Path) -> str:
    """By what the file holds, whatever it is called."""
    content = path.read_bytes()
    if content.startswith(b"\x89PNG") or path.suffix.lower() == ".png":
        return _png_text(path)
    try:
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return content.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise FluxSaeError(
            f"{path} is neither a PNG nor JSON text; give a PNG or JSON file that fluxsae wrote."
        ) from error


def _png_text(path: Path) -> str:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise FluxSaeError(f"{path} has {size} pixels; give an image that fluxsae wrote.")
            image.load()
            text = image.info.get(PNG_KEY)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FluxSaeError(
            f"{path} is not a readable PNG ({error}); give a PNG or JSON file that fluxsae wrote."
        ) from error
    if text is None:
        raise FluxSaeError(
            f"{path} carries no {PNG_KEY} metadata; give a PNG that fluxsae wrote, unedited, or its JSON."
        )
    return str(text)


def _region_to_json(region: Region | None) -> Any:
    if region is None:
        return None
    if isinstance(region, HeatmapRegion):
        return {"heatmap": region.threshold}
    return [[int(cell) for cell in row] for row in region]


def _loads(text: str, name: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except FluxSaeError:
        raise
    except (ValueError, RecursionError) as error:
        raise FluxSaeError(f"{name} is not valid JSON ({error}); it was {short(text)}.") from error


def _refuse_constant(constant: str) -> None:
    raise FluxSaeError(f"{constant} is not a number; give a finite one.")
