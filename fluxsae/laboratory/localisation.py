"""Does a feature fire where the concept is? Its token map against the true mask."""

import numpy as np
from jaxtyping import Float

from fluxsae.laboratory.truths import COVERED

LEVELS = np.concatenate([np.linspace(0.0, 0.9, 19), np.linspace(0.92, 0.99, 8)])
"""Thresholds tried, as quantiles of a candidate's values on all tokens, and on those of the images with the concept."""

Maps = Float[np.ndarray, "images tokens"]


def best_threshold(maps: Maps, covers: Maps, *, everywhere: Float[np.ndarray, "all_images tokens"]) -> float:
    """The threshold with the largest mean IoU; `maps` and `covers` of positive images, `everywhere` of all images.

    Minus infinity, where every token fires, is open to every candidate: a dense map reaches it with its lowest
    quantile, a sparse one with none.
    """
    tried = np.unique(np.concatenate([[-np.inf], np.quantile(everywhere, LEVELS), np.quantile(maps, LEVELS)]))
    means = [np.nanmean(intersection_over_union(maps, covers, threshold=float(value))) for value in tried]
    return float(tried[int(np.argmax(means))])


def intersection_over_union(maps: Maps, covers: Maps, *, threshold: float) -> Float[np.ndarray, " images"]:
    """IoU of each image's tokens above `threshold` with the tokens that the concept covers; NaN for an empty mask."""
    inside, fires = covers > COVERED, maps > threshold
    union = (inside | fires).sum(axis=1)
    overlap = (inside & fires).sum(axis=1)
    values: Float[np.ndarray, " images"] = np.where(inside.any(axis=1), overlap / np.maximum(union, 1), np.nan)
    return values


def pointing(maps: Maps, covers: Maps) -> Float[np.ndarray, " images"]:
    """1 where the token with the largest value touches the concept, else 0 (pointing game, Zhang et al. 2016).

    A map of one value everywhere, as that of a silent feature, points nowhere.
    """
    highest = maps.argmax(axis=1)
    points = maps.max(axis=1) > maps.min(axis=1)
    hits: Float[np.ndarray, " images"] = (points & (covers[np.arange(len(maps)), highest] > 0)).astype(np.float64)
    return hits
