import base64
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_demos import PLACE, PROMPTS, copy_of, run  # noqa: F401 - the run is a fixture
from test_measurements import PixelDistance, measurement
from test_steering import random_sae
from tiny_flux import SETTINGS

from fluxsae.errors import FluxSaeError
from fluxsae.features.vocabulary import NameKinds, cosine, in_place, words_around, words_around_each
from fluxsae.flux import FluxPipeline, capture, generate
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.miniature import miniature_path
from fluxsae.pictures.grids import split_pictures
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import FeatureTable
from fluxsae.steering.demos import (
    LIMITS_KEY,
    Swap,
    SwapConfig,
    acts_in_window,
    addable,
    find_swaps,
    hot_region,
    opening_swap,
    swap_score,
    swap_variants,
    write_opening,
)
from fluxsae.steering.demos.opening import turned
from fluxsae.steering.edits import Recipe
from fluxsae.steering.measurements import TokenLimits
from fluxsae.steering.sweeps import reproduce

CONFIG = SwapConfig(suppress=(0.0,), amplify=((1, 6.0), (2, 6.0)), n_images=1, alike=0.4, steps=(1, 4))
EYE = torch.eye(3)


# Names of one kind


def test_names_of_one_kind_stand_between_the_same_words() -> None:
    sentences = [text.split() for text in ("a red ring", "a blue ring", "a small red star", "one small blue star")]
    assert words_around("red", sentences) == Counter({("a", -1): 1, ("ring", 1): 1, ("small", -1): 1, ("star", 1): 1})
    assert words_around("small red", sentences) == Counter({("a", -1): 1, ("star", 1): 1})
    assert words_around("green", sentences) == Counter()
    around = words_around_each(sentences)
    assert all(around[name] == words_around(name, sentences) for name in ("red", "blue", "ring", "a"))
    assert cosine(around["red"], around["blue"]) == pytest.approx(1)
    assert cosine(around["red"], around["ring"]) == 0
    assert cosine(around["red"], Counter()) == 0
    kinds = NameKinds(["a Red ring!", "a blue ring", "a small red star", "one small blue star"], ["small red"])
    assert kinds.alike("red", least=0.9) == {"blue": pytest.approx(1)}
    assert "small red" not in kinds.alike("red", least=0.0)  # nobody tells the two apart
    assert kinds.rivals("red", "blue", least=0.0, limit=9) == [*kinds.alike("red", least=0.0)][1:]
    assert len(kinds.rivals("red", "ring", least=0.0, limit=2)) == 2


def test_a_name_takes_the_place_of_another_as_a_word() -> None:
    assert in_place("a Red ring, a tired red star", "red", "pink") == "a pink ring, a tired pink star"
    assert in_place("a ring", "red", "pink") == "pink"
    assert in_place("a red ring", "red", r"c\d") == r"a c\d ring"


# One swap


def test_every_way_to_swap_takes_the_old_away_and_adds_the_new_in_the_region() -> None:
    region = ((True, False), (False, False))
    config = SwapConfig(suppress=(0.0, -1.0), amplify=((1, 0.3), (2, 0.2), (3, 0.1)))
    found = swap_variants(PLACE, 4, [7, 9], region, config)
    said = [[(edit.feature, edit.mode, edit.strength) for edit in edits] for edits in found]
    assert said == [
        [(4, "scale", 0.0), (7, "add", 0.3)],
        [(4, "scale", 0.0), (7, "add", 0.2), (9, "add", 0.2)],
        [(4, "scale", -1.0), (7, "add", 0.3)],
        [(4, "scale", -1.0), (7, "add", 0.2), (9, "add", 0.2)],
    ]  # three features of the new name are not there
    assert {edit.region for edits in found for edit in edits} == {region}


def measured(inside: float = 0.3, outside: float = 0.1, odd: float = 0.0):
    return replace(measurement(odd), distance_inside=inside, distance_outside=outside)


def test_the_score_is_what_goes_and_comes_less_by_what_else_changes() -> None:
    pictures = torch.tensor([[0.9, 0.1, 0.0], [0.4, 0.8, 0.2]])
    score = swap_score(measured(), EYE, pictures)
    assert (score.gone, score.come, score.collateral) == pytest.approx((0.5, 0.7, 0.25))
    assert score.score == pytest.approx(0.5 * 0.75)
    assert swap_score(measured(odd=0.5), EYE, pictures).score == 0  # does not look natural


def test_a_picture_that_reads_as_another_name_of_the_kind_is_worth_nothing() -> None:
    third = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.6, 0.7]])
    assert swap_score(measured(), EYE, third).score == 0
    never_was = torch.tensor([[0.3, 0.1, 0.4], [0.1, 0.8, 0.2]])
    assert swap_score(measured(), EYE, never_was).score == 0


def test_the_region_is_where_the_feature_fires(tiny_flux: FluxPipeline) -> None:
    sae = random_sae()
    with capture(tiny_flux, [PLACE], steps=[1, 2, 3]) as captured:
        generate(tiny_flux, PROMPTS[0], seeds=0, settings=SETTINGS)
    acts = torch.stack([sae.encode(captured.get(PLACE, step)[0]) for step in (1, 2, 3)]).mean(dim=0)
    feature = int(acts.max(dim=0).values.argmax())
    options = {"prompt": PROMPTS[0], "seed": 0, "settings": SETTINGS, "steps": (1, 4)}
    told: list[int] = []
    every = acts_in_window(tiny_flux, sae, PLACE, [feature, 0], on_step=lambda step, _: told.append(step), **options)
    assert every.shape[0] == 3
    mine, other = every.mean(dim=0)
    assert torch.allclose(mine, acts[:, feature])
    assert torch.allclose(other, acts[:, 0])
    part = acts_in_window(tiny_flux, sae, PLACE, [feature], **{**options, "steps": (1, 2)})
    assert torch.allclose(part[0, 0], every[0, 0])
    assert len(part) == 1
    assert told
    region = torch.tensor(hot_region(mine, TokenGrid(4, 4), heat=0.5))
    assert torch.equal(region.flatten(), acts[:, feature] >= 0.5 * acts[:, feature].max())
    assert region.any()
    assert not region.all()
    assert not torch.tensor(hot_region(torch.zeros(16), TokenGrid(4, 4), heat=0.5)).any()


def test_only_features_with_a_known_strength_are_added() -> None:
    sae = random_sae()
    sae.reference_acts[:] = 1.0
    sae.reference_acts[2] = 0.0
    assert addable(sae, [1, 2, 3]) == [1, 3]
    with pytest.raises(FluxSaeError, match="no way to add 1"):
        swap_variants(PLACE, 0, [1], ((True,),), SwapConfig(amplify=((2, 0.1),)))


# The search


class Reader:
    """Reads the first picture as the first text, and every other as the second."""

    name = "reader"

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]] + [[0.0, 1.0, 0.0]] * (len(images) - 1))

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.eye(max(len(texts), 3))[: len(texts), :3]

    def unknown_words(self, text: str) -> list[str]:
        return []


@pytest.fixture
def named(run: RunFolder, tmp_path: Path) -> RunFolder:  # noqa: F811 - the fixture
    """A run with a demo of red; blue and cyan are used like it, black too but is not trusted, star is not."""
    other = copy_of(run, tmp_path)
    table = other.load_features(PLACE)
    rows = sorted(table, key=lambda row: -row.max_act)
    labels = {rows[0].feature: ("red", 0.9), rows[1].feature: ("blue", 0.9), rows[2].feature: ("blue", 0.6)}
    labels |= {rows[3].feature: ("black", 0.2), rows[4].feature: ("cyan", 0.7), rows[5].feature: ("star", 0.9)}
    told = []
    for row in table:
        label, sure = labels.get(row.feature, ("", 0.0))
        told.append(replace(row, label=label or None, label_confidence=sure or None))
    metadata = {"steps": "[2]", "quantile_levels": "[0.5, 0.9]", "histogram_edges": "[0.1, 1.0]"}
    other.save_features(PLACE, FeatureTable.from_rows(told, metadata=metadata))
    demo = {"feature": rows[0].feature, "label": "red", "prompt": PROMPTS[0], "seed": 0, "score": {"label_less": -0.5}}
    stays = {**demo, "feature": rows[1].feature, "label": "blue", "score": {"label_less": 0.1}}
    other.save_demos(PLACE, [json.dumps(line) for line in (demo, stays)])
    usual = TokenLimits((0.5,), (0.0,), (1e9,), (1e9,))  # a random autoencoder knows no usual tokens
    other.update_metrics(PLACE, {LIMITS_KEY: usual.to_dict()})
    return other


def search(run: RunFolder, pipe: FluxPipeline, **options: object) -> list[Swap]:  # noqa: F811
    judges = {"distance": PixelDistance(), "embedder": Reader(), "config": CONFIG}
    return find_swaps(run, pipe, {PLACE: random_sae()}, **{**judges, **options})[PLACE]


def test_swaps_are_of_trusted_names_alike_in_use_and_are_made_again(named: RunFolder, tiny_flux: FluxPipeline) -> None:
    swaps = search(named, tiny_flux)
    assert sorted((swap.label, swap.new_label) for swap in swaps) == [("red", "blue"), ("red", "cyan")]
    stored = named.load_swaps(PLACE)[0]
    assert stored["new_features"] == list(swaps[0].new_features)
    recipe = Recipe.from_dict(stored["recipe"])
    assert [edit.mode for edit in recipe.edits] == ["scale", *["add"] * len(swaps[0].new_features)]
    again = reproduce(tiny_flux, {PLACE: random_sae()}, recipe).image
    with Image.open(named.demo_image_path(PLACE, stored["image"])) as strip:
        pictures = [picture.resize(again.size) for picture in split_pictures(strip.convert("RGB"), 2)]
    before, after = (np.abs(np.asarray(again, dtype=float) - np.asarray(shown)).mean() for shown in pictures)
    assert after < 12  # webp is lossy
    assert after < before
    acts = acts_in_window(
        tiny_flux, random_sae(), PLACE, [stored["feature"]], prompt=stored["prompt"], seed=stored["seed"],
        settings=SETTINGS, steps=CONFIG.steps,
    ).mean(dim=0)[0]  # fmt: skip
    region = hot_region(acts, TokenGrid(4, 4), heat=CONFIG.heat)
    assert {edit.region for edit in recipe.edits} == {region}
    assert not torch.tensor(region).all()


def test_a_search_for_swaps_that_was_cut_off_goes_on_where_it_stopped(
    named: RunFolder, tiny_flux: FluxPipeline
) -> None:
    def cut_off(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(named, tiny_flux, on_candidate=cut_off)
    counts: list[tuple[int, int]] = []
    search(named, tiny_flux, on_candidate=lambda *count: counts.append(count))
    search(named, tiny_flux, on_candidate=lambda *_: pytest.fail("measured again"))
    assert counts == [(1, 1)]


def test_a_name_that_is_not_seen_to_come_gives_no_swap(named: RunFolder, tiny_flux: FluxPipeline) -> None:
    class Blind(Reader):
        name = "blind"

        def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0, 0.0]] * len(images))

    assert search(named, tiny_flux)
    assert search(named, tiny_flux, embedder=Blind()) == []
    assert not list(named.swaps_path(PLACE).parent.glob("swap-*.webp"))


def test_the_embedded_run_has_swaps_that_change_little_else() -> None:
    embedded = RunFolder(miniature_path("run"))
    swaps = [swap for place in embedded.hookpoints() for swap in embedded.load_swaps(place)]
    assert len(swaps) >= 3
    assert all(swap["score"]["score"] > 0 for swap in swaps)
    assert min(swap["score"]["collateral"] for swap in swaps) < 0.2


def test_the_opening_is_the_clear_swap_that_changes_least_else_at_rising_strength(
    named: RunFolder, tiny_flux: FluxPipeline
) -> None:
    swaps = search(named, tiny_flux)

    def scored(swap: Swap, score: float, collateral: float, *, looks_natural: bool = True) -> Swap:
        return replace(swap, score=replace(swap.score, score=score, collateral=collateral, looks_natural=looks_natural))

    first, second = swaps
    assert opening_swap([scored(first, 0.5, 0.4), scored(second, 0.3, 0.1)]) == scored(first, 0.5, 0.4)
    assert opening_swap([scored(first, 0.5, 0.4, looks_natural=False), scored(second, 0.2, 0.1)]) == scored(
        second, 0.2, 0.1
    )
    assert opening_swap([scored(first, 0.0, 0.4)]) is None
    assert opening_swap([scored(first, 0.5, 0.4)]) == scored(first, 0.5, 0.4)
    assert opening_swap([scored(first, 0.5, 0.4, looks_natural=False)]) is None
    write_opening(named, tiny_flux, {PLACE: random_sae()}, first)
    opening = named.load_opening(PLACE)
    assert opening is not None
    assert (opening["label"], opening["new_label"]) == (first.label, first.new_label)
    assert opening["turns"] == pytest.approx([0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1])
    with Image.open(named.demo_image_path(PLACE, "opening")) as strip:
        pictures = [np.asarray(one, dtype=float) for one in split_pictures(strip.convert("RGB"), 7)]
    away = [np.abs(one - pictures[0]).mean() for one in pictures]
    assert away[0] == 0 < away[3]
    assert np.argmax(away) >= 3
    assert all(len(base64.b64decode(each["map"])) == 16 for each in opening["features"])
    edit = first.recipe.edits[0]
    assert turned(edit, 1).strength == pytest.approx(edit.strength)
    assert turned(edit, 0).is_identity
