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
from PIL import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.stream import OnProgress, batches
from fluxsae.flux import (
    AnyFlux,
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
from fluxsae.laboratory.config import DIRECTIONS, Direction, LaboratoryConfig
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.laboratory.outcomes import Outcome, Subject, Tally, compare_scenes, draw_subject
from fluxsae.laboratory.probes import TokenMoments
from fluxsae.laboratory.steering_report import (
    TARGET_ATTRIBUTES,
    ConceptResult,
    EditSettings,
    LaboratoryReport,
    TrialResult,
)
from fluxsae.laboratory.truths import CONCEPTS, COVERED, Concept, coverage
from fluxsae.miniature.scenes import Scene, read_scene
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import IDENTITY, MAX_STRENGTH, NEEDS_REFERENCE, SteeringEdit
from fluxsae.steering.sweeps import first_edited_step

_REPORT_SEEDS: Final = 1 << 21
_SELECT_SEEDS: Final = 1 << 20
_DRAWS_PER_SUBJECT: Final = 4
_UNEDITED: Final = Arm("unedited", ())


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
    pipe: AnyFlux,
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
    pipe: AnyFlux
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
            for part in batches(drawn, self.config.batch_size):
                scenes = self._plain_scenes([s.prompt for _, s in part], [s.seed for _, s in part])
                for (key, subject), scene in zip(part, scenes, strict=True):
                    if _is_readable(scene, key[1], has_concept=key[2] == "suppress"):
                        self._cases[key].append(_Case(subject, scene))
            if self.on_progress is not None:
                done = sum(map(len, self._cases.values()))
                self.on_progress("unedited pictures", done, sum(count for count, _ in wanted.values()))

    def _plain_scenes(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Scene]:
        """The scenes of unedited pictures, generated together."""
        pictures = generate(self.pipe, prompts, seeds=seeds, settings=self.settings)
        assert isinstance(pictures, list)
        return self.read(pictures)

    def _outcomes(
        self,
        stage: str,
        concept: Concept,
        direction: Direction,
        arms: Sequence[Arm],
        saes: Mapping[HookPoint, SparseAutoencoder] | None = None,
    ) -> list[list[Outcome]]:
        """For each arm the outcome of each case; the steps before an arm's first edit run once a case."""
        cases, saes = self._cases[stage, concept, direction], self.saes if saes is None else saes
        firsts = [first_edited_step(self.pipe, saes, [arm.edits], self.settings) for arm in arms]
        found: dict[int, list[Outcome]] = {}
        for first in dict.fromkeys(firsts):
            places = [place for place, own in enumerate(firsts) if own == first]
            columns = self._outcomes_from(first, cases, concept, [arms[place] for place in places], saes)
            found |= dict(zip(places, columns, strict=True))
        return [found[place] for place in range(len(arms))]

    def _outcomes_from(
        self,
        first: int,
        cases: Sequence[_Case],
        concept: Concept,
        arms: Sequence[Arm],
        saes: Mapping[HookPoint, SparseAutoencoder],
    ) -> list[list[Outcome]]:
        """For each arm the outcome of each case, where no arm edits before step `first`.

        An edited picture is compared with the unedited one of its own batch: in bfloat16 a batch of another size
        changes pixels.
        """
        tried = [_UNEDITED, *arms]
        rows: list[list[Outcome]] = []
        for part in batches(cases, max(1, self.config.batch_size // len(tried))):
            subjects = [case.subject for case in part]
            prompts, seeds = [s.prompt for s in subjects], [s.seed for s in subjects]
            snapshot = denoise_to(self.pipe, prompts, seeds=seeds, settings=self.settings, step=first)
            with steer(
                self.pipe,
                saes,
                [self._edits(case, concept.attribute, arm) for case in part for arm in tried],
                settings=self.settings,
                allow_mismatch=self.allow_mismatch,
                direction_of=Controls(subjects, tried, saes, self.config.seed),
            ):
                latents = generate_from(self.pipe, snapshot, repeat=len(tried), output_type="latent")
            assert isinstance(latents, Tensor)
            scenes = self.read(decode_latents(self.pipe, latents, self.settings))
            for before, *after in batches(scenes, len(tried)):
                rows.append([compare_scenes(before, scene, concept) for scene in after])
        return [list(column) for column in zip(*rows, strict=True)]

    def _edits(self, case: _Case, attribute: str, arm: Arm) -> tuple[SteeringEdit, ...]:
        """An arm's edits on one picture: in its painted region where the arm asks for it."""
        if arm.where == "everywhere":
            return arm.edits
        region = case.painted(attribute, token_grid(self.pipe, self.settings))
        return tuple(replace(edit, region=region) for edit in arm.edits)

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
            hits = [o.is_success(wanted=direction == "amplify") * o.share_unchanged for o in by_group[group]]
            return float(np.mean(hits))

        return max(by_group, key=merit)

    def _trial(
        self,
        chosen: EditSettings,
        direction: Direction,
        scores: Mapping[Concept, Mapping[Group, Sequence[Outcome]]],
        concepts: Sequence[Concept],
    ) -> TrialResult:
        def means(by_group: Mapping[Group, Sequence[Outcome]]) -> list[float]:
            outcomes = by_group[self._best_group(by_group, direction)]
            hits = [(o.is_success(wanted=direction == "amplify"), o.is_specific, o.share_unchanged) for o in outcomes]
            return [float(value) for value in np.mean(hits, axis=0)]

        unknown = [0.0, 1.0, 1.0]  # without a feature nothing is changed
        rows = [means(scores[concept]) if concept in scores else unknown for concept in concepts]
        return TrialResult(chosen, direction, *np.mean(rows, axis=0).tolist())

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
        curve = {s: tallies.pop(f"strength {s:g}") for s in strengths} | {chosen.strength: tallies["feature"]}
        centre = IDENTITY[chosen.mode] or 0.0
        ordered = dict(sorted(curve.items(), key=lambda point: abs(point[0] - centre)))
        return ConceptResult(concept, direction, group, tallies, ordered)

    def _curve(self, chosen: EditSettings) -> tuple[float, ...]:
        centre = IDENTITY[chosen.mode] or 0.0
        values = [centre + factor * (chosen.strength - centre) for factor in dict.fromkeys(self.config.curve)]
        top = 1.0 if chosen.mode in ("ablate", "project_out") else MAX_STRENGTH
        return tuple(round(value, 6) for value in values if value <= top)

    def _difference_of_means(
        self, concept: Concept, direction: Direction, chosen: EditSettings, moments: TokenMoments
    ) -> dict[str, Tally]:
        """The mean-difference direction at its best strength: alone, without rivals taken away, not below nothing."""
        sae = moments.difference_sae(concept)
        if sae is None:
            return {}
        name, wanted = "difference of means", direction == "amplify"
        mode, strengths = ("add", (0.5, 1.0, 2.0)) if wanted else ("project_out", (1.0,))
        edits = [SteeringEdit(chosen.hookpoint, 0, mode, strength, steps=chosen.steps) for strength in strengths]
        arms = [Arm(name, (edit,), chosen.where) for edit in edits]
        saes = {chosen.hookpoint: sae.to(execution_device(self.pipe))}
        tallies = [Tally.of(one, wanted=wanted) for one in self._outcomes("report", concept, direction, arms, saes)]
        return {name: max(tallies, key=lambda t: t.success.value * t.specificity.value)}

    def _prompt_editing(self, concept: Concept, direction: Direction) -> dict[str, Tally]:
        outcomes = []
        for part in batches(self._cases["report", concept, direction], max(1, self.config.batch_size // 2)):
            subjects = [case.subject for case in part]
            prompts = [s.prompt for s in subjects] + [s.edited_prompt for s in subjects]
            scenes = self._plain_scenes(prompts, [s.seed for s in subjects] * 2)
            pairs = zip(scenes[: len(part)], scenes[len(part) :], strict=True)
            outcomes += [compare_scenes(before, after, concept) for before, after in pairs]
        return {"prompt": Tally.of(outcomes, wanted=direction == "amplify")}

    def _moments(self) -> dict[HookPoint, TokenMoments]:
        """Token means of every concept at every hook point, from the pictures for choosing."""
        cases = [case for (stage, _, _), found in self._cases.items() if stage == "select" for case in found]
        cases = cases[:: max(1, len(cases) // self.config.n_moment_images)]
        moments = {place: TokenMoments(sae) for place, sae in self.saes.items()}
        grid = token_grid(self.pipe, self.settings)
        n_steps = self.settings.num_inference_steps
        steps = sorted({n_steps * part // 10 for part in (3, 5, 7, 9)})
        for part in batches(cases, self.config.batch_size):
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
