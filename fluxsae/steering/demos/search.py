"""The search for the image, seed and strengths at which turning a feature down and up shows best."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.features.scores import load_scores
from fluxsae.files import write_bytes, write_text
from fluxsae.flux import flux_identity, schedule_sigmas
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.pictures.grids import join_pictures
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import encode_webp
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.demos.config import DemoConfig
from fluxsae.steering.demos.measured import LIMITS_KEY, load_limits, measured_sweep, run_origin
from fluxsae.steering.demos.swaps import addable
from fluxsae.steering.edits import Recipe, SteeringEdit
from fluxsae.steering.measurements import EditMeasurement, TokenLimits, measure_token_limits, measure_unedited
from fluxsae.steering.naturalness import calibrated_range
from fluxsae.steering.sweeps import Variant, first_edited_step

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoScore:
    """How well one image shows a feature in both directions; distances are in the run's perceptual measure."""

    score: float
    """Mean responsiveness x balance x (1 - collateral); higher is better."""
    less: float
    """Distance inside the feature's region when it is turned down, times the share of usual tokens; 0 where it does
    not look natural."""
    more: float
    """The same when it is turned up."""
    balance: float
    """The smaller of the two over the larger."""
    collateral: float
    """Distance outside the feature's region as a share of outside and inside together, mean of both directions."""
    suppress: float
    """Strength (scale) that was best."""
    amplify: float
    """Strength (add) that was best."""
    out_of_distribution: float
    """The larger share of both directions."""
    label_less: float | None = None
    """How much nearer the picture came to the feature's label when turned down, in CLIP cosine: below 0 if it shows
    what its name says. None without a label or CLIP."""
    label_more: float | None = None
    """The same when it is turned up: above 0 if it shows what its name says."""

    @property
    def worth(self) -> float:
        """By which images of one feature compare: the score times what CLIP sees of the label going and coming."""
        if self.label_less is None or self.label_more is None:
            return self.score
        return self.score * max(0.0, min(-self.label_less, self.label_more))


@dataclass(frozen=True)
class SteeringDemo:
    """One feature turned down and up on the image that shows it best."""

    hookpoint: str
    feature: int
    label: str | None
    prompt: str
    seed: int
    score: DemoScore
    distance_name: str
    image: str
    """Name of the strip (less, before, more) in the run's demo folder."""
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """less, before and more."""
    measurements: dict[str, EditMeasurement] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The demo as JSON values; `recipe` is the one that turns the feature up."""
        return {
            **{name: getattr(self, name) for name in ("hookpoint", "feature", "label", "prompt", "seed", "image")},
            "distance_name": self.distance_name,
            "score": asdict(self.score),
            "recipe": self.recipes["more"].to_dict(),
            "recipes": {name: recipe.to_dict() for name, recipe in self.recipes.items()},
            "measurements": {name: measured.to_dict() for name, measured in self.measurements.items()},
        }


def demo_score(
    suppress: Sequence[tuple[float, EditMeasurement]], amplify: Sequence[tuple[float, EditMeasurement]]
) -> DemoScore:
    """The score of one image from its measured (strength, measurement) pairs in both directions."""
    less_strength, less = max(suppress, key=lambda pair: _responsiveness(pair[1]))
    more_strength, more = max(amplify, key=lambda pair: _responsiveness(pair[1]))
    down, up = _responsiveness(less), _responsiveness(more)
    balance = min(down, up) / max(down, up) if max(down, up) > 0 else 0.0
    collateral = (_collateral(less) + _collateral(more)) / 2
    return DemoScore(
        score=(down + up) / 2 * balance * (1 - collateral),
        less=down,
        more=up,
        balance=balance,
        collateral=collateral,
        suppress=less_strength,
        amplify=more_strength,
        out_of_distribution=max(less.out_of_distribution, more.out_of_distribution),
    )


def find_demos(
    run: RunFolder,
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    features: Mapping[HookPoint, Sequence[int]],
    *,
    distance: PerceptualDistance,
    embedder: ImageEmbedder | None = None,
    config: DemoConfig | None = None,
    max_batch: int | None = None,
    on_candidate: Callable[[int, int], None] | None = None,
) -> dict[HookPoint, list[SteeringDemo]]:
    """The best demo of each feature, best first, written into the run; features that nothing moves get none.

    What was measured is kept in the run's work folder after every candidate, so a search that was cut off goes on
    where it stopped, and unedited images are made once for all features. `on_candidate(done, total)`.

    Raises:
        FluxSaeError: a feature that never fires in the run's images, or a strength out of range.
    """
    config = config or DemoConfig()
    found: dict[HookPoint, list[SteeringDemo]] = {}
    searches = [
        _Search(run, pipe, saes[place], place, distance, embedder, config, max_batch, _turnable(saes[place], chosen))
        for place, chosen in sorted(features.items())
    ]
    plans = [search.candidates() for search in searches]
    total, done = sum(map(len, plans)), 0
    for search, plan in zip(searches, plans, strict=True):
        for feature, image_id in plan:
            search.measure(feature, image_id)
            done += 1
            if on_candidate is not None:
                on_candidate(done, total)
        found[search.place] = search.write_demos()
    return found


def _turnable(sae: SparseAutoencoder, features: Sequence[int]) -> tuple[int, ...]:
    """The features that can be turned up; the others, with no reference activation to count in, are told of."""
    kept = addable(sae, features)
    if left := [feature for feature in features if feature not in kept]:
        _log.warning("No demo of features %s: they have no reference activation.", ", ".join(map(str, left)))
    return tuple(kept)


def candidate_images(
    scores: Float[Tensor, " images"], prompts: Sequence[str], *, label: str, n_wanted: int
) -> list[int]:
    """Images to turn a feature in, from those where it fires strongest down to a weak one, evenly over their ranks.

    Where prompts have every word of its label, only theirs: a demo shows what its name says. And of these the quarter
    that says most: what a prompt leaves open drifts with any edit.
    """
    ranked = torch.argsort(scores, descending=True, stable=True)[: int((scores > 0).sum())].tolist()
    words = {image: prompts[image].lower().split() for image in ranked}
    name = set(label.lower().replace(",", " ").split())
    named = [image for image in ranked if name and name <= set(words[image])] or ranked
    told = set(sorted(named, key=lambda image: -len(words[image]))[: max(n_wanted, len(named) // 4)])
    named = [image for image in named if image in told]
    places = np.linspace(0, max(0, len(named) - 1) * 0.75, min(n_wanted, len(named)))
    return [named[int(place)] for place in dict.fromkeys(places.round().astype(int).tolist())]


@dataclass(eq=False)
class _Search:
    """The search at one hook point and what it keeps in the work folder."""

    run: RunFolder
    pipe: Any
    sae: SparseAutoencoder
    place: HookPoint
    distance: PerceptualDistance
    embedder: ImageEmbedder | None
    config: DemoConfig
    max_batch: int | None
    features: tuple[int, ...]

    def __post_init__(self) -> None:
        self.settings = self.run.load_info().settings
        self.images = self.run.load_images()
        self.scores = load_scores(self.run, self.place)
        self.folder = self.run.work_path("demos") / str(self.place)
        self.labels = self._labels()
        self.edits = {feature: self._variants(feature) for feature in self.features}
        self.done = self._load_checkpoint()
        self.limits: TokenLimits | None = None

    def candidates(self) -> list[tuple[int, int]]:
        """(feature, image id) pairs that are still to be measured."""
        pairs = [(feature, image_id) for feature in self.features for image_id in self._images_of(feature)]
        return [pair for pair in pairs if pair not in self.done]

    def measure(self, feature: int, image_id: int) -> None:
        """Measures one feature on one image and keeps the score."""
        variants, measured = self._sweep(feature, image_id)
        images = [variant.image for variant in variants]
        self.done[feature, image_id] = self._with_label(feature, self._score(measured[1:]), images)
        self._save_checkpoint()

    def write_demos(self) -> list[SteeringDemo]:
        """The best image of every feature whose turning shows what its label says, as demos in the run folder."""
        demos = []
        for feature in self.features:
            scores = {image_id: self.done[feature, image_id] for image_id in self._images_of(feature)}
            best = max(scores, key=lambda image_id: (scores[image_id].worth, scores[image_id].score))
            if scores[best].score > self.config.least_score and scores[best].worth > 0:
                demos.append(self._demo(feature, best, scores[best]))
        demos.sort(key=lambda demo: -demo.score.score)
        self.run.save_demos(self.place, [json.dumps(demo.to_dict()) for demo in demos])
        named = {self.run.demo_image_path(self.place, demo.image) for demo in demos}
        for old in set(self.run.demos_path(self.place).parent.glob("feature-*.webp")) - named:
            old.unlink()
        return demos

    def _images_of(self, feature: int) -> list[int]:
        label, n_wanted = self.labels.get(feature, ""), self.config.n_candidates
        found = candidate_images(self.scores.feature(feature), self.images.prompts, label=label, n_wanted=n_wanted)
        if not found:
            raise FluxSaeError(f"Feature {feature} of {self.place} fires in none of the run's images; choose another.")
        return found

    def _variants(self, feature: int) -> list[tuple[SteeringEdit, ...]]:
        config = self.config
        pairs = [("scale", strength) for strength in config.suppress] + [("add", value) for value in config.amplify]
        return [(SteeringEdit(self.place, feature, mode, value, steps=config.steps),) for mode, value in pairs]

    def _sweep(self, feature: int, image_id: int) -> tuple[list[Variant], list[EditMeasurement]]:
        """The unedited image and each variant. Its baseline is its own: a batch of another size changes pixels."""
        row = self.images[image_id]
        edits = self.edits[feature]
        # Scaling a feature touches exactly the tokens where it fires: that is its region.
        return measured_sweep(
            self.pipe,
            {self.place: self.sae},
            [(), *edits],
            prompt=row.prompt,
            seed=row.seed,
            settings=self.settings,
            distance=self.distance,
            embedder=self.embedder,
            limits={self.place: self._limits(feature)},
            region_of=len(self.config.suppress),
            origin=run_origin(self.run, self.pipe),
            max_batch=self.max_batch,
        )

    def _score(self, measured: Sequence[EditMeasurement]) -> DemoScore:
        n_less = len(self.config.suppress)
        less = list(zip(self.config.suppress, measured[:n_less], strict=True))
        return demo_score(less, list(zip(self.config.amplify, measured[n_less:], strict=True)))

    def _with_label(self, feature: int, score: DemoScore, images: Sequence[Image.Image]) -> DemoScore:
        """The score with what CLIP sees of the feature's label in the pictures; the first image is unedited."""
        if self.embedder is None or feature not in self.labels:
            return score
        label = self.embedder.embed_texts([self.labels[feature]])[0]
        shown = self.embedder.embed_images([images[place] for place in self._places(score).values()])
        less, before, more = (shown @ label).tolist()
        return replace(score, label_less=less - before, label_more=more - before)

    def _places(self, score: DemoScore) -> dict[str, int]:
        """Which variants show the feature turned down, not at all and up; the first variant is unedited."""
        return {
            "less": 1 + self.config.suppress.index(score.suppress),
            "before": 0,
            "more": 1 + len(self.config.suppress) + self.config.amplify.index(score.amplify),
        }

    def _limits(self, feature: int) -> TokenLimits:
        if self.limits is None:
            known = load_limits(self.run, self.place)
            if known is None or known.natural.false_alarms is None:
                known = self._measure_limits(feature)
            self.limits = known
        return self.limits

    def _measure_limits(self, feature: int) -> TokenLimits:
        count = min(self.config.n_limit_images, len(self.images))
        rows = [self.images[image_id] for image_id in range(count)]
        first = first_edited_step(self.pipe, {self.place: self.sae}, self.edits[feature], self.settings)
        limits = measure_token_limits(
            self.pipe,
            self.sae,
            self.place,
            prompts=[row.prompt for row in rows],
            seeds=[row.seed for row in rows],
            settings=self.settings,
            steps=range(first, len(schedule_sigmas(self.pipe, self.settings))),
        )
        count = min(self.config.n_natural_images, len(self.images))
        rows = [self.images[image_id] for image_id in range(count)]
        unedited = measure_unedited(
            self.pipe,
            self.sae,
            self.place,
            limits,
            prompts=[row.prompt for row in rows],
            seeds=[row.seed for row in rows],
            settings=self.settings,
        )
        limits = replace(limits, natural=calibrated_range(unedited))
        self.run.update_metrics(self.place, {LIMITS_KEY: limits.to_dict()})
        return limits

    def _demo(self, feature: int, image_id: int, score: DemoScore) -> SteeringDemo:
        row = self.images[image_id]
        variants, measured = self._sweep(feature, image_id)
        chosen = self._places(score)
        name = f"feature-{feature}"
        strip = join_pictures([variants[place].image for place in chosen.values()])
        webp = encode_webp(strip, longest_side=3 * self.config.picture_side, quality=92)
        write_bytes(self.run.demo_image_path(self.place, name), webp)
        return SteeringDemo(
            hookpoint=str(self.place),
            feature=feature,
            label=self.labels.get(feature),
            prompt=row.prompt,
            seed=row.seed,
            score=score,
            distance_name=self.distance.name,
            image=name,
            recipes={word: variants[place].recipe for word, place in chosen.items()},
            measurements={word: measured[place] for word, place in chosen.items()},
        )

    def _labels(self) -> dict[int, str]:
        if not self.run.features_path(self.place).is_file():
            return {}
        table = self.run.load_features(self.place)
        labels = list(table.column("label")) if "label" in table else []
        return {feature: str(label) for feature, label in enumerate(labels) if label}

    # What is kept between calls

    def _identity(self) -> str:
        """Changes whenever an earlier measurement would not be comparable."""
        asked = replace(self.config, n_candidates=1, picture_side=1)
        judges = (self.distance.name, self.embedder.name if self.embedder is not None else None)
        weights = {name: float(tensor.double().sum()) for name, tensor in self.sae.state_dict().items()}
        parts = [asdict(asked), self.settings.to_dict(), weights, judges, list(flux_identity(self.pipe))]
        parts.append([self.labels.get(feature) for feature in self.features])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def _checkpoint_path(self) -> Path:
        return self.folder / f"candidates-{self._identity()}.json"

    def _load_checkpoint(self) -> dict[tuple[int, int], DemoScore]:
        if not self._checkpoint_path.is_file():
            return {}
        rows = json.loads(self._checkpoint_path.read_text(encoding="utf-8"))
        return {(row["feature"], row["image_id"]): DemoScore(**row["score"]) for row in rows}

    def _save_checkpoint(self) -> None:
        rows = [
            {"feature": feature, "image_id": image_id, "score": asdict(score)}
            for (feature, image_id), score in self.done.items()
        ]
        write_text(self._checkpoint_path, json.dumps(rows))


def _responsiveness(measured: EditMeasurement) -> float:
    """How much an edit changed the picture where it acts, less by the odd tokens; nothing where it broke."""
    if not measured.looks_natural:
        return 0.0
    return (measured.distance_inside or 0.0) * (1 - measured.out_of_distribution)


def _collateral(measured: EditMeasurement) -> float:
    inside, outside = measured.distance_inside or 0.0, measured.distance_outside or 0.0
    return outside / (inside + outside) if inside + outside > 0 else 0.0
