"""Which features mean something: coherence against a null, monosemanticity, ranking."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import einops
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import SelectionConfig


@dataclass(frozen=True)
class FeatureCoherence:
    """How alike each feature's top images are, and how sure that is; NaN where too few images fire."""

    coherence: Float[np.ndarray, " features"]
    """Mean pairwise cosine of the top images' CLIP embeddings."""
    p_value: Float[np.ndarray, " features"]
    """Share of random sets of as many active images that are at least as alike."""
    q_value: Float[np.ndarray, " features"]
    """The p-value corrected for testing all features: the false discovery rate at which it would be called coherent."""
    monosemanticity: Float[np.ndarray, " features"]
    """Mean cosine over all pairs of active images, weighted by the product of their scores."""
    n_images: Int[np.ndarray, " features"]
    """Top images the coherence rests on."""


def coherence(embeddings: Float[Tensor, "images width"]) -> float:
    """Mean cosine over all pairs of different images, in [-1, 1]; `embeddings` are unit vectors.

    Raises:
        FluxSaeError: fewer than two images.
    """
    n = embeddings.shape[0]
    if n < 2:
        raise FluxSaeError(f"coherence of {n} images was asked; it needs at least 2")
    total = embeddings.double().sum(dim=0).square().sum()
    return float((total - embeddings.double().square().sum()) / (n * (n - 1)))


def monosemanticity(
    embeddings: Float[Tensor, "images width"], scores: Float[Tensor, "images features"], *, block: int = 512
) -> Float[Tensor, " features"]:
    """For each feature the mean cosine over all pairs of different images, weighted by the product of their scores.

    NaN below two active images. After the monosemanticity score of Pach et al. 2025 (arXiv 2504.02821).
    """
    vectors = embeddings.double()
    parts = [_weighted_coherence(vectors, part.double()) for part in scores.split(block, dim=1)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _weighted_coherence(vectors: Tensor, scores: Tensor) -> Float[Tensor, " features"]:
    weights = scores.clamp(min=0) / scores.amax(dim=0).clamp(min=1e-300)
    own = weights.square()
    together = einops.einsum(weights, vectors, "images features, images width -> features width").square().sum(dim=1)
    alone = einops.einsum(own, vectors.square().sum(dim=1), "images features, images -> features")
    pairs = weights.sum(dim=0).square() - own.sum(dim=0)
    is_pair = (scores > 0).sum(dim=0) >= 2
    return torch.where(is_pair, (together - alone) / pairs, torch.nan)


def iter_columns(scores: Float[Tensor, "images features"], *, block: int = 1024) -> Iterator[Float[Tensor, " images"]]:
    """S of each feature in turn, fp32; a block of them is in memory at a time."""
    for part in scores.split(block, dim=1):
        yield from part.T.float().contiguous()


def top_unique(scores: Float[Tensor, " images"], groups: Int[Tensor, " images"], *, n: int) -> Int[Tensor, " top"]:
    """Up to `n` images with the highest scores above 0, at most one of each group (prompt), best first.

    Equal scores go to the lower image.
    """
    active = (scores > 0).nonzero().flatten()
    order = active[torch.argsort(scores[active], descending=True, stable=True)]
    best = _first_of_groups(order[: 8 * n], groups, n)  # nearly always enough, and much shorter
    return best if len(best) == n else _first_of_groups(order, groups, n)


def _first_of_groups(order: Int[Tensor, " images"], groups: Int[Tensor, " all"], n: int) -> Int[Tensor, " first"]:
    kept: dict[int, int] = {}
    for image, group in zip(order.tolist(), groups[order].tolist(), strict=True):
        kept.setdefault(group, image)
        if len(kept) == n:
            break
    return torch.tensor(list(kept.values()), dtype=torch.long)


def prompt_groups(prompts: Sequence[str]) -> Int[Tensor, " images"]:
    """One number a prompt, the same for images of the same prompt."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts], dtype=torch.long)


def feature_coherence(
    scores: Float[Tensor, "images features"],
    embeddings: Float[Tensor, "embedded width"],
    prompts: Sequence[str],
    *,
    config: SelectionConfig | None = None,
) -> FeatureCoherence:
    """Coherence, p-values and monosemanticity of every feature; `embeddings` are unit vectors of the same images.

    The null: as many images, drawn by chance with unique prompts from the images on which any feature fires.

    Raises:
        FluxSaeError: scores, embeddings and prompts are of different numbers of images.
    """
    config = config or SelectionConfig()
    if not scores.shape[0] == embeddings.shape[0] == len(prompts):
        raise FluxSaeError(
            f"{scores.shape[0]} rows of scores, {embeddings.shape[0]} embeddings, {len(prompts)} prompts were given; "
            "they must be of the same images in the same order: embed the run again"
        )
    groups = prompt_groups(prompts)
    tops, is_active = [], torch.zeros(len(scores), dtype=torch.bool)
    for column in iter_columns(scores):
        tops.append(top_unique(column, groups, n=config.top_images))
        is_active |= column > 0
    null = coherence_null(embeddings, groups, is_active, config=config)
    values, p_values = np.full(len(tops), np.nan), np.full(len(tops), np.nan)
    for feature, top in enumerate(tops):
        if len(top) >= config.min_images:
            values[feature] = coherence(embeddings[top])
            p_values[feature] = null.p_value(values[feature], len(top))
    return FeatureCoherence(
        coherence=values,
        p_value=p_values,
        q_value=q_values(p_values),
        monosemanticity=monosemanticity(embeddings, scores).numpy(),
        n_images=np.array([len(top) for top in tops]),
    )


@dataclass(frozen=True)
class CoherenceNull:
    """Coherences of random sets of images, sorted, for every size of a set."""

    draws: Float[np.ndarray, "sizes draws"]
    """Row m holds the sets of m images; rows 0 and 1 are NaN."""

    def p_value(self, value: float, n_images: int) -> float:
        """Chance that a random set of as many images is at least as coherent; never 0 (Phipson & Smyth 2010)."""
        row = self.draws[n_images]
        at_least = len(row) - int(np.searchsorted(row, value - 1e-9, side="left"))
        return (1 + at_least) / (1 + len(row))


def coherence_null(
    embeddings: Float[Tensor, "images width"],
    groups: Int[Tensor, " images"],
    active: Bool[Tensor, " images"],
    *,
    config: SelectionConfig,
) -> CoherenceNull:
    """Coherences of random sets of active images with unique prompts, of every size up to `config.top_images`."""
    pool = active.nonzero().flatten().numpy()
    most = min(config.top_images, len(np.unique(groups.numpy()[pool])))
    if most < 2:
        return CoherenceNull(np.full((most + 1, config.null_draws), np.nan))
    generator = np.random.default_rng(config.seed)
    rows = [
        _prefix_coherences(embeddings, _random_sets(pool, groups.numpy(), most, size, generator))
        for size in _chunks(config.null_draws, 500)
    ]
    return CoherenceNull(np.sort(np.concatenate(rows).T, axis=1))


def _chunks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _random_sets(
    pool: np.ndarray, groups: np.ndarray, most: int, draws: int, generator: np.random.Generator
) -> Int[np.ndarray, "draws most"]:
    """Images in random order without a second one of a group, cut after `most`."""
    picked = pool[generator.integers(len(pool), size=(draws, 4 * most + 16))]
    is_first = _first_of_group(groups[picked])
    short = np.flatnonzero(is_first.sum(axis=1) < most)
    order = np.argsort(~is_first, axis=1, kind="stable")[:, :most]
    sets = np.take_along_axis(picked, order, axis=1)
    for row in short:
        shuffled = generator.permutation(pool)
        sets[row] = shuffled[_first_of_group(groups[shuffled][None])[0]][:most]
    return sets


def _first_of_group(groups: Int[np.ndarray, "draws picks"]) -> Bool[np.ndarray, "draws picks"]:
    order = np.argsort(groups, axis=1, kind="stable")
    ordered = np.take_along_axis(groups, order, axis=1)
    first = np.ones(groups.shape, dtype=bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    unsorted = np.empty_like(first)
    np.put_along_axis(unsorted, order, first, axis=1)
    return unsorted


def _prefix_coherences(
    embeddings: Float[Tensor, "images width"], sets: Int[np.ndarray, "draws most"]
) -> Float[np.ndarray, "draws sizes"]:
    """Coherence of the first 0, 1, 2, ... images of each set."""
    chosen = embeddings[torch.from_numpy(sets)].double()
    totals = chosen.cumsum(dim=1).square().sum(dim=-1)
    own = chosen.square().sum(dim=-1).cumsum(dim=1)
    size = torch.arange(1, sets.shape[1] + 1)
    prefix = (totals - own) / (size * (size - 1))
    prefix[:, 0] = torch.nan
    return np.concatenate([np.full((len(sets), 1), np.nan), prefix.numpy()], axis=1)


def q_values(p_values: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """The false discovery rate at which each test would be called a discovery; NaN stays NaN and counts as no test."""
    from scipy.stats import false_discovery_control

    is_test = ~np.isnan(p_values)
    rates = np.full(len(p_values), np.nan)
    rates[is_test] = false_discovery_control(p_values[is_test]) if is_test.any() else np.nan
    return rates


def label_images(
    scores: Float[Tensor, " images"], groups: Int[Tensor, " images"], *, config: SelectionConfig
) -> Int[Tensor, " top"]:
    """The images that speak for a feature: unique prompts, best first; beyond the top images none under the floor."""
    top = top_unique(scores, groups, n=config.label_images)
    speaks = scores[top] >= config.label_floor * scores.max()
    speaks[: config.top_images] = True  # one outlier must not silence the rest
    return top[speaks]


def select_features(
    judged: FeatureCoherence, label_confidence: Float[np.ndarray, " features"], *, max_q: float = 0.05
) -> list[int]:
    """Features worth showing, best first: coherent at a false discovery rate of `max_q`, by coherence and label.

    The order is by coherence times (1 + label confidence); a feature without coherence is never selected, so that
    an empty run selects nothing rather than feature 0.
    """
    sure = np.nan_to_num(label_confidence, nan=0.0)
    merit = judged.coherence * (1.0 + sure)
    chosen = np.flatnonzero(np.nan_to_num(judged.q_value, nan=1.0) <= max_q)
    return [int(feature) for feature in chosen[np.argsort(-merit[chosen], kind="stable")]]


def rank_features(
    coherences: Float[np.ndarray, " features"],
    q_values: Float[np.ndarray, " features"],
    label_confidence: Float[np.ndarray, " features"],
    image_density: Float[np.ndarray, " features"],
    *,
    max_q: float = 0.05,
) -> list[int]:
    """All features for browsing: the selected ones first, then those with a label, then what fires, the dead last.

    NaN stands for what was not measured. Within a rank by merit, and where nothing was measured by how often they fire.
    """
    is_selected = np.nan_to_num(q_values, nan=1.0) <= max_q
    sure = np.nan_to_num(label_confidence, nan=0.0)
    merit = np.nan_to_num(coherences, nan=0.0) * (1.0 + sure) + sure
    often = np.where(merit > 0, 0.0, image_density)
    order = np.lexsort((-often, -merit, ~is_selected, image_density <= 0))
    return [int(feature) for feature in order]


def nearest_silent_images(
    scores: Float[Tensor, " images"],
    embeddings: Float[Tensor, "images width"],
    top: Int[Tensor, " top"],
    *,
    n: int = 6,
) -> Int[Tensor, " silent"]:
    """The images that look most like the feature's top images although it is silent there, the nearest first."""
    silent = (scores <= 0).nonzero().flatten()
    if not len(top):
        return silent[:0]
    likeness = embeddings[silent] @ embeddings[top].mean(dim=0)
    return silent[torch.argsort(likeness, descending=True, stable=True)[:n]]
