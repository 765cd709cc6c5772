"""The steering laboratory: does turning a feature change what it stands for, and nothing else?

On the miniature every picture can be read back. Features of each concept are turned up on pictures without the concept
and down on pictures with it. Beside them: edits of equal norm in random directions and along other features, linear
edits that know the labels, and another prompt. Success: the attribute changed as meant. Specificity: it changed, and no
other attribute did. All methods choose their settings for a concept on some pictures and are reported on others.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.stream import OnProgress, batches, iter_read_activations
from fluxsae.flux import AnyFlux, execution_device, schedule_sigmas, token_grid
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.arms import Arm
from fluxsae.laboratory.bench import Bench, Case, Key, Saes, reading
from fluxsae.laboratory.config import Direction, LaboratoryConfig, Method
from fluxsae.laboratory.moments import ConceptMoments
from fluxsae.laboratory.outcomes import Outcome, Tally, compare_scenes
from fluxsae.laboratory.steering_report import ConceptResult, EditSettings, LaboratoryReport, TrialResult
from fluxsae.laboratory.swaps import run_swaps
from fluxsae.laboratory.truths import CONCEPTS, Concept, coverage
from fluxsae.miniature.scenes import Scene, caption_scene, render_scene, sample_scene
from fluxsae.sae.config import Mismatch
from fluxsae.steering.edits import IDENTITY, MAX_STRENGTH, NEEDS_REFERENCE, SteeringEdit

_REPORT_SEEDS: Final = 1 << 21
_SELECT_SEEDS: Final = 1 << 20
_MOMENT_SEEDS: Final = 1 << 22

CandidateFeatures = Mapping[HookPoint, Mapping[Concept, Sequence[int]]]


def candidate_features(concepts: Mapping[str, Any], *, limit: int) -> dict[Concept, list[int]]:
    """The best matched features of each concept, best first, from a concept report's JSON values.

    A concept that no feature matches has the feature that tells it best.
    """
    found: dict[Concept, list[int]] = {}
    by_name = {str(concept): concept for concept in CONCEPTS}
    for feature, name in concepts["matches"].items():
        found.setdefault(by_name[name], []).append(int(feature))
    for score in concepts["concepts"]:
        concept = Concept(score["attribute"], score["value"])
        found.setdefault(concept, [int(score["methods"]["SAE feature"]["candidate"])])
    return {concept: features[:limit] for concept, features in sorted(found.items())}


@torch.no_grad()
def run_laboratory(
    pipe: AnyFlux,
    saes: Saes,
    features: CandidateFeatures,
    *,
    settings: GenerationSettings,
    config: LaboratoryConfig | None = None,
    allow_mismatch: Collection[Mismatch] = (),
    on_progress: OnProgress | None = None,
) -> LaboratoryReport:
    """Chooses hook point, mode, strength, window and features on some pictures and reports them on others.

    A picture of NaN or infinite numbers is logged and is an attempt that failed.

    Raises:
        FluxSaeError: no feature matches any concept, no picture could be read, or too many hold NaN.
    """
    config = config or LaboratoryConfig()
    concepts = sorted({c for matched in features.values() for c in matched if c.attribute in config.attributes})
    if not concepts:
        raise FluxSaeError(
            f"No feature matches a concept of {', '.join(config.attributes)}, so there is nothing to steer. "
            "Train a better SAE first, or name other attributes."
        )
    with reading(config.readers) as read:
        bench = Bench(pipe, settings, config, allow_mismatch, read, on_progress)
        return _Laboratory(bench, saes, features, concepts).run()


Group = tuple[int, ...]
"""Features that are turned together."""
Scores = dict[EditSettings, dict[Concept, dict[Group, list[Outcome]]]]
"""Settings -> concept -> features -> what the edit did to each picture."""


@dataclass(frozen=True)
class Choice:
    """What is reported of a concept: the settings chosen for it, and the features."""

    settings: EditSettings
    features: Group
    both: float = 0.0
    """Success with nothing else changed, on the concept's pictures for choosing."""


@dataclass(eq=False)
class _Laboratory:
    bench: Bench
    saes: Saes
    features: CandidateFeatures
    concepts: Sequence[Concept]
    moments: dict[HookPoint, ConceptMoments] = field(default_factory=dict)
    chosen: dict[tuple[Method, Direction], dict[Concept, Choice]] = field(default_factory=dict)

    @property
    def config(self) -> LaboratoryConfig:
        return self.bench.config

    def run(self) -> LaboratoryReport:
        stages = (("select", _SELECT_SEEDS, self.config.n_select), ("report", _REPORT_SEEDS, self.config.n_report))
        self.bench.draw_cases(
            {
                (stage, concept, direction): (count, first + self.config.seed)
                for concept in self.concepts
                for direction in self.config.directions
                for stage, first, count in stages
            }
        )
        self.moments = self._moments()
        trials: list[TrialResult] = []
        for direction in self.config.directions:
            for method in self.config.methods:
                tried, self.chosen[method, direction] = self._choose(method, direction)
                trials += tried
        wanted = [(concept, direction) for direction in self.config.directions for concept in self.concepts]
        results = [self._report(*each) for each in self.bench.with_progress("report", wanted)]
        return LaboratoryReport(tuple(trials), tuple(results), tuple(run_swaps(self.bench, self._swap_arms)))

    def _choices(self, concept: Concept, direction: Direction) -> dict[Method, Choice]:
        """What is reported of a concept, by method."""
        found = {method: self.chosen[method, direction].get(concept) for method in self.config.methods}
        return {method: choice for method, choice in found.items() if choice is not None}

    def _moments(self) -> dict[HookPoint, ConceptMoments]:
        """What the tokens of every concept look like, from drawn scenes of one object that are read as pictures."""
        settings, n_steps = self.bench.settings, self.bench.settings.num_inference_steps
        steps = tuple(sorted({n_steps * part // 10 for part in (3, 5, 7, 9)}))
        sigmas = schedule_sigmas(self.bench.pipe, settings)
        levels = tuple(float(sigmas[step]) for step in steps)
        moments = {place: ConceptMoments(sae, steps, levels) for place, sae in self.saes.items()}
        grid, rng = token_grid(self.bench.pipe, settings), np.random.default_rng([self.config.seed, _MOMENT_SEEDS])
        scenes = [sample_scene(rng, n_objects=1, held_out=None) for _ in range(self.config.n_moment_images)]
        read = iter_read_activations(
            self.bench.pipe,
            [Image.fromarray(render_scene(scene)).resize((settings.width, settings.height)) for scene in scenes],
            dict.fromkeys(self.saes, steps),
            prompts=[caption_scene(scene, rng, keep=1.0) for scene in scenes],
            seeds=[self.config.seed + _MOMENT_SEEDS + row for row in range(len(scenes))],
            settings=settings,
            left_out=LeftOut(len(scenes)),
            batch_size=self.config.batch_size,
            on_progress=self.bench.on_progress,
            doing="drawn scenes",
        )
        for batch in read:
            for place, sums in moments.items():
                for row, x in zip(batch.rows, batch.tokens[place], strict=True):
                    sums.update(x, coverage(scenes[row], grid))
        return moments

    # Edits

    def _candidates(self, method: Method, direction: Direction) -> list[EditSettings]:
        """Every hook point with every way of a method in every window."""
        n_steps = self.bench.settings.num_inference_steps
        stop = round(self.config.stop * n_steps)
        ways = self.config.ways(method, direction)
        return [
            EditSettings(place, mode, strength, (round(start * n_steps), stop), where, together, without, method)
            for place in sorted(self.features)
            for where in self.config.where
            for start in self.config.starts
            for mode, strength, together, without in ways
        ]

    def _groups(self, chosen: EditSettings, concept: Concept) -> list[Group]:
        """The features that settings turn at once: some of the best alone, or the best together."""
        if chosen.where == "all of it" and concept.attribute != "background":
            return []  # as painted
        if chosen.mode == "swap":
            other = self._easiest(chosen, concept)
            return [] if other is None else [self.chosen["features", "amplify"][other].features]
        if chosen.method != "features" or chosen.mode == "profile":
            known = self.moments[chosen.hookpoint].is_known(concept)
            telling = self.moments[chosen.hookpoint].telling_features(concept, limit=chosen.together) if known else ()
            return [telling if chosen.mode == "profile" else ()] if known else []
        found = self.features[chosen.hookpoint].get(concept, ())
        matched = [f for f in found if self._is_possible(chosen, f)]
        if chosen.together == 1:
            return [(feature,) for feature in matched[: self.config.n_features]]
        return [tuple(matched[: chosen.together])] if matched else []

    def _is_possible(self, chosen: EditSettings, feature: int) -> bool:
        return chosen.mode not in NEEDS_REFERENCE or float(self.saes[chosen.hookpoint].reference_acts[feature]) > 0

    def _rivals(self, place: HookPoint, concept: Concept) -> list[int]:
        """Features of the attribute's other values."""
        return [
            feature
            for other, matched in self.features[place].items()
            if other.attribute == concept.attribute and other != concept
            for feature in matched[: self.config.n_rivals]
        ]

    def _arm(self, name: str, choice: Choice, concept: Concept, direction: Direction, **changes: Any) -> Arm:
        """The edits of a choice, at its own or another strength."""
        chosen = choice.settings
        strength = changes.pop("strength", chosen.strength)
        if chosen.mode == "swap":
            other = self._easiest(chosen, concept)
            assert other is not None
            return self._arm(name, self.chosen["features", "amplify"][other], other, "amplify", **changes)
        if chosen.mode == "profile":
            edits = self._profile(choice, concept, direction, strength=strength)
        elif chosen.method == "features":
            edits = chosen.edits(choice.features, self._rivals(chosen.hookpoint, concept), strength=strength)
        else:
            n_features = self._saes_of(chosen, concept, direction)[chosen.hookpoint].config.n_features
            edits = chosen.edits(range(n_features), (), strength=strength)
        return Arm(name, edits, chosen.where, **changes)

    def _easiest(self, chosen: EditSettings, concept: Concept) -> Concept | None:
        """The attribute's other value that came best on the pictures for choosing, or the second best, ..."""
        others = [
            (choice.both, other)
            for other, choice in self.chosen["features", "amplify"].items()
            if other.attribute == concept.attribute and other != concept
            and choice.settings.hookpoint == chosen.hookpoint
        ]  # fmt: skip
        ranked = sorted(others, key=lambda one: -one[0])
        place = round(chosen.strength) - 1
        return ranked[place][1] if place < len(ranked) else None

    def _profile(
        self, choice: Choice, concept: Concept, direction: Direction, *, strength: float
    ) -> tuple[SteeringEdit, ...]:
        """Each feature set to its mean act on the concept's tokens (or, to suppress, on the other values' tokens).

        Strength 1 is that mean, 0 the mean on the tokens that the picture has, 2 as far again beyond; at each step the
        means of the nearest step that was looked at.
        """
        moments = self.moments[choice.settings.hookpoint]
        own, others = moments.levels(concept)
        start, end = (others, own) if direction == "amplify" else (own, others)
        reference = self.saes[choice.settings.hookpoint].reference_acts.cpu().double()
        levels = ((start + strength * (end - start)) / reference).clamp(-MAX_STRENGTH, MAX_STRENGTH)
        return tuple(
            SteeringEdit(choice.settings.hookpoint, feature, "clamp", float(level[feature]), steps=window)
            for level, window in zip(levels, moments.windows(*choice.settings.steps), strict=True)
            for feature in choice.features
            if window[0] < window[1]
        )

    def _saes_of(self, chosen: EditSettings, concept: Concept, direction: Direction) -> Saes:
        """The dictionaries that a method's edits speak of: the SAEs, or one made for the concept."""
        moments = self.moments[chosen.hookpoint]
        if chosen.method == "features":
            return self.saes
        if chosen.method == "difference of means":
            sae = moments.difference_sae(concept)
        elif chosen.method == "means, rivals away":
            sae = moments.replacement_sae(concept, wanted=direction == "amplify")
        else:
            sae = moments.leace_sae(concept, wanted=direction == "amplify")
        return {chosen.hookpoint: sae.to(execution_device(self.bench.pipe))}

    # Choosing

    def _choose(self, method: Method, direction: Direction) -> tuple[list[TrialResult], dict[Concept, Choice]]:
        """Every candidate with its result, and the best one for each concept, with the best features at it.

        A concept's own few pictures count as much as the mean over all concepts.
        """
        known = [concept for concept in self.concepts if self.bench.cases["select", concept, direction]]
        if not known:
            raise FluxSaeError(
                f"None of the pictures for choosing how to {direction} could be read. Give more pictures (n_select), "
                "or train the miniature further."
            )
        candidates = self._candidates(method, direction)
        if len(candidates) == 1:  # nothing to choose
            sure = {concept: self._groups(candidates[0], concept) for concept in known}
            return [], {c: Choice(candidates[0], groups[0]) for c, groups in sure.items() if len(groups) == 1}
        scores = self._try(method, direction, known)
        if not scores:
            raise FluxSaeError(
                f"None of the matched features can be turned to {direction}: modes add and clamp need a reference "
                "activation. Score the SAE on more images, or try other modes."
            )
        best = {
            (chosen, concept): self._best_group(by_group, direction)
            for chosen, by_concept in scores.items()
            for concept, by_group in by_concept.items()
        }
        trials = [self._trial(chosen, direction, scores[chosen], best, known) for chosen in scores]
        overall = {trial.settings: trial.both for trial in trials}

        def merit(chosen: EditSettings, concept: Concept) -> float:
            return overall[chosen] + _both(scores[chosen][concept][best[chosen, concept]], direction)

        choices = {}
        for concept in known:
            possible = [chosen for chosen in scores if concept in scores[chosen]]
            if possible:
                chosen = max(possible, key=lambda one: merit(one, concept))
                group = best[chosen, concept]
                choices[concept] = Choice(chosen, group, _both(scores[chosen][concept][group], direction))
        return trials, choices

    def _try(self, method: Method, direction: Direction, concepts: Sequence[Concept]) -> Scores:
        """The outcomes of each candidate, concept and group of features."""
        scores: Scores = {}
        candidates = self._candidates(method, direction)
        for concept in self.bench.with_progress(f"choosing to {direction} by {method}", concepts):
            tried = [Choice(chosen, group) for chosen in candidates for group in self._groups(chosen, concept)]
            for place in sorted({choice.settings.hookpoint for choice in tried}):
                here = [choice for choice in tried if choice.settings.hookpoint == place]
                arms = [self._arm(method, choice, concept, direction) for choice in here]
                distinct = list(dict.fromkeys(arms))  # a concept of few features has fewer ways
                saes = self._saes_of(here[0].settings, concept, direction)
                outcomes = dict(
                    zip(distinct, self._outcomes(("select", concept, direction), distinct, saes), strict=True)
                )
                for choice, arm in zip(here, arms, strict=True):
                    scores.setdefault(choice.settings, {}).setdefault(concept, {})[choice.features] = outcomes[arm]
        return scores

    def _outcomes(self, key: Key, arms: Sequence[Arm], saes: Saes) -> list[list[Outcome]]:
        _, concept, _ = key

        def compare(_: Case, before: Scene | None, after: Scene | None) -> Outcome:
            return compare_scenes(before, after, concept)

        return self.bench.outcomes(self.bench.cases[key], arms, attribute=concept.attribute, saes=saes, compare=compare)

    @staticmethod
    def _best_group(by_group: Mapping[Group, Sequence[Outcome]], direction: Direction) -> Group:
        return max(by_group, key=lambda group: _both(by_group[group], direction))

    @staticmethod
    def _trial(
        chosen: EditSettings,
        direction: Direction,
        scores: Mapping[Concept, Mapping[Group, Sequence[Outcome]]],
        best: Mapping[tuple[EditSettings, Concept], Group],
        concepts: Sequence[Concept],
    ) -> TrialResult:
        wanted = direction == "amplify"
        tallies = [
            Tally.of(scores[concept][best[chosen, concept]] if concept in scores else (), wanted=wanted,
                     n_failed=concept not in scores)
            for concept in concepts
        ]  # fmt: skip
        means = [
            float(np.mean([tally.values(rate).mean() for tally in tallies]))
            for rate in ("success", "specificity", "both")
        ]
        return TrialResult(chosen, direction, *means)

    # Reporting

    def _report(self, concept: Concept, direction: Direction) -> ConceptResult:
        choices = self._choices(concept, direction)
        key: Key = ("report", concept, direction)
        wanted, n_failed = direction == "amplify", self.bench.unread[key]
        found: dict[str, Sequence[Outcome]] = {}
        for method, choice in choices.items():
            arms = [self._arm(method, choice, concept, direction)]
            if method == "features":
                arms += self._controls(choice, concept, direction)
            saes = self._saes_of(choice.settings, concept, direction)
            found |= dict(zip([arm.name for arm in arms], self._outcomes(key, arms, saes), strict=True))
        found["another prompt"] = self._prompt_editing(key)
        n_cases = len(self.bench.cases[key])
        missing: dict[str, Sequence[Outcome]] = {method: [] for method in self.config.methods if method not in choices}
        tallies = {
            name: Tally.of(outcomes, wanted=wanted, n_failed=n_failed + n_cases - len(outcomes))
            for name, outcomes in (missing | found).items()
        }
        main = choices.get("features")
        strengths = [] if main is None else self._curve(main.settings)
        curve = {strength: tallies.pop(f"strength {strength:g}") for strength in strengths}
        if main is not None:
            curve[main.settings.strength] = tallies["features"]
            centre = self._identity(main.settings)
            curve = dict(sorted(curve.items(), key=lambda point: abs(point[0] - centre)))
        return ConceptResult(
            concept,
            direction,
            {method: choice.settings for method, choice in choices.items()},
            main.features if main is not None else (),
            tallies,
            curve,
        )

    def _controls(self, choice: Choice, concept: Concept, direction: Direction) -> list[Arm]:
        """Other strengths, other directions of equal norm, and only what is taken away."""
        arms = [
            self._arm(f"strength {strength:g}", choice, concept, direction, strength=strength)
            for strength in self._curve(choice.settings)
        ]
        for kind in self.config.controls:
            arms.append(self._arm(kind, choice, concept, direction, control=kind))
        if choice.settings.without_rivals and self.config.rivals_alone:
            rivals = self._rivals(choice.settings.hookpoint, concept)
            arms.append(Arm("rivals alone", choice.settings.edits((), rivals), choice.settings.where))
        return arms

    @staticmethod
    def _identity(chosen: EditSettings) -> float:
        return IDENTITY.get(chosen.mode) or 0.0

    def _curve(self, chosen: EditSettings) -> tuple[float, ...]:
        if chosen.mode == "swap":
            return ()
        centre = self._identity(chosen)
        values = [centre + factor * (chosen.strength - centre) for factor in dict.fromkeys(self.config.curve)]
        top = 1.0 if chosen.mode in ("ablate", "project_out") else MAX_STRENGTH
        return tuple(round(value, 6) for value in values if value <= top)

    def _prompt_editing(self, key: Key) -> list[Outcome]:
        _, concept, _ = key
        outcomes: list[Outcome] = []
        for part in batches(self.bench.cases[key], max(1, self.config.batch_size // 2)):
            before = [] if self.bench.is_exact else [case.subject.prompt for case in part]
            prompts = [*before, *(case.subject.edited_prompt for case in part)]
            seeds = [case.subject.seed for case in part]
            scenes = self.bench.plain_scenes(prompts, seeds * (len(prompts) // len(part)))
            unedited = scenes[: len(before)] or [case.before for case in part]
            pairs = zip(unedited, scenes[len(before) :], strict=True)
            outcomes += [compare_scenes(was, now, concept) for was, now in pairs]
        return outcomes

    def _swap_arms(self, concept: Concept) -> list[tuple[Arm, Saes]]:
        """What turns the concept up, at the settings chosen for it, with a random direction beside."""
        arms = []
        for method, choice in self._choices(concept, "amplify").items():
            saes = self._saes_of(choice.settings, concept, "amplify")
            arms.append((self._arm(method, choice, concept, "amplify"), saes))
            if method == "features":
                control = self._arm("random direction", choice, concept, "amplify", control="random direction")
                arms.append((control, saes))
        return arms


def _both(outcomes: Sequence[Outcome], direction: Direction) -> float:
    return float(Tally.of(outcomes, wanted=direction == "amplify").values("both").mean())
