"""Files that are either whole or absent: atomic writes, and safetensors with the same bytes every time."""

import errno
import json
import mmap
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxsae.errors import FluxSaeError

_DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_NUMPY_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_MAX_HEADER_BYTES = 100_000_000


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends without an exception.

    The temporary name tells host and process, so that `remove_leftovers` finds what a killed process left.

    Raises:
        FluxSaeError: the disk is full; what was at `path` before is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        with explained_full_disk(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explained_full_disk(path: str | Path) -> Iterator[None]:
    """Says what to do where `path` cannot be written for want of room.

    Raises:
        FluxSaeError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise FluxSaeError(
                f"The disk is full: {path} could not be written. Free some space or choose another folder, "
                "then start the same command again; what is complete is kept."
            ) from error
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """The temporary files under `folder` whose process on this host has ended; they are deleted."""
    removed = []
    for path in sorted(Path(folder).rglob(".*.tmp")):
        name, _, process = path.name.removesuffix(".tmp").rpartition("-")
        if name.endswith(f".{socket.gethostname()}") and process.isdigit() and not _is_alive(int(process)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def check_free_space(folder: str | Path, needed_bytes: int, *, purpose: str) -> None:
    """Refuses work that would not fit on the disk of `folder`, before it starts.

    Raises:
        FluxSaeError: less than `needed_bytes` are free.
    """
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise FluxSaeError(
            f"{purpose} needs {needed_bytes / 1e9:.2f} GB in {folder}, but only {free / 1e9:.2f} GB are free. "
            "Free some space, choose another folder, or ask for less."
        )


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file that is whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes a UTF-8 text file that is whole or absent."""
    write_bytes(path, content.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON with a final newline; NaN and infinity are refused by a `ValueError`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FluxSaeError: the file is missing, is not JSON, or holds something other than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Check the path of the run folder, or run the stage that writes it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FluxSaeError(
            f"{path} is not valid JSON ({error}). Restore it or run the stage that writes it."
        ) from error
    if not isinstance(content, dict):
        raise FluxSaeError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


@dataclass(frozen=True)
class _Layout:
    header: bytes
    n_bytes: int
    offsets: dict[str, int]


def _layout(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> _Layout:
    """The header of a safetensors file: tensors by falling item size, then by name; metadata sorted."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    position, offsets = 0, {}
    for name in sorted(shapes, key=lambda name: (-_DTYPES[shapes[name][0]].itemsize, name)):
        dtype, shape = shapes[name]
        size = _DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        offsets[name] = position
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return _Layout(prefix, position, {name: len(prefix) + offset for name, offset in offsets.items()})


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or absent; equal tensors and metadata give equal bytes."""
    shapes = {name: (_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    layout = _layout(shapes, metadata)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(layout.header)
        for name in layout.offsets:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")


@contextmanager
def mapped_tensors(
    path: str | Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], *, metadata: Mapping[str, str] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Arrays on disk to fill row by row; the safetensors file appears at `path` when the block ends.

    `shapes` maps a name to (safetensors dtype such as "F16", shape). What is not filled is 0.
    """
    layout = _layout(shapes, metadata)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.write(layout.header)
            file.truncate(len(layout.header) + layout.n_bytes)
            if hasattr(os, "posix_fallocate") and layout.n_bytes:
                os.posix_fallocate(file.fileno(), 0, len(layout.header) + layout.n_bytes)
        arrays = {name: _map(temporary, layout.offsets[name], *shapes[name], mode="r+") for name in shapes}
        yield arrays
        for array in arrays.values():
            if isinstance(array, np.memmap):
                array.flush()


def _map(path: Path, offset: int, dtype: str, shape: tuple[int, ...], *, mode: str) -> np.ndarray:
    if dtype not in _NUMPY_DTYPES:
        raise FluxSaeError(f"{path} holds {dtype} values, which numpy cannot show. Read it with `load_tensors`.")
    if 0 in shape:
        return np.zeros(shape, _NUMPY_DTYPES[dtype])
    mapped: np.ndarray = np.memmap(path, dtype=_NUMPY_DTYPES[dtype], mode=mode, offset=offset, shape=shape)  # type: ignore[call-overload]
    return mapped


def release_pages(array: np.ndarray) -> None:
    """Lets go of the memory behind a mapped array; its values stay on disk and are paged in again when used."""
    mapping = getattr(array, "_mmap", None)
    if mapping is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    if isinstance(array, np.memmap) and array.mode != "r":
        array.flush()
    mapping.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says about itself."""

    shapes: dict[str, tuple[str, tuple[int, ...]]]
    metadata: dict[str, str]
    offsets: dict[str, int]


def read_header(path: str | Path) -> TensorHeader:
    """The names, types, shapes and metadata of a safetensors file, without its values.

    Raises:
        FluxSaeError: the file is missing, cut off, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Check the path, or run the stage that writes it.")
    try:
        return _parse_header(path)
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FluxSaeError(
            f"{path} is not a whole safetensors file ({error}). Delete it and run the stage that writes it again."
        ) from error


def _parse_header(path: Path) -> TensorHeader:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MAX_HEADER_BYTES, path.stat().st_size - 8):
            raise ValueError("its header is cut off")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    shapes = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
    for name, (dtype, shape) in shapes.items():
        start, stop = header[name]["data_offsets"]
        if dtype not in _DTYPES or stop - start != _DTYPES[dtype].itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"tensor {name!r} does not fit its shape")
        if not 0 <= start <= stop <= path.stat().st_size - 8 - length:
            raise ValueError("its values are cut off")
    return TensorHeader(shapes, metadata, {name: 8 + length + header[name]["data_offsets"][0] for name in shapes})


def map_array(path: str | Path, name: str, *, header: TensorHeader | None = None) -> np.ndarray:
    """One tensor of a safetensors file as a read-only array that is paged in as it is used."""
    header = header or read_header(path)
    if name not in header.shapes:
        raise FluxSaeError(f"{path} has no tensor {name!r}; it holds {', '.join(sorted(header.shapes))}.")
    return _map(Path(path), header.offsets[name], *header.shapes[name], mode="r")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        FluxSaeError: the file is missing, cut off, or not safetensors.
    """
    read_header(path)
    return load_file(str(path))
