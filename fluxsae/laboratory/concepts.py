"""Does an SAE's feature stand for something? Features against the true concepts of the images, beside baselines.

Concepts are read from the generated images themselves. Every choice (feature, channel, component, direction, threshold)
is made on one half of the images and reported on the other; images of one prompt stay in one half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int

from fluxsae.evaluation.intervals import Estimate, auc_table, interval, weighted_mean
from fluxsae.evaluation.stream import ImageSet, OnProgress, iter_activations
from fluxsae.flux import AnyFlux, schedule_sigmas, token_grid
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.concept_report import (
    BASELINES,
    FEATURE,
    METHODS,
    PROBE,
    ConceptReport,
    ConceptScore,
    MethodScore,
)
from fluxsae.laboratory.halves import LEAST_CONFIDENCE, Halves, fold_by_prompt, split_by_prompt
from fluxsae.laboratory.localisation import best_threshold, intersection_over_union, pointing
from fluxsae.laboratory.matching import find_matches, label_accuracy
from fluxsae.laboratory.probes import N_FOLDS, TokenMoments, pooled_probe
from fluxsae.laboratory.readouts import Readout, SaeReadout, channels, principal_components, random_directions
from fluxsae.laboratory.truths import CONCEPTS, HEADLINE_ATTRIBUTES, attribute_mean, coverage
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, read_scene
from fluxsae.sae.model import SparseAutoencoder

POOLED_PROBE, TOKEN_PROBE = "pooled probe", "token probe"
PCA_TOKENS = 20_000
"""Tokens of the first half that the principal components are fitted on, where there are as many."""


@dataclass(eq=False)
class _Gathered:
    """What one pass over the images keeps of them at one hook point."""

    sae: SparseAutoencoder
    moments: Sequence[TokenMoments]
    """One for each fold of the first half."""
    seed: int
    sigmas: Float[torch.Tensor, " steps"] | None = None
    """Noise levels of the steps, which an SAE with a `sigma_table` needs."""
    readouts: dict[str, Readout] = field(default_factory=dict)
    fold_probes: list[Readout] = field(default_factory=list)
    token_scores: list[Float[np.ndarray, "images concepts"]] = field(default_factory=list)
    """The token probe's scores of every image, by a probe that was not fitted on it."""
    pooled: dict[str, list[Float[np.ndarray, "images steps candidates"]]] = field(default_factory=dict)
    _waiting: list[Float[torch.Tensor, "images steps tokens d"]] = field(default_factory=list)
    _to_fit: list[Float[torch.Tensor, "tokens d"]] = field(default_factory=list)

    def add(self, x: Float[torch.Tensor, "images steps tokens d"], is_first: Bool[np.ndarray, " images"]) -> None:
        """Takes some images; they wait until the first half has given tokens enough for principal components."""
        self._waiting.append(x)
        if self.readouts:
            self._pool()
            return
        self._to_fit.append(
            rearrange(x[torch.from_numpy(is_first)], "images steps tokens d -> (images steps tokens) d")
        )
        if sum(map(len, self._to_fit)) >= PCA_TOKENS:
            self.finish()

    def finish(self) -> None:
        """Takes in what still waits, when no more images come."""
        if not self.readouts:
            basis = principal_components(self.sae, torch.cat(self._to_fit))
            random = random_directions(self.sae, seed=self.seed)
            self.readouts = {r.name: r for r in (SaeReadout(self.sae, self.sigmas), channels(self.sae), basis, random)}
            self.pooled = {name: [] for name in self.readouts}
            self._to_fit.clear()
        self._pool()

    def _pool(self) -> None:
        for x in self._waiting:
            for name, readout in self.readouts.items():
                self.pooled[name].append(readout.pooled(x).cpu().numpy())
        self._waiting.clear()

    def finish_probe(self) -> None:
        """Makes the token probe of the first half, and for each of its folds the one of the other folds."""
        self.readouts[TOKEN_PROBE] = TokenMoments.merged(self.moments).readout()
        for fold in range(N_FOLDS):
            self.fold_probes.append(TokenMoments.merged([*self.moments[:fold], *self.moments[fold + 1 :]]).readout())

    def held_out_scores(
        self, x: Float[torch.Tensor, "images steps tokens d"], folds: Int[np.ndarray, " images"]
    ) -> Float[np.ndarray, "images concepts"]:
        """The token probe's pooled scores of images that it was not fitted on: other folds' in the first half."""
        probes = [*self.fold_probes, self.readouts[TOKEN_PROBE]]  # fold -1, the second half, is the last
        values = [probes[fold].pooled(image[None]).amax(1)[0] for fold, image in zip(folds, x, strict=True)]
        return torch.stack(values).cpu().numpy()

    def scores(self, method: str, *, steps: slice | int = slice(None)) -> Float[np.ndarray, "images candidates"]:
        values = np.concatenate(self.pooled[method])[:, steps]
        return values if isinstance(steps, int) else values.max(axis=1)


@torch.no_grad()
def evaluate_concepts(
    pipe: AnyFlux,
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
    Images with NaN or infinite activations are left out and logged.

    Raises:
        FluxSaeError: too few images show scenes that can be read, or too many are left out.
    """
    is_first = split_by_prompt(images.prompts, seed=seed)
    folds = fold_by_prompt(images.prompts, is_first, n=N_FOLDS, seed=seed)
    sigmas = torch.tensor(schedule_sigmas(pipe, settings))
    gathered = {
        h: _Gathered(sae, [TokenMoments(sae) for _ in range(N_FOLDS)], seed, sigmas[list(steps[h])])
        for h, sae in saes.items()
    }
    scenes, sound, left_out = list[Scene](), list[int](), LeftOut(len(images))
    grid = token_grid(pipe, settings)
    batches = iter_activations(
        pipe, images, steps, settings=settings, batch_size=batch_size, with_pictures=True, on_progress=on_progress,
        doing="concepts", left_out=left_out,
    )  # fmt: skip
    for batch in batches:
        read = [read_scene(picture) for picture in batch.pictures]
        scenes += read
        sound += batch.rows
        for hookpoint, one in gathered.items():
            one.add(batch.tokens[hookpoint], is_first[[*batch.rows]])
            for row, scene, x in zip(batch.rows, read, batch.tokens[hookpoint], strict=True):
                if is_first[row] and scene.confidence >= LEAST_CONFIDENCE:
                    one.moments[folds[row]].update(x, coverage(scene, grid))
    halves = Halves.plan(scenes, is_first[sound], draws=draws, seed=seed)
    for one in gathered.values():
        one.finish()
        one.finish_probe()
    chosen = {hookpoint: _choose(halves, one) for hookpoint, one in gathered.items()}
    maps = _gather_maps(
        pipe,
        images.of(sound),
        steps,
        gathered,
        chosen,
        folds=folds[sound],
        settings=settings,
        batch_size=batch_size,
        on_progress=on_progress,
    )
    covers = np.stack([coverage(scene, grid) for scene in scenes])
    return {
        hookpoint: _report(
            halves, one, chosen[hookpoint], maps[hookpoint], covers,
            hookpoint=hookpoint, steps=steps[hookpoint], labels=(labels or {}).get(hookpoint),
            n_left_out=len(left_out.image_ids),
        )
        for hookpoint, one in gathered.items()
    }  # fmt: skip


Chosen = dict[str, Int[np.ndarray, " concepts"]]
TokenMaps = dict[str, Float[np.ndarray, "images concepts tokens"]]


def _choose(halves: Halves, gathered: _Gathered) -> Chosen:
    """The best candidate of each method for each concept, on the first half."""
    chosen = {
        method: _best(auc_table(gathered.scores(method)[halves.first], halves.truth[halves.first]))
        for method in (FEATURE, *BASELINES)
    }
    return {**chosen, TOKEN_PROBE: np.arange(len(CONCEPTS))}


def _best(table: Float[np.ndarray, "concepts candidates"]) -> Int[np.ndarray, " concepts"]:
    best: Int[np.ndarray, " concepts"] = np.nan_to_num(table, nan=-1.0).argmax(axis=1)
    return best


def _gather_maps(
    pipe: AnyFlux,
    images: ImageSet,
    steps: Mapping[HookPoint, Sequence[int]],
    gathered: Mapping[HookPoint, _Gathered],
    chosen: Mapping[HookPoint, Chosen],
    *,
    folds: Int[np.ndarray, " images"],
    settings: GenerationSettings,
    batch_size: int,
    on_progress: OnProgress | None,
) -> dict[HookPoint, TokenMaps]:
    """The maps of all chosen candidates; by the way the token probe's held-out scores."""
    parts: dict[HookPoint, dict[str, list[np.ndarray]]] = {h: {m: [] for m in chosen[h]} for h in gathered}
    batches = iter_activations(
        pipe, images, steps, settings=settings, batch_size=batch_size, on_progress=on_progress, doing="localisation"
    )
    for batch in batches:
        for hookpoint, one in gathered.items():
            for method, candidates in chosen[hookpoint].items():
                values = one.readouts[method].maps(batch.tokens[hookpoint], candidates.tolist())
                parts[hookpoint][method].append(values.cpu().numpy())
            here = folds[[*batch.rows]]
            one.token_scores.append(one.held_out_scores(batch.tokens[hookpoint], here))
    return {h: {m: np.concatenate(values) for m, values in per.items()} for h, per in parts.items()}


def _report(
    halves: Halves,
    gathered: _Gathered,
    chosen: Chosen,
    maps: TokenMaps,
    covers: Float[np.ndarray, "images concepts tokens"],
    *,
    hookpoint: HookPoint,
    steps: Sequence[int],
    labels: Sequence[str | None] | None,
    n_left_out: int,
) -> ConceptReport:
    aucs, validated = _auc_draws(halves, gathered, chosen)
    probe_kind = _stronger_probe(validated)
    kinds = [probe_kind[concept.attribute] for concept in CONCEPTS]
    aucs[PROBE] = np.stack([aucs[kind][row] for row, kind in enumerate(kinds)])
    places = {method: _localise(halves, maps[method], covers) for method in maps}
    places[PROBE] = places[TOKEN_PROBE]
    chosen = {**chosen, PROBE: chosen[TOKEN_PROBE]}
    found = {method: find_matches(halves, gathered.scores(method)) for method in (FEATURE, *BASELINES)}
    matches, n_alive = found[FEATURE]
    return ConceptReport(
        hookpoint=str(hookpoint),
        steps=tuple(steps),
        n_images=len(halves.first) + len(halves.second),
        n_unread=len(halves.truth) - len(halves.first) - len(halves.second),
        n_left_out=n_left_out,
        concepts=tuple(
            ConceptScore(
                concept,
                int(halves.truth[halves.second, row].sum()),
                {m: MethodScore(int(chosen[m][row]), interval(aucs[m][row]), *places[m][row]) for m in METHODS},
                labels[chosen[FEATURE][row]] if labels else None,
            )
            for row, concept in enumerate(CONCEPTS)
            if halves.usable[row]
        ),
        skipped=tuple(concept for row, concept in enumerate(CONCEPTS) if not halves.usable[row]),
        ratio={method: interval(_mean_ratio(aucs[method], aucs[PROBE])) for method in METHODS},
        attribute_ratio={
            method: {name: float(_ratio(aucs[method], aucs[PROBE], name)[0]) for name in ATTRIBUTES}
            for method in METHODS
        },
        probe_kind=probe_kind,
        matched_share={m: len(some) / max(alive, 1) for m, (some, alive) in found.items()},
        n_alive=n_alive,
        n_matched=len(matches),
        label_accuracy=label_accuracy(matches, labels) if labels else None,
        step_auc=_step_auc(halves, gathered, steps),
        matches=matches,
    )


def _auc_draws(
    halves: Halves, gathered: _Gathered, chosen: Chosen
) -> tuple[dict[str, Float[np.ndarray, "concepts draws"]], dict[str, Float[np.ndarray, " concepts"]]]:
    """AUC on the second half of each method's choice and of both probes, for the sample and each resample.

    Beside it the AUC of both probes by cross-validation within the first half.
    """
    aucs = {}
    for method in (FEATURE, *BASELINES):
        scores, best = gathered.scores(method), chosen[method]
        aucs[method] = halves.over_concepts(lambda c, s=scores, b=best: halves.auc_draws(s[:, b[c]], c))  # type: ignore[misc]
    token_scores = np.concatenate(gathered.token_scores)
    aucs[TOKEN_PROBE] = halves.over_concepts(lambda c: halves.auc_draws(token_scores[:, c], c))
    pooled = gathered.scores("raw channel")
    validated = {
        TOKEN_PROBE: auc_table(token_scores[halves.first], halves.truth[halves.first]).diagonal(),
        POOLED_PROBE: np.full(len(CONCEPTS), np.nan),
    }

    def probe_draws(concept: int) -> Float[np.ndarray, " draws"]:
        truth = halves.truth[halves.first, concept]
        probe = pooled_probe(pooled[halves.first], truth, pooled[halves.second])
        validated[POOLED_PROBE][concept] = probe.validated_auc
        scores = np.zeros(len(pooled))
        scores[halves.second] = probe.scores
        return halves.auc_draws(scores, concept)

    aucs[POOLED_PROBE] = halves.over_concepts(probe_draws)
    return aucs, {kind: np.where(halves.usable, values, np.nan) for kind, values in validated.items()}


def _stronger_probe(validated: Mapping[str, Float[np.ndarray, " concepts"]]) -> dict[str, str]:
    """Attribute -> the probe with the larger mean AUC by cross-validation within the first half."""
    return {
        name: max((POOLED_PROBE, TOKEN_PROBE), key=lambda kind: attribute_mean(validated[kind], name))
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
    halves: Halves,
    maps: Float[np.ndarray, "images concepts tokens"],
    covers: Float[np.ndarray, "images concepts tokens"],
) -> list[tuple[Estimate | None, Estimate | None]]:
    """IoU and pointing of each concept on the second half's images that show it, the threshold from the first half."""
    found: list[tuple[Estimate | None, Estimate | None]] = []
    for row in range(len(CONCEPTS)):
        if not halves.usable[row]:
            found.append((None, None))
            continue
        shows = halves.truth[:, row] == 1
        fit, report = halves.first[shows[halves.first]], halves.second[shows[halves.second]]
        threshold = best_threshold(maps[fit, row], covers[fit, row], everywhere=maps[halves.first, row])
        overlaps = intersection_over_union(maps[report, row], covers[report, row], threshold=threshold)
        hits = pointing(maps[report, row], covers[report, row])
        weights = halves.weights[:, shows[halves.second]]
        found.append((interval(weighted_mean(overlaps, weights)), interval(weighted_mean(hits, weights))))
    return found


def _step_auc(halves: Halves, gathered: _Gathered, steps: Sequence[int]) -> dict[int, float]:
    means = {}
    for place, step in enumerate(steps):
        scores = gathered.scores(FEATURE, steps=place)
        best = _best(auc_table(scores[halves.first], halves.truth[halves.first]))
        table = auc_table(scores[halves.second], halves.truth[halves.second])
        aucs = np.where(halves.usable, table[np.arange(len(CONCEPTS)), best], np.nan)
        means[step] = float(np.nanmean([attribute_mean(aucs, name) for name in HEADLINE_ATTRIBUTES]))
    return means
