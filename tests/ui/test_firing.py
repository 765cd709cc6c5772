"""What fires in an image, and which features say most about it."""

import numpy as np
import pytest
from desk_data import LATE, maps_of, reading

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import features_at, first_thing, ranked_features, standing_out
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.heatmap.lab import PER_PATCH, telling_patches


def test_a_map_is_the_most_over_the_saes_steps_or_one_step() -> None:
    maps = reading().maps[LATE]
    assert maps.acts(1, None).tolist() == [2, 0, 0, 0]
    assert maps.acts(1, 8).tolist() == [1, 0, 0, 0]
    assert maps.acts(2, 4).tolist() == [0, 0, 0, 0]
    assert maps.peaks(None)[[1, 2]].tolist() == [2, 3]
    assert maps.at(3, None) == {2: 3.0}
    with pytest.raises(FluxSaeError, match="Give one of 4, 8, or null"):
        maps.acts(1, 5)


def test_ranked_features_fire_and_say_how_strongly(bench: Workbench) -> None:
    ranked = ranked_features(reading().maps[LATE], bench.cards[LATE], step=None, limit=5)
    assert {each.feature for each in ranked} == {1, 2}
    assert all(0 < each.relative <= 1 for each in ranked)
    at = features_at(reading().maps[LATE], bench.cards[LATE], token=0, step=None, limit=5)
    assert [each.feature for each in at] == [1]
    assert features_at(reading().maps[LATE], bench.cards[LATE], token=1, step=None, limit=5) == []


def test_means_are_over_patches_and_steps() -> None:
    values = np.array([[[2.0, 0.0], [4.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]]])
    indices = np.array([[[1, 0], [1, 2]], [[1, 0], [1, 0]]])
    maps = maps_of((2, 6), values, indices, 4)
    assert maps.means(None).tolist() == [0, 2, 0.25, 0]
    assert maps.means(6).tolist() == [0, 1, 0, 0]


def test_a_spread_is_the_share_of_patches_above_half_the_peak() -> None:
    values = np.array([[[4.0, 1.0], [2.5, 1.0], [1.0, 0.0], [0.0, 0.0]]])
    indices = np.array([[[1, 2], [1, 2], [1, 0], [1, 0]]])
    maps = maps_of((2,), values, indices, 4)
    assert maps.spreads(None).tolist() == [0, 0.5, 0.5, 0]


def test_what_glows_on_a_speck_or_everywhere_stands_out_less() -> None:
    speck, thing, everywhere = standing_out(np.array([0.01, 0.15, 0.6]), np.array([0.01, 0.2, 0.9]))
    assert thing > speck
    assert thing > everywhere
    assert standing_out(np.array([0.6]), np.array([1.0]))[0] > 0  # a style is everywhere and still something


def test_heat_is_first_shown_on_a_thing_not_on_its_background(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = bench.cards[LATE]
    monkeypatch.setattr(cards, "labels", ["brown background", None, "red"])
    assert first_thing([0], cards) == 0
    assert first_thing([0, 2], cards) == 2
    assert first_thing([], cards) is None


def test_a_feature_without_a_name_is_no_guess(bench: Workbench) -> None:
    cards = bench.cards[LATE]
    ranked = ranked_features(reading().maps[LATE], cards, step=None, limit=5)
    unnamed = [each for each in ranked if cards.labels[each.feature] is None]
    assert unnamed
    assert {each.label_confidence_here for each in unnamed} == {None}


def test_what_the_page_knows_of_every_patch_is_what_fires_there(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards, rng = bench.cards[LATE], np.random.default_rng(0)
    monkeypatch.setattr(cards, "labels", [None, *rng.choice(["red", "blue", "star", None], len(cards) - 1).tolist()])
    features = np.stack([[rng.permutation(len(cards))[:9] for _ in range(12)] for _ in range(2)])
    maps = maps_of((4, 8), rng.random(features.shape), features, len(cards))
    patches, values = telling_patches(maps, cards)
    for token in range(12):
        alone = features_at(maps, cards, token=token, step=None, limit=PER_PATCH)
        assert patches[token].tolist() == [each.feature for each in alone]
        assert values[token].tolist() == [max(1, round(255 * each.relative)) for each in alone]


def test_a_map_read_feature_by_feature_is_the_one_read_token_by_token() -> None:
    rng = np.random.default_rng(1)
    features = np.stack([[rng.permutation(6)[:3] for _ in range(5)] for _ in range(3)])
    maps = maps_of((1, 2, 3), rng.random(features.shape), features, 6)
    for step in (None, 2):
        by_token = [maps.at(token, step) for token in range(5)]
        assert [maps.acts(f, step).tolist() for f in range(6)] == [
            [at.get(f, 0.0) for at in by_token] for f in range(6)
        ]
        tokens, found, acts = maps.strongest(step)
        assert list(zip(tokens, found, acts, strict=True)) == [
            (token, f, by_token[token][f]) for token in range(5) for f in sorted(by_token[token])
        ]
