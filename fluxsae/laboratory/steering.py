"""The steering laboratory: does turning a feature change what it stands for, and nothing else?

On the miniature every picture can be read back. For each concept that a feature matches, the feature is turned up on
pictures without the concept and down on pictures with it, beside edits of equal norm in random directions and along
other features, the difference-of-means direction, and prompt editing. Success: the attribute changed as meant.
Specificity: all other attributes read as in the unedited picture. Edits act everywhere, or where a person would paint:
on the object, or on the background. Settings are chosen on some pictures and reported
on others.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.stream import OnProgress
from fluxsae.flux import (
    FluxPipeline,
    capture,
    decode_latents,
    denoise_to,
    execution_device,
    generate,
    generate_from,
    token_grid,
)
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.arms import Arm, Controls
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.laboratory.outcomes import Outcome, Subject, Tally, compare_scenes, draw_subject
from fluxsae.laboratory.probes import TokenMoments
from fluxsae.laboratory.steering_report import (
    DIRECTIONS,
    TARGET_ATTRIBUTES,
    ConceptResult,
    Direction,
    EditSettings,
    LaboratoryReport,
    TrialResult,
    Where,
)
from fluxsae.laboratory.truths import CONCEPTS, COVERED, Concept, coverage
from fluxsae.miniature.scenes import Scene, read_scene
from fluxsae.sae.config import Mismatch, SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import IDENTITY, MAX_STRENGTH, NEEDS_REFERENCE, SteeringEdit
from fluxsae.steering.sweeps import first_edited_step

_REPORT_SEEDS: Final = 1 << 21
_SELECT_SEEDS: Final = 1 << 20
_DRAWS_PER_SUBJECT: Final = 4


@dataclass(frozen=True, kw_only=True)
class LaboratoryConfig:
    """How much is tried."""

    n_select: int = 6
    """Pictures a concept and direction on which hook point, mode, strength, window and feature are chosen."""
    n_report: int = 12
    """Further pictures a concept and direction on which the chosen settings are reported."""
    add: tuple[float, ...] = (0.25, 0.35, -0.5)
    """Strengths of mode add that are tried: above 0 to turn a feature up, below to turn it down."""
    clamp: tuple[float, ...] = (-0.25,)
    """Strengths of mode clamp that are tried: above 0 to turn a feature up, below to turn it down."""
    scale: tuple[float, ...] = (-1.0,)
    """Strengths of mode scale that are tried to turn a feature down."""
    project_out: tuple[float, ...] = ()
    """Strengths of mode project_out that are tried to turn a feature down."""
    starts: tuple[float, ...] = (0.2,)
    """Where windows start, as fractions of the schedule."""
    stop: float = 1.0
    """Where they end."""
    where: tuple[Where, ...] = ("everywhere", "painted")
    """Whether edits act on the whole picture, or where the attribute lies in the unedited one."""
    n_features: int = 1
    """Matched features of a concept that are tried alone, the best by AUC first."""
    together: tuple[int, ...] = (1, 4)
    """How many matched features of a concept are turned at once at most, the best by AUC first; 1 tries each alone."""
    without_rivals: tuple[bool, ...] = (False, True)
    """Whether, to turn a feature up, the matched features of the attribute's other values are taken away (scale 0)."""
    n_rivals: int = 3
    """Matched features of each other value that are taken away, the best by AUC first."""
    named: float = 1.0
    """Share of the attributes an edit is not about that its prompt names; what is left open may be drawn either way."""
    n_moment_images: int = 96
    """Pictures from which the difference-of-means directions come."""
    curve: tuple[float, ...] = (0.5, 2.0)
    """Multiples of the chosen strength's distance from no change, beside 1, on the dose-response curve."""
    batch_size: int = 64
    """Pictures generated together."""
    readers: int = 0
    """Processes that read pictures back; 0 reads in this one."""
    seed: int = 0
    """Decides subjects and control directions."""

    def __post_init__(self) -> None:
        for name in ("n_select", "n_report", "n_features", "n_rivals", "n_moment_images", "batch_size"):
            if getattr(self, name) < 1:
                raise FluxSaeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.starts or not all(0 <= start < self.stop <= 1 for start in self.starts):
            raise FluxSaeError(
                f"starts is {self.starts} and stop {self.stop}; they are fractions of the schedule: "
                "at least one start, each at least 0 and below stop, and stop at most 1."
            )
        if not 0 <= self.named <= 1:
            raise FluxSaeError(f"named is {self.named}; it is a share of the attributes, from 0 to 1.")
        if not self.where or not self.without_rivals:
            raise FluxSaeError("where or without_rivals is empty; name at least one way of each.")
        if not self.together or min(self.together) < 1:
            raise FluxSaeError(f"together is {self.together}; give numbers of features, each at least 1.")
        for direction in DIRECTIONS:
            if not self.modes(direction):
                raise FluxSaeError(
                    f"No strength is left to {direction} with; give one of add, clamp, scale, project_out."
                )

    @property
    def n_candidates(self) -> int:
        """Matched features of a concept that any of the ways needs."""
        return max(self.n_features, self.n_rivals, *self.together)

    def modes(self, direction: Direction) -> list[tuple[str, float]]:
        """(mode, strength) pairs that are tried in one direction."""
        signed = [(name, strength) for name in ("add", "clamp") for strength in getattr(self, name)]
        if direction == "amplify":
            return [(name, strength) for name, strength in signed if strength > 0]
        down = [(name, strength) for name in ("scale", "project_out") for strength in getattr(self, name)]
        return down + [(name, strength) for name, strength in signed if strength < 0]


CandidateFeatures = Mapping[HookPoint, Mapping[Concept, Sequence[int]]]


def candidate_features(concepts: Mapping[str, Any], *, limit: int) -> dict[Concept, list[int]]:
    """The best matched features of each concept, best first, from a concept report's JSON values."""
    found: dict[Concept, list[int]] = {}
    by_name = {str(concept): concept for concept in CONCEPTS}
    for feature, name in concepts["matches"].items():
        found.setdefault(by_name[name], []).append(int(feature))
    return {concept: features[:limit] for concept, features in sorted(found.items())}


@torch.no_grad()
def run_laboratory(
    pipe: FluxPipeline,
    saes: Mapping[HookPoint, SparseAutoencoder],
    features: CandidateFeatures,
    *,
    settings: GenerationSettings,
    config: LaboratoryConfig | None = None,
    allow_mismatch: Collection[Mismatch] = (),
    on_progress: OnProgress | None = None,
) -> LaboratoryReport:
    """Chooses hook point, mode, strength, window and features on some pictures and reports them on others.

    Raises:
        FluxSaeError: no feature matches any concept, or no picture could be read.
    """
    config = config or LaboratoryConfig()
    if not any(features.values()):
        raise FluxSaeError("No feature matches a concept, so there is nothing to steer. Train a better SAE first.")
    with _reading(config.readers) as read:
        bench = _Bench(pipe, saes, features, settings, config, allow_mismatch, read, on_progress)
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

    def painted(self, attribute: str, grid: TokenGrid) -> tuple[tuple[bool, ...], ...]:
        """The tokens on which an attribute lies: rows of the token grid."""
        rows = [row for row, concept in enumerate(CONCEPTS) if concept.attribute == attribute]
        lies = coverage(self.before, grid)[rows].max(axis=0) > COVERED
        return tuple(tuple(line) for line in lies.reshape(grid.rows, grid.cols).tolist())


def _is_readable(scene: Scene, concept: Concept, *, has_concept: bool) -> bool:
    """Whether an unedited picture may serve: one object, surely read, with or without the concept as is needed."""
    is_sure = len(scene.objects) == 1 and scene.confidence >= LEAST_CONFIDENCE
    return is_sure and ((concept.attribute, concept.value) in scene.concepts()) == has_concept


Group = tuple[int, ...]
"""Features that are turned together."""
Scores = dict[EditSettings, dict[Concept, dict[Group, list[Outcome]]]]
"""Settings -> concept -> features -> what the edit did to each picture."""


@dataclass(eq=False)
class _Bench:
    pipe: FluxPipeline
    saes: Mapping[HookPoint, SparseAutoencoder]
    features: CandidateFeatures
    settings: GenerationSettings
    config: LaboratoryConfig
    allow_mismatch: Collection[Mismatch]
    read: Callable[[Sequence[Image.Image]], list[Scene]]
    on_progress: OnProgress | None
    _cases: dict[tuple[str, Concept, Direction], list[_Case]] = field(default_factory=dict)

    def run(self) -> LaboratoryReport:
        concepts = sorted({concept for matched in self.features.values() for concept in matched})
        self._draw_cases(concepts)
        moments = self._moments()
        trials: list[TrialResult] = []
        defaults: dict[Direction, EditSettings] = {}
        chosen: dict[tuple[Concept, Direction], Group] = {}
        for direction in DIRECTIONS:
            tried, defaults[direction], groups = self._choose(direction, concepts)
            trials += tried
            chosen |= {(concept, direction): group for concept, group in groups.items()}
        results = [
            self._report(concept, direction, group, defaults[direction], moments)
            for (concept, direction), group in self._with_progress("report", list(chosen.items()))
            if self._cases["report", concept, direction]
        ]
        reported = {(result.concept, result.direction) for result in results}
        skipped = tuple(
            f"{concept} ({direction}): {self._reason(concept, direction, defaults[direction])}"
            for concept in concepts
            for direction in DIRECTIONS
            if (concept, direction) not in reported
        )
        return LaboratoryReport(defaults, tuple(trials), tuple(results), skipped)

    def _reason(self, concept: Concept, direction: Direction, chosen: EditSettings) -> str:
        """Why a concept is not reported."""
        if all(self._cases[stage, concept, direction] for stage in ("select", "report")):
            return f"no feature of {chosen.hookpoint} that can be turned matches it"
        return "too few pictures could be read"

    # Pictures

    def _draw_cases(self, concepts: Sequence[Concept]) -> None:
        """Subjects whose unedited picture shows one object, and the concept only where it is to be turned down.

        All that is still lacking is drawn together, so that the batches are full.
        """
        stages = (("select", _SELECT_SEEDS, self.config.n_select), ("report", _REPORT_SEEDS, self.config.n_report))
        wanted: dict[tuple[str, Concept, Direction], tuple[int, Iterator[int]]] = {
            (stage, concept, direction): (
                count,
                iter(range(first + self.config.seed, first + self.config.seed + _DRAWS_PER_SUBJECT * count)),
            )
            for concept in concepts
            for direction in DIRECTIONS
            for stage, first, count in stages
        }
        self._cases = {key: [] for key in wanted}
        while drawn := [
            (key, draw_subject(key[1], has_concept=key[2] == "suppress", seed=seed, named=self.config.named))
            for key, (count, seeds) in wanted.items()
            for seed in islice(seeds, count - len(self._cases[key]))
        ]:
            scenes = self._plain_scenes([s.prompt for _, s in drawn], [s.seed for _, s in drawn])
            for (key, subject), scene in zip(drawn, scenes, strict=True):
                if _is_readable(scene, key[1], has_concept=key[2] == "suppress"):
                    self._cases[key].append(_Case(subject, scene))
            if self.on_progress is not None:
                done = sum(map(len, self._cases.values()))
                self.on_progress("unedited pictures", done, sum(count for count, _ in wanted.values()))

    def _plain_scenes(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Scene]:
        scenes: list[Scene] = []
        for start in range(0, len(prompts), self.config.batch_size):
            part = slice(start, start + self.config.batch_size)
            pictures = generate(self.pipe, list(prompts[part]), seeds=list(seeds[part]), settings=self.settings)
            assert isinstance(pictures, list)
            scenes += self.read(pictures)
        return scenes

    def _edited_scenes(
        self, cases: Sequence[_Case], attribute: str, arms: Sequence[Arm], saes: Mapping[HookPoint, SparseAutoencoder]
    ) -> list[list[Scene]]:
        """For each arm the scene of each case; the steps before an arm's first edit run once a case."""
        groups: dict[int, list[int]] = {}
        for place, arm in enumerate(arms):
            first = first_edited_step(self.pipe, saes, [arm.edits], self.settings)
            groups.setdefault(first, []).append(place)
        found: dict[int, list[Scene]] = {}
        for first, places in groups.items():
            columns = self._scenes_from(first, cases, attribute, [arms[place] for place in places], saes)
            found |= dict(zip(places, columns, strict=True))
        return [found[place] for place in range(len(arms))]

    def _scenes_from(
        self,
        first: int,
        cases: Sequence[_Case],
        attribute: str,
        arms: Sequence[Arm],
        saes: Mapping[HookPoint, SparseAutoencoder],
    ) -> list[list[Scene]]:
        """For each arm the scene of each case, where no arm edits before step `first`."""
        per_batch = max(1, self.config.batch_size // len(arms))
        scenes: list[Scene] = []
        for start in range(0, len(cases), per_batch):
            part = cases[start : start + per_batch]
            snapshot = denoise_to(
                self.pipe,
                [case.subject.prompt for case in part],
                seeds=[case.subject.seed for case in part],
                settings=self.settings,
                step=first,
            )
            edits = [self._edits(case, attribute, arm) for case in part for arm in arms]
            with steer(
                self.pipe,
                saes,
                edits,
                settings=self.settings,
                allow_mismatch=self.allow_mismatch,
                direction_of=Controls([case.subject for case in part], arms, saes, self.config.seed),
            ):
                latents = generate_from(self.pipe, snapshot, repeat=len(arms), output_type="latent")
            assert isinstance(latents, Tensor)
            scenes += self.read(decode_latents(self.pipe, latents, self.settings))
        return [scenes[place :: len(arms)] for place in range(len(arms))]

    def _edits(self, case: _Case, attribute: str, arm: Arm) -> tuple[SteeringEdit, ...]:
        """An arm's edits on one picture: in its painted region where the arm asks for it."""
        if arm.where == "everywhere":
            return arm.edits
        region = case.painted(attribute, token_grid(self.pipe, self.settings))
        return tuple(replace(edit, region=region) for edit in arm.edits)

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
        scenes = self._edited_scenes(cases, concept.attribute, arms, self.saes if saes is None else saes)
        return [
            [compare_scenes(case.before, after, concept) for case, after in zip(cases, column, strict=True)]
            for column in scenes
        ]

    # Choosing

    def _candidates(self, direction: Direction) -> list[EditSettings]:
        """Every hook point with every mode and strength in every window."""
        n_steps = self.settings.num_inference_steps
        stop = round(self.config.stop * n_steps)
        return [
            EditSettings(place, mode, strength, (round(start * n_steps), stop), where, together, without_rivals)
            for place in sorted(self.features)
            for where in self.config.where
            for together in self.config.together
            for without_rivals in (self.config.without_rivals if direction == "amplify" else (False,))
            for start in self.config.starts
            for mode, strength in self.config.modes(direction)
        ]

    def _groups(self, chosen: EditSettings, concept: Concept) -> list[Group]:
        """The features that settings turn at once: some of the best alone, or the best together."""
        matched = [f for f in self.features[chosen.hookpoint][concept] if self._is_possible(chosen, f)]
        if chosen.together == 1:
            return [(feature,) for feature in matched[: self.config.n_features]]
        return [tuple(matched[: chosen.together])] if matched else []

    def _rivals(self, place: HookPoint, concept: Concept) -> list[int]:
        """Features of the attribute's other values."""
        return [
            feature
            for other, matched in self.features[place].items()
            if other.attribute == concept.attribute and other != concept
            for feature in matched[: self.config.n_rivals]
        ]

    def _choose(
        self, direction: Direction, concepts: Sequence[Concept]
    ) -> tuple[list[TrialResult], EditSettings, dict[Concept, Group]]:
        """Every candidate with its result, the best one, and each concept's best features at it.

        Candidates are tried on the concepts that targets speak of; the others only at the best candidate.
        """
        known = [concept for concept in concepts if self._cases["select", concept, direction]]
        if not known:
            raise FluxSaeError(
                f"None of the pictures for choosing how to {direction} could be read. Give more pictures (n_select), "
                "or train the miniature further."
            )
        targeted = [concept for concept in known if concept.attribute in TARGET_ATTRIBUTES] or known
        scores = self._try(direction, targeted, self._candidates(direction))
        if not scores:
            raise FluxSaeError(
                f"None of the matched features can be turned to {direction}: modes add and clamp need a reference "
                "activation. Score the SAE on more images, or try other modes."
            )
        trials = [self._trial(chosen, direction, scores[chosen], targeted) for chosen in scores]
        best = max(trials, key=lambda trial: trial.merit).settings
        rest = [concept for concept in known if concept not in targeted]
        by_concept = scores[best] | self._try(direction, rest, [best]).get(best, {})
        return trials, best, {concept: self._best_group(tried, direction) for concept, tried in by_concept.items()}

    def _try(self, direction: Direction, concepts: Sequence[Concept], candidates: Sequence[EditSettings]) -> Scores:
        """The outcomes of each candidate, concept and group of features."""
        scores: Scores = {}
        groups = [
            (place, concept)
            for place in sorted({chosen.hookpoint for chosen in candidates})
            for concept in concepts
            if concept in self.features[place]
        ]
        for place, concept in self._with_progress(f"choosing to {direction}", groups):
            tried = [
                (chosen, group)
                for chosen in candidates
                if chosen.hookpoint == place
                for group in self._groups(chosen, concept)
            ]
            rivals = self._rivals(place, concept)
            arms = [Arm("feature", chosen.edits(group, rivals), chosen.where) for chosen, group in tried]
            distinct = list(dict.fromkeys(arms))  # a concept of few features has fewer ways
            outcomes = dict(zip(distinct, self._outcomes("select", concept, direction, distinct), strict=True))
            for (chosen, group), arm in zip(tried, arms, strict=True):
                scores.setdefault(chosen, {}).setdefault(concept, {})[group] = outcomes[arm]
        return scores

    def _is_possible(self, chosen: EditSettings, feature: int) -> bool:
        return chosen.mode not in NEEDS_REFERENCE or float(self.saes[chosen.hookpoint].reference_acts[feature]) > 0

    def _best_group(self, by_group: Mapping[Group, Sequence[Outcome]], direction: Direction) -> Group:
        def merit(group: Group) -> float:
            outcomes = by_group[group]
            hits = [o.is_success(wanted=direction == "amplify") * o.share_unchanged for o in outcomes]
            return float(np.mean(hits))

        return max(by_group, key=merit)

    def _trial(
        self,
        chosen: EditSettings,
        direction: Direction,
        scores: Mapping[Concept, Mapping[Group, Sequence[Outcome]]],
        concepts: Sequence[Concept],
    ) -> TrialResult:
        wanted = direction == "amplify"
        rows = [
            _means(scores[concept][self._best_group(scores[concept], direction)], wanted=wanted)
            if concept in scores
            else (0.0, 1.0, 1.0)
            for concept in concepts
        ]
        success, specificity, unchanged = np.mean(rows, axis=0).tolist()
        return TrialResult(chosen, direction, success, specificity, unchanged)

    # Reporting

    def _report(
        self,
        concept: Concept,
        direction: Direction,
        group: Group,
        chosen: EditSettings,
        moments: Mapping[HookPoint, TokenMoments],
    ) -> ConceptResult:
        wanted = direction == "amplify"
        strengths = self._curve(chosen)
        rivals = self._rivals(chosen.hookpoint, concept)
        edits = chosen.edits(group, rivals)
        arms = [
            *(Arm(f"strength {s:g}", chosen.edits(group, rivals, strength=s), chosen.where) for s in strengths),
            Arm("feature", edits, chosen.where),
            Arm("random direction", edits, chosen.where, "random direction"),
            Arm("random feature", edits, chosen.where, "random feature"),
        ]
        if chosen.without_rivals:
            arms.append(Arm("rivals alone", chosen.edits((), rivals), chosen.where))
        outcomes = self._outcomes("report", concept, direction, arms)
        tallies = {arm.name: Tally.of(o, wanted=wanted) for arm, o in zip(arms, outcomes, strict=True)}
        tallies |= self._difference_of_means(concept, direction, chosen, moments[chosen.hookpoint])
        tallies |= self._prompt_editing(concept, direction)
        on_curve = [*strengths, chosen.strength]
        curve = {s: Tally.of(o, wanted=wanted) for s, o in zip(on_curve, outcomes, strict=False)}
        centre = _no_change(chosen.mode)
        ordered = dict(sorted(curve.items(), key=lambda point: abs(point[0] - centre)))
        named = {name: tally for name, tally in tallies.items() if not name.startswith("strength")}
        return ConceptResult(concept, direction, group, named, ordered)

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
        if step is None:
            return {}
        d_model = moments.sae.config.d_model
        sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=d_model, n_features=1), seed=None)
        sae.W_dec.data[0] = normalize(step.float(), dim=0)
        sae.reference_acts[0] = step.norm().float()
        sae.input_mean.copy_((moments.total / moments.count).float() * float(moments.sae.input_scale)
                             + moments.sae.input_mean.cpu())  # fmt: skip
        sae.input_scale.copy_(moments.sae.input_scale.cpu())
        sae = sae.to(execution_device(self.pipe))
        strengths: tuple[float, ...] = (0.5, 1.0, 2.0) if direction == "amplify" else (1.0,)
        mode = "add" if direction == "amplify" else "project_out"
        arms = [
            Arm(
                "difference of means",
                (SteeringEdit(chosen.hookpoint, 0, mode, strength, steps=chosen.steps),),
                chosen.where,
            )
            for strength in strengths
        ]
        outcomes = self._outcomes("report", concept, direction, arms, {chosen.hookpoint: sae})
        tallies = [Tally.of(one, wanted=direction == "amplify") for one in outcomes]
        # its best strength; alone, without rivals taken away, and not below nothing
        return {"difference of means": max(tallies, key=lambda t: t.success.value * t.specificity.value)}

    def _prompt_editing(self, concept: Concept, direction: Direction) -> dict[str, Tally]:
        cases = self._cases["report", concept, direction]
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
    """Success, specificity and share of unchanged attributes of some outcomes."""
    rows = [(o.is_success(wanted=wanted), o.is_specific, o.share_unchanged) for o in outcomes]
    success, specificity, unchanged = np.mean(rows, axis=0).tolist()
    return success, specificity, unchanged


def mean_difference(moments: TokenMoments, concept: Concept) -> Float[Tensor, " d"] | None:
    """Mean of the concept's tokens minus mean of the tokens of the attribute's other values, normalised units."""
    own = CONCEPTS.index(concept)
    others = [row for row, other in enumerate(CONCEPTS) if other.attribute == concept.attribute and row != own]
    n_own, n_others = float(moments.concept_count[own]), float(moments.concept_count[others].sum())
    if not n_own or not n_others:
        return None
    return moments.concept_total[own] / n_own - moments.concept_total[others].sum(0) / n_others
