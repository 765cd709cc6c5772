"""Prompts: files of every kind read alike, and dealt to training, held-out and scoring so that none is in two of them.

Odd values are read right or refused with their line and a remedy; nothing is dropped without a word but blank lines
and repetitions.
"""

import ast
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from fluxsae.errors import FluxSaeError

MAX_PROMPT_CHARACTERS = 2000
SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv", ".txt")
"""Kinds of prompt files; where a folder holds several, the first kind of these counts."""
Split = Literal["train", "held_out", "score"]
HELD_OUT_SHARE, SCORE_SHARE = 0.1, 0.2
_PYTHON_BYTES = re.compile(r"""b(['"]).*\1""", re.DOTALL)
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # beside those that are spaces
_JOINERS = r"\u200c\u200d"
Item = TypeVar("Item")


def load_prompts(path: str | Path, *, column: str = "prompt") -> list[str]:
    """The distinct prompts of a file, or of a folder of such files (a downloaded Hub dataset), in order.

    `.txt`: one prompt a line, lines that start with # are comments. `.csv`, `.tsv`, `.jsonl`, `.parquet`: the values of
    `column`, where a list of texts counts as several prompts. A line of a `.jsonl` may also be the text itself.

    Raises:
        FluxSaeError: the file is missing, of another kind, damaged, has no such column, or holds no prompt; or a value,
            named by its line, is too long or no text.
    """
    path = Path(path)
    prompts = unique_prompts(itertools.chain.from_iterable(_read_file(file, column) for file in _files_at(path)))
    if not prompts:
        raise FluxSaeError(f"{path} holds no prompt. Write one prompt a line, or name the column that holds them.")
    return prompts


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if not file.name.startswith("."))
        by_suffix = [[file for file in files if file.suffix == suffix] for suffix in SUFFIXES]
        found = next((some for some in by_suffix if some), [])
        if not found:
            raise FluxSaeError(f"{path} holds no prompt file. Allowed are {', '.join(SUFFIXES)}.")
        return found
    if not path.is_file():
        raise FluxSaeError(
            f"There is no prompt file {path}. Give a {', '.join(SUFFIXES)} file, or a folder of them; a Hub dataset is "
            "fetched with `hf download --repo-type dataset user/name --local-dir FOLDER`."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise FluxSaeError(
            f"{path} is no prompt file: its name ends in {path.suffix!r}, allowed are {', '.join(SUFFIXES)}."
        )
    return [path]


def _read_file(path: Path, column: str) -> Iterator[str]:
    """The clean prompts of one file, repetitions among them."""
    suffix = path.suffix.lower()
    cells = _parquet_cells(path, column) if suffix == ".parquet" else _TEXT_READERS[suffix](path, column)
    for line, value in cells:
        yield from prompts_in(value, where=f"{path} line {line}" if suffix != ".parquet" else f"{path} row {line}")


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        kind = "It is UTF-16: save it as UTF-8." if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "Save it as UTF-8."
        raise FluxSaeError(f"{path} line {line} is not UTF-8 text ({error.reason}). {kind}") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers from 1; only CR, LF and both end one, since a prompt may hold Unicode's other breaks."""
    return enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1)


def _txt_cells(path: Path, column: str) -> Iterator[tuple[int, object]]:
    return ((number, line) for number, line in _lines(_read_text(path)) if not line.lstrip().startswith("#"))


def _jsonl_cells(path: Path, column: str) -> Iterator[tuple[int, object]]:
    for number, line in _lines(_read_text(path)):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise FluxSaeError(f"{path} line {number} is not valid JSON ({error}). Mend or remove it.") from error
        if isinstance(value, dict):
            _check_column(f"{path} line {number}", column, list(value))
            value = value[column]
        yield number, value


def _csv_cells(path: Path, column: str) -> Iterator[tuple[int, object]]:
    reader = csv.DictReader(
        io.StringIO(_read_text(path), newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    last = 0
    try:
        names = list(reader.fieldnames or [])
        _check_column(str(path), column, names)
        last = reader.line_num
        for row in reader:
            last, line = reader.line_num, last + 1
            if None in row:
                raise FluxSaeError(
                    f"{path} line {line} has more cells than the {len(names)} columns of its head. Put text that holds "
                    "the separator in double quotes."
                )
            yield line, _python_text(row[column] or "", where=f"{path} line {line}")
    except csv.Error as error:
        raise FluxSaeError(f"{path} line {last + 1} cannot be read ({error}). Mend its quotes.") from error


def _python_text(cell: str, *, where: str) -> object:
    """What a cell stands for where a program wrote a value that is no text: a list of captions, a NaN.

    Raises:
        FluxSaeError: bytes as Python prints them, which lost their encoding.
    """
    text = cell.strip()
    if _PYTHON_BYTES.fullmatch(text):
        raise FluxSaeError(f"{where} holds bytes as Python prints them ({text[:40]}). Decode them and save text.")
    if text.lower() in ("nan", "none", "null", "<na>"):
        return None
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(value, list) and all(isinstance(item, str) for item in value):
                return value
    return cell


_TEXT_READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, object]]]] = {
    ".txt": _txt_cells,
    ".csv": _csv_cells,
    ".tsv": _csv_cells,
    ".jsonl": _jsonl_cells,
}


def _parquet_cells(path: Path, column: str) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        _check_column(str(path), column, file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(columns=[column]):
            values = batch.column(0).to_pylist()
            yield from enumerate(values, start=number)
            number += len(values)
    except (pa.ArrowInvalid, OSError) as error:
        raise FluxSaeError(f"{path} is not a whole parquet file ({error}). Fetch or save it again.") from error


def _check_column(where: str, column: str, present: Sequence[str]) -> None:
    if column not in present:
        raise FluxSaeError(
            f"{where} has no column {column!r}; it has {', '.join(present) or 'none'}. Name one of them."
        )


def prompts_in(value: object, *, where: str) -> Iterator[str]:
    """The clean prompts in a value as a file holds it: text, UTF-8 bytes, or a list of them; none for None and NaN.

    Raises:
        FluxSaeError: anything else, or a prompt longer than `MAX_PROMPT_CHARACTERS`; `where` names the line.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, list | tuple):
                raise FluxSaeError(f"{where} holds lists in a list. Allowed are a text or a list of texts.")
            yield from prompts_in(item, where=where)
        return
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FluxSaeError(f"{where} holds bytes that are not UTF-8 text ({error.reason}). Save text.") from error
    if not isinstance(value, str):
        kind = "nested values" if isinstance(value, Mapping) else f"a {type(value).__name__}"
        raise FluxSaeError(f"{where} holds {kind}, no text. Name a column of texts, or of lists of texts.")
    if text := clean_prompt(value, where=where):
        yield text


def clean_prompt(text: str, *, where: str = "A prompt") -> str:
    """The prompt in Unicode's composed form (NFC) with single spaces.

    Any character that people write is kept: marks, joiners, emoji, every script. Spaces of any kind become plain ones.

    Raises:
        FluxSaeError: longer than `MAX_PROMPT_CHARACTERS`, or it holds control characters; `where` names the line.
    """
    clean = " ".join(unicodedata.normalize("NFC", text).split())
    if len(clean) > MAX_PROMPT_CHARACTERS:
        raise FluxSaeError(
            f"{where} has {len(clean)} characters; at most {MAX_PROMPT_CHARACTERS} are allowed. "
            f"It begins with {clean[:60]!r}. Shorten or remove it."
        )
    if control := control_character(clean):
        raise FluxSaeError(f"{where} holds the control character {control!r} in {clean[:60]!r}. Remove it.")
    return clean


def control_character(text: str) -> str | None:
    """The first control character or lone surrogate in a text, which no prompt holds; joiners and marks are none."""
    found = _CONTROL.search(text)
    return found[0] if found else None


@functools.cache
def _word_signs() -> str:
    """What a word is made of, as the inside of a character class: letters, digits and combining marks."""
    marks = (chr(code) for code in range(0x300, 0x110000) if unicodedata.category(chr(code))[0] == "M")
    return r"\w" + "".join(marks)


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """One word: marks belong to it, and joiners, apostrophes and hyphens where they stand inside."""
    signs = _word_signs()
    return re.compile(rf"[{signs}](?:[{signs}{_JOINERS}'’-]*[{signs}])?")


def words_of(text: str) -> list[str]:
    """The words of a text in order, as Unicode divides them (hyphens join)."""
    return word_pattern().findall(text)


def phrase_pattern(phrase: str) -> re.Pattern[str]:
    """A word or phrase by itself, in any case: no letter, mark or joiner right before or after it."""
    signs = _word_signs()
    return re.compile(rf"(?<![{signs}{_JOINERS}]){re.escape(phrase)}(?![{signs}{_JOINERS}])", re.IGNORECASE)


def unique_prompts(prompts: Iterable[str]) -> list[str]:
    """The prompts without repetitions (case aside), first spelling kept, in order; they are clean already."""
    kept: dict[str, str] = {}
    for prompt in prompts:
        kept.setdefault(prompt.casefold(), prompt)
    return list(kept.values())


def split_of(key: str) -> Split:
    """Where a prompt (or a picture's digest) belongs, decided by its own hash: never by what stands beside it.

    So added prompts move none that is there.
    """
    place = _place(key)
    return "held_out" if place < HELD_OUT_SHARE else "score" if place < HELD_OUT_SHARE + SCORE_SHARE else "train"


def _place(key: str) -> float:
    digest = hashlib.sha256(key.casefold().encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def split_items(keys: Sequence[str]) -> dict[Split, list[int]]:
    """The indices of each split, by `split_of`; where few items leave one empty, it takes the item nearest to it.

    Raises:
        FluxSaeError: fewer than three different keys.
    """
    order = sorted(dict.fromkeys(keys), key=_place)
    if len(order) < len(get_args(Split)):
        raise FluxSaeError(
            f"{len(order)} different prompts or pictures cannot be dealt to training, held-out and scoring, which "
            "share none. Give at least 3, or pass --share-prompts to use the same for all."
        )
    splits = [split_of(key) for key in order]
    n_held = min(max(1, splits.count("held_out")), len(order) - 2)
    n_score = min(max(1, splits.count("score")), len(order) - n_held - 1)
    split: dict[str, Split] = {
        key: "held_out" if i < n_held else "score" if i < n_held + n_score else "train" for i, key in enumerate(order)
    }
    return {name: [i for i, key in enumerate(keys) if split[key] == name] for name in get_args(Split)}


def wanted_splits(count: int, *, purpose: Literal["collect", "score"], held_out_every: int) -> list[Split]:
    """The split of each image of a stage: in a collection every n-th is held out, as the shards have it."""
    if purpose == "score":
        return ["score"] * count
    every = held_out_every
    return ["held_out" if every and i % every == every - 1 else "train" for i in range(count)]


def decks(items: Sequence[Item], *, seed: int) -> Iterator[Item]:
    """The items without end, in an order that `seed` decides: all of them once before any comes again."""
    for turn in itertools.count():
        deck = list(items)
        random.Random(f"{seed}/{turn}").shuffle(deck)
        yield from deck


def split_stream(prompts: Iterator[str]) -> dict[Split, Iterator[str]]:
    """An endless stream of prompts as one stream a split, each in the order of the whole."""
    waiting: dict[Split, deque[str]] = {name: deque() for name in get_args(Split)}

    def of(split: Split) -> Iterator[str]:
        while True:
            while not waiting[split]:
                prompt = next(prompts)
                waiting[split_of(prompt)].append(prompt)
            yield waiting[split].popleft()

    return {split: of(split) for split in waiting}


def deal(streams: Mapping[Split, Iterator[Any]], splits: Sequence[Split]) -> list[Any]:
    """The next item of the wanted split, image by image: a longer list begins with the shorter one."""
    return [next(streams[split]) for split in splits]
