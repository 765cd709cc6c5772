"""Which features stand for a concept, and whether their labels say so."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from fluxsae.evaluation.intervals import Estimate, auc_table, bootstrap_weights, interval, weighted_mean
from fluxsae.laboratory.halves import Halves
from fluxsae.laboratory.truths import CONCEPTS, Concept
from fluxsae.miniature.scenes import SYNONYMS

MATCH = 0.75
"""AUC, on both halves, from which a feature is said to match a concept."""


def find_matches(halves: Halves, scores: Float[np.ndarray, "images candidates"]) -> tuple[dict[int, Concept], int]:
    """Matched candidates with their concepts, and the number of candidates that are ever different from 0.

    A candidate's concept is the one it tells best on the first half; it matches where it tells it on both. Ordered by
    the AUC on the first half, the best first.
    """
    first, second = (auc_table(scores[half], halves.truth[half]) for half in (halves.first, halves.second))
    first[~halves.usable] = np.nan
    best = np.nan_to_num(first, nan=-1.0).argmax(axis=0)
    places = np.arange(scores.shape[1])
    is_alive = (scores != 0).any(axis=0)
    is_match = is_alive & (first[best, places] >= MATCH) & (second[best, places] >= MATCH)
    matched = np.flatnonzero(is_match)
    matched = matched[np.argsort(-first[best[matched], matched], kind="stable")]
    return {int(place): CONCEPTS[best[place]] for place in matched}, int(is_alive.sum())


def label_names(label: str | None, concept: Concept) -> bool:
    """Whether a label says the concept's value, by its own word or a synonym."""
    words = (label or "").lower().replace(",", " ").split()
    return concept.value in {SYNONYMS.get(word, word) for word in words}


def label_accuracy(matches: Mapping[int, Concept], labels: Sequence[str | None]) -> Estimate | None:
    """Share of matched features whose label names their concept; None where nothing matched."""
    if not matches:
        return None
    right = np.array([label_names(labels[feature], concept) for feature, concept in matches.items()], dtype=np.float64)
    return interval(weighted_mean(right, bootstrap_weights(len(right), draws=500, seed=0)))
