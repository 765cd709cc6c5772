"""Prompt files and sampling from them."""

import csv
import random
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from fluxsae.errors import FluxSaeError

MAX_PROMPT_CHARACTERS = 2000
_SUFFIXES = (".txt", ".csv", ".parquet")


def load_prompts(path: str | Path, *, column: str = "prompt") -> list[str]:
    """The distinct prompts of a file, in its order.

    `.txt`: one prompt a line, lines that start with # are comments. `.csv` and `.parquet`: the values of `column`.

    Raises:
        FluxSaeError: the file is missing, of another kind, has no such column, holds none, or one that is too long.
    """
    path = Path(path)
    if not path.is_file():
        raise FluxSaeError(f"There is no prompt file {path}. Give a {', '.join(_SUFFIXES)} file.")
    if path.suffix not in _SUFFIXES:
        raise FluxSaeError(
            f"{path} is no prompt file: its name ends in {path.suffix!r}, allowed are {', '.join(_SUFFIXES)}."
        )
    try:
        raw = _read_txt(path) if path.suffix == ".txt" else _read_column(path, column)
    except UnicodeDecodeError as error:
        raise FluxSaeError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    prompts = unique_prompts(raw)
    if not prompts:
        raise FluxSaeError(f"{path} holds no prompt. Write one prompt a line, or name the column that holds them.")
    return prompts


def _read_txt(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def _read_column(path: Path, column: str) -> list[str]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_column(path, column, list(reader.fieldnames or []))
            return [row[column] or "" for row in reader]
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise FluxSaeError(f"{path} is not a whole parquet file ({error}).") from error
    _check_column(path, column, file.schema_arrow.names)
    return [str(value) for value in file.read(columns=[column])[column].to_pylist() if value is not None]


def _check_column(path: Path, column: str, present: list[str]) -> None:
    if column not in present:
        raise FluxSaeError(f"{path} has no column {column!r}; it has {', '.join(present) or 'none'}. Name one of them.")


def unique_prompts(prompts: Iterable[str]) -> list[str]:
    """The prompts without blank ones and repetitions (case and spacing aside), first spelling kept, in order.

    Raises:
        FluxSaeError: a prompt is longer than `MAX_PROMPT_CHARACTERS`.
    """
    kept: dict[str, str] = {}
    for prompt in prompts:
        clean = " ".join(unicodedata.normalize("NFC", prompt).split())
        if len(clean) > MAX_PROMPT_CHARACTERS:
            raise FluxSaeError(
                f"A prompt has {len(clean)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed. "
                f"It begins with {clean[:60]!r}."
            )
        if clean:
            kept.setdefault(clean.casefold(), clean)
    return list(kept.values())


def sample_prompts(prompts: list[str], count: int, *, seed: int = 0) -> list[str]:
    """`count` prompts in an order that `seed` decides; all of them once before any comes again.

    A longer sample with the same seed begins with the shorter one.

    Raises:
        FluxSaeError: there is nothing to sample from, or `count` is below 1.
    """
    if not prompts or count < 1:
        raise FluxSaeError(f"Cannot sample {count} prompts from {len(prompts)}: both must be at least 1.")
    sampled: list[str] = []
    turn = 0
    while len(sampled) < count:
        deck = list(prompts)
        random.Random(f"{seed}/{turn}").shuffle(deck)
        sampled += deck
        turn += 1
    return sampled[:count]
