"""The images of a run as typed values: prompts, seeds and thumbnails, with the one reader and writer of their file."""

import functools
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.files import atomic_path

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
        self._file = open_parquet(self.path, _IMAGE_COLUMNS)
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
    file = open_parquet(Path(path), _IMAGE_COLUMNS)
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


def open_parquet(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    """A parquet file that has these columns.

    Raises:
        FluxSaeError: it is missing, cut off, or lacks a column.
    """
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
