"""Pairs of drawn scenes that differ in one attribute, read as pictures: what does a matched feature respond to?

A feature responds to an attribute in a pair where its largest activation changes by more than half when the attribute
gets another value. To its own attribute it should fall. A feature passes where it falls in at least half of the pairs
that take its concept away, and responds in fewer than half of the pairs of each other attribute. A pair with a picture
whose activations are NaN or infinite counts against every feature.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image

from fluxsae.evaluation.intervals import Estimate, interval
from fluxsae.evaluation.stream import OnProgress, iter_read_activations
from fluxsae.flux import AnyFlux, schedule_sigmas
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.outcomes import OBJECT_ATTRIBUTES
from fluxsae.laboratory.truths import CONCEPTS, Concept
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, place_object, render_scene
from fluxsae.sae.model import SparseAutoencoder

RESPONSE: Final = 0.5
"""Change of the activation, as a share of the unchanged scene's, that counts as a response."""
PASSES: Final = 0.5
"""Share of the pairs in which a feature must respond to its own attribute, and may not respond to another."""
_DRAWS: Final = 1000


@dataclass(frozen=True)
class ScenePairs:
    """A scene with a concept, and for each attribute the same scene with another value of it."""

    base: Scene
    partners: dict[str, Scene]


def draw_pairs(concept: Concept, seed: int) -> ScenePairs:
    """A random scene of one thing that has the concept, and its partners: place, size and noise stay as they can."""
    rng = np.random.default_rng([seed, *concept.attribute.encode(), *concept.value.encode()])
    values = {name: str(rng.choice(options)) for name, options in ATTRIBUTES.items()}
    values[concept.attribute] = concept.value
    others = {
        name: str(rng.choice([value for value in options if value != values[name]]))
        for name, options in ATTRIBUTES.items()
    }
    place = int(rng.integers(1 << 32))
    partners = {name: _scene(values | {name: other}, place) for name, other in others.items()}
    return ScenePairs(_scene(values, place), partners)


def _scene(values: Mapping[str, str], seed: int) -> Scene:
    thing = place_object(np.random.default_rng(seed), **{name: values[name] for name in OBJECT_ATTRIBUTES})
    return Scene((thing,), values["background"])


@dataclass(frozen=True)
class PairResult:
    """One dictionary's matched features on the pairs."""

    n_features: int
    passes: Estimate | None
    """Share of the matched features that pass; None where none is matched."""
    right: Estimate | None
    """Share that falls with its own attribute, whatever else it responds to."""
    selective: Estimate | None
    """Share that responds to no other attribute, whatever it does with its own."""

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        rates = {name: getattr(self, name) for name in ("passes", "right", "selective")}
        return {"n_features": self.n_features, **{n: r.to_dict() if r else None for n, r in rates.items()}}


@dataclass(frozen=True)
class PairsReport:
    """A trained SAE's matched features beside those of an untrained one."""

    hookpoint: str
    step: int
    n_pairs: int
    """Pairs of each concept and attribute."""
    trained: PairResult
    untrained: PairResult
    difference: Estimate | None
    """Trained minus untrained share that passes; None where either has no matched feature."""
    n_left_out: int
    """Pictures whose activations hold NaN or infinite numbers."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "step": self.step,
            "n_pairs": self.n_pairs,
            "trained": self.trained.to_dict(),
            "untrained": self.untrained.to_dict(),
            "difference": self.difference.to_dict() if self.difference else None,
            "n_left_out": self.n_left_out,
        }


@torch.no_grad()
def run_pairs(
    pipe: AnyFlux,
    hookpoint: HookPoint,
    saes: tuple[SparseAutoencoder, SparseAutoencoder],
    matches: tuple[Mapping[int, Concept], Mapping[int, Concept]],
    *,
    step: int,
    settings: GenerationSettings,
    n_pairs: int = 6,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> PairsReport:
    """Reads the pairs of every matched concept, one pass a picture without a prompt; the trained SAE comes first.

    Raises:
        FluxSaeError: too many pictures have NaN or infinite activations.
    """
    concepts = [c for c in CONCEPTS if any(c in found.values() for found in matches)]
    drawn = [(concept, draw_pairs(concept, seed + n)) for concept in concepts for n in range(n_pairs)]
    scenes = [scene for _, pairs in drawn for scene in (pairs.base, *pairs.partners.values())]
    acts = [np.full((len(scenes), sae.config.n_features), np.nan, dtype=np.float32) for sae in saes]
    sigma, left_out = float(schedule_sigmas(pipe, settings)[step]), LeftOut(len(scenes))
    for batch in iter_read_activations(
        pipe, [Image.fromarray(render_scene(scene)) for scene in scenes], {hookpoint: [step]},
        prompts=[""] * len(scenes), seeds=[seed + row // (1 + len(ATTRIBUTES)) for row in range(len(scenes))],
        settings=settings, left_out=left_out, batch_size=batch_size, on_progress=on_progress, doing="pairs",
    ):  # fmt: skip
        for sae, found in zip(saes, acts, strict=True):
            tokens = batch.tokens[hookpoint][:, 0]
            found[[*batch.rows]] = sae.encode(tokens, sigma=sigma).amax(1).cpu().numpy()
    rows = {concept: [at for at, (own, _) in enumerate(drawn) if own == concept] for concept in concepts}
    draws = []
    for found, own in zip(acts, matches, strict=True):
        table = found.reshape(len(drawn), 1 + len(ATTRIBUTES), found.shape[1])
        responses = [
            feature_responses(table[rows[concept], :, feature], concept.attribute) for feature, concept in own.items()
        ]
        draws.append(pass_draws(responses, list(own.values()), seed=seed))
    shares = [{name: interval(values) for name, values in each.items()} for each in draws]
    results = [
        PairResult(len(own), each.get("passes"), each.get("right"), each.get("selective"))
        for own, each in zip(matches, shares, strict=True)
    ]
    both = all(draws)
    return PairsReport(
        str(hookpoint), step, n_pairs, results[0], results[1],
        interval(draws[0]["passes"] - draws[1]["passes"]) if both else None, len(left_out.image_ids),
    )  # fmt: skip


def feature_responses(acts: Float[np.ndarray, "pairs scenes"], attribute: str) -> Bool[np.ndarray, "pairs attributes"]:
    """Whether a feature of a concept of `attribute` responds; the first column of `acts` is the unchanged scene.

    To its own attribute only a fall counts. A feature that is silent in the unchanged scene does not respond. A pair
    with NaN counts against the feature: it responds to the other attribute, and not to its own.
    """
    base, changed = acts[:, :1], acts[:, 1:]
    own = [name == attribute for name in ATTRIBUTES]
    moved = np.where(own, base - changed, np.abs(base - changed))
    responds = (base > 0) & (moved > RESPONSE * base)
    counted: Bool[np.ndarray, "pairs attributes"] = np.where(np.isnan(base + changed), np.logical_not(own), responds)
    return counted


def pass_draws(
    responses: Sequence[Bool[np.ndarray, "pairs attributes"]], concepts: Sequence[Concept], *, seed: int
) -> dict[str, Float[np.ndarray, " draws"]]:
    """Shares of features that pass, for the sample and for resamples of features and of each one's pairs."""
    if not responses:
        return {}
    rng = np.random.default_rng(seed)
    tests: dict[str, list[np.ndarray]] = {"passes": [], "right": [], "selective": []}
    for found, concept in zip(responses, concepts, strict=True):
        n = len(found)
        weights = np.concatenate([np.ones((1, n)), rng.multinomial(n, np.full(n, 1 / n), size=_DRAWS)])
        shares = weights @ found / n
        own = np.array([name == concept.attribute for name in ATTRIBUTES])
        right, selective = shares[:, own].min(axis=1) >= PASSES, shares[:, ~own].max(axis=1) < PASSES
        for name, values in (("passes", right & selective), ("right", right), ("selective", selective)):
            tests[name].append(values)
    chosen = rng.integers(len(responses), size=(_DRAWS + 1, len(responses)))
    chosen[0] = np.arange(len(responses))
    draw = np.arange(_DRAWS + 1)[:, None]
    return {name: np.array(values)[chosen, draw].mean(axis=1) for name, values in tests.items()}
