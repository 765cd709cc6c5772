"""Estimates with intervals over images, and areas under ROC curves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from fluxsae.evaluation.intervals import (
    Estimate,
    auc_table,
    bootstrap_weights,
    interval,
    two_level_draws,
    weighted_auc,
    weighted_mean,
)


def test_auc_on_a_hand_computed_case() -> None:
    # positives 3 and 1, negatives 2 and 1: pairs 3>2, 3>1, 1<2, 1=1 give (1 + 1 + 0 + 0.5) / 4
    scores, truth = np.array([[3.0], [1.0], [2.0], [1.0]]), np.array([[1], [1], [0], [0]])
    assert auc_table(scores, truth)[0, 0] == pytest.approx(2.5 / 4)
    assert weighted_auc(scores[:, 0], truth[:, 0], np.ones((1, 4)))[0] == pytest.approx(2.5 / 4)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_auc_table_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, (40, 3)).astype(float)  # many ties
    truth = rng.integers(0, 2, (40, 2))
    truth[:2] = [[0, 1], [1, 0]]
    expected = [[roc_auc_score(truth[:, c], scores[:, f]) for f in range(3)] for c in range(2)]
    np.testing.assert_allclose(auc_table(scores, truth), expected, atol=1e-12)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_weighted_auc_equals_repeating_the_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 6, 20).astype(float), rng.integers(0, 2, 20)
    truth[:2] = [0, 1]
    weights = bootstrap_weights(20, draws=5, seed=seed)
    weights[:, :2] += 1
    found = weighted_auc(scores, truth, weights)
    for row, value in zip(weights.astype(int), found, strict=True):
        assert value == pytest.approx(roc_auc_score(np.repeat(truth, row), np.repeat(scores, row)))


def test_a_concept_without_negatives_has_no_auc() -> None:
    assert np.isnan(auc_table(np.ones((3, 1)), np.ones((3, 1), dtype=int))).all()
    assert np.isnan(weighted_auc(np.arange(3.0), np.ones(3, dtype=int), np.ones((1, 3)))).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        weights = bootstrap_weights(60, draws=200, seed=trial)
        covered += interval(weighted_mean(rng.normal(1.0, 2.0, 60), weights)).contains(1.0)
    assert 0.88 <= covered / 200 <= 0.99


def test_the_first_resample_is_the_sample_itself() -> None:
    values = np.array([1.0, 2.0, 6.0])
    estimate = interval(weighted_mean(values, bootstrap_weights(3, draws=50, seed=0)))
    assert estimate.value == pytest.approx(3.0)
    assert estimate.low <= 3.0 <= estimate.high


def test_images_without_a_value_do_not_count() -> None:
    assert weighted_mean(np.array([1.0, np.nan, 3.0]), np.ones((1, 3)))[0] == pytest.approx(2.0)
    assert np.isnan(weighted_mean(np.array([np.nan]), np.ones((1, 1)))[0])


def test_an_estimate_is_json_also_without_an_interval() -> None:
    assert Estimate(0.5, float("nan"), float("nan")).to_dict() == {"value": 0.5, "low": None, "high": None}


def test_two_levels_resample_groups_and_members() -> None:
    settled = [np.ones(50), np.zeros(50), np.ones(50), np.zeros(50)]
    found = interval(two_level_draws(settled, draws=2000, seed=0))
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)  # four groups that agree within, 4 choose k / 16
    varied = [np.tile([0.0, 1.0], 25)] * 40
    inside = interval(two_level_draws(varied, draws=2000, seed=0))
    assert inside.value == 0.5
    assert inside.high - inside.low == pytest.approx(2 * 1.96 * 0.5 / (40 * 50) ** 0.5, rel=0.1)


def test_two_levels_weigh_groups_alike_and_cover_the_truth() -> None:
    draws = two_level_draws([np.ones(100), np.zeros(2)], draws=10, seed=0)
    assert draws[0] == 0.5
    rng, hits = np.random.default_rng(1), 0
    for trial in range(100):
        groups = [(rng.random(10) < rate).astype(float) for rate in rng.beta(2, 2, size=15)]
        hits += interval(two_level_draws(groups, draws=300, seed=trial)).contains(0.5)
    assert hits >= 90
