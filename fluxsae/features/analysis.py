"""From S and sums to one row a feature: class, quantiles, place, steps, best images, companions."""

import json
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.scores import ScoreMatrix, TopImages, fingerprint_metadata
from fluxsae.features.statistics import HISTOGRAM_EDGES, PLACE_SIDE, FeatureStats
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.runs.tables import FeatureRow, FeatureTable

FEATURE_CLASSES = ("dead", "rare", "common", "very common")
_FEATURES_AT_ONCE = 512


def feature_class(density: float, config: AnalysisConfig) -> str:
    """dead, rare, common or very common, by the share of tokens on which the feature fires."""
    if density <= 0:
        return "dead"
    if density < config.rare_below:
        return "rare"
    return "common" if density < config.very_common_from else "very common"


class Companions(NamedTuple):
    """Features that fire on the same images, nearest first: one list a feature."""

    features: list[list[int]]
    similarities: list[list[float]]


def find_companions(top: TopImages, *, n_images: int, n_neighbours: int) -> Companions:
    """For each feature those whose best images are its own: cosine of S, cut to each feature's best images.

    Cutting keeps a feature that fires faintly everywhere from being near to everything, and the cost linear.
    """
    scores = top.scores.double()
    unit = (scores / scores.norm(dim=1, keepdim=True).clamp(min=1e-300)).numpy()
    rows, ranks = np.nonzero(top.image_ids.numpy() >= 0)
    columns = top.image_ids.numpy()[rows, ranks]
    matrix = sparse.csr_matrix((unit[rows, ranks], (rows, columns)), shape=(len(unit), n_images))
    found = Companions([], [])
    for start in range(0, len(unit), _FEATURES_AT_ONCE):
        block = (matrix[start : start + _FEATURES_AT_ONCE] @ matrix.T).toarray()
        for offset, similarities in enumerate(block):
            similarities[start + offset] = 0.0
            nearest = np.argsort(-similarities, kind="stable")[:n_neighbours]
            nearest = nearest[similarities[nearest] > 0]
            found.features.append(nearest.tolist())
            found.similarities.append(similarities[nearest].tolist())
    return found


def find_families(companions: Companions, *, similarity: float) -> list[int]:
    """The number of each feature's family, by size, largest first; -1 for a feature on its own."""
    n_features = len(companions.features)
    pairs = {
        (feature, other)
        for feature, (others, values) in enumerate(zip(*companions, strict=True))
        for other, value in zip(others, values, strict=True)
        if value >= similarity
    }
    mutual = [pair for pair in sorted(pairs) if pair[::-1] in pairs]
    rows, columns = zip(*mutual, strict=True) if mutual else ((), ())
    graph = sparse.csr_matrix((np.ones(len(mutual)), (rows, columns)), shape=(n_features, n_features))
    _, parts = connected_components(graph, directed=False)
    sizes = np.bincount(parts, minlength=1)
    order = sorted((part for part in range(len(sizes)) if sizes[part] > 1), key=lambda part: (-sizes[part], part))
    number = {part: rank for rank, part in enumerate(order)}
    return [number.get(part, -1) for part in parts.tolist()]


def place_shares(
    places: Float[Tensor, "features cells"], grid: TokenGrid
) -> tuple[list[float | None], list[float | None]]:
    """Shares of each feature's activation in the middle quarter of images, and in their outermost cells.

    `places` are sums by cell of the coarse grid. None for a feature that never fires, and on a grid that is too small
    to have a middle and a border, such as the single row of a text stream.
    """
    rows, cols = min(grid.rows, PLACE_SIDE), min(grid.cols, PLACE_SIDE)
    if min(rows, cols) < 4:
        return [None] * len(places), [None] * len(places)
    square = places.reshape(-1, rows, cols)
    total = square.sum(dim=(1, 2))
    middle = square[:, rows // 4 : rows - rows // 4, cols // 4 : cols - cols // 4].sum(dim=(1, 2))
    border = total - square[:, 1:-1, 1:-1].sum(dim=(1, 2))
    alive = (total > 0).tolist()
    parts = ((part / total.clamp(min=1e-300)).tolist() for part in (middle, border))
    centres, borders = ([s if fires else None for s, fires in zip(each, alive, strict=True)] for each in parts)
    return centres, borders


def describe_features(scores: ScoreMatrix, stats: FeatureStats, config: AnalysisConfig) -> FeatureTable:
    """One row a feature, from S and the sums.

    Raises:
        FluxSaeError: S and the sums are of different features or images.
    """
    n_scored = scores.n_images - len(scores.left_out)
    if scores.n_features != len(stats.counts) or n_scored != stats.n_images:
        raise FluxSaeError(
            f"S is of {n_scored} images and {scores.n_features} features, the sums of {stats.n_images} and "
            f"{len(stats.counts)}. Score the images again."
        )
    best = scores.top(max(config.n_top_images, config.companion_images))
    companions = find_companions(best, n_images=scores.n_images, n_neighbours=config.n_neighbours)
    families = find_families(companions, similarity=config.family_similarity)
    images = [ids[ids >= 0].numpy() for ids in best.image_ids[:, : config.n_top_images]]
    density, image_density = stats.density.tolist(), (stats.image_counts / max(1, stats.n_images)).tolist()
    centres, borders = place_shares(stats.places, scores.grid)
    columns: dict[str, list[Any]] = {
        "feature": list(range(scores.n_features)),
        "feature_class": [feature_class(share, config) for share in density],
        "density": density,
        "image_density": image_density,
        "mean_act": stats.mean_act.tolist(),
        "max_act": stats.maxima.tolist(),
        "quantiles": stats.quantiles(config.quantile_levels).tolist(),
        "spatial_spread": stats.spatial_spread.tolist(),
        "step_profile": stats.step_profile.T.tolist(),
        "histogram": stats.histogram.tolist(),
        "top_images": [ids.tolist() for ids in images],
        "top_scores": [best.scores[f, : len(ids)].tolist() for f, ids in enumerate(images)],
        "top_tokens": [np.asarray(scores.argmax_token[ids, f]).astype(int).tolist() for f, ids in enumerate(images)],
        "neighbours": companions.features,
        "neighbour_similarities": companions.similarities,
        "family": families,
        "patch_share": [d / i if i > 0 else None for d, i in zip(density, image_density, strict=True)],
        "centre_share": centres,
        "border_share": borders,
    }
    rows = [FeatureRow(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
    metadata = {
        "quantile_levels": json.dumps(list(config.quantile_levels)),
        "steps": json.dumps(list(stats.steps)),
        "histogram_edges": json.dumps(list(HISTOGRAM_EDGES)),
        **fingerprint_metadata(scores.sae_fingerprint),
    }
    return FeatureTable.from_rows(rows, metadata=metadata)


def class_counts(table: FeatureTable) -> dict[str, int]:
    """How many features are dead, rare, common and very common."""
    classes = list(table.column("feature_class"))
    return {name: classes.count(name) for name in FEATURE_CLASSES}
