"""Do our own measures mean anything?

Each measure is taken of SAEs that were trained under several seeds, and of dictionaries that should fare worse: with
first, random weights, with the decoder rows of other features, principal components. Beside them is one that knows the
truth. A measure that does not separate trained SAEs from untrained ones says nothing about training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from fluxsae.evaluation.flow import CleanImages, evaluate_flow
from fluxsae.evaluation.intervals import auc_table
from fluxsae.evaluation.stream import OnProgress
from fluxsae.features.config import SelectionConfig
from fluxsae.features.labels import CaptionLabeller
from fluxsae.features.selection import coherence, monosemanticity, prompt_groups, top_unique
from fluxsae.flux import AnyFlux
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.config import DIRECTIONS, AuditConfig, LaboratoryConfig
from fluxsae.laboratory.dictionaries import oracle_sae, pca_sae, permuted_decoder, trained_sae, untrained_sae
from fluxsae.laboratory.localisation import best_threshold, intersection_over_union
from fluxsae.laboratory.matching import find_matches, label_accuracy
from fluxsae.laboratory.sample import Sample, Truth
from fluxsae.laboratory.steering import run_laboratory
from fluxsae.laboratory.truths import CONCEPTS, HEADLINE_ATTRIBUTES, Concept, attribute_mean
from fluxsae.sae.metrics import FiringSums, ReconstructionSums
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig

MEASURES: Final[dict[str, int]] = {
    "FVU": -1, "L0": 0, "dead share": -1, "coherence": 1, "monosemanticity": 1, "concept AUC": 1, "IoU": 1,
    "label accuracy": 1, "splice error": -1, "flow loss recovered": 1, "steering, both": 1,
}  # fmt: skip
"""What is audited: 1 where larger is better, -1 where smaller is, 0 where neither is."""
TRUTH: Final = "concept AUC"
STEERING: Final = "steering, both"
TRAINED, UNTRAINED, PERMUTED, PCA, ORACLE = "trained", "untrained", "permuted decoder", "PCA", "oracle"
KINDS: Final = (TRAINED, UNTRAINED, PERMUTED, PCA, ORACLE)
STEERED: Final = (TRAINED, UNTRAINED, ORACLE)
"""Kinds whose steering is measured, which takes as long as all else."""
SEPARATES_FROM: Final = 3.0
"""Standard deviations between seeds from which a measure is said to separate."""
MASSIVE: Final = 8.0
"""How many times the median root mean square makes a channel's activation massive."""

Measured = Mapping[str, float]
"""Measure -> value, of one dictionary."""


@dataclass(frozen=True)
class AuditReport:
    """Every measure of every dictionary."""

    hookpoint: str
    n_images: int
    values: dict[str, tuple[Measured, ...]]
    """Kind -> one dictionary a seed."""
    massive_channels: tuple[int, ...]
    without_massive: dict[str, tuple[Measured, ...]]
    """The same with those channels at their mean; empty where there are none."""

    def unseparated(self) -> list[str]:
        """Measures by which trained SAEs are not better than untrained ones by three standard deviations of seeds.

        Steering, measured once, is not judged so.
        """
        found = {name: separation(self.values, name, UNTRAINED) for name in self.measures() if name != STEERING}
        return [name for name, apart in found.items() if np.isnan(apart) or apart < SEPARATES_FROM]

    def measures(self) -> list[str]:
        """The measures that were taken of trained and untrained dictionaries."""
        return [
            name for name in MEASURES if all(name in self.values.get(kind, [{}])[0] for kind in (TRAINED, UNTRAINED))
        ]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "images": self.n_images,
            "values": _as_json(self.values),
            "massive_channels": list(self.massive_channels),
            "without_massive": _as_json(self.without_massive),
            "unseparated": self.unseparated(),
        }


def separation(values: Mapping[str, Sequence[Measured]], measure: str, kind: str) -> float:
    """How many standard deviations between seeds the trained SAEs are better than another kind of dictionary.

    Where no direction is better, the distance. NaN where a kind was not measured, 0 where both are equal throughout,
    infinite where only the seeds are.
    """
    trained = np.array([one.get(measure, np.nan) for one in values[TRAINED]])
    others = np.array([one.get(measure, np.nan) for one in values.get(kind, ())])
    if len(trained) < 2 or not len(others):
        return float("nan")
    gap = float(trained.mean() - others.mean())
    spread = float(trained.std(ddof=1))
    direction = MEASURES[measure] or np.sign(gap)
    if abs(gap) <= 1e-9:
        return 0.0
    return float(direction * gap / spread) if spread > 0 else float(direction * np.sign(gap) * np.inf)


def rank_with_truth(values: Mapping[str, Sequence[Measured]], measure: str) -> float:
    """Spearman correlation over all dictionaries with what they know of the scenes: 1 ranks them as the truth does.

    The truth is the concept AUC; its own rank is compared with the IoU. NaN where nothing varies.
    """
    truth = "IoU" if measure == TRUTH else TRUTH
    pairs = [
        (MEASURES[measure] * one[measure], one[truth])
        for some in values.values()
        for one in some
        if not np.isnan(one.get(measure, np.nan)) and truth in one
    ]
    own, known = np.array(pairs).reshape(-1, 2).T
    if len(pairs) < 3 or np.ptp(own) == 0 or np.ptp(known) == 0:
        return float("nan")
    return float(spearmanr(own, known).statistic)


def massive_channels(x: Float[Tensor, "*batch d"]) -> tuple[int, ...]:
    """Channels whose root mean square is at least `MASSIVE` times the median one (arXiv 2402.17762)."""
    size = x.flatten(0, -2).double().square().mean(0).sqrt()
    return tuple((size >= MASSIVE * size.median()).nonzero().flatten().tolist())


@torch.no_grad()
def run_audit(
    pipe: AnyFlux,
    hookpoint: HookPoint,
    sae: SparseAutoencoder,
    sample: Sample,
    *,
    rows: Float[Tensor, "rows d"],
    images: CleanImages,
    settings: GenerationSettings,
    config: AuditConfig,
    on_progress: OnProgress | None = None,
) -> AuditReport:
    """Measures dictionaries of the SAE's kind on the sample; `rows` are other images' tokens to train on.

    `images` are for the flow loss. Steering is measured of the first trained, untrained and oracle dictionary.
    """
    named = build_dictionaries(sae, sample, rows, config=config, on_progress=on_progress)
    n = sum(map(len, named.values()))
    massive = massive_channels(sample.x)
    calm = _without(sample, massive)
    values: dict[str, list[dict[str, float]]] = {kind: [] for kind in named}
    without: dict[str, list[dict[str, float]]] = {kind: [] for kind in named} if massive else {}
    for kind, dictionaries in named.items():
        for dictionary in dictionaries:
            measured = measure(dictionary, sample)
            flow = evaluate_flow(
                pipe, {hookpoint: dictionary}, images, {hookpoint: list(sample.steps)}, settings=settings,
                batch_size=config.batch_size, draws=50,
            )[hookpoint].overall  # fmt: skip
            measured["splice error"] = flow.splice_error.value
            measured["flow loss recovered"] = flow.recovered.value if flow.recovered else float("nan")
            if sample.truth is not None and config.steers and kind in STEERED and not values[kind]:
                measured[STEERING] = _steering(
                    pipe, hookpoint, dictionary, settings=settings, config=config, on_progress=on_progress
                )
            values[kind].append(measured)
            if massive:
                without[kind].append(measure(dictionary, calm))
            if on_progress is not None:
                on_progress("dictionaries", sum(map(len, values.values())), n)
    return AuditReport(
        str(hookpoint),
        len(sample.prompts),
        {kind: tuple(some) for kind, some in values.items()},
        massive,
        {kind: tuple(some) for kind, some in without.items()},
    )


def build_dictionaries(
    sae: SparseAutoencoder,
    sample: Sample,
    rows: Float[Tensor, "rows d"],
    *,
    config: AuditConfig,
    on_progress: OnProgress | None = None,
) -> dict[str, list[SparseAutoencoder]]:
    """The dictionaries by kind; without readable images there is no oracle."""
    named: dict[str, list[SparseAutoencoder]] = {kind: [] for kind in KINDS}
    for seed in range(config.n_seeds):
        with torch.enable_grad():
            training = TrainConfig(epochs=config.epochs, lr=config.lr, seed=seed)
            named[TRAINED].append(trained_sae(sae, rows, training))
        named[UNTRAINED].append(untrained_sae(named[TRAINED][-1], rows, seed=10_000 + seed))
        named[PERMUTED].append(permuted_decoder(named[TRAINED][-1], seed=seed))
        if on_progress is not None:
            on_progress("training anew", seed + 1, config.n_seeds)
    named[PCA].append(pca_sae(sae, rows))
    if sample.truth is None:
        del named[ORACLE]
    else:
        named[ORACLE].append(oracle_sae(named[TRAINED][0], sample))
    return named


def measure(sae: SparseAutoencoder, sample: Sample) -> dict[str, float]:
    """Every measure that needs no further pass of FLUX."""
    sums, firing = ReconstructionSums.empty(sae.config.d_model), FiringSums.empty(sae.config.n_features)
    for x in sample.x:
        acts = sae.encode_sparse(x, sigma=sample.sigmas[:, None])
        sums.update(x, sae.decode_sparse(acts))
        firing.update(acts)
    found = {"FVU": sums.fvu(), "L0": firing.l0(), "dead share": firing.dead_share()}
    scores = sample.scores(sae)
    if sample.embeddings is not None:
        found |= _likeness(scores, sample)
    if sample.truth is not None:
        found |= _knowledge(sae, scores, sample, sample.truth)
    return found


def _steering(
    pipe: AnyFlux,
    hookpoint: HookPoint,
    sae: SparseAutoencoder,
    *,
    settings: GenerationSettings,
    config: AuditConfig,
    on_progress: OnProgress | None,
) -> float:
    """Success with nothing else changed, over both directions, where the telling features are set to their means."""
    laboratory = LaboratoryConfig(
        n_select=config.n_steered, n_report=2 * config.n_steered, methods=("features",), n_swaps=0, add=(), clamp=(),
        scale=(), n_others=0, controls=(), seed=config.seed, batch_size=config.batch_size,
    )  # fmt: skip
    concepts: dict[Concept, list[int]] = {concept: [] for concept in CONCEPTS}
    report = run_laboratory(
        pipe, {hookpoint: sae}, {hookpoint: concepts}, settings=settings, config=laboratory, on_progress=on_progress
    )
    rates = [report.rate(direction, "features", "both") for direction in DIRECTIONS]
    return float(np.mean([rate.value for rate in rates if rate is not None]))


def _likeness(scores: Float[Tensor, "images features"], sample: Sample) -> dict[str, float]:
    """How alike the images are that the features like, by CLIP: means over the features."""
    assert sample.embeddings is not None
    config, groups = SelectionConfig(), prompt_groups(sample.prompts)
    tops = [top_unique(column, groups, n=config.top_images) for column in scores.T]
    alike = [coherence(sample.embeddings[top]) for top in tops if len(top) >= config.min_images]
    mono = monosemanticity(sample.embeddings, scores)
    return {
        "coherence": float(np.mean(alike)) if alike else float("nan"),
        "monosemanticity": float(mono[~mono.isnan()].mean()) if not bool(mono.isnan().all()) else float("nan"),
    }


def _knowledge(
    sae: SparseAutoencoder, scores: Float[Tensor, "images features"], sample: Sample, truth: Truth
) -> dict[str, float]:
    """What the features know of the scenes: chosen on one half, reported on the other; means over attributes."""
    halves, values = truth.halves, scores.double().numpy()
    first = np.nan_to_num(auc_table(values[halves.first], halves.truth[halves.first]), nan=-1.0)
    second = auc_table(values[halves.second], halves.truth[halves.second])
    best = first.argmax(axis=1)
    aucs = np.where(halves.usable, second[np.arange(len(best)), best], np.nan)
    overlaps = _overlaps(sae, best, sample, truth)
    matches, _ = find_matches(halves, values)
    labeller = CaptionLabeller(sample.prompts)
    names = {feature: labeller.label(scores[:, feature]) for feature in matches}
    labels = [names[f][0].text if names.get(f) else None for f in range(scores.shape[1])]
    right = label_accuracy(matches, labels)
    return {
        TRUTH: _mean_of_attributes(aucs),
        "IoU": _mean_of_attributes(overlaps),
        "label accuracy": right.value if right else float("nan"),
    }


def _overlaps(
    sae: SparseAutoencoder, best: Int[np.ndarray, " concepts"], sample: Sample, truth: Truth
) -> Float[np.ndarray, " concepts"]:
    """Mean IoU of each concept's best feature with the masks of the second half, its threshold from the first."""
    halves = truth.halves
    chosen, place = np.unique(best, return_inverse=True)
    levels = sample.sigmas[:, None]
    maps = torch.stack([sae.encode(image, sigma=levels)[..., chosen].amax(0).T for image in sample.x]).double().numpy()
    found = np.full(len(best), np.nan)
    for row in np.flatnonzero(halves.usable):
        own = maps[:, place[row]]
        shows = halves.truth[:, row] == 1
        fit, report = halves.first[shows[halves.first]], halves.second[shows[halves.second]]
        threshold = best_threshold(own[fit], truth.covers[fit, row], everywhere=own[halves.first])
        overlap = intersection_over_union(own[report], truth.covers[report, row], threshold=threshold)
        found[row] = np.nanmean(overlap)
    return found


def _mean_of_attributes(values: Float[np.ndarray, " concepts"]) -> float:
    means = [attribute_mean(values, name) for name in HEADLINE_ATTRIBUTES]
    return float(np.nanmean(means))


def _without(sample: Sample, channels: Sequence[int]) -> Sample:
    """The sample with some channels at their mean."""
    x = sample.x.clone()
    x[..., list(channels)] = x[..., list(channels)].mean((0, 1, 2))
    return replace(sample, x=x)


def _as_json(values: Mapping[str, Sequence[Measured]]) -> dict[str, list[dict[str, float | None]]]:
    return {
        kind: [{name: None if np.isnan(value) else value for name, value in one.items()} for one in some]
        for kind, some in values.items()
    }
