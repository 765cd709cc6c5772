"""Does an SAE's feature stand for something? Features against the true concepts of the images, beside baselines.

Concepts are read from the generated images themselves. Every choice (feature, channel, component, direction, threshold)
is made on one half of the images and reported on the other; images of one prompt stay in one half.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.concept_report import (
    BASELINES,
    FEATURE,
    METHODS,
    PROBE,
    ConceptReport,
    ConceptScore,
    MethodScore,
)
from fluxsae.evaluation.intervals import (
    Estimate,
    auc_table,
    bootstrap_weights,
    interval,
    weighted_auc,
    weighted_mean,
)
from fluxsae.evaluation.localisation import best_threshold, intersection_over_union, pointing
from fluxsae.evaluation.probes import TokenMoments, pooled_probe_scores
from fluxsae.evaluation.readouts import Readout, SaeReadout, channels, principal_components, random_directions
from fluxsae.evaluation.stream import ImageSet, OnProgress, iter_activations
from fluxsae.evaluation.truths import CONCEPTS, HEADLINE_ATTRIBUTES, Concept, attribute_mean, coverage, truth_table
from fluxsae.flux import FluxPipeline, token_grid
from fluxsae.hookpoints import HookPoint
from fluxsae.miniature.scenes import ATTRIBUTES, SYNONYMS, Scene, read_scene
from fluxsae.sae import SparseAutoencoder
from fluxsae.settings import GenerationSettings

POOLED_PROBE, TOKEN_PROBE = "pooled probe", "token probe"

LEAST_CONFIDENCE = 0.05
"""Images that the reader is less sure of have no known truth and are left out."""
LEAST_IMAGES = 5
"""A concept needs this many images with it and without it in each half."""
MATCH = 0.75
"""AUC, on both halves, from which a feature is said to match a concept."""
PCA_TOKENS = 20_000


@dataclass(eq=False)
class _Gathered:
    """What one pass over the images keeps of them at one hook point."""

    sae: SparseAutoencoder
    moments: TokenMoments
    readouts: dict[str, Readout] = field(default_factory=dict)
    pooled: dict[str, list[Float[np.ndarray, "images steps candidates"]]] = field(default_factory=dict)

    def add(self, x: torch.Tensor, *, seed: int) -> None:
        if not self.readouts:
            tokens = rearrange(x, "images steps tokens d -> (images steps tokens) d")
            every = max(1, len(tokens) // PCA_TOKENS)
            basis = principal_components(self.sae, tokens[::every])
            random = random_directions(self.sae, seed=seed)
            self.readouts = {r.name: r for r in (SaeReadout(self.sae), channels(self.sae), basis, random)}
            self.pooled = {name: [] for name in self.readouts}
        for name, readout in self.readouts.items():
            self.pooled[name].append(readout.pooled(x).cpu().numpy())

    def scores(self, method: str, *, steps: slice | int = slice(None)) -> Float[np.ndarray, "images candidates"]:
        values = np.concatenate(self.pooled[method])[:, steps]
        return values if isinstance(steps, int) else values.max(axis=1)


def split_by_prompt(prompts: Sequence[str], *, seed: int = 0) -> Bool[np.ndarray, " images"]:
    """Which images are in the first half, where choices are made; images of one prompt stay together."""
    distinct = sorted(set(prompts))
    first = set(np.random.default_rng(seed).permutation(distinct)[: (len(distinct) + 1) // 2].tolist())
    return np.array([prompt in first for prompt in prompts], dtype=bool)


@torch.no_grad()
def evaluate_concepts(
    pipe: FluxPipeline,
    saes: Mapping[HookPoint, SparseAutoencoder],
    images: ImageSet,
    steps: Mapping[HookPoint, Sequence[int]],
    *,
    settings: GenerationSettings,
    labels: Mapping[HookPoint, Sequence[str | None]] | None = None,
    batch_size: int = 8,
    draws: int = 500,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[HookPoint, ConceptReport]:
    """For every true concept the best feature, beside raw channels, PCA, random directions and linear probes.

    The images are generated twice: once for scores of all candidates, once for the token maps of those chosen.

    Raises:
        FluxSaeError: too few images show scenes that can be read.
    """
    is_first = split_by_prompt(images.prompts, seed=seed)
    gathered = {hookpoint: _Gathered(sae, TokenMoments(sae)) for hookpoint, sae in saes.items()}
    scenes: list[Scene] = []
    grid = token_grid(pipe, settings)
    batches = iter_activations(
        pipe, images, steps, settings=settings, batch_size=batch_size, with_pictures=True, on_progress=on_progress,
        doing="concepts",
    )  # fmt: skip
    for batch in batches:
        read = [read_scene(picture) for picture in batch.pictures]
        scenes += read
        for hookpoint, one in gathered.items():
            one.add(batch.tokens[hookpoint], seed=seed)
            for row, scene, x in zip(batch.rows, read, batch.tokens[hookpoint], strict=True):
                if is_first[row] and scene.confidence >= LEAST_CONFIDENCE:
                    one.moments.update(x, coverage(scene, grid))
    study = _Study.plan(scenes, is_first, draws=draws, seed=seed)
    for one in gathered.values():
        one.readouts[TOKEN_PROBE] = one.moments.readout()
    chosen = {hookpoint: study.choose(one) for hookpoint, one in gathered.items()}
    maps = _gather_maps(
        pipe, images, steps, gathered, chosen, settings=settings, batch_size=batch_size, on_progress=on_progress
    )
    covers = np.stack([coverage(scene, grid) for scene in scenes])
    return {
        hookpoint: _report(
            study, one, chosen[hookpoint], maps[hookpoint], covers,
            hookpoint=hookpoint, steps=steps[hookpoint], labels=(labels or {}).get(hookpoint),
        )
        for hookpoint, one in gathered.items()
    }  # fmt: skip


Chosen = dict[str, Int[np.ndarray, " concepts"]]
TokenMaps = dict[str, Float[np.ndarray, "images concepts tokens"]]


def _gather_maps(
    pipe: FluxPipeline,
    images: ImageSet,
    steps: Mapping[HookPoint, Sequence[int]],
    gathered: Mapping[HookPoint, _Gathered],
    chosen: Mapping[HookPoint, Chosen],
    *,
    settings: GenerationSettings,
    batch_size: int,
    on_progress: OnProgress | None,
) -> dict[HookPoint, TokenMaps]:
    parts: dict[HookPoint, dict[str, list[np.ndarray]]] = {h: {m: [] for m in chosen[h]} for h in gathered}
    batches = iter_activations(
        pipe, images, steps, settings=settings, batch_size=batch_size, on_progress=on_progress, doing="localisation"
    )
    for batch in batches:
        for hookpoint, one in gathered.items():
            for method, candidates in chosen[hookpoint].items():
                values = one.readouts[method].maps(batch.tokens[hookpoint], candidates.tolist())
                parts[hookpoint][method].append(values.cpu().numpy())
    return {h: {m: np.concatenate(values) for m, values in per.items()} for h, per in parts.items()}


@dataclass(frozen=True, eq=False)
class _Study:
    """The two halves, what is true in them, and how the second is resampled."""

    truth: Int[np.ndarray, "images concepts"]
    first: Int[np.ndarray, " first"]
    second: Int[np.ndarray, " reported"]
    usable: Bool[np.ndarray, " concepts"]
    weights: Float[np.ndarray, "draws reported"]

    @classmethod
    def plan(cls, scenes: Sequence[Scene], is_first: Bool[np.ndarray, " images"], *, draws: int, seed: int) -> "_Study":
        is_read = np.array([scene.confidence >= LEAST_CONFIDENCE for scene in scenes])
        truth = truth_table(scenes)
        first, second = np.flatnonzero(is_first & is_read), np.flatnonzero(~is_first & is_read)
        usable = np.ones(len(CONCEPTS), dtype=bool)
        for half in (first, second):
            positives = truth[half].sum(axis=0)
            usable &= (positives >= LEAST_IMAGES) & (len(half) - positives >= LEAST_IMAGES)
        if not usable.any():
            raise FluxSaeError(
                f"Of {len(scenes)} images {is_read.sum()} show scenes that can be read, too few for any concept. "
                "Concepts are known for the miniature's scenes only; give more images, or another evaluation."
            )
        return cls(truth, first, second, usable, bootstrap_weights(len(second), draws=draws, seed=seed))

    def choose(self, gathered: _Gathered) -> Chosen:
        """The best candidate of each method for each concept, on the first half."""
        chosen = {
            method: _best(auc_table(gathered.scores(method)[self.first], self.truth[self.first]))
            for method in (FEATURE, *BASELINES)
        }
        return {**chosen, TOKEN_PROBE: np.arange(len(CONCEPTS))}

    def auc_draws(self, scores: Float[np.ndarray, " images"], concept: int) -> Float[np.ndarray, " draws"]:
        return weighted_auc(scores[self.second], self.truth[self.second, concept], self.weights)

    def over_concepts(
        self, draws_of: Callable[[int], Float[np.ndarray, " draws"]]
    ) -> Float[np.ndarray, "concepts draws"]:
        """A statistic of every usable concept; NaN rows for the others."""
        values = np.full((len(CONCEPTS), len(self.weights)), np.nan)
        for concept in np.flatnonzero(self.usable):
            values[concept] = draws_of(int(concept))
        return values


def _best(table: Float[np.ndarray, "concepts candidates"]) -> Int[np.ndarray, " concepts"]:
    best: Int[np.ndarray, " concepts"] = np.nan_to_num(table, nan=-1.0).argmax(axis=1)
    return best


def _report(
    study: _Study,
    gathered: _Gathered,
    chosen: Chosen,
    maps: TokenMaps,
    covers: Float[np.ndarray, "images concepts tokens"],
    *,
    hookpoint: HookPoint,
    steps: Sequence[int],
    labels: Sequence[str | None] | None,
) -> ConceptReport:
    aucs = _auc_draws(study, gathered, chosen, maps)
    probe_kind = _stronger_probe(aucs)
    kinds = [probe_kind[concept.attribute] for concept in CONCEPTS]
    aucs[PROBE] = np.stack([aucs[kind][row] for row, kind in enumerate(kinds)])
    places = {method: _localise(study, maps[method], covers) for method in maps}
    places[PROBE] = places[TOKEN_PROBE]
    chosen = {**chosen, PROBE: chosen[TOKEN_PROBE]}
    matches, share, n_alive = _matches(study, gathered)
    return ConceptReport(
        hookpoint=str(hookpoint),
        steps=tuple(steps),
        n_images=len(study.first) + len(study.second),
        n_unread=len(study.truth) - len(study.first) - len(study.second),
        concepts=tuple(
            ConceptScore(
                concept,
                int(study.truth[study.second, row].sum()),
                {m: MethodScore(int(chosen[m][row]), interval(aucs[m][row]), *places[m][row]) for m in METHODS},
                labels[chosen[FEATURE][row]] if labels else None,
            )
            for row, concept in enumerate(CONCEPTS)
            if study.usable[row]
        ),
        skipped=tuple(concept for row, concept in enumerate(CONCEPTS) if not study.usable[row]),
        ratio={method: interval(_mean_ratio(aucs[method], aucs[PROBE])) for method in METHODS},
        attribute_ratio={
            method: {name: float(_ratio(aucs[method], aucs[PROBE], name)[0]) for name in ATTRIBUTES}
            for method in METHODS
        },
        probe_kind=probe_kind,
        matched_share=share,
        n_alive=n_alive,
        n_matched=len(matches),
        label_accuracy=_label_accuracy(matches, labels) if labels else None,
        step_auc=_step_auc(study, gathered, steps),
        matches=matches,
    )


def _auc_draws(
    study: _Study, gathered: _Gathered, chosen: Chosen, maps: TokenMaps
) -> dict[str, Float[np.ndarray, "concepts draws"]]:
    """AUC on the second half of each method's choice and of both probes, for the sample and each resample."""
    aucs = {}
    for method in (FEATURE, *BASELINES):
        scores, best = gathered.scores(method), chosen[method]
        aucs[method] = study.over_concepts(lambda c, s=scores, b=best: study.auc_draws(s[:, b[c]], c))  # type: ignore[misc]
    token_scores = maps[TOKEN_PROBE].max(axis=2)
    aucs[TOKEN_PROBE] = study.over_concepts(lambda c: study.auc_draws(token_scores[:, c], c))
    pooled = gathered.scores("raw channel")

    def probe_draws(concept: int) -> Float[np.ndarray, " draws"]:
        scores = np.zeros(len(pooled))
        truth = study.truth[study.first, concept]
        scores[study.second] = pooled_probe_scores(pooled[study.first], truth, pooled[study.second])
        return study.auc_draws(scores, concept)

    aucs[POOLED_PROBE] = study.over_concepts(probe_draws)
    return aucs


def _stronger_probe(aucs: Mapping[str, Float[np.ndarray, "concepts draws"]]) -> dict[str, str]:
    """Attribute -> the probe with the larger mean AUC on the second half: the ceiling is never put too low."""
    return {
        name: max((POOLED_PROBE, TOKEN_PROBE), key=lambda kind: attribute_mean(aucs[kind][:, 0], name))
        for name in ATTRIBUTES
    }


def _ratio(
    auc: Float[np.ndarray, "concepts draws"], ceiling: Float[np.ndarray, "concepts draws"], attribute: str
) -> Float[np.ndarray, " draws"]:
    """Mean of AUC - 0.5 over an attribute's concepts, as a share of the ceiling's."""
    rows = np.array([concept.attribute == attribute for concept in CONCEPTS]) & ~np.isnan(auc[:, 0])
    if not rows.any():
        return np.full(auc.shape[1], np.nan)
    share: Float[np.ndarray, " draws"] = (auc[rows] - 0.5).mean(axis=0) / (ceiling[rows] - 0.5).mean(axis=0)
    return share


def _mean_ratio(
    auc: Float[np.ndarray, "concepts draws"], ceiling: Float[np.ndarray, "concepts draws"]
) -> Float[np.ndarray, " draws"]:
    shares = np.stack([_ratio(auc, ceiling, name) for name in HEADLINE_ATTRIBUTES])
    mean: Float[np.ndarray, " draws"] = shares[~np.isnan(shares[:, 0])].mean(axis=0)
    return mean


def _localise(
    study: _Study,
    maps: Float[np.ndarray, "images concepts tokens"],
    covers: Float[np.ndarray, "images concepts tokens"],
) -> list[tuple[Estimate | None, Estimate | None]]:
    """IoU and pointing of each concept on the second half's images that show it, the threshold from the first half."""
    found: list[tuple[Estimate | None, Estimate | None]] = []
    for row in range(len(CONCEPTS)):
        if not study.usable[row]:
            found.append((None, None))
            continue
        shows = study.truth[:, row] == 1
        fit, report = study.first[shows[study.first]], study.second[shows[study.second]]
        threshold = best_threshold(maps[fit, row], covers[fit, row], everywhere=maps[study.first, row])
        overlaps = intersection_over_union(maps[report, row], covers[report, row], threshold=threshold)
        hits = pointing(maps[report, row], covers[report, row])
        weights = study.weights[:, shows[study.second]]
        found.append((interval(weighted_mean(overlaps, weights)), interval(weighted_mean(hits, weights))))
    return found


def _matches(study: _Study, gathered: _Gathered) -> tuple[dict[int, Concept], dict[str, float], int]:
    """Matched features with their concepts, each method's share of matched candidates, and the alive features."""
    shares: dict[str, float] = {}
    matches: dict[int, Concept] = {}
    n_alive = 0
    for method in (FEATURE, *BASELINES):
        scores = gathered.scores(method)
        first, second = (auc_table(scores[half], study.truth[half]) for half in (study.first, study.second))
        first[~study.usable] = np.nan
        best = np.nan_to_num(first, nan=-1.0).argmax(axis=0)
        places = np.arange(scores.shape[1])
        is_match = (first[best, places] >= MATCH) & (second[best, places] >= MATCH)
        alive = (scores != 0).any(axis=0)
        shares[method] = float(is_match[alive].mean()) if alive.any() else 0.0
        if method == FEATURE:
            n_alive = int(alive.sum())
            matches = {int(feature): CONCEPTS[best[feature]] for feature in np.flatnonzero(is_match & alive)}
    return matches, shares, n_alive


def label_names(label: str | None, concept: Concept) -> bool:
    """Whether a label says the concept's value, by its own word or a synonym."""
    words = (label or "").lower().replace(",", " ").split()
    return concept.value in {SYNONYMS.get(word, word) for word in words}


def _label_accuracy(matches: Mapping[int, Concept], labels: Sequence[str | None]) -> Estimate | None:
    if not matches:
        return None
    right = np.array([label_names(labels[feature], concept) for feature, concept in matches.items()], dtype=np.float64)
    return interval(weighted_mean(right, bootstrap_weights(len(right), draws=500, seed=0)))


def _step_auc(study: _Study, gathered: _Gathered, steps: Sequence[int]) -> dict[int, float]:
    means = {}
    for place, step in enumerate(steps):
        scores = gathered.scores(FEATURE, steps=place)
        best = _best(auc_table(scores[study.first], study.truth[study.first]))
        table = auc_table(scores[study.second], study.truth[study.second])
        aucs = np.where(study.usable, table[np.arange(len(CONCEPTS)), best], np.nan)
        means[step] = float(np.nanmean([attribute_mean(aucs, name) for name in HEADLINE_ATTRIBUTES]))
    return means
