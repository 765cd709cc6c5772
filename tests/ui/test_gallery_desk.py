"""What the Gallery tab answers."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from desk_data import LATE, maps_of, reading

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardLevel, CardName, SearchHit, TopImage
from fluxsae.features.silencing import WordEffect
from fluxsae.ui.kit import views
from fluxsae.ui.serve.guard import current_visitor
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.schemas import SilenceRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.visitors import VisitorLimits
from fluxsae.ui.tabs.gallery.desk import PAGE, GalleryDesk, facts, sentence
from fluxsae.ui.tabs.gallery.words import WordsDesk, verdict


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


@pytest.fixture
def words_desk(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> WordsDesk:
    """Feature 1 needs "circle" where the caption has it, else "star"; "red" brings a fifth. The prompts are `asked`."""
    captions = ("a red circle", "a circle on red", "a blue circle on red", "a big star")
    images = [TopImage(place, text, 10 + place, 1.0, 0) for place, text in enumerate(captions)]
    again = TopImage(9, captions[0], 99, 1.0, 0)  # the first caption at another seed
    card = replace(bench.cards[LATE][1], top_images=(images[0], again, *images[1:]))
    monkeypatch.setattr(type(bench.cards[LATE]), "__getitem__", lambda cards, feature: card)
    desk = WordsDesk(bench)
    desk.asked = []  # type: ignore[attr-defined]

    def read(prompt: str, seed: int, num_inference_steps: int) -> Any:
        desk.asked.append((prompt, seed))
        values = np.zeros((2, 4, 2), np.float32)
        values[0, 0, 0] = 4.0 * ("circle" in prompt or "star" in prompt) + 1.0 * ("red" in prompt)
        maps = maps_of((4, 8), values, np.full((2, 4, 2), 1), len(bench.cards[LATE]))
        yield StepDone(1, 2)
        yield Done(replace(reading(), prompt=prompt, seed=seed, maps={LATE: maps}))

    monkeypatch.setattr(bench, "read", read)
    return desk


def test_the_word_that_silences_a_feature_is_told_with_in_how_many_images(words_desk: WordsDesk) -> None:
    *steps, done = words_desk.silence({"hookpoint": LATE, "feature": 1})
    asked = words_desk.asked
    assert asked == [
        ("a red circle", 10), ("a circle", 10), ("a red", 10),
        ("a circle on red", 11), ("a on red", 11), ("a circle on", 11),
        ("a blue circle on red", 12), ("a circle on red", 12), ("a blue on red", 12), ("a blue circle on", 12),
    ]  # fmt: skip
    assert steps == [StepDone(1 + 2 * place, 2 * len(asked)) for place in range(len(asked))]
    assert done.value["verdict"] == "Without “circle” its activation falls to 20 % or less in 3 of 3 images."
    assert done.value["remarks"].startswith("3 of its best images were made again without each word")
    assert "words were tried" not in done.value["remarks"]
    first, *_ = done.value["images"]
    assert (first["prompt"], first["seed"]) == ("a red circle", 10)
    assert [(word["word"], word["left"]) for word in first["without"]] == [
        ("circle", pytest.approx(0.2)),
        ("red", pytest.approx(0.8)),
    ]


def test_few_words_of_long_captions_are_tried_those_that_captions_share_first(words_desk: WordsDesk) -> None:
    request = SilenceRequest.parse(words_desk.limits, hookpoint=LATE, feature=1, limit=1, n_images=5)
    *_, done = words_desk.answer(request)
    found, gallery = done.value
    assert words_desk.asked == [
        ("a red circle", 10), ("a circle", 10),
        ("a circle on red", 11), ("a circle on", 11),
        ("a blue circle on red", 12), ("a blue circle on", 12),
        ("a big star", 13), ("a star", 13),
        ("a red circle", 99), ("a circle", 99),
    ]  # fmt: skip
    assert "5 of 11 words were tried" in found["remarks"]
    assert [image["words"][0]["prompt"] for image in found["images"]][:2] == ["a circle", "a circle on"]
    assert [caption for _, caption in gallery[:2]] == ["a red circle (seed 10)", "without “red”: 80% is left"]
    assert found["verdict"] == "In 5 of 5 images no word alone silences it: 80 % or more is left without any one."


def test_an_image_on_which_it_does_not_fire_again_is_left_out(
    words_desk: WordsDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = words_desk.bench.cards[LATE][1]
    pale = TopImage(0, "a pale thing", 1, 1.0, 0)
    monkeypatch.setattr(type(words_desk.bench.cards[LATE]), "__getitem__", lambda cards, feature: silent)
    silent = replace(card, top_images=(pale, card.top_images[0]))
    *_, done = words_desk.silence({"hookpoint": LATE, "feature": 1})
    assert done.value["verdict"] == "Without “circle” its activation falls to 20 % or less in this image."
    assert "In 1 more, made again, the feature did not fire" in done.value["remarks"]
    silent = replace(card, top_images=(pale,))
    with pytest.raises(FluxSaeError, match="do not show this feature"):
        list(words_desk.silence({"hookpoint": LATE, "feature": 1}))


def test_a_feature_without_words_to_take_away_offers_nothing_and_is_told_so(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    selection = {"hookpoint": LATE, "feature": 0}
    with pytest.raises(FluxSaeError, match="Feature 0 never fired in this run"):
        list(WordsDesk(bench).silence(selection))
    top = TopImage(0, "star", 1, 1.0, 0)
    for image in (top, replace(top, prompt="a red star", source="mine.png")):
        card = replace(bench.cards[LATE][1], top_images=(image,))
        assert WordsDesk(bench).cost_words(card) == ""
        with monkeypatch.context() as patch:
            patch.setattr(type(bench.cards[LATE]), "__getitem__", lambda cards, feature, card=card: card)
            with pytest.raises(FluxSaeError, match="No word can be taken away from the best images of feature 1"):
                list(WordsDesk(bench).silence(selection))


def test_the_images_are_told_before_and_fit_a_visitors_share(
    words_desk: WordsDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, card = words_desk.bench, words_desk.bench.cards[LATE][1]
    monkeypatch.setattr(bench, "pass_times", deque([0.5]))
    seconds = bench.limits.default_steps * 0.5
    assert words_desk.cost_words(card) == f"10 images, about {round(10 * seconds)} s"
    limits = VisitorLimits(6)
    monkeypatch.setattr(bench, "visitors", limits)
    assert words_desk.cost_words(card).startswith("6 images")
    request = SilenceRequest.parse(bench.limits, hookpoint=LATE, feature=1)
    with pytest.raises(FluxSaeError, match="This makes 10 images, and one visitor may make 6"):
        list(words_desk.answer(request))
    with limits.share(current_visitor(), 1) as share:
        share.made(1.0)
    with pytest.raises(FluxSaeError, match="You made 1 images in ten minutes, and this is 6 more"):
        list(words_desk.silence({"hookpoint": LATE, "feature": 1}))
    assert words_desk.asked == []


def effects(**left: float) -> list[WordEffect]:
    return [WordEffect(word, share, share - 1) for word, share in left.items()]


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([{"red": 0.0, "ring": 0.9}] * 2, "Without “red” it is silent in 2 of 2 images."),
        (
            [{"red": 0.081, "ring": 0.02}, {"Red": 0.05, "star": 1.2}],  # one word tells of both
            "Without “red” its activation falls to 9 % or less in 2 of 2 images.",
        ),
        (
            [{"red": 0.08}, {"red": 0.04, "ring": 0.9}, {"ring": 0.3, "red": 0.7}],
            "The words differ between images: without “red” its activation falls to 8 % or less in 2 of 3 images; "
            "without “ring” its activation falls to 30 % or less in 1 of 3 images.",
        ),
        (
            [{"red": 0.5}, {"red": 0.85, "ring": 1.0}],
            "Without “red” its activation falls to 50 % or less in 1 of 2 images; in 1 of 2 images no word alone "
            "silences it: 85 % or more is left without any one.",
        ),
        ([{"red": 0.9}], "In this image no word alone silences it: 90 % or more is left without any one."),
    ],
)
def test_the_verdict_claims_no_more_than_the_images_show(images: list[dict[str, float]], told: str) -> None:
    assert verdict([effects(**image) for image in images]) == told
