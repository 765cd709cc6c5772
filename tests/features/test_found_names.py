"""Names on planted data with a known answer, and on shuffled data, which have none."""

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fluxsae.features.labels import CURVE_LEVELS, Label
from fluxsae.features.naming import (
    NEVER_SURE,
    PLACES,
    STRENGTHS,
    NameCheck,
    NameChecker,
    NamePlace,
    held_out_half,
    kept_names,
    measured_name,
    name_columns,
    precision_curve,
    random_named,
    strength_levels,
)

COLOURS = ("red", "blue", "green", "pink")
N_IMAGES = 600


class World:
    """Captions of a colour and a thing, pictures whose CLIP vector is their colour, and nothing else."""

    def __init__(self, seed: int = 0, *, with_captions: bool = True) -> None:
        rng = np.random.default_rng(seed)
        self.colours = rng.integers(len(COLOURS), size=N_IMAGES)
        things = rng.integers(50, size=N_IMAGES)
        captions = [
            f"a {COLOURS[c]} thing{t} number{i}" for i, (c, t) in enumerate(zip(self.colours, things, strict=True))
        ]
        vectors = torch.eye(len(COLOURS))[self.colours] + 0.1 * torch.tensor(rng.standard_normal((N_IMAGES, 4))).float()
        self.checker = NameChecker(
            captions if with_captions else [""] * N_IMAGES,
            [f"picture {i}" for i in range(N_IMAGES)],
            vocabulary=COLOURS,
            texts=torch.eye(len(COLOURS)),
            images=vectors,
        )

    def named(self, columns: list[np.ndarray]) -> list[NameCheck | None]:
        scores = [torch.tensor(column, dtype=torch.float32) for column in columns]
        return kept_names([self.checker.check(each, self.checker.propose(each)) for each in scores], max_q=0.05)

    def planted(self, colour: int, *, purity: float, rng: np.random.Generator) -> np.ndarray:
        """A feature that fires on 60 images, this share of which has the colour, strong and weak ones alike."""
        own, other = np.flatnonzero(self.colours == colour), np.flatnonzero(self.colours != colour)
        n_own = round(60 * purity)
        scores = np.zeros(N_IMAGES)
        chosen = [*rng.choice(own, n_own, replace=False), *rng.choice(other, 60 - n_own, replace=False)]
        scores[chosen] = rng.uniform(0.4, 1.0, 60)
        return scores


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_images_of_one_prompt_stay_in_one_half() -> None:
    prompts = [f"prompt {i // 3}" for i in range(300)] + [""] * 100
    held_out = held_out_half(prompts, [str(i) for i in range(400)], seed=0)
    assert (held_out[:300].reshape(-1, 3).sum(axis=1) % 3 == 0).all()
    assert held_out[:300:3].sum() + held_out[300:].sum() == 100  # of 100 prompts and 100 pictures
    assert 20 < held_out[300:].sum() < 80  # pictures without a prompt are told apart


def test_a_planted_name_is_found_with_its_precision_on_the_other_half(world: World) -> None:
    rng = np.random.default_rng(1)
    pure, half = world.named([world.planted(0, purity=1.0, rng=rng), world.planted(1, purity=0.6, rng=rng)])
    assert pure is not None
    assert half is not None
    assert (pure.label.text, half.label.text) == ("red", "blue")
    assert pure.q_value < 1e-6
    assert pure.base == pytest.approx(0.25, abs=0.06)
    assert pure.precision[-1] > 0.75
    assert 0.4 < half.precision[-1] < 0.8
    assert pure.recall[0] == pytest.approx(60 / (N_IMAGES / 4), abs=0.1)
    assert pure.recall[-1] < pure.recall[5] <= pure.recall[0]
    assert half.confidence < pure.confidence


def test_a_name_is_checked_on_images_it_was_not_taken_from(world: World) -> None:
    # red on one half, no colour at all on the other: the name is put forward and falls
    rng, held_out = np.random.default_rng(2), world.checker.held_out
    scores = np.where(held_out, rng.random(N_IMAGES), world.colours == 0).astype(np.float32)
    proposed = world.checker.propose(torch.tensor(scores))
    assert [labels[0].text for labels in proposed] == ["red", "red"]
    assert world.named([scores]) == [None]


def test_pictures_without_captions_are_named_by_clip_alone() -> None:
    bare = World(with_captions=False)
    (found,) = bare.named([bare.planted(2, purity=1.0, rng=np.random.default_rng(3))])
    assert found is not None
    assert (found.label.text, found.label.source, found.precision) == ("green", "clip", None)
    assert found.curve is not None
    assert found.curve[-1] > found.curve[3] > 0


@pytest.mark.parametrize("with_captions", [True, False])
def test_shuffled_features_get_no_name(with_captions: bool) -> None:
    shuffled_world, rng = World(seed=4, with_captions=with_captions), np.random.default_rng(4)
    planted = [shuffled_world.planted(i % 4, purity=1.0, rng=rng) for i in range(40)]
    shuffled = [rng.permutation(column) for column in planted for _ in range(5)]
    assert sum(name is not None for name in shuffled_world.named(shuffled)) <= 1
    columns = [torch.tensor(column, dtype=torch.float32) for column in planted]
    assert random_named(shuffled_world.checker, columns, shuffled_world.named(planted), seed=0) <= 0.05
    among_true = shuffled_world.named([*planted, *shuffled])
    assert sum(name is not None for name in among_true[:40]) == 40
    assert sum(name is not None for name in among_true[40:]) <= binom.ppf(0.99, len(shuffled), 0.05)


def test_names_are_corrected_for_all_features_by_hand() -> None:
    label = Label("red", 1.0, 0.0, 1.0, "captions")
    checks = [NameCheck(label, 0.01), None, NameCheck(label, 0.04), NameCheck(label, 0.5)]
    # Benjamini and Hochberg, three tests: 0.01 * 3 / 1 and 0.04 * 3 / 2
    first, none, second, third = kept_names(checks, max_q=0.07)
    assert first is not None
    assert second is not None
    assert (first.q_value, second.q_value) == pytest.approx((0.03, 0.06))
    assert none is third is None


def test_precision_is_that_of_images_that_fire_so_strongly() -> None:
    rng = np.random.default_rng(0)
    scores = np.where(rng.random(4000) < 0.5, rng.random(4000), 0.0)
    found = precision_curve(scores, scores > 0.6)  # a fifth of all images
    assert found[CURVE_LEVELS <= 0.3].max() < 0.2
    assert found[CURVE_LEVELS >= 0.8].min() > 0.95
    assert 0.3 < found[6] < 0.7
    assert (np.diff(found) >= 0).all()
    half = precision_curve(scores, (scores > 0.6) & (rng.random(4000) < 0.5))
    assert 0.4 < half[-1] < 0.6


def test_a_name_that_has_nothing_to_do_with_the_activation_is_never_trusted() -> None:
    rng = np.random.default_rng(1)
    label, scores, ids = Label("x", 1.0, 0.0, 1.0, "captions"), rng.random(4000), np.arange(4000)
    for holds in (rng.random(4000) < 0.3, np.ones(4000, bool)):  # what every caption says tells nothing
        found = measured_name(label, 0.5, scores, holds, ids=ids)
        assert found.curve is not None
        assert max(found.curve) < 0.1
        assert found.confidence < 0.1


def test_few_images_make_no_certainty() -> None:
    scores = np.array([1.0, 0.98, *[0.0] * 98])
    assert precision_curve(scores, scores > 0).max() < 0.7


def test_a_feature_of_half_of_the_images_is_no_sure_sign_of_a_rarer_thing() -> None:
    rng = np.random.default_rng(2)
    red = rng.random(2000) < 0.1
    often = np.where(red, rng.uniform(0.7, 1.0, 2000), np.where(rng.random(2000) < 0.6, 0.3, 0.0))
    label, ids = Label("red", 1.0, 0.0, 1.0, "captions"), np.arange(2000)
    frequent = measured_name(label, 0.0, often, red, ids=ids)
    seldom = measured_name(label, 0.0, np.where(often > 0.5, often, 0.0), red, ids=ids)
    assert frequent.curve is not None
    assert seldom.curve is not None
    assert max(frequent.curve[:7]) <= NEVER_SURE < max(seldom.curve[:7])
    assert frequent.curve[-1] > NEVER_SURE  # where it fires strongly the held-out images bear it out
    assert frequent.confidence < 0.5 < seldom.confidence  # most of what it fires on is not red


def test_levels_are_thirds_of_the_highest_score() -> None:
    shares = np.array([1.0, 0.9, 0.7, 0.6, 0.4, 0.3, 0.0])
    holds = np.array([True, True, False, True, False, False, True])
    strong, middle, weak = strength_levels(shares, holds, ids=np.arange(10, 17), n_images=2)
    assert list(STRENGTHS) == ["strong", "middle", "weak"]
    assert (strong.n_images, strong.precision, strong.images) == (3, pytest.approx(2 / 3), [10, 12])
    assert (middle.n_images, middle.precision, middle.images) == (2, 0.5, [13, 14])
    assert (weak.n_images, weak.precision, weak.images) == (1, 0.0, [15])
    assert strength_levels(np.zeros(3), np.zeros(3, bool), ids=np.arange(3))[0].precision is None


def test_a_name_without_a_fixed_place_is_never_sure() -> None:
    sure = NameCheck(Label("red", 1.0, 0.0, 1.0, "captions"), 0.0, confidence=0.9, curve=[0.2, 0.95])
    assert sure.at(None).curve == [0.2, 0.95]
    assert sure.at(NamePlace("below", 0.95, 20)).curve == [0.2, 0.95]
    varies = sure.at(NamePlace("varies", 0.4, 20))
    assert (varies.curve, varies.confidence) == ([0.2, NEVER_SURE], NEVER_SURE)
    assert list(PLACES)[-1] == "varies"


def test_columns_hold_none_for_features_without_a_name(world: World) -> None:
    (name,) = world.named([world.planted(0, purity=1.0, rng=np.random.default_rng(5))])
    columns = name_columns([name, None])
    assert columns["label"] == ["red", None]
    assert {len(values) for values in columns.values()} == {2}
    assert all(values[1] is None for values in columns.values())
    assert [len(images) for images in columns["level_images"][0]] == [4, 4, 0]


def test_strengths_are_shares_of_the_highest_score_in_the_whole_run(world: World) -> None:
    scores = world.planted(0, purity=1.0, rng=np.random.default_rng(6))
    chosen = np.flatnonzero((scores > 0) & ~world.checker.held_out)[0]
    (plain,) = world.named([scores])
    scores[chosen] = 2.0  # twice what any held-out image reaches
    (half,) = world.named([scores])
    assert plain is not None
    assert half is not None
    assert plain.levels[0].n_images > 0
    assert half.levels[0].n_images == 0
    assert half.recall[6] == 0 < plain.recall[6]
