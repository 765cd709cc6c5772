"""The search for pictures on which one name in place of another shows best."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from fluxsae.features.cards import CardIndex
from fluxsae.features.scores import load_scores
from fluxsae.features.vocabulary import NameKinds, has_name, in_place
from fluxsae.files import write_bytes, write_text
from fluxsae.flux import flux_identity, token_grid
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.pictures.grids import join_pictures
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import encode_webp
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.demos.config import SwapConfig
from fluxsae.steering.demos.measured import load_limits, measured_sweep, run_origin
from fluxsae.steering.demos.search import candidate_images
from fluxsae.steering.demos.swaps import (
    Region,
    SwapScore,
    acts_in_window,
    addable,
    hot_region,
    swap_variants,
    try_swaps,
)
from fluxsae.steering.edits import Recipe, SteeringEdit
from fluxsae.steering.measurements import EditMeasurement

SEEN: Final = 0.15
"""Share of the best demo's loss of its label, as CLIP sees it, from which a demo shows what its name says."""
Candidate = tuple[int, int, str]
"""Feature that is taken away, image id, new name."""


@dataclass(frozen=True)
class Swap:
    """One name put in place of another, on a picture that shows it."""

    hookpoint: str
    feature: int
    """The feature that is taken away."""
    label: str
    new_features: tuple[int, ...]
    new_label: str
    prompt: str
    seed: int
    score: SwapScore
    distance_name: str
    image: str
    """Name of the strip (before, after) in the run's demo folder."""
    recipe: Recipe
    measurement: EditMeasurement

    def to_dict(self) -> dict[str, Any]:
        """The swap as JSON values."""
        names = ("hookpoint", "feature", "label", "new_label", "prompt", "seed", "distance_name", "image")
        return {
            **{name: getattr(self, name) for name in names},
            "new_features": list(self.new_features),
            "score": asdict(self.score),
            "recipe": self.recipe.to_dict(),
            "measurement": self.measurement.to_dict(),
        }


def find_swaps(
    run: RunFolder,
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    *,
    distance: PerceptualDistance,
    embedder: ImageEmbedder,
    config: SwapConfig | None = None,
    max_batch: int | None = None,
    on_candidate: Callable[[int, int], None] | None = None,
) -> dict[HookPoint, list[Swap]]:
    """Swaps of the features whose steering demos show their labels go, best first, written into the run.

    What was measured is kept in the run's work folder after every candidate. `on_candidate(done, total)`.
    """
    config = config or SwapConfig()
    searches = [_Search(run, pipe, saes[place], place, distance, embedder, config, max_batch) for place in sorted(saes)]
    plans = [search.candidates() for search in searches]
    total, done, found = sum(map(len, plans)), 0, {}
    for search, plan in zip(searches, plans, strict=True):
        for candidate in plan:
            search.measure(candidate)
            done += 1
            if on_candidate is not None:
                on_candidate(done, total)
        found[search.place] = search.write_swaps()
    return found


@dataclass(eq=False)
class _Search:
    """The search at one hook point and what it keeps in the work folder."""

    run: RunFolder
    pipe: Any
    sae: SparseAutoencoder
    place: HookPoint
    distance: PerceptualDistance
    embedder: ImageEmbedder
    config: SwapConfig
    max_batch: int | None

    def __post_init__(self) -> None:
        self.settings = self.run.load_info().settings
        self.images = self.run.load_images()
        self.own_images, self.labels = self._going_labels()
        named = CardIndex(self.run, self.place).named()
        self.named = {name: kept for name, features in named.items() if (kept := addable(self.sae, features))}
        self.names = NameKinds(self.images.prompts, self.named)
        limits = load_limits(self.run, self.place)
        self.limits = None if limits is None else {self.place: limits}
        self._regions: dict[tuple[int, int], Region] = {}
        self._kinds: dict[str, dict[str, float]] = {}
        self.done = self._load_checkpoint()

    def candidates(self) -> list[Candidate]:
        """What is still to be measured."""
        return [candidate for feature in self.labels for candidate in self._of(feature) if candidate not in self.done]

    def measure(self, candidate: Candidate) -> None:
        """Measures every way to put a new name in place of a feature's own on one image, and keeps the best."""
        feature, image_id, name = candidate
        label, prompt = self.labels[feature], self.images.prompts[image_id]
        rivals = self.names.rivals(label, name, least=self.config.alike, limit=self.config.n_rivals)
        scores = try_swaps(
            self.pipe,
            self.sae,
            self.place,
            self._variants(candidate),
            [in_place(prompt, label, other) for other in (label, name, *rivals)],
            prompt=prompt,
            seed=self.images.seeds[image_id],
            settings=self.settings,
            distance=self.distance,
            embedder=self.embedder,
            limits=self.limits,
            max_batch=self.max_batch,
        )
        best = max(range(len(scores)), key=lambda place: scores[place].score)
        self.done[candidate] = (best, scores[best])
        rows = [
            {"candidate": candidate, "variant": variant, "score": asdict(score)}
            for candidate, (variant, score) in self.done.items()
        ]
        write_text(self._checkpoint_path, json.dumps(rows))

    def write_swaps(self) -> list[Swap]:
        """Each feature and new name on the image that shows it best, if CLIP sees it happen; best first."""
        tried = [
            (self.done[candidate][1].score, candidate) for feature in self.labels for candidate in self._of(feature)
        ]
        best: dict[tuple[int, str], Candidate] = {}
        for score, (feature, image_id, name) in sorted(tried, key=lambda pair: -pair[0]):
            if score > 0:
                best.setdefault((feature, name), (feature, image_id, name))
        swaps = [self._swap(candidate, *self.done[candidate]) for candidate in best.values()]
        self.run.save_swaps(self.place, [json.dumps(swap.to_dict()) for swap in swaps])
        named = {self.run.demo_image_path(self.place, swap.image) for swap in swaps}
        for old in set(self.run.swaps_path(self.place).parent.glob("swap-*.webp")) - named:
            old.unlink()
        return swaps

    def _going_labels(self) -> tuple[dict[int, int], dict[int, str]]:
        """Image and label of the features whose label CLIP sees go in their demo."""
        demos = self.run.load_demos(self.place)
        told = [demo for demo in demos if demo["label"] and demo["score"].get("label_less") is not None]
        least = SEEN * max((-demo["score"]["label_less"] for demo in told), default=0.0)
        shown = [demo for demo in told if -demo["score"]["label_less"] > max(least, 0.0)]
        ids = {key: image for image, key in enumerate(zip(self.images.prompts, self.images.seeds, strict=True))}
        images = {demo["feature"]: ids[demo["prompt"], demo["seed"]] for demo in shown}
        return images, {demo["feature"]: str(demo["label"]) for demo in shown}

    def _of(self, feature: int) -> list[Candidate]:
        scores = load_scores(self.run, self.place).feature(feature)
        label, prompts = self.labels[feature], self.images.prompts
        others = candidate_images(scores, prompts, label=label, n_wanted=self.config.n_images)
        images = dict.fromkeys([self.own_images[feature], *others])
        return [(feature, image, name) for image in images for name in self._new_names(label, prompts[image])]

    def _new_names(self, label: str, prompt: str) -> list[str]:
        """The names most like a label in use, of those that a prompt does not have."""
        names = [name for name in self._kind(label) if name in self.named and not has_name(prompt, name)]
        return names[: self.config.n_names]

    def _kind(self, label: str) -> dict[str, float]:
        if label not in self._kinds:
            self._kinds[label] = self.names.alike(label, least=self.config.alike)
        return self._kinds[label]

    def _variants(self, candidate: Candidate) -> list[tuple[SteeringEdit, ...]]:
        feature, image_id, name = candidate
        if (feature, image_id) not in self._regions:
            acts = acts_in_window(
                self.pipe,
                self.sae,
                self.place,
                [feature],
                prompt=self.images.prompts[image_id],
                seed=self.images.seeds[image_id],
                settings=self.settings,
                steps=self.config.steps,
            )
            grid = token_grid(self.pipe, self.settings)
            self._regions[feature, image_id] = hot_region(acts.mean(dim=0)[0], grid, heat=self.config.heat)
        return swap_variants(self.place, feature, self.named[name], self._regions[feature, image_id], self.config)

    def _swap(self, candidate: Candidate, variant: int, score: SwapScore) -> Swap:
        feature, image_id, name = candidate
        edits = self._variants(candidate)[variant]
        found, measured = measured_sweep(
            self.pipe,
            {self.place: self.sae},
            [(), edits],
            prompt=self.images.prompts[image_id],
            seed=self.images.seeds[image_id],
            settings=self.settings,
            distance=self.distance,
            embedder=self.embedder,
            limits=self.limits,
            origin=run_origin(self.run, self.pipe),
            max_batch=self.max_batch,
        )
        picture = f"swap-{feature}-{edits[1].feature}"
        strip = encode_webp(
            join_pictures([made.image for made in found]), longest_side=2 * self.config.picture_side, quality=92
        )
        write_bytes(self.run.demo_image_path(self.place, picture), strip)
        return Swap(
            hookpoint=str(self.place),
            feature=feature,
            label=self.labels[feature],
            new_features=tuple(edit.feature for edit in edits[1:]),
            new_label=name,
            prompt=self.images.prompts[image_id],
            seed=self.images.seeds[image_id],
            score=score,
            distance_name=self.distance.name,
            image=picture,
            recipe=found[1].recipe,
            measurement=measured[1],
        )

    # What is kept between calls

    @functools.cached_property
    def _checkpoint_path(self) -> Path:
        """Named after all that makes an earlier measurement comparable."""
        parts: list[Any] = [
            asdict(self.config),
            self.settings.to_dict(),
            {name: float(tensor.double().sum()) for name, tensor in self.sae.state_dict().items()},
            (self.distance.name, self.embedder.name),
            list(flux_identity(self.pipe)),
            list(self.labels.items()),
            self.named,
            [*zip(self.images.prompts, self.images.seeds, strict=True)],
            [limits.to_dict() for limits in (self.limits or {}).values()],
            [column.name for column in fields(SwapScore)],
        ]
        name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return self.run.work_path("demos") / str(self.place) / f"swaps-{name}.json"

    def _load_checkpoint(self) -> dict[Candidate, tuple[int, SwapScore]]:
        if not self._checkpoint_path.is_file():
            return {}
        rows = json.loads(self._checkpoint_path.read_text(encoding="utf-8"))
        return {tuple(row["candidate"]): (row["variant"], SwapScore(**row["score"])) for row in rows}
