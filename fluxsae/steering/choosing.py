"""The condition of an edit, chosen on unedited images with and without its concept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float

from fluxsae.errors import FluxSaeError
from fluxsae.steering.conditions import Condition

FALSE_ALARMS: Final = 0.02
"""Share of images without the concept in which a condition may hold."""
N_FOLDS: Final = 5
INVERSE_PENALTIES: Final = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the sparse regression, from few features to many."""
ROUNDS: Final = (1, 2, 4)
"""How often weights and the patches that they are fitted on follow from each other: each is tried."""

Units = Float[np.ndarray, "images steps tokens features"]
"""Acts as multiples of each feature's reference activation."""
Present = Bool[np.ndarray, " images"]


@dataclass(frozen=True)
class ChosenCondition:
    """A condition, and how it fares on images that its weights were not fitted on."""

    condition: Condition
    detected: float
    """Share of the images with the concept in which it holds from the first step on."""
    false_alarms: float
    """Share of the images without the concept in which it holds at any step."""


def choose_condition(
    acts: Float[np.ndarray, "images steps tokens features"],
    is_present: Present | Sequence[bool],
    *,
    features: Sequence[int],
    reference_acts: Float[np.ndarray, " features"],
    false_alarms: float = FALSE_ALARMS,
    limit: int = 12,
    label: str = "",
) -> ChosenCondition:
    """The condition that holds in most images with the concept, and in at most `false_alarms` of those without.

    Compared are the best feature alone; the best pair of it, where both have to fire at one patch; and a weighted sum
    of at most `limit` features that a sparse regression picks.
    The weights are those of a logistic regression on one patch of each image: first the one where the best feature is
    highest, then the one where the sum is, in turn (Andrews et al. 2002). The level is the lowest that keeps to
    `false_alarms` in further images of the kind.

    Args:
        acts: of unedited images, at the steps of the edit's window, in order.
        is_present: whether each image shows the concept.
        features: the numbers of the last axis of `acts`.
        reference_acts: of these features; those of unknown reference (0) are left out.
        false_alarms: the share of images without the concept that may be edited.
        limit: most features of a condition.
        label: what the condition stands for, in words.

    Raises:
        FluxSaeError: fewer than `N_FOLDS` images with or without the concept, or no feature whose reference is known.
    """
    is_present, known = np.asarray(is_present, dtype=bool), np.flatnonzero(np.asarray(reference_acts) > 0)
    counts = int(is_present.sum()), int((~is_present).sum())
    if min(counts) < N_FOLDS or not len(known):
        raise FluxSaeError(
            f"There are {counts[0]} images with the concept and {counts[1]} without, and {len(known)} features with a "
            f"reference activation. Give at least {N_FOLDS} images of each kind, and features that fire."
        )
    units = np.asarray(acts, dtype=np.float32)[..., known] / np.asarray(reference_acts, dtype=np.float32)[known]
    best, every = _best_alone(units, is_present), np.ones((len(units), 1))
    told, weights, least = [best], np.ones(1), 1
    level, detected, wrong = _tried(units[..., told], is_present, every, false_alarms)
    pair = _pair(units, is_present, best=best) if limit > 1 else told
    both = _tried(units[..., pair].min(axis=-1, keepdims=True), is_present, every, false_alarms)
    if both[1] > detected:
        level, detected, wrong = both
        told, least = pair, len(pair)
    several = _telling(units, is_present, best=best, limit=limit)
    chosen = units[..., several]
    for rounds in ROUNDS if len(several) > 1 else ():
        together = _tried(chosen, is_present, _held_out_weights(chosen, is_present, rounds=rounds), false_alarms)
        if together[1] > detected:
            level, detected, wrong = together
            told, weights, least = several, _fitted(chosen, is_present, rounds=rounds), 1
    condition = Condition(
        tuple(int(features[known[place]]) for place in told),
        above=round(level, 4),
        label=label,
        weights=tuple(round(float(weight), 4) for weight in weights) if len(weights) > 1 else (),
        least=least,
    )
    return ChosenCondition(condition, detected, wrong)


def _best_alone(units: Units, is_present: Present) -> int:
    """The feature whose highest act at the first step tells the images apart best, by AUC."""
    from scipy.stats import rankdata

    ranks = rankdata(units[:, 0].max(axis=1), axis=0)
    return int(ranks[is_present].mean(axis=0).argmax())


def _pair(units: Units, is_present: Present, *, best: int) -> list[int]:
    """`best` and the feature that tells the images apart best together with it: by the smaller act of each patch."""
    pairs = np.minimum(units[..., [best]], units)
    pairs[..., best] = 0.0
    return [best, _best_alone(pairs, is_present)]


def _telling(units: Units, is_present: Present, *, best: int, limit: int) -> list[int]:
    """`best`, and the features that a sparse logistic regression on the first step's highest acts keeps (L1)."""
    from sklearn.linear_model import LogisticRegression

    pooled = units[:, 0].max(axis=1)
    kept = [best]
    for inverse_penalty in INVERSE_PENALTIES:
        model = LogisticRegression(
            C=inverse_penalty, l1_ratio=1.0, solver="liblinear", class_weight="balanced", random_state=0
        )
        picked = np.flatnonzero(model.fit(pooled, is_present).coef_[0])
        found = [best, *(int(place) for place in picked if place != best)]
        if len(found) > limit:
            break
        kept = found
    return kept


def _pooled(units: Units, is_present: Present) -> Float[np.ndarray, "images features"]:
    """The highest act of each image: at the first step where the concept is, since the edit should begin there."""
    pooled: Float[np.ndarray, "images features"] = np.where(
        is_present[:, None], units[:, 0].max(axis=1), units.max(axis=(1, 2))
    )
    return pooled


def _tried(
    units: Units, is_present: Present, weights: Float[np.ndarray, "images features"], false_alarms: float
) -> tuple[float, float, float]:
    """Level, share detected and share of false alarms of a sum whose weights are given for each image."""
    scores = _pooled(np.einsum("istf,if->ist", units, weights)[..., None], is_present)[:, 0]
    level = _level(scores, is_present, false_alarms)
    return level, float((scores[is_present] > level).mean()), float((scores[~is_present] > level).mean())


def _level(scores: Float[np.ndarray, " images"], is_present: Present, false_alarms: float) -> float:
    """The lowest level that a further image without the concept stays below so often (Vovk et al. 2005).

    It is raised to midway to the next image with the concept, which costs no detection.
    """
    without = np.sort(scores[~is_present])
    rank = min(len(without), math.ceil((len(without) + 1) * (1 - false_alarms) - 1e-9))
    lowest = max(float(without[rank - 1]), 0.0)
    higher = scores[is_present & (scores > lowest)]
    return (lowest + float(higher.min())) / 2 if len(higher) else lowest


def _held_out_weights(units: Units, is_present: Present, *, rounds: int) -> Float[np.ndarray, "images features"]:
    """For each image the weights that were fitted on the other folds."""
    from sklearn.model_selection import StratifiedKFold

    weights = np.empty((len(units), units.shape[-1]))
    for fitted_on, held_out in StratifiedKFold(N_FOLDS, shuffle=True, random_state=0).split(weights, is_present):
        weights[held_out] = _fitted(units[fitted_on], is_present[fitted_on], rounds=rounds)
    return weights


def _fitted(units: Units, is_present: Present, *, rounds: int) -> Float[np.ndarray, " features"]:
    """The weights, the largest of them 1; at first the patches are those of the first feature."""
    from sklearn.linear_model import LogisticRegression

    weights = np.zeros(units.shape[-1])
    weights[0] = 1.0
    n_tokens, every = units.shape[2], np.arange(len(units))
    patches = units.reshape(len(units), -1, units.shape[-1])
    for _ in range(rounds):
        sums = patches @ weights
        at = np.where(is_present, sums[:, :n_tokens].argmax(axis=1), sums.argmax(axis=1))
        model = LogisticRegression(class_weight="balanced", max_iter=500)
        fitted = model.fit(patches[every, at], is_present).coef_[0]
        if not fitted.any():
            break
        weights = fitted / np.abs(fitted).max()
    return weights
