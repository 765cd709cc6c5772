"""Pictures from folders and parquet files, made upright, RGB and of one size; what cannot be read is named and counted.

`train.collect --pictures` and `train.score --pictures` read them with FLUX instead of generating images.
"""

import functools
import hashlib
import io
import json
import math
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from fluxsae.errors import FluxSaeError
from fluxsae.runs.prompts import prompts_in

MAX_PIXELS = 89_478_485
"""Pillow's own bound: beyond it a small file may unpack to gigabytes."""
MIN_SIDE = 32
"""Shortest side of a picture that is read, pixels: below, it would be mostly interpolation."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm")
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".eps", ".pdf", ".dng", ".cr2", ".nef", ".arw")
"""Kinds of pictures that are refused by name, and not passed over as files of another kind."""
CAPTION_COLUMNS = ("caption", "text", "prompt")
IMAGE_COLUMNS = ("image", "picture", "img", "jpg", "png", "webp")
_FORMAT_SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jfif"), "MPO": (".jpg", ".jpeg", ".jfif"), "TIFF": (".tif", ".tiff")}
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, struct.error, zlib.error)


@dataclass(frozen=True)
class OpenedPicture:
    """A picture upright and in RGB, and what had to be done for that."""

    image: Image.Image
    notes: tuple[str, ...]
    """In words, for example "turned as its EXIF says"."""


def open_picture(source: str | Path | bytes, *, name: str | None = None) -> Image.Image:
    """A picture file as FLUX reads it: upright, RGB, transparent parts white, the first frame of an animation.

    Raises:
        FluxSaeError: no picture, one that is broken, too small or too large, or of a kind that is not read.
    """
    return inspect_picture(source, name=name).image


def inspect_picture(source: str | Path | bytes, *, name: str | None = None) -> OpenedPicture:
    """As `open_picture`, with what was done."""
    if isinstance(source, bytes):
        name, content = name or "the picture", source
    else:
        name, content = name or str(source), _read_bytes(Path(source))
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image, name)
            image.load()
            return _as_rgb(image, name)
    except FluxSaeError:
        raise
    except UnidentifiedImageError as error:
        raise FluxSaeError(
            f"{name} is no picture of a kind that is read ({', '.join(FORMATS)}). Convert it."
        ) from error
    except Image.DecompressionBombError as error:
        raise FluxSaeError(f"{name} is too large: {error} Scale it down to {MAX_PIXELS:,} pixels or fewer.") from error
    except _BROKEN as error:
        raise FluxSaeError(f"{name} is broken or cut off ({error}). Fetch or save it again.") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FluxSaeError(f"{path} cannot be read ({error.strerror}). Check the path.") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise FluxSaeError(
            f"{name} is too large: {width} x {height} pixels. Scale it down to {MAX_PIXELS:,} pixels or fewer."
        )
    if min(width, height) < MIN_SIDE:
        raise FluxSaeError(f"{name} is too small: {width} x {height} pixels. Each side has at least {MIN_SIDE}.")


def _as_rgb(image: Image.Image, name: str) -> OpenedPicture:
    notes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        notes.append("first frame of an animation")
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        notes.append("turned as its EXIF says")
    if upright.mode.startswith(("I", "F")):
        upright = _to_eight_bits(upright, name)
        notes.append("16 bits to 8")
    if upright.mode == "CMYK":
        notes.append("CMYK to RGB")
    if upright.has_transparency_data:
        upright = _over_white(upright)
        notes.append("transparent parts made white")
    if upright.mode in ("L", "1"):
        notes.append("gray to RGB")
    return OpenedPicture(_to_srgb(upright, notes), tuple(notes))


def _to_eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 0xFFFF:
        raise FluxSaeError(
            f"{name} has values of {values.min():g} to {values.max():g}, whose white is unknown (mode {image.mode}). "
            "Save it with 8 or 16 bits a channel."
        )
    return Image.fromarray(((values.astype(np.uint32) * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    clear = image.convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    on_white.info = {key: value for key, value in image.info.items() if key == "icc_profile" and image.mode != "CMYK"}
    return on_white


def _to_srgb(image: Image.Image, notes: list[str]) -> Image.Image:
    """RGB in sRGB, where the picture carries a colour profile that fits its mode."""
    profile = image.info.get("icc_profile")
    if profile and image.mode in ("RGB", "CMYK", "L"):
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            made = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("unfit colour profile left out")
        else:
            assert made is not None
            made.info = {}
            return made
    converted = image.convert("RGB")
    converted.info = {}
    return converted


def fit_picture(image: Image.Image, *, height: int, width: int) -> Image.Image:
    """The middle of the picture in the shape asked for, scaled to `width` x `height` pixels."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def describe_fit(size: tuple[int, int], *, height: int, width: int) -> tuple[str, ...]:
    """What `fit_picture` does to a picture of this size (width, height), in words; empty where it fits already."""
    if size == (width, height):
        return ()
    scale = max(width / size[0], height / size[1])
    lost = 1 - width * height / (size[0] * size[1] * scale * scale)
    words = ["enlarged" if scale > 1 else "scaled down"] if not math.isclose(scale, 1.0) else []
    return (*words, *(["cropped"] if lost > 1e-3 else []))


@dataclass(frozen=True)
class PictureEntry:
    """One picture of a source that can be read."""

    name: str
    """Its path in the folder, or the parquet file and row."""
    caption: str
    """Empty where it has none."""
    digest: str
    """sha256 of the file's bytes."""
    size: tuple[int, int]
    """Width and height as stored upright, pixels."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A picture that is left out, and why."""

    name: str
    kind: str
    """In a word or two, for counting: "double", "broken", "too small", ..."""
    reason: str


@dataclass(frozen=True, eq=False)
class PictureSet:
    """Pictures of one source that can be read, each at the same size."""

    path: Path
    height: int
    width: int
    entries: tuple[PictureEntry, ...]
    refusals: tuple[Refusal, ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def picture(self, index: int) -> Image.Image:
        """The picture, upright, RGB, cropped and scaled.

        Raises:
            FluxSaeError: its bytes are not those that were found at first.
        """
        entry = self.entries[index]
        content = _content(self.path, entry.name)
        if hashlib.sha256(content).hexdigest() != entry.digest:
            raise FluxSaeError(
                f"{entry.name} has changed since {self.path} was looked through. Start the command again."
            )
        return fit_picture(open_picture(content, name=entry.name), height=self.height, width=self.width)

    def take(self, indices: Sequence[int]) -> "PictureSet":
        """Some of the pictures, in the order given; one may come several times."""
        return PictureSet(self.path, self.height, self.width, tuple(self.entries[i] for i in indices), self.refusals)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values for the run's record: counts of what was found, done and left out, and why."""
        size = {"height": self.height, "width": self.width}
        done = Counter(note for e in self.entries for note in (*e.notes, *describe_fit(e.size, **size)))
        return {
            "name": self.path.name,
            "pictures": len(self.entries),
            "with_caption": sum(bool(entry.caption) for entry in self.entries),
            "changed": dict(sorted(done.items())),
            "refused": dict(sorted(Counter(refusal.kind for refusal in self.refusals).items())),
        }

    def report(self) -> str:
        """What was found, done and left out, in lines for people; refused pictures by name, at most ten."""
        about = self.describe()
        lines = [f"{about['pictures']} pictures in {self.path}, {about['with_caption']} with a caption"]
        lines += [f"  {count} {note}" for note, count in about["changed"].items()]
        lines += [f"  left out: {count} {kind}" for kind, count in about["refused"].items()]
        lines += [f"    {refusal.reason}" for refusal in self.refusals[:10]]
        if len(self.refusals) > 10:
            lines.append(f"    ... and {len(self.refusals) - 10} more")
        return "\n".join(lines)


def load_pictures(path: str | Path, *, height: int, width: int, caption_column: str | None = None) -> PictureSet:
    """The pictures of a folder, of a parquet file, or of a folder of parquet files (a downloaded Hub dataset).

    Captions come from `name.txt` beside `name.jpg`, from `metadata.jsonl` (`file_name` and a caption), or from a
    column; a picture without one is read without a prompt. Every picture is decoded once: those that cannot be read,
    and every double but the first, are left out with a reason.

    Raises:
        FluxSaeError: nothing there, no picture that can be read, no such column, or several that may be meant.
    """
    path = Path(path)
    entries: list[PictureEntry] = []
    refusals: list[Refusal] = []
    first_names: dict[str, str] = {}
    for name, content, caption in _iter_source(path, caption_column):
        digest = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else ""
        if digest in first_names:
            refusals.append(Refusal(name, "double", f"{name} is the same file as {first_names[digest]}."))
            continue
        try:
            if isinstance(content, FluxSaeError):
                raise content
            opened = inspect_picture(content, name=name)
            text = next(prompts_in(caption, where=f"The caption of {name}"), "")  # the first of those given
        except FluxSaeError as error:
            refusals.append(Refusal(name, _kind_of(str(error)), str(error)))
            continue
        first_names[digest] = name
        misnamed = _misnamed(name, content)
        entries.append(PictureEntry(name, text, digest, opened.image.size, opened.notes + misnamed))
    if not entries:
        detail = f" {len(refusals)} were left out; the first: {refusals[0].reason}" if refusals else ""
        raise FluxSaeError(
            f"{path} holds no picture that can be read.{detail} Give a folder of {', '.join(SUFFIXES)}, a .parquet "
            "file with a column of pictures, or a folder of such files."
        )
    return PictureSet(path, height, width, tuple(entries), tuple(refusals))


def fingerprint(path: str | Path) -> str:
    """A hash of a source's files by name and size, wherever it lies: another one means other pictures or captions.

    Raises:
        FluxSaeError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise _nothing_at(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
    lines = [f"{file.relative_to(path).as_posix()} {file.stat().st_size}" for file in files]
    return hashlib.sha256("\n".join(lines or [str(path.stat().st_size)]).encode("utf-8", "surrogateescape")).hexdigest()


def _kind_of(reason: str) -> str:
    for kind in ("broken or cut off", "too small", "too large", "no picture of a kind that is read", "caption"):
        if kind in reason:
            return "unfit caption" if kind == "caption" else kind
    return "unreadable"


def _misnamed(name: str, content: bytes) -> tuple[str, ...]:
    """A note where the file's name says another format than its content; the content counts."""
    suffix = Path(name).suffix.lower()
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        kind = str(image.format)
    right = _FORMAT_SUFFIXES.get(kind, (f".{kind.lower()}", ".apng" if kind == "PNG" else ""))
    return (f"{suffix} that holds {kind}",) if suffix in SUFFIXES and suffix not in right else ()


_Found = tuple[str, bytes | FluxSaeError, object]
"""A picture's name, its bytes (or why there are none) and its caption as it stands there."""


def _iter_source(path: Path, caption_column: str | None) -> Iterator[_Found]:
    if path.is_file() and path.suffix == ".parquet":
        yield from _iter_parquet(path, path, caption_column)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if not _is_hidden(file, path))
        tables = [file for file in files if file.suffix == ".parquet"]
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES + UNREAD_SUFFIXES and file.is_file()]
        if pictures:
            yield from _iter_folder(path, pictures, caption_column)
        for table in [] if pictures else tables:
            yield from _iter_parquet(path, table, caption_column)
    else:
        raise _nothing_at(path)


def _nothing_at(path: Path) -> FluxSaeError:
    return FluxSaeError(
        f"There are no pictures at {path}. Give a folder or a .parquet file; a Hub dataset is fetched with "
        "`hf download --repo-type dataset user/name --local-dir FOLDER`, and FOLDER given here."
    )


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in file.relative_to(folder).parts)


def _iter_folder(folder: Path, files: Sequence[Path], caption_column: str | None) -> Iterator[_Found]:
    listed = _metadata_captions(folder, caption_column)
    for file in files:
        name = file.relative_to(folder).as_posix()
        sidecar = file.with_suffix(".txt")
        caption = sidecar.read_bytes() if sidecar.is_file() else listed.get(name)
        try:
            yield name, _read_bytes(file), caption
        except FluxSaeError as error:
            yield name, error, caption


def _metadata_captions(folder: Path, caption_column: str | None) -> dict[str, object]:
    """Captions by path from every `metadata.jsonl`, whose `file_name` counts from its own folder."""
    captions: dict[str, object] = {}
    for file in sorted(folder.rglob("metadata.jsonl")):
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
        for number, line in enumerate(lines, start=1):
            where = f"{file.name} line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise FluxSaeError(f"{where} is not valid JSON ({error}). Mend or remove the line.") from error
            if not isinstance(values, dict) or not isinstance(values.get("file_name"), str):
                raise FluxSaeError(f"{where} has no file_name. Write the picture's path there, relative to this file.")
            column = _caption_column(list(values), caption_column, where=where)
            name = Path(os.path.relpath(file.parent / values["file_name"], folder)).as_posix()
            captions[name] = values[column] if column else None
    return captions


def _caption_column(present: Sequence[str], asked: str | None, *, where: str) -> str | None:
    if asked is not None:
        if asked not in present:
            raise FluxSaeError(f"{where} has no column {asked!r}; it has {', '.join(present)}. Name one of them.")
        return asked
    found = [name for name in CAPTION_COLUMNS if name in present]
    if len(found) > 1:
        raise FluxSaeError(f"{where} has several captions: {', '.join(found)}. Name one with --caption-column.")
    return found[0] if found else None


def _iter_parquet(root: Path, path: Path, caption_column: str | None) -> Iterator[_Found]:
    file = _open_table(path)
    image_column = _image_column(file.schema_arrow, path)
    column = _caption_column(file.schema_arrow.names, caption_column, where=path.name)
    columns = [image_column, *([column] if column else [])]
    row = 0
    for batch in file.iter_batches(batch_size=16, columns=columns):
        for values in batch.to_pylist():
            name = _row_name(root, path, row)
            row += 1
            try:
                yield name, _cell_bytes(values[image_column], path, name), values[column] if column else None
            except FluxSaeError as error:
                yield name, error, None


def _open_table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FluxSaeError(f"{path} is not a whole parquet file ({error}). Fetch it again.") from error


def _image_column(schema: pa.Schema, path: Path) -> str:
    """The column that holds pictures: {bytes, path} as the Hub's datasets have them, or plain bytes."""

    def holds_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    found = [field.name for field in schema if holds_bytes(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found] or found
    if len(named) != 1:
        raise FluxSaeError(
            f"{path} has {len(named) or 'no'} columns of pictures among {', '.join(schema.names)}. One is needed, of "
            f"bytes or of the Hub's image kind, called {IMAGE_COLUMNS[0]} where there are several."
        )
    return named[0]


def _cell_bytes(value: Any, path: Path, name: str) -> bytes:
    if isinstance(value, Mapping):
        beside = value.get("path")
        if value.get("bytes") is None and isinstance(beside, str):
            return _read_bytes(path.parent / Path(beside).name)
        value = value.get("bytes")
    if not value:
        raise FluxSaeError(f"{name} holds no picture: the cell is empty.")
    return bytes(value)


def _row_name(root: Path, path: Path, row: int) -> str:
    file = path.name if root == path else path.relative_to(root).as_posix()
    return f"{file}#{row}"


def _content(root: Path, name: str) -> bytes:
    """A picture's bytes, read again by its name."""
    table, sign, row = name.rpartition("#")
    if not sign or not table.endswith(".parquet"):
        return _read_bytes(root / name)
    path = root if root.is_file() else root / table
    return _cell_bytes(_row_group_cell(path, int(row)), path, name)


def _row_group_cell(path: Path, row: int) -> Any:
    starts = _group_starts(path)
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return _group_cells(path, group)[row - int(starts[group])].as_py()


@functools.lru_cache(maxsize=64)
def _group_starts(path: Path) -> np.ndarray:
    metadata = _open_table(path).metadata
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes)])


@functools.lru_cache(maxsize=2)
def _group_cells(path: Path, group: int) -> Any:
    file = _open_table(path)
    column = _image_column(file.schema_arrow, path)
    return file.read_row_group(group, columns=[column])[column]
