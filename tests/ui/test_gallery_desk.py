"""What the Gallery tab answers."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from desk_data import LATE, maps_of, reading

from fluxsae.errors import FluxSaeError
from fluxsae.features.silencing import prompts_without_words
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.gallery.desk import PAGE, GalleryDesk
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
