"""What the Gallery tab answers."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from desk_data import LATE, maps_of, reading

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardLevel, CardName, SearchHit
from fluxsae.features.silencing import prompts_without_words
from fluxsae.ui.kit import views
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.gallery.desk import PAGE, GalleryDesk, facts, sentence
from fluxsae.ui.tabs.gallery.words import WordsDesk


def test_the_gallery_filters_and_counts(bench: Workbench) -> None:
    desk = GalleryDesk(bench)
    n_features, pages = len(bench.cards[LATE]), []
    for start in range(0, n_features + PAGE, PAGE):  # the last begins behind the end
        pages.append(desk.gallery("", LATE, "any", False, "number", start))
    assert [card["feature"] for page in pages for card in page["cards"]] == list(range(n_features))
    assert f"{n_features} of {n_features} features" in pages[-1]["summary"]
    assert pages[0]["more"].endswith(f" of {n_features - PAGE}")
    assert pages[-1]["more"] is None
    dead = desk.gallery("", LATE, "dead", False, "best")
    assert [card["feature"] for card in dead["cards"]] == [0]
    assert desk.gallery("4", LATE, "any", False, "best")["cards"][0]["feature"] == 4
    with pytest.raises(FluxSaeError, match="feature is None"):
        desk.page({"hookpoint": LATE, "feature": None})


def test_those_who_search_the_same_at_a_time_wait_for_one_search(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def hits(bench: Workbench, hookpoint: str, query: str, *, limit: int) -> list[SearchHit]:
        asked.append(query)
        time.sleep(0.1)
        return [SearchHit(4, "label", 1.0)]

    monkeypatch.setattr(views, "hits", hits)
    desk = GalleryDesk(bench)
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda _: desk.gallery("circle", LATE, "any", False, "best"), range(8)))
    assert asked == ["circle"]
    assert all(page["cards"][0]["feature"] == 4 for page in pages)


def test_a_card_says_where_its_feature_fires_and_how_its_name_was_checked(bench: Workbench) -> None:
    bare = replace(bench.cards[LATE][1], label="cross", place=None, patch_share=None, name=None)
    assert "fires" not in sentence(bare).split("patches", 1)[1]  # a run of before
    assert "It goes with images of “cross” and fires below it (in 95 % of other images)" in sentence(
        replace(bare, place="below", place_share=0.95)
    )
    plain = sentence(replace(bare, patch_share=0.125, centre_share=0.5, border_share=0.25))
    assert "covers 12 % of the patches; 50 % of its activation lies in the middle quarter" in plain
    levels = (CardLevel("strong", 8, 0.75, (0, 1)),)
    name = CardName(0.001, 0.01, 0.25, tuple([0.25] * 10 + [0.75]), tuple([1.0] * 5 + [0.5] * 6), levels)
    told = {term: value for term, value, _ in facts(replace(bare, name=name))}
    assert told["q-value of the name"] == "0.01"
    assert (told["Precision of the name"], told["Recall of the name"]) == ("75 %", "50 %")
    assert told["Lift of the name"] == "3.0 ×"


def test_the_word_that_silences_a_feature_is_told_with_what_is_left(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def read(prompt: str, seed: int, num_inference_steps: int) -> Any:
        asked.append((prompt, seed))
        values = np.zeros((2, 4, 2), np.float32)
        values[0, 0, 0] = 2.0 if "circle" in prompt else 0.5
        maps = maps_of((4, 8), values, np.full((2, 4, 2), 1), len(bench.cards[LATE]))
        yield StepDone(1, 2)
        yield Done(replace(reading(), prompt=prompt, seed=seed, maps={LATE: maps}))

    monkeypatch.setattr(bench, "read", read)
    best = bench.cards[LATE][1].top_images[0]
    assert "circle" in best.prompt
    *steps, done = WordsDesk(bench).silence({"hookpoint": LATE, "feature": 1})
    variants = prompts_without_words(best.prompt)
    assert asked == [(prompt, best.seed) for prompt in (best.prompt, *variants.values())]
    assert steps == [StepDone(1 + 2 * place, 2 * len(asked)) for place in range(len(asked))]
    left = {item["word"]: item["left"] for item in done.value["without"]}
    assert left == {word: 0.25 if word == "circle" else 1.0 for word in variants}
    assert next(iter(left)) == "circle"
    with pytest.raises(FluxSaeError, match="Feature 0 never fired in this run"):
        list(WordsDesk(bench).silence({"hookpoint": LATE, "feature": 0}))
