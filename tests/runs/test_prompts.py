"""Prompt files and their splits: every kind read alike, odd values right or refused by line, none in two splits."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.features.labels import caption_terms
from fluxsae.features.silencing import prompts_without_words
from fluxsae.features.vocabulary import has_name, in_place
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.prompts import (
    MAX_PROMPT_CHARACTERS,
    clean_prompt,
    deal,
    decks,
    load_prompts,
    split_items,
    split_of,
    split_stream,
    unique_prompts,
    wanted_splits,
    words_of,
)
from fluxsae.ui.serve.schemas import HeatmapRequest, Limits
from train.flux_options import FluxOptions
from train.prompts import BUNDLED_PROMPTS, iter_prompts
from train.prompts.grammar import draw_prompts

PROMPTS = ["a red star", "two cats, asleep", 'a sign that says "hello"']
ASTRONAUT = "\N{WOMAN}\u200d\N{ROCKET}"
PERSIAN = "گل\u200cهای سرخ"


def write(path: Path, prompts: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": prompts}), path)
    elif path.suffix in (".csv", ".tsv"):
        sign = "," if path.suffix == ".csv" else "\t"
        lines = ['"' + prompt.replace('"', '""') + f'"{sign}1' for prompt in prompts]
        path.write_text("\n".join([f"text{sign}number", *lines]) + "\n", encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": prompt}) for prompt in prompts) + "\n", encoding="utf-8")
    else:
        path.write_text("# a comment\n\n" + "\n".join(prompts) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["p.txt", "p.csv", "p.tsv", "p.jsonl", "p.parquet", "P.TXT"])
def test_every_kind_of_file_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    assert load_prompts(write(tmp_path / name, PROMPTS), column="text") == PROMPTS


def test_a_folder_of_a_downloaded_dataset_gives_the_prompts_of_all_its_files(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, prompts in enumerate((PROMPTS[:2], PROMPTS[1:])):
        write(data / f"train-{number:05d}-of-00002.parquet", prompts)
    (tmp_path / "README.txt").write_text("About this dataset")
    assert load_prompts(tmp_path, column="text") == PROMPTS


ODD_TEXT = {
    "a byte order mark": (b"\xef\xbb\xbfa cat\na dog\n", ["a cat", "a dog"]),
    "lines of windows": (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
    "lines of old macs": (b"a cat\ra dog\r", ["a cat", "a dog"]),
    "empty lines": (b"\n\n  \t\na cat\n\n", ["a cat"]),
    "double lines": (b"a cat\nA  cat\na cat \na dog", ["a cat", "a dog"]),
    "a line break of unicode": ("a cat\u2028that sleeps\x85well\na dog".encode(), ["a cat that sleeps well", "a dog"]),
    "no-break spaces": ("a\u00a0red\u202fstar".encode(), ["a red star"]),
    "joined emoji": (f"an astronaut {ASTRONAUT}".encode(), [f"an astronaut {ASTRONAUT}"]),
    "persian": (PERSIAN.encode(), [PERSIAN]),
    "marks": ("cafe\u0301 हिन्दी".encode(), ["café हिन्दी"]),
}


@pytest.mark.parametrize(("content", "expected"), ODD_TEXT.values(), ids=ODD_TEXT)
def test_odd_text_is_read_right(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    assert load_prompts(path) == expected
    table = tmp_path / "p.csv"
    table.write_bytes(b"prompt\n" + content.replace(b"\xef\xbb\xbf", b""))
    assert load_prompts(table) == expected


ODD_VALUES: dict[str, tuple[list[Any], list[str]]] = {
    "several captions": ([["a cat", "a sleeping cat"], ["a dog"], []], ["a cat", "a sleeping cat", "a dog"]),
    "bytes": ([b"a cat", "a caf\u00e9".encode()], ["a cat", "a caf\u00e9"]),
    "missing values": ([None, "a cat", None], ["a cat"]),
    "only NaN beside text": ([float("nan"), float("nan")], []),
}


@pytest.mark.parametrize(("values", "expected"), ODD_VALUES.values(), ids=ODD_VALUES)
def test_odd_values_of_a_table_are_read_right(tmp_path: Path, values: list[Any], expected: list[str]) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"prompt": values}), path)
    if expected:
        assert load_prompts(path) == expected
    else:
        with pytest.raises(FluxSaeError, match="holds no prompt"):
            load_prompts(path)


def test_odd_values_of_lines_are_read_right(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "a cat"}\n\n"a bare text"\n{"prompt": null}\n{"prompt": NaN}\n{"prompt": ["one", "two"]}'
    )
    assert load_prompts(path) == ["a cat", "a bare text", "one", "two"]


def test_cells_of_a_csv_that_a_program_wrote_are_read_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text(
        'prompt,n\nnan,1\nNaN,2\n"[\'a cat\', \'a dog\']",3\n"[""a bird""]",4\n[blue] car,5\n,6\nbanana,7\n'
    )
    assert load_prompts(path) == ["a cat", "a dog", "a bird", "[blue] car", "banana"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"# only a comment\n", "holds no prompt"),
        ("p.txt", b"a cat\na \xff dog\n", r"p\.txt line 2 is not UTF-8 text.*Save it as UTF-8"),
        ("p.txt", "a cat".encode("utf-16"), "line 1 is not UTF-8.*It is UTF-16"),
        ("p.txt", b"a cat\n" + b"x" * (MAX_PROMPT_CHARACTERS + 1), r"p\.txt line 2 has 2001 .*at most 2000.*Shorten"),
        ("p.txt", b"a cat\n\na \x07 bell\n", "line 3 holds the control character"),
        ("p.csv", b"text\na cat\n", "has no column 'prompt'; it has text"),
        ("p.csv", b"prompt\na cat\na dog, asleep\n", r"p\.csv line 3 has more cells than the 1 columns.*double quotes"),
        ("p.csv", b"prompt\n\"a cat\nb'a dog'\n", "line 2 cannot be read"),
        ("p.csv", b"prompt\na cat\nb'a dog'\n", r"line 3 holds bytes as Python prints them \(b'a dog'\)"),
        ("p.csv", b'prompt\n"a\ncat"\n' + b"x" * 2001, r"p\.csv line 4 has 2001"),
        ("p.csv", b"prompt\n" + b"x" * 2001, r"p\.csv line 2 has 2001"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"prompt": \n', r"p\.jsonl line 2 is not valid JSON"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"text": "a dog"}\n', "line 2 has no column 'prompt'; it has text"),
        ("p.jsonl", b'{"prompt": {"en": "a cat"}}\n', r"line 1 holds nested values, no text"),
        ("p.jsonl", b'{"prompt": [["a"]]}\n', "line 1 holds lists in a list"),
        ("p.jsonl", b'{"prompt": 7}\n', "line 1 holds a int, no text"),
        ("p.jsonl", b'{"prompt": "\\ud83d"}\n', "line 1 holds the control character"),
        ("p.parquet", b"not parquet", "not a whole parquet file"),
        ("p.json", b"[]", r"allowed are \.parquet, \.jsonl, \.csv, \.tsv, \.txt"),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_line_and_remedy(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FluxSaeError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "message"),
    [([{"en": "a cat"}], "row 0 holds nested"), ([b"a", b"\xff"], "row 1 holds bytes that are not UTF-8")],
)
def test_values_of_a_table_that_are_no_text_are_refused_with_their_row(
    tmp_path: Path, values: list[Any], message: str
) -> None:
    pq.write_table(pa.table({"prompt": values}), tmp_path / "p.parquet")
    with pytest.raises(FluxSaeError, match=message):
        load_prompts(tmp_path / "p.parquet")


@pytest.mark.parametrize(
    ("name", "message"), [("none.txt", "There is no prompt file.*hf download"), (".", "no prompt")]
)
def test_a_place_without_a_prompt_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FluxSaeError, match=message):
        load_prompts(tmp_path / name)


def test_repetitions_are_left_out_whatever_their_case() -> None:
    assert unique_prompts(["a cat", "A cat", "a dog"]) == ["a cat", "a dog"]


@given(st.text(max_size=60))
def test_a_clean_prompt_stays_as_it_is(text: str) -> None:
    try:
        clean = clean_prompt(text)
    except FluxSaeError:
        return
    assert clean_prompt(clean) == clean


@given(st.integers(1, 30), st.integers(0, 5))
def test_decks_use_every_prompt_before_they_repeat_one(count: int, seed: int) -> None:
    pool = [f"p{i}" for i in range(7)]
    drawn = list(itertools.islice(decks(pool, seed=seed), count))
    assert len(set(drawn[:7])) == min(count, 7)
    assert drawn == list(itertools.islice(decks(pool, seed=seed), 40))[:count]
    assert list(itertools.islice(decks(pool, seed=seed + 1), 30)) != list(itertools.islice(decks(pool, seed=seed), 30))


@given(st.lists(st.text(), min_size=3, max_size=60, unique_by=str.casefold))
def test_every_item_is_in_one_split_and_no_split_is_empty(keys: list[str]) -> None:
    splits = split_items(keys)
    assert sorted(itertools.chain.from_iterable(splits.values())) == list(range(len(keys)))
    assert all(splits.values())


def test_a_prompts_split_is_decided_by_itself_alone() -> None:
    prompts = [f"a picture of {i}" for i in range(2000)]
    few, many = split_items(prompts[:300]), split_items(prompts)
    for split, indices in few.items():
        assert {prompts[i] for i in indices} <= {prompts[i] for i in many[split]}
        assert all(split_of(prompts[i]) == split == split_of(prompts[i].upper()) for i in indices)
    shares = {split: len(indices) / len(prompts) for split, indices in many.items()}
    assert shares == pytest.approx({"train": 0.7, "held_out": 0.1, "score": 0.2}, abs=0.03)


def test_repeated_keys_stay_together() -> None:
    keys = ["a", "b", "c", "d", "e"] * 3
    for indices in split_items(keys).values():
        assert all(keys.count(keys[i]) == sum(keys[j] == keys[i] for j in indices) for i in indices)


def test_two_prompts_cannot_be_split_in_three() -> None:
    with pytest.raises(FluxSaeError, match=r"2 different prompts.*--share-prompts"):
        split_items(["a", "b", "a"])


def test_held_out_places_get_held_out_prompts() -> None:
    wanted = wanted_splits(20, purpose="collect", held_out_every=5)
    assert [i for i, split in enumerate(wanted) if split == "held_out"] == [4, 9, 14, 19]
    dealt = deal(split_stream(f"prompt {i}" for i in itertools.count()), wanted)
    assert [split_of(prompt) for prompt in dealt] == wanted


@pytest.mark.parametrize(("flux", "n_images"), [("miniature", 1000), ("elsewhere", 20_000)])
def test_of_many_images_no_prompt_is_in_two_splits(flux: str, n_images: int) -> None:
    config = FluxOptions(flux=flux)
    collected = config.load_prompts(n_images, "collect", held_out_every=10)
    held_out = set(collected[9::10])
    train = {prompt for i, prompt in enumerate(collected) if i % 10 != 9}
    scored = set(config.load_prompts(n_images // 5, "score"))
    assert not train & held_out
    assert not train & scored
    assert not held_out & scored
    assert collected[:50] == config.load_prompts(50, "collect", held_out_every=10)


def test_of_a_file_no_prompt_is_in_two_splits_unless_they_may_share(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", [f"a picture of {i}" for i in range(60)])
    dealt = {
        share: [
            set(FluxOptions(flux="x", prompts=path, share_prompts=share).load_prompts(200, purpose, held_out_every=0))
            for purpose in ("collect", "score")
        ]
        for share in (False, True)
    }
    assert not dealt[False][0] & dealt[False][1]
    assert dealt[True][0] == dealt[True][1] == set(load_prompts(path))


def test_the_record_of_a_prompt_file_is_its_content_wherever_it_lies(tmp_path: Path) -> None:
    first, moved = write(tmp_path / "a.txt", PROMPTS), write(tmp_path / "b.csv", PROMPTS)
    identity = FluxOptions(prompts=first).identity()
    assert identity["prompts"] == FluxOptions(prompts=moved, prompt_column="text").identity()["prompts"]
    assert str(tmp_path) not in str(identity)
    write(first, [*PROMPTS, "one more"])
    assert FluxOptions(prompts=first).identity() != identity


def test_the_bundled_prompts_are_many_distinct_and_varied() -> None:
    lines = [line for line in BUNDLED_PROMPTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    prompts = load_prompts(BUNDLED_PROMPTS)
    assert len(prompts) == len(lines) >= 1000
    assert len({" ".join(prompt.lower().split()[:6]) for prompt in prompts}) >= 700
    assert len({word.strip(",'s") for prompt in prompts for word in prompt.lower().split()}) >= 1000
    assert all(prompt[0].isupper() and len(prompt) < 160 for prompt in prompts)


def test_the_grammar_gives_100_000_different_natural_prompts() -> None:
    prompts = list(itertools.islice(draw_prompts(0), 100_000))
    assert len({prompt.casefold() for prompt in prompts}) == 100_000
    assert all(
        clean_prompt(prompt) == prompt and prompt[0] == prompt[0].upper() and len(prompt) < 180 for prompt in prompts
    )
    words = Counter(word.strip(",") for prompt in prompts for word in prompt.lower().split())
    assert len(words) >= 900
    assert not {pair for prompt in prompts for pair in itertools.pairwise(prompt.lower().split()) if wrong(*pair)}
    assert prompts[:100] == list(itertools.islice(draw_prompts(0), 100))
    assert prompts[:100] != list(itertools.islice(draw_prompts(1), 100))


def wrong(article: str, word: str) -> bool:
    """Whether an article does not fit the letter after it, sounds aside."""
    sounds_otherwise = word.startswith(("unicorn", "ukiyo", "hour"))
    return article in ("a", "an") and not sounds_otherwise and (article == "an") != (word[0] in "aeiou")


def test_the_bundled_file_comes_before_the_grammar() -> None:
    n_bundled = len(load_prompts(BUNDLED_PROMPTS))
    first = list(itertools.islice(iter_prompts(0), n_bundled + 50))
    assert set(first[:n_bundled]) == set(load_prompts(BUNDLED_PROMPTS))
    assert len(set(first)) == len(first)


def test_200_000_lines_are_read_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("\n".join(f"a picture of the number {i} in a café" for i in range(200_000)), encoding="utf-8")
    assert len(load_prompts(path)) == 200_000  # a quadratic reader runs into the time limit


def test_the_miniature_gets_captions_of_its_world_and_a_file_wins() -> None:
    settings = GenerationSettings()
    plan = FluxOptions().build_plan(20, purpose="score", settings=settings)
    assert plan.prompts == tuple(FluxOptions().load_prompts(20, "score"))
    assert all("background" in p or " a" in f" {p}" for p in plan.prompts)
    assert FluxOptions(prompts=BUNDLED_PROMPTS).load_prompts(5, "score")[0] in load_prompts(BUNDLED_PROMPTS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog's red-haired 'friend', asleep", ["a", "dog's", "red-haired", "friend", "asleep"]),
        ("a dog’s bed", ["a", "dog’s", "bed"]),
        ("हिन्दी में किताब", ["हिन्दी", "में", "किताब"]),
        (PERSIAN, ["گل\u200cهای", "سرخ"]),
        ("cafe\u0301 bar", ["cafe\u0301", "bar"]),
        (f"an astronaut {ASTRONAUT}!", ["an", "astronaut"]),
    ],
)
def test_words_are_split_as_unicode_does(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("text", "name", "holds"),
    [
        ("हिन्दी किताब", "हिन्दी", True),
        ("हिन्दी किताब", "हिन", False),
        ("A Red star", "red", True),
        ("redder", "red", False),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own_in_any_script(text: str, name: str, holds: bool) -> None:
    assert has_name(text, name) is holds
    assert (in_place(f"x {text}", name, "new") == "new") is not holds


def test_a_word_with_marks_or_joiners_can_be_taken_out_whole() -> None:
    assert prompts_without_words("हिन्दी किताब") == {"हिन्दी": "किताब", "किताब": "हिन्दी"}
    assert prompts_without_words(PERSIAN)["سرخ"] == "گل\u200cهای"
    assert caption_terms("हिन्दी किताब") == {"हिन्दी", "किताब", "हिन्दी किताब"}


@pytest.mark.parametrize("prompt", [f"an astronaut {ASTRONAUT}", PERSIAN, "a\u00a0red star", "हिन्दी", "a\u2028b"])
def test_the_page_and_the_files_accept_the_same_characters(prompt: str) -> None:
    limits = Limits({"transformer_blocks.1.ff": 8}, 8, 8, 20, 128, 128)
    values = {"hookpoint": None, "seed": 0, "num_inference_steps": 20, "step": None, "limit": 5}
    assert HeatmapRequest.parse(limits, prompt=prompt, **values).prompt == clean_prompt(prompt)
