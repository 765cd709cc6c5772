"""The steering laboratory: does turning a feature change what it stands for, and nothing else?

On the miniature every picture can be read back. For each concept that a feature matches, the feature is turned up on
pictures without the concept and down on pictures with it, beside edits of equal norm in random directions and along
other features, the difference-of-means direction, and prompt editing. Settings are chosen on some pictures and
reported on others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.edits import IDENTITY, MAX_STRENGTH, SteeringEdit
from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.outcomes import Outcome, Subject, Tally, compare_scenes, draw_subject
from fluxsae.evaluation.probes import TokenMoments
from fluxsae.evaluation.stream import OnProgress
from fluxsae.evaluation.truths import CONCEPTS, Concept, coverage
from fluxsae.flux import FluxPipeline, capture, decode_latents, denoise_to, generate, generate_from, token_grid
from fluxsae.hookpoints import HookPoint
from fluxsae.measurements import random_directions, random_features
from fluxsae.miniature.scenes import Scene, read_scene
from fluxsae.sae import SaeConfig, SparseAutoencoder
from fluxsae.settings import GenerationSettings
from fluxsae.steering import steer
from fluxsae.sweeps import first_edited_step

Direction = Literal["amplify", "suppress"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("amplify", "suppress")
TARGET_ATTRIBUTES: Final = ("colour", "texture", "background")
LEAST_SPECIFICITY: Final = 0.8
LEAST_CONFIDENCE: Final = 0.05
_REPORT_SEEDS: Final = 1 << 21
_SELECT_SEEDS: Final = 1 << 20
_DRAWS_PER_SUBJECT: Final = 4


@dataclass(frozen=True)
class EditSettings:
    """How a feature is turned in one direction, at one hook point."""

    hookpoint: HookPoint
    mode: str
    strength: float
    steps: tuple[int, int] | None

    def edit(self, feature: int, *, strength: float | None = None) -> SteeringEdit:
        """The edit of a feature, at these settings or at another strength."""
        chosen = self.strength if strength is None else strength
        return SteeringEdit(self.hookpoint, feature, self.mode, chosen, steps=self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "hookpoint": str(self.hookpoint), "steps": list(self.steps) if self.steps else None}


@dataclass(frozen=True, kw_only=True)
class LaboratoryConfig:
    """How much is tried."""

    n_select: int = 4
    """Pictures a concept and direction on which hook point, mode, strength, window and feature are chosen."""
    n_report: int = 8
    """Further pictures a concept and direction on which the chosen settings are reported."""
    add: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Strengths of mode add that are tried to turn a feature up."""
    clamp: tuple[float, ...] = ()
    """Strengths of mode clamp that are tried to turn a feature up."""
    scale: tuple[float, ...] = (0.0, -1.0)
    """Strengths of mode scale that are tried to turn a feature down."""
    project_out: tuple[float, ...] = ()
    """Strengths of mode project_out that are tried to turn a feature down."""
    starts: tuple[float, ...] = (0.0, 0.3)
    """Where windows start, as fractions of the schedule."""
    stop: float = 1.0
    """Where they end."""
    n_features: int = 2
    """Matched features of a concept that are tried, the best by AUC first."""
    n_moment_images: int = 96
    """Pictures from which the difference-of-means directions come."""
    curve: tuple[float, ...] = (0.25, 0.5, 2.0, 4.0)
    """Multiples of the chosen strength's distance from no change, beside 1, on the dose-response curve."""
    batch_size: int = 64
    """Pictures generated together."""
    readers: int = 0
    """Processes that read pictures back; 0 reads in this one."""
    seed: int = 0
    """Decides subjects and control directions."""

    def modes(self, direction: Direction) -> list[tuple[str, float]]:
        """(mode, strength) pairs that are tried in one direction."""
        names = ("add", "clamp") if direction == "amplify" else ("scale", "project_out")
        return [(name, strength) for name in names for strength in getattr(self, name)]


@dataclass(frozen=True)
class Arm:
    """One way of changing a picture."""

    name: str
    edits: tuple[SteeringEdit, ...]
    control: Literal["", "random direction", "random feature"] = ""
    """In place of the feature's decoder row: a random direction, or another feature's row, of equal norm."""


@dataclass(frozen=True)
class ConceptResult:
    """One concept in one direction."""

    concept: Concept
    direction: Direction
    feature: int
    arms: dict[str, Tally]
    """feature (at the default settings), random direction, random feature, difference of means, prompt."""
    curve: dict[float, Tally]
    """Strength -> the feature's tally: the dose-response curve."""

    @property
    def breaking_strength(self) -> float | None:
        """The weakest strength of the curve at which less than 80 % of the other attributes hold; None if none."""
        falling = [s for s, tally in self.curve.items() if tally.specificity.value < LEAST_SPECIFICITY]
        return falling[0] if falling else None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "concept": str(self.concept),
            "direction": self.direction,
            "feature": self.feature,
            "arms": {name: tally.to_dict() for name, tally in self.arms.items()},
            "curve": [{"strength": strength, **tally.to_dict()} for strength, tally in self.curve.items()],
            "breaking_strength": self.breaking_strength,
        }


@dataclass(frozen=True)
class TrialResult:
    """One candidate for the defaults, over the concepts that targets speak of, on the pictures for choosing."""

    settings: EditSettings
    direction: Direction
    success: float
    specificity: float
    strict_specificity: float

    @property
    def merit(self) -> float:
        """Success, held down where specificity misses its target."""
        return self.success - 3 * max(0.0, LEAST_SPECIFICITY - self.specificity)

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {**self.settings.to_dict(), "direction": self.direction, "success": self.success,
                "specificity": self.specificity, "strict_specificity": self.strict_specificity}  # fmt: skip


@dataclass(frozen=True)
class LaboratoryReport:
    """What the laboratory found."""

    defaults: dict[Direction, EditSettings]
    trials: tuple[TrialResult, ...]
    results: tuple[ConceptResult, ...]
    skipped: tuple[str, ...]
    """Concepts for which too few pictures could be read."""

    def group(self, direction: Direction, attributes: Sequence[str], arm: str) -> tuple[float, float, float] | None:
        """Mean success, specificity and strict specificity over the concepts of some attributes."""
        tallies = [
            result.arms[arm]
            for result in self.results
            if result.direction == direction and result.concept.attribute in attributes and arm in result.arms
        ]
        if not tallies:
            return None
        columns = [(t.success.value, t.specificity.value, t.strict_specificity.value) for t in tallies]
        mean = np.mean(columns, axis=0)
        return float(mean[0]), float(mean[1]), float(mean[2])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "defaults": {direction: chosen.to_dict() for direction, chosen in self.defaults.items()},
            "trials": [trial.to_dict() for trial in self.trials],
            "results": [result.to_dict() for result in self.results],
            "skipped": list(self.skipped),
        }


CandidateFeatures = Mapping[HookPoint, Mapping[Concept, Sequence[int]]]


def candidate_features(concepts: Mapping[str, Any], *, limit: int) -> dict[Concept, list[int]]:
    """The matched features of each concept, best first, from a concept report's JSON values."""
    best = {
        Concept(row["attribute"], row["value"]): row["methods"]["SAE feature"]["candidate"]
        for row in concepts["concepts"]
    }
    found: dict[Concept, list[int]] = {}
    by_name = {str(concept): concept for concept in CONCEPTS}
    for feature, name in concepts["matches"].items():
        found.setdefault(by_name[name], []).append(int(feature))
    for concept, features in found.items():
        features.sort(key=lambda feature: feature != best.get(concept))
    return {concept: features[:limit] for concept, features in sorted(found.items())}


@torch.no_grad()
def run_laboratory(
    pipe: FluxPipeline,
    saes: Mapping[HookPoint, SparseAutoencoder],
    features: CandidateFeatures,
    *,
    settings: GenerationSettings,
    config: LaboratoryConfig | None = None,
    on_progress: OnProgress | None = None,
) -> LaboratoryReport:
    """Chooses hook point, mode, strength, window and features on some pictures and reports them on others.

    Raises:
        FluxSaeError: no feature matches any concept.
    """
    config = config or LaboratoryConfig()
    if not any(features.values()):
        raise FluxSaeError("No feature matches a concept, so there is nothing to steer. Train a better SAE first.")
    with _reading(config.readers) as read:
        bench = _Bench(pipe, saes, features, settings, config, read, on_progress)
        return bench.run()


@contextmanager
def _reading(n_processes: int) -> Iterator[Callable[[Sequence[Image.Image]], list[Scene]]]:
    if n_processes < 1:
        yield lambda pictures: [read_scene(picture) for picture in pictures]
        return
    with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
        yield lambda pictures: list(pool.map(read_scene, pictures, chunksize=4))


@dataclass(frozen=True)
class _Case:
    """A subject whose unedited picture could be read."""

    subject: Subject
    before: Scene


@dataclass(eq=False)
class _Bench:
    pipe: FluxPipeline
    saes: Mapping[HookPoint, SparseAutoencoder]
    features: CandidateFeatures
    settings: GenerationSettings
    config: LaboratoryConfig
    read: Callable[[Sequence[Image.Image]], list[Scene]]
    on_progress: OnProgress | None
    _cases: dict[tuple[str, Concept, Direction], list[_Case]] = field(default_factory=dict)

    def run(self) -> LaboratoryReport:
        concepts = sorted({concept for matched in self.features.values() for concept in matched})
        self._draw_cases(concepts)
        moments = self._moments()
        trials: list[TrialResult] = []
        defaults: dict[Direction, EditSettings] = {}
        chosen: dict[tuple[Concept, Direction], int] = {}
        for direction in DIRECTIONS:
            found, best = self._choose(direction)
            trials += found
            defaults[direction] = max(found, key=lambda trial: trial.merit).settings
            chosen |= {(concept, direction): feature for concept, feature in best[defaults[direction]].items()}
        results = [
            self._report(concept, direction, feature, defaults[direction], moments)
            for (concept, direction), feature in self._with_progress("report", list(chosen.items()))
        ]
        skipped = tuple(
            f"{concept} ({direction})"
            for concept in concepts
            for direction in DIRECTIONS
            if not self._cases["report", concept, direction]
        )
        return LaboratoryReport(defaults, tuple(trials), tuple(results), skipped)

    # Pictures

    def _draw_cases(self, concepts: Sequence[Concept]) -> None:
        wanted = [(concept, direction) for concept in concepts for direction in DIRECTIONS]
        for concept, direction in self._with_progress("unedited pictures", wanted):
            for stage, first, count in (
                ("select", _SELECT_SEEDS, self.config.n_select),
                ("report", _REPORT_SEEDS, self.config.n_report),
            ):
                self._cases[stage, concept, direction] = self._draw(concept, direction, first + self.config.seed, count)

    def _draw(self, concept: Concept, direction: Direction, first: int, count: int) -> list[_Case]:
        """Subjects whose unedited picture shows one object, and the concept only where it is to be turned down."""
        found: list[_Case] = []
        has = direction == "suppress"
        seeds = iter(range(first, first + _DRAWS_PER_SUBJECT * count))
        while len(found) < count:
            subjects = [
                draw_subject(concept, has_concept=has, seed=seed) for _, seed in zip(range(count), seeds, strict=False)
            ]
            if not subjects:
                break
            scenes = self._plain_scenes([s.prompt for s in subjects], [s.seed for s in subjects])
            found += [
                _Case(subject, scene)
                for subject, scene in zip(subjects, scenes, strict=True)
                if len(scene.objects) == 1
                and scene.confidence >= LEAST_CONFIDENCE
                and ((concept.attribute, concept.value) in scene.concepts()) == has
            ]
        return found[:count]

    def _plain_scenes(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Scene]:
        scenes: list[Scene] = []
        for start in range(0, len(prompts), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            pictures = generate(self.pipe, list(prompts[part]), seeds=list(seeds[part]), settings=self.settings)
            assert isinstance(pictures, list)
            scenes += self.read(pictures)
        return scenes

    def _edited_scenes(
        self, cases: Sequence[_Case], arms: Sequence[Arm], saes: Mapping[HookPoint, SparseAutoencoder]
    ) -> list[list[Scene]]:
        """For each case the scene of each arm; the steps before the first edit run once a case."""
        first = first_edited_step(self.pipe, saes, [arm.edits for arm in arms], self.settings)
        per_batch = max(1, self.config.batch_size // len(arms))
        found: list[list[Scene]] = []
        for start in range(0, len(cases), per_batch):
            part = cases[start : start + per_batch]
            snapshot = denoise_to(
                self.pipe,
                [case.subject.prompt for case in part],
                seeds=[case.subject.seed for case in part],
                settings=self.settings,
                step=first,
            )
            edits = [arm.edits for _ in part for arm in arms]
            controls = _Controls(part, arms, saes, self.config.seed)
            with steer(self.pipe, saes, edits, settings=self.settings, direction_of=controls):
                latents = generate_from(self.pipe, snapshot, repeat=len(arms), output_type="latent")
            assert isinstance(latents, Tensor)
            scenes = self.read(decode_latents(self.pipe, latents, self.settings))
            found += [scenes[row : row + len(arms)] for row in range(0, len(scenes), len(arms))]
        return found

    def _outcomes(
        self,
        stage: str,
        concept: Concept,
        direction: Direction,
        arms: Sequence[Arm],
        saes: Mapping[HookPoint, SparseAutoencoder] | None = None,
    ) -> list[list[Outcome]]:
        """For each arm the outcome of each case."""
        cases = self._cases[stage, concept, direction]
        scenes = self._edited_scenes(cases, arms, self.saes if saes is None else saes)
        return [
            [compare_scenes(case.before, row[place], concept) for case, row in zip(cases, scenes, strict=True)]
            for place in range(len(arms))
        ]

    # Choosing

    def _windows(self) -> list[tuple[int, int]]:
        n_steps = self.settings.num_inference_steps
        stop = round(self.config.stop * n_steps)
        return [(round(start * n_steps), stop) for start in self.config.starts]

    def _choose(self, direction: Direction) -> tuple[list[TrialResult], dict[EditSettings, dict[Concept, int]]]:
        """Every candidate setting with its result, and each concept's best feature at it."""
        modes = self.config.modes(direction)
        groups = [(place, concept) for place, matched in sorted(self.features.items()) for concept in matched]
        scores: dict[EditSettings, dict[Concept, dict[int, list[Outcome]]]] = {}
        for place, concept in self._with_progress(f"choosing to {direction}", groups):
            if not self._cases["select", concept, direction]:
                continue
            tried = [
                (EditSettings(place, mode, strength, window), feature)
                for window in self._windows()
                for mode, strength in modes
                for feature in self.features[place][concept]
                if self._is_possible(place, feature, mode)
            ]
            arms = [Arm("feature", (chosen.edit(feature),)) for chosen, feature in tried]
            for (chosen, feature), outcomes in zip(
                tried, self._outcomes("select", concept, direction, arms), strict=True
            ):
                scores.setdefault(chosen, {}).setdefault(concept, {})[feature] = outcomes
        best = {
            chosen: {concept: self._best_feature(by_feature, direction) for concept, by_feature in by_concept.items()}
            for chosen, by_concept in scores.items()
        }
        return [self._trial(c, direction, scores[c], best[c]) for c in scores], best

    def _is_possible(self, place: HookPoint, feature: int, mode: str) -> bool:
        return mode not in ("add", "clamp") or float(self.saes[place].reference_acts[feature]) > 0

    def _best_feature(self, by_feature: Mapping[int, Sequence[Outcome]], direction: Direction) -> int:
        def merit(feature: int) -> float:
            outcomes = by_feature[feature]
            hits = [o.is_success(wanted=direction == "amplify") * o.share_unchanged for o in outcomes]
            return float(np.mean(hits))

        return max(by_feature, key=merit)

    def _trial(
        self,
        chosen: EditSettings,
        direction: Direction,
        scores: Mapping[Concept, Mapping[int, Sequence[Outcome]]],
        best: Mapping[Concept, int],
    ) -> TrialResult:
        targeted = [concept for concept in scores if concept.attribute in TARGET_ATTRIBUTES] or list(scores)
        rows = [_means(scores[concept][best[concept]], wanted=direction == "amplify") for concept in targeted]
        success, specificity, strict = np.mean(rows, axis=0).tolist()
        return TrialResult(chosen, direction, success, specificity, strict)

    # Reporting

    def _report(
        self,
        concept: Concept,
        direction: Direction,
        feature: int,
        chosen: EditSettings,
        moments: Mapping[HookPoint, TokenMoments],
    ) -> ConceptResult:
        wanted = direction == "amplify"
        strengths = self._curve(chosen)
        arms = [
            *(Arm(f"strength {strength:g}", (chosen.edit(feature, strength=strength),)) for strength in strengths),
            Arm("feature", (chosen.edit(feature),)),
            Arm("random direction", (chosen.edit(feature),), "random direction"),
            Arm("random feature", (chosen.edit(feature),), "random feature"),
        ]
        outcomes = self._outcomes("report", concept, direction, arms)
        tallies = {arm.name: Tally.of(o, wanted=wanted) for arm, o in zip(arms, outcomes, strict=True) if o}
        tallies |= self._difference_of_means(concept, direction, chosen, moments[chosen.hookpoint])
        tallies |= self._prompt_editing(concept, direction)
        on_curve = [*strengths, chosen.strength]
        curve = {s: Tally.of(o, wanted=wanted) for s, o in zip(on_curve, outcomes, strict=False) if o}
        centre = _no_change(chosen.mode)
        ordered = dict(sorted(curve.items(), key=lambda point: abs(point[0] - centre)))
        named = {name: tally for name, tally in tallies.items() if not name.startswith("strength")}
        return ConceptResult(concept, direction, feature, named, ordered)

    def _curve(self, chosen: EditSettings) -> tuple[float, ...]:
        centre = _no_change(chosen.mode)
        values = [centre + factor * (chosen.strength - centre) for factor in self.config.curve]
        top = 1.0 if chosen.mode in ("ablate", "project_out") else MAX_STRENGTH
        return tuple(round(value, 6) for value in values if value <= top)

    def _difference_of_means(
        self, concept: Concept, direction: Direction, chosen: EditSettings, moments: TokenMoments
    ) -> dict[str, Tally]:
        """The direction from other tokens of its kind to the concept's, as a dictionary of one feature."""
        step = mean_difference(moments, concept)
        if step is None or not self._cases["report", concept, direction]:
            return {}
        d_model = moments.sae.config.d_model
        sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=d_model, n_features=1), seed=None)
        sae.W_dec.data[0] = normalize(step.float(), dim=0)
        sae.reference_acts[0] = step.norm().float()
        sae.input_mean.copy_((moments.total / moments.count).float() * float(moments.sae.input_scale)
                             + moments.sae.input_mean.cpu())  # fmt: skip
        sae.input_scale.copy_(moments.sae.input_scale.cpu())
        sae = sae.to(self.pipe.transformer.device)
        strengths: tuple[float, ...] = (0.5, 1.0, 2.0) if direction == "amplify" else (1.0,)
        mode = "add" if direction == "amplify" else "project_out"
        arms = [
            Arm("difference of means", (SteeringEdit(chosen.hookpoint, 0, mode, strength, steps=chosen.steps),))
            for strength in strengths
        ]
        outcomes = self._outcomes("report", concept, direction, arms, {chosen.hookpoint: sae})
        tallies = [Tally.of(one, wanted=direction == "amplify") for one in outcomes]
        # its best strength: the reference is given every advantage
        return {"difference of means": max(tallies, key=lambda t: t.success.value * t.specificity.value)}

    def _prompt_editing(self, concept: Concept, direction: Direction) -> dict[str, Tally]:
        cases = self._cases["report", concept, direction]
        if not cases:
            return {}
        scenes = self._plain_scenes([c.subject.edited_prompt for c in cases], [c.subject.seed for c in cases])
        outcomes = [compare_scenes(case.before, scene, concept) for case, scene in zip(cases, scenes, strict=True)]
        return {"prompt": Tally.of(outcomes, wanted=direction == "amplify")}

    def _moments(self) -> dict[HookPoint, TokenMoments]:
        """Token means of every concept at every hook point, from the pictures for choosing."""
        cases = [case for (stage, _, _), found in self._cases.items() if stage == "select" for case in found]
        cases = cases[:: max(1, len(cases) // self.config.n_moment_images)]
        moments = {place: TokenMoments(sae) for place, sae in self.saes.items()}
        grid = token_grid(self.pipe, self.settings)
        n_steps = self.settings.num_inference_steps
        steps = sorted({n_steps * part // 10 for part in (3, 5, 7, 9)})
        for start in range(0, len(cases), self.config.batch_size):
            part = cases[start : start + self.config.batch_size]
            prompts, seeds = [c.subject.prompt for c in part], [c.subject.seed for c in part]
            with capture(self.pipe, list(self.saes), steps, stop_early=True) as captured:
                generate(self.pipe, prompts, seeds=seeds, settings=self.settings)
            for place, sums in moments.items():
                tokens = torch.stack([captured.get(place, step) for step in steps], dim=1).float()
                for case, x in zip(part, tokens, strict=True):
                    sums.update(x, coverage(case.before, grid))
        return moments

    def _with_progress(self, doing: str, things: Sequence[Any]) -> Iterator[Any]:
        for done, thing in enumerate(things):
            yield thing
            if self.on_progress is not None:
                self.on_progress(doing, done + 1, len(things))


def _no_change(mode: str) -> float:
    return IDENTITY[mode] or 0.0


def _means(outcomes: Sequence[Outcome], *, wanted: bool) -> tuple[float, float, float]:
    """Success, specificity and strict specificity of some outcomes."""
    rows = [(o.is_success(wanted=wanted), o.share_unchanged, o.is_specific) for o in outcomes]
    success, specificity, strict = np.mean(rows, axis=0).tolist()
    return success, specificity, strict


def mean_difference(moments: TokenMoments, concept: Concept) -> Float[Tensor, " d"] | None:
    """Mean of the concept's tokens minus mean of the tokens of the attribute's other values, normalised units."""
    own = CONCEPTS.index(concept)
    others = [row for row, other in enumerate(CONCEPTS) if other.attribute == concept.attribute and row != own]
    n_own, n_others = float(moments.concept_count[own]), float(moments.concept_count[others].sum())
    if not n_own or not n_others:
        return None
    return moments.concept_total[own] / n_own - moments.concept_total[others].sum(0) / n_others


class _Controls:
    """The direction of each edit of a batch: cases one after the other, each with every arm."""

    def __init__(
        self, cases: Sequence[_Case], arms: Sequence[Arm], saes: Mapping[HookPoint, SparseAutoencoder], seed: int
    ) -> None:
        self.cases, self.arms, self.saes, self.seed = cases, arms, saes, seed
        self._known: dict[tuple[int, HookPoint, int], Tensor] = {}

    def __call__(self, edit: SteeringEdit, item: int) -> Tensor | None:
        case, place = divmod(item, len(self.arms))
        control = self.arms[place].control
        if not control:
            return None
        key = (item, edit.hookpoint, edit.feature)
        if key not in self._known:
            sae = self.saes[edit.hookpoint]
            seed = (self.seed + 1) * 1_000_003 + self.cases[case].subject.seed
            rows = (
                random_directions(sae.config.d_model, 1, seed=seed)
                if control == "random direction"
                else random_features(sae, edit.feature, 1, seed=seed)
            )
            self._known[key] = rows[0].to(sae.W_dec.device)
        return self._known[key]
