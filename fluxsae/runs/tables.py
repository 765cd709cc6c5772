"""The tables of a run as typed values, each with the one reader and writer of its file format."""

import csv
import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image

from fluxsae.errors import FluxSaeError, maker
from fluxsae.files import atomic_path, load_tensors, map_array, read_header, save_tensors
from fluxsae.runs.names import SaeName

_IMAGE_ROW_GROUP = 128
_THUMBNAIL_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_IMAGE_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("thumbnail", _THUMBNAIL_TYPE),
        ("source", pa.string()),
    ]
)
_IMAGE_COLUMNS = _IMAGE_SCHEMA.names[:-1]  # runs scored before pictures could be read have no source
# What the `datasets` library and the Hub's viewer read to show the thumbnails as pictures.
_HUGGINGFACE = {
    "info": {
        "features": {
            "image_id": {"dtype": "int64", "_type": "Value"},
            "prompt": {"dtype": "string", "_type": "Value"},
            "seed": {"dtype": "int64", "_type": "Value"},
            "thumbnail": {"_type": "Image"},
            "source": {"dtype": "string", "_type": "Value"},
        }
    }
}
_FEATURE_COLUMNS = ("feature", "feature_class", "density", "mean_act", "max_act")


@dataclass(frozen=True)
class ImageRow:
    """One scored image: its id is its row in S; prompt and seed identify it, or the picture it was read from."""

    image_id: int
    prompt: str
    seed: int
    thumbnail: bytes
    """The picture as webp."""
    source: str | None = None
    """Name of the picture that was read (its path, or file and row); None for a generated image."""

    def picture(self) -> Image.Image:
        """The thumbnail decoded."""
        return Image.open(io.BytesIO(self.thumbnail)).convert("RGB")


def encode_webp(image: Image.Image, *, longest_side: int, quality: int = 90) -> bytes:
    """The image as webp, no side longer than `longest_side` pixels."""
    small = image.convert("RGB")
    if max(small.size) > longest_side:
        small.thumbnail((longest_side, longest_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


class ImageTable:
    """`images.parquet`: prompts and seeds in memory, thumbnails read as they are asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = _open_parquet(self.path, _IMAGE_COLUMNS)
        names = ["image_id", "prompt", "seed", "source"]
        light = self._file.read(columns=[name for name in names if name in self._file.schema_arrow.names])
        self.image_ids: list[int] = light["image_id"].to_pylist()
        self.prompts: list[str] = light["prompt"].to_pylist()
        self.seeds: list[int] = light["seed"].to_pylist()
        has_source = "source" in light.column_names
        self.sources: list[str | None] = light["source"].to_pylist() if has_source else [None] * len(self.prompts)
        if self.image_ids != list(range(len(self.image_ids))):
            raise FluxSaeError(f"{self.path} must list image ids 0, 1, 2, ... in order. Score the images again.")
        sizes = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(sizes)])
        self._group = functools.lru_cache(maxsize=8)(self._read_group)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, image_id: int) -> ImageRow:
        thumbnail = self.thumbnail(image_id)
        return ImageRow(image_id, self.prompts[image_id], self.seeds[image_id], thumbnail, self.sources[image_id])

    def __iter__(self) -> Iterator[ImageRow]:
        return (self[image_id] for image_id in self.image_ids)

    @property
    def subjects(self) -> list[str]:
        """What tells images apart where one prompt's, or one picture's, count once: the source, else the prompt."""
        return [source or prompt for source, prompt in zip(self.sources, self.prompts, strict=True)]

    def thumbnail(self, image_id: int) -> bytes:
        """The webp bytes of one image.

        Raises:
            FluxSaeError: there is no such image.
        """
        if not 0 <= image_id < len(self):
            raise FluxSaeError(f"Image id {image_id} is not in this run; ids go from 0 to {len(self) - 1}.")
        group = int(np.searchsorted(self._group_starts, image_id, side="right")) - 1
        return self._group(group)[image_id - int(self._group_starts[group])]

    def picture(self, image_id: int) -> Image.Image:
        """One thumbnail decoded."""
        return Image.open(io.BytesIO(self.thumbnail(image_id))).convert("RGB")

    def _read_group(self, group: int) -> list[bytes]:
        return [
            entry["bytes"] for entry in self._file.read_row_group(group, columns=["thumbnail"])["thumbnail"].to_pylist()
        ]


def iter_image_rows(path: str | Path) -> Iterator[ImageRow]:
    """The rows of an images file, whatever their ids, a group at a time."""
    file = _open_parquet(Path(path), _IMAGE_COLUMNS)
    for group in range(file.num_row_groups):
        for row in file.read_row_group(group).to_pylist():
            yield ImageRow(row["image_id"], row["prompt"], row["seed"], row["thumbnail"]["bytes"], row.get("source"))


def write_images(path: str | Path, rows: Iterable[ImageRow]) -> None:
    """Writes `images.parquet` from rows in the order of their ids, streaming."""
    schema = _IMAGE_SCHEMA.with_metadata({"huggingface": json.dumps(_HUGGINGFACE)})
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        remaining = iter(rows)
        while group := list(itertools.islice(remaining, _IMAGE_ROW_GROUP)):
            writer.write_table(_image_group(group, schema))


def _image_group(rows: Sequence[ImageRow], schema: pa.Schema) -> pa.Table:
    thumbnails = [{"bytes": row.thumbnail, "path": f"{row.image_id:06d}.webp"} for row in rows]
    plain = [[getattr(row, name) for row in rows] for name in ("image_id", "prompt", "seed", "source")]
    columns = [*plain[:3], thumbnails, plain[3]]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _open_parquet(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Check the run folder, or run the stage that writes it.")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FluxSaeError(
            f"{path} is not a whole parquet file ({error}). Run the stage that writes it again."
        ) from error
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise FluxSaeError(f"{path} lacks the columns {', '.join(missing)}. Run the stage that writes it again.")
    return file


@dataclass(frozen=True)
class FeatureRow:
    """One feature's line in `features.parquet`. A new column is a field here.

    `features/analysis.py` fills it with what scores tell, or `train/select.py` with names, which are None until then.
    """

    feature: int
    feature_class: str
    """dead, rare, common or very common, by density."""
    density: float
    """Share of scored tokens with acts > 0."""
    image_density: float
    """Share of images with S > 0."""
    mean_act: float
    """Mean of the acts > 0."""
    max_act: float
    quantiles: list[float]
    """Of the acts > 0, at `FeatureTable.quantile_levels`; from a histogram, exact to its bins of 19 %."""
    spatial_spread: float
    """Entropy of where it fires on a coarse grid, as a fraction of the uniform: 0 one place, 1 everywhere alike."""
    step_profile: list[float]
    """Mean activation per token, step by step of the captured steps."""
    histogram: list[int]
    """Counts of acts > 0 in log-spaced bins."""
    top_images: list[int]
    """Ids of the images with the highest S > 0, highest first, ties to the lower id."""
    top_scores: list[float]
    top_tokens: list[int]
    """The token with the highest activation in each top image."""
    neighbours: list[int]
    """Features that fire on the same images, nearest first."""
    neighbour_similarities: list[float]
    family: int
    """Number of the group of features that fire together; -1 for a feature on its own."""
    coherence: float | None = None
    p_value: float | None = None
    q_value: float | None = None
    is_coherent: bool | None = None
    monosemanticity: float | None = None
    label: str | None = None
    label_confidence: float | None = None
    """How far to trust the label where the feature fires, weighted by how strongly (older runs: at its strongest)."""
    label_curve: list[float] | None = None
    """How far to trust the label at 0, 10, ..., 100 % of `max_act`: 0 is chance, 1 certainty."""
    label_by: str | None = None
    """"person" where labels.csv gives the label; never stored."""
    caption_words: list[str] | None = None
    """Words of captions that stand out on its images, the first one first."""
    clip_phrases: list[str] | None = None
    """Phrases that CLIP finds in its images, the first one first."""
    silent_images: list[int] | None = None
    """Ids of images that look like its top images to CLIP, and on which it is silent."""
    name_p_value: float | None = None
    """Chance that the label fits random held-out images as well: a permutation test of one name."""
    name_q_value: float | None = None
    """The false discovery rate at which the label is kept among those of all features."""
    name_base: float | None = None
    """Share of all held-out images whose captions hold the label; None where captions never do."""
    name_precision: list[float] | None = None
    """Share of held-out images scored near 0, 10, ..., 100 % of `max_act` whose captions hold the label."""
    name_recall: list[float] | None = None
    """Share of the held-out images whose captions hold the label that score at least so much."""
    level_images: list[list[int]] | None = None
    """Ids of some held-out images on which it fires strongly, less, and weakly."""
    level_counts: list[int] | None = None
    """Held-out images of each of these three levels."""
    level_precision: list[float | None] | None = None
    """Share of them whose captions hold the label."""
    name_place: str | None = None
    """Where it fires beside what the label names ("inside", "below", ...); None where no masks are known."""
    name_place_share: float | None = None
    """Share of held-out images in which it fires there most."""
    patch_share: float | None = None
    """Mean share of the patches on which it fires, in images where it fires."""
    centre_share: float | None = None
    """Share of its activation in the middle quarter of images."""
    border_share: float | None = None
    """Share of its activation in the outermost eighth on each side."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns that this class does not name."""


_OF_FOUND_NAMES = (
    "name_p_value", "name_q_value", "name_base", "name_precision", "name_recall", "level_precision", "name_place",
    "name_place_share",
)  # fmt: skip
"""Columns about a name that was found and checked; they say nothing of one that a person gave."""


class FeatureTable:
    """`features.parquet`: one row a feature, in order, as columns that stages may add to."""

    def __init__(self, table: pa.Table) -> None:
        missing = [name for name in _FEATURE_COLUMNS if name not in table.column_names]
        if missing:
            raise FluxSaeError(
                f"A feature table needs the columns {', '.join(missing)}. Make it again: {maker('analyze')}."
            )
        if table["feature"].to_pylist() != list(range(table.num_rows)):
            raise FluxSaeError(f"A feature table needs one row a feature, in order. Make it again: {maker('analyze')}.")
        self.table = table

    @classmethod
    def from_rows(cls, rows: Sequence[FeatureRow], *, metadata: Mapping[str, str] | None = None) -> "FeatureTable":
        """A table with every field of the rows as a column; fields that are None everywhere are left out."""
        names = [name for name in FeatureRow.__dataclass_fields__ if name != "extra"]
        columns = {name: [getattr(row, name) for row in rows] for name in names}
        filled = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        return cls(pa.table(filled).replace_schema_metadata(dict(metadata or {}) or None))

    @classmethod
    def load(cls, path: str | Path) -> "FeatureTable":
        """The table in a parquet file."""
        return cls(_open_parquet(Path(path), _FEATURE_COLUMNS).read())

    def save(self, path: str | Path) -> None:
        """Writes the parquet file, whole or absent."""
        with atomic_path(path) as temporary:
            pq.write_table(self.table, temporary, compression="zstd")

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __contains__(self, name: str) -> bool:
        return name in self.table.column_names

    def __getitem__(self, feature: int) -> FeatureRow:
        if not 0 <= feature < len(self):
            raise FluxSaeError(f"Feature {feature} does not exist; features go from 0 to {len(self) - 1}.")
        values = {name: self.table[name][feature].as_py() for name in self.table.column_names}
        known = {name: values.pop(name) for name in list(values) if name in FeatureRow.__dataclass_fields__}
        return FeatureRow(**known, extra=values)

    def __iter__(self) -> Iterator[FeatureRow]:
        return (self[feature] for feature in range(len(self)))

    def column(self, name: str) -> np.ndarray:
        """One column as an array (of objects, where its values are lists or text)."""
        if name not in self.table.column_names:
            raise FluxSaeError(f"There is no column {name!r}; there are {', '.join(self.table.column_names)}.")
        values = self.table[name].to_pylist()
        if values and isinstance(next((v for v in values if v is not None), None), list | str):
            array = np.empty(len(values), dtype=object)
            array[:] = values
            return array
        return np.asarray(values)

    def with_columns(self, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> "FeatureTable":
        """The table with columns added, or replaced where the name exists."""
        table = self.table
        for name, values in columns.items():
            array = pa.array(values.tolist() if isinstance(values, np.ndarray) else list(values))
            position = table.column_names.index(name) if name in table.column_names else -1
            table = table.append_column(name, array) if position < 0 else table.set_column(position, name, array)
        return FeatureTable(table)

    def with_given_labels(self, labels: Mapping[int, str], source: str) -> "FeatureTable":
        """The table with labels that a person gave, trusted fully; an empty one takes the name away.

        Raises:
            FluxSaeError: a feature that does not exist; `source` is named.
        """
        if not labels:
            return self
        beyond = [feature for feature in labels if feature >= len(self)]
        if beyond:
            raise FluxSaeError(f"{source} names feature {beyond[0]}; features go from 0 to {len(self) - 1}.")
        given: dict[str, list[Any]] = {
            name: self.table[name].to_pylist() if name in self else [None] * len(self)
            for name in ("label", "label_confidence", "label_curve", *(n for n in _OF_FOUND_NAMES if n in self))
        }
        given["label_by"] = [None] * len(self)
        for feature, text in labels.items():
            own = {"label": text or None, "label_confidence": 1.0 if text else None, "label_by": "person"}
            for name, values in given.items():
                values[feature] = own.get(name)
        return self.with_columns(given)

    @property
    def quantile_levels(self) -> list[float]:
        """The levels of the column `quantiles`."""
        return [float(level) for level in json.loads(self._metadata("quantile_levels"))]

    @property
    def steps(self) -> list[int]:
        """The steps of the column `step_profile`."""
        return [int(step) for step in json.loads(self._metadata("steps"))]

    @property
    def histogram_edges(self) -> list[float]:
        """The edges of the bins of the column `histogram`, in activation units."""
        return [float(edge) for edge in json.loads(self._metadata("histogram_edges"))]

    def _metadata(self, key: str) -> str:
        found = (self.table.schema.metadata or {}).get(key.encode())
        if found is None:
            raise FluxSaeError(f"The feature table lacks its {key}. Make it again: {maker('analyze')}.")
        return bytes(found).decode()


HEATMAPS_SCHEMA = 2
"""Version 1 held every token of every map; it is still read."""


@dataclass(frozen=True)
class Heatmaps:
    """`heatmaps.safetensors`: acts of the alive features on the tokens of their top images, 8 bits an act.

    Map m = position * top + rank holds the entries `starts[m]` to `starts[m + 1]` - 1. An entry is the distance to the
    token of the entry before (to token -1 for the first) and a level; a distance above 255 passes entries of level 0.
    """

    features: Int[np.ndarray, " alive"]
    image_ids: Int[np.ndarray, "alive top"]
    """-1 where a feature fires on fewer images."""
    starts: Int[np.ndarray, " maps_and_end"]
    steps: UInt8[np.ndarray, " entries"]
    levels: UInt8[np.ndarray, " entries"]
    scale: Float[np.ndarray, " alive"]
    """Activation that 255 stands for: the feature's run-wide maximum."""
    rows: int
    cols: int

    @classmethod
    def load(cls, path: str | Path) -> "Heatmaps":
        """The heatmaps of a file; entries are paged in as they are used.

        Raises:
            FluxSaeError: missing, cut off, or written by a newer version of this program.
        """
        header = read_header(path)
        version = int(header.metadata.get("schema_version", "1"))
        if version > HEATMAPS_SCHEMA:
            raise FluxSaeError(
                f"{path} was written with schema version {version}; this program reads up to {HEATMAPS_SCHEMA}. "
                "Update fluxsae."
            )
        arrays = {name: map_array(path, name, header=header) for name in ("features", "image_ids", "scale")}
        if version == 1:
            arrays |= _dense_entries(map_array(path, "values", header=header))
        else:
            arrays |= {name: map_array(path, name, header=header) for name in ("starts", "steps", "levels")}
        return cls(**arrays, rows=int(header.metadata["rows"]), cols=int(header.metadata["cols"]))

    def acts(self, feature: int) -> dict[int, Float[np.ndarray, " tokens"]]:
        """Image id -> acts of the feature on that image's tokens, best image first; empty for a dead feature."""
        position = int(np.searchsorted(self.features, feature))
        if position == len(self.features) or self.features[position] != feature:
            return {}
        unit = np.float32(self.scale[position]) / np.float32(255)
        ids, first = self.image_ids[position], position * self.image_ids.shape[1]
        return {int(i): self._levels(first + rank).astype(np.float32) * unit for rank, i in enumerate(ids) if i >= 0}

    def fits(self) -> bool:
        """Whether there is a map for each image id, and every map ends within the grid."""
        if len(self.starts) != self.image_ids.size + 1 or len(self.steps) != len(self.levels):
            return False
        if self.starts[0] != 0 or self.starts[-1] != len(self.steps) or (np.diff(self.starts) < 0).any():
            return False
        begins = self.starts[:-1][np.diff(self.starts) > 0]
        walked = np.add.reduceat(self.steps, begins, dtype=np.int64) if len(begins) else begins
        return bool((walked <= self.rows * self.cols).all() and np.all(self.steps))

    def _levels(self, place: int) -> UInt8[np.ndarray, " tokens"]:
        own = slice(int(self.starts[place]), int(self.starts[place + 1]))
        levels = np.zeros(self.rows * self.cols, dtype=np.uint8)
        levels[np.cumsum(self.steps[own], dtype=np.int64) - 1] = self.levels[own]
        return levels


def _dense_entries(values: UInt8[np.ndarray, "alive top tokens"]) -> dict[str, np.ndarray]:
    """Maps of every token, as entries of distance 1."""
    n_tokens = values.shape[2]
    starts = np.arange(values.shape[0] * values.shape[1] + 1) * n_tokens
    steps = np.broadcast_to(np.ones(1, dtype=np.uint8), values.size)
    return {"starts": starts, "steps": steps, "levels": values.reshape(-1)}


@dataclass(frozen=True)
class Embeddings:
    """`embeddings.safetensors`: one unit vector an image, and the model that made it."""

    vectors: Float[np.ndarray, "images d"]
    model: str

    @classmethod
    def load(cls, path: str | Path) -> "Embeddings":
        """The embeddings of a file."""
        return cls(np.asarray(map_array(path, "embeddings")), read_header(path).metadata["model"])

    def save(self, path: str | Path) -> None:
        """Writes the file as fp16, whole or absent."""
        vectors = torch.from_numpy(np.ascontiguousarray(self.vectors, dtype=np.float16))
        save_tensors(path, {"embeddings": vectors}, metadata={"model": self.model})


def load_given_labels(path: str | Path, names: Sequence[str]) -> dict[str, dict[int, str]]:
    """Labels that people gave, by SAE and feature, from a CSV file with the columns hookpoint, feature and label.

    Raises:
        FluxSaeError: a column is missing, or a line names no SAE of `names` or no feature, or one a second time.
    """
    found: dict[str, dict[int, str]] = {}
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in ("hookpoint", "feature", "label") if name not in (reader.fieldnames or ())]
        if missing:
            raise FluxSaeError(f"{path} lacks {', '.join(missing)}. Its first line must be: hookpoint,feature,label")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            name, number, label = ((row[column] or "").strip() for column in ("hookpoint", "feature", "label"))
            name = str(SaeName.parse(name))  # such as layer15
            if name not in names:
                raise FluxSaeError(f"{where}: this run has no SAE {name}; it has {', '.join(names)}.")
            if not number.isdecimal() or int(number) in found.get(name, {}):
                raise FluxSaeError(f"{where}: feature is {number!r}; it must be a whole number from 0, once an SAE.")
            found.setdefault(name, {})[int(number)] = " ".join(label.split())
    return found


def load_directions(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a directions file: `neighbours`, `similarities` (n_features, n), `positions` (n_features, 2)."""
    tensors = load_tensors(path)
    missing = [name for name in ("neighbours", "similarities", "positions") if name not in tensors]
    if missing:
        raise FluxSaeError(f"{path} lacks {', '.join(missing)}. Make it again: {maker('directions')}.")
    return tensors


def load_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none where there is no file.

    Raises:
        FluxSaeError: a line is no JSON object, as in a file that was cut off.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FluxSaeError(
            f"{path} is not valid JSON ({error}). Restore it or run the stage that writes it."
        ) from error
    if not all(isinstance(line, dict) for line in found):
        raise FluxSaeError(f"{path} must hold a JSON object a line. Restore it or run the stage that writes it.")
    return found
