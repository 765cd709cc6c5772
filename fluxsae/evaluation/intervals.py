"""Estimates with bootstrap intervals: images are drawn again with replacement, never tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

LEVEL = 0.95
"""Coverage of every interval."""

Weights = Float[np.ndarray, "draws images"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % bootstrap interval over images; NaN bounds where it cannot be resampled."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def contains(self, value: float) -> bool:
        """Whether the interval contains `value`."""
        return self.low <= value <= self.high

    def to_dict(self) -> dict[str, float | None]:
        """The numbers as JSON values; None for NaN, which JSON does not have."""
        return {name: None if np.isnan(number) else number for name, number in vars(self).items()}


def bootstrap_weights(n_images: int, *, draws: int, seed: int) -> Weights:
    """How often each image comes in each resample; the first row is the sample itself, each image once."""
    counts = np.random.default_rng(seed).multinomial(n_images, np.full(n_images, 1 / n_images), size=draws)
    return np.concatenate([np.ones((1, n_images)), counts])


def interval(values: Float[np.ndarray, " draws"]) -> Estimate:
    """The estimate whose first value is the sample's own and whose other values are the resamples'."""
    resampled = values[1:][~np.isnan(values[1:])]
    if not len(resampled):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values[0]), float(low), float(high))


def two_level_draws(groups: Sequence[Float[np.ndarray, " _"]], *, draws: int, seed: int) -> Float[np.ndarray, " draws"]:
    """The mean of the groups' means, for the sample and for resamples of groups and of the members of each.

    For rates of pictures of several concepts: other concepts could have been asked for, and other pictures drawn.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(groups), size=(draws, len(groups)))
    taken = np.zeros(chosen.shape)
    for place, group in enumerate(groups):
        is_chosen, n = chosen == place, len(group)
        taken[is_chosen] = rng.multinomial(n, np.full(n, 1 / n), size=int(is_chosen.sum())) @ group / n
    return np.concatenate([[np.mean([group.mean() for group in groups])], taken.mean(axis=1)])


def weighted_mean(values: Float[np.ndarray, " images"], weights: Weights) -> Float[np.ndarray, " draws"]:
    """Mean over the images of each resample; images whose value is NaN do not count."""
    known = ~np.isnan(values)
    total = weights[:, known].sum(axis=1)
    with np.errstate(invalid="ignore"):
        mean: Float[np.ndarray, " draws"] = weights[:, known] @ values[known] / np.where(total > 0, total, np.nan)
    return mean


def safe_ratio(
    numerator: Float[np.ndarray, " draws"], denominator: Float[np.ndarray, " draws"]
) -> Float[np.ndarray, " draws"]:
    """The quotient, NaN where the denominator is not above 0."""
    quotient: Float[np.ndarray, " draws"] = numerator / np.where(denominator > 0, denominator, np.nan)
    return quotient


def auc_table(
    scores: Float[np.ndarray, "images candidates"], truths: Int[np.ndarray, "images concepts"]
) -> Float[np.ndarray, "concepts candidates"]:
    """P(score of a positive image > that of a negative one), ties half: the area under the ROC curve of every pair.

    NaN for a concept without positives or without negatives. `truths` are 0 and 1.
    """
    from scipy.stats import rankdata

    positives = truths.sum(axis=0).astype(np.float64)[:, None]
    negatives = len(truths) - positives
    rank_sums = truths.T.astype(np.float64) @ rankdata(scores, axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        table: Float[np.ndarray, "concepts candidates"] = (rank_sums - positives * (positives + 1) / 2) / (
            positives * negatives
        )
    return table


def weighted_auc(
    scores: Float[np.ndarray, " images"], truth: Int[np.ndarray, " images"], weights: Weights
) -> Float[np.ndarray, " draws"]:
    """The area under the ROC curve of each resample, ties half; NaN where a resample lacks one of the classes."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive = np.add.reduceat(weights[:, order] * truth[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - truth[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    area: Float[np.ndarray, " draws"] = (positive * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)
    return area
