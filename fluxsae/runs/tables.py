"""The tables of a run as typed values, each with the one reader and writer of its file format."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float

from fluxsae.errors import FluxSaeError, maker
from fluxsae.files import atomic_path, load_tensors, map_array, read_header, save_tensors
from fluxsae.runs.heatmaps import HEATMAPS_SCHEMA, Heatmaps
from fluxsae.runs.images import ImageRow, ImageTable, encode_webp, iter_image_rows, open_parquet, write_images
from fluxsae.runs.names import SaeName

__all__ = [
    "HEATMAPS_SCHEMA", "Embeddings", "FeatureRow", "FeatureTable", "Heatmaps", "ImageRow", "ImageTable", "encode_webp",
    "iter_image_rows", "load_directions", "load_given_labels", "load_lines", "write_images",
]  # fmt: skip

_FEATURE_COLUMNS = ("feature", "feature_class", "density", "mean_act", "max_act")


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
        return cls(open_parquet(Path(path), _FEATURE_COLUMNS).read())

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

    @property
    def sae_fingerprint(self) -> str | None:
        """Of the SAE whose features these are; None in tables of before it was kept."""
        found = (self.table.schema.metadata or {}).get(b"sae_fingerprint")
        return None if found is None else bytes(found).decode()

    def _metadata(self, key: str) -> str:
        found = (self.table.schema.metadata or {}).get(key.encode())
        if found is None:
            raise FluxSaeError(f"The feature table lacks its {key}. Make it again: {maker('analyze')}.")
        return bytes(found).decode()


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
