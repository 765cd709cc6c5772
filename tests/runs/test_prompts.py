"""Prompt files and samples: every kind read alike, nothing twice, faults told in words."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.runs.prompts import MAX_PROMPT_CHARACTERS, load_prompts, sample_prompts, unique_prompts
from train.flux_options import BUNDLED_PROMPTS, FluxOptions, draw_captions

PROMPTS = ["a red star", "two cats, asleep", 'a sign that says "hello"']


def write(path: Path, prompts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": prompts}), path)
    elif path.suffix == ".csv":
        lines = ['"' + prompt.replace('"', '""') + '",1' for prompt in prompts]
        path.write_text("\n".join(["text,number", *lines]) + "\n", encoding="utf-8")
    else:
        path.write_text("# a comment\n\n" + "\n".join(prompts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.parquet"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    assert load_prompts(write(tmp_path / name, PROMPTS), column="text") == PROMPTS


def test_blank_lines_repetitions_and_spacing_are_cleaned_away() -> None:
    assert unique_prompts(["a  cat ", "", "A cat", "\t", "a dog"]) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"# only a comment\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.csv", b"text\na cat\n", "has no column 'prompt'; it has text"),
        ("p.parquet", b"not parquet", "not a whole parquet file"),
        ("p.json", b"[]", "allowed are .txt, .csv, .parquet"),
        ("p.txt", b"x" * (MAX_PROMPT_CHARACTERS + 1), "at most 2000 are allowed"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FluxSaeError, match=message):
        load_prompts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match="There is no prompt file"):
        load_prompts(tmp_path / "none.txt")


@given(st.integers(1, 30), st.integers(0, 5))
def test_a_sample_uses_every_prompt_before_it_repeats_one(count: int, seed: int) -> None:
    pool = [f"p{i}" for i in range(7)]
    sample = sample_prompts(pool, count, seed=seed)
    assert len(sample) == count
    assert len(set(sample[:7])) == min(count, 7)
    assert sample == sample_prompts(pool, 40, seed=seed)[:count]


def test_samples_of_different_seeds_differ() -> None:
    pool = [f"p{i}" for i in range(20)]
    assert sample_prompts(pool, 20, seed=0) != sample_prompts(pool, 20, seed=1)


@pytest.mark.parametrize(("pool", "count"), [([], 3), (["a"], 0)])
def test_impossible_samples_are_refused(pool: list[str], count: int) -> None:
    with pytest.raises(FluxSaeError, match="Cannot sample"):
        sample_prompts(pool, count)


def test_the_bundled_prompts_are_many_distinct_and_varied() -> None:
    lines = [line for line in BUNDLED_PROMPTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    prompts = load_prompts(BUNDLED_PROMPTS)
    assert len(prompts) == len(lines) >= 1000
    assert len({" ".join(prompt.lower().split()[:6]) for prompt in prompts}) >= 700
    assert len({word.strip(",'s") for prompt in prompts for word in prompt.lower().split()}) >= 1000
    assert all(prompt[0].isupper() and len(prompt) < 160 for prompt in prompts)


def test_the_miniature_gets_captions_of_its_world_that_differ_by_purpose() -> None:
    captions = draw_captions(20, seed=0, purpose="collect")
    assert captions == FluxOptions().load_prompts(20, "collect")
    assert captions[:10] == draw_captions(10, seed=0, purpose="collect")
    assert captions != draw_captions(20, seed=0, purpose="score")
    assert FluxOptions(prompts=BUNDLED_PROMPTS).load_prompts(5, "score")[0] in load_prompts(BUNDLED_PROMPTS)
