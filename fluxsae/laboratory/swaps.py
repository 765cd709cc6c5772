"""Swaps: one of two objects gets another value of an attribute, all else stays.

Names are drawn from all values of the attribute, whether features tell them or not. A picture that cannot be read, or
that does not show the old value, is an attempt that failed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from fluxsae.evaluation.stream import batches
from fluxsae.laboratory.arms import Arm
from fluxsae.laboratory.bench import Bench, Case, Compare, Saes
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.laboratory.outcomes import Outcome, Subject, Tally, compare_swap
from fluxsae.laboratory.truths import CONCEPTS, Concept
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, caption_scene, sample_scene

_SWAP_SEEDS: Final = 3 << 20
ANOTHER_PROMPT: Final = "another prompt"


@dataclass(frozen=True)
class SwapResult:
    """All attempts to put one value in place of others."""

    concept: Concept
    """The new value."""
    arms: dict[str, Tally]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"concept": str(self.concept), "arms": {name: tally.to_dict() for name, tally in self.arms.items()}}


def draw_swap(attribute: str, seed: int) -> tuple[Concept, str, Subject]:
    """A new value, the old one, and a caption of two objects of which one has the old value and none the new one."""
    rng = np.random.default_rng([seed, *attribute.encode()])
    old, new, *rest = rng.permutation(ATTRIBUTES[attribute]).tolist()
    drawn = sample_scene(rng, n_objects=2, held_out=None)
    values = (old, str(rng.choice(rest)))
    things = [replace(thing, **{attribute: value}) for thing, value in zip(drawn.objects, values, strict=True)]
    before = Scene(tuple(things), drawn.background)
    after = Scene((replace(things[0], **{attribute: new}), things[1]), drawn.background)
    prompts = [caption_scene(scene, np.random.default_rng(seed), keep=1.0) for scene in (before, after)]
    return Concept(attribute, new), old, Subject(prompts[0], seed, prompts[1])


def run_swaps(bench: Bench, arms_of: Callable[[Concept], Sequence[tuple[Arm, Saes]]]) -> list[SwapResult]:
    """The swaps of each new value, by the arms that turn it up and by another prompt."""
    cases: dict[Concept, list[Case]] = {}
    n_failed: dict[Concept, int] = {}
    for attribute in bench.config.swap_attributes:
        first = _SWAP_SEEDS + bench.config.seed
        drawn = [draw_swap(attribute, seed) for seed in range(first, first + bench.config.n_swaps)]
        for part in batches(drawn, bench.config.batch_size):
            scenes = bench.plain_scenes([s.prompt for *_, s in part], [s.seed for *_, s in part])
            for (concept, old, subject), scene in zip(part, scenes, strict=True):
                at = place_of(scene, attribute, old)
                cases.setdefault(concept, []).extend([] if scene is None or at is None else [Case(subject, scene, at)])
                n_failed[concept] = n_failed.get(concept, 0) + (at is None)
    results = []
    for concept in bench.with_progress("swaps", [concept for concept in CONCEPTS if concept in cases]):
        found: dict[str, Sequence[Outcome]] = {}
        for arm, own in arms_of(concept):
            (found[arm.name],) = bench.outcomes(
                cases[concept], [arm], attribute=concept.attribute, saes=own, compare=_compare(concept)
            )
        found[ANOTHER_PROMPT] = _by_prompt(bench, cases[concept], concept)
        tallies = {n: Tally.of(some, wanted=True, n_failed=n_failed[concept]) for n, some in found.items()}
        results.append(SwapResult(concept, tallies))
    return results


def place_of(scene: Scene | None, attribute: str, old: str) -> int | None:
    """The only one of two surely read objects that has the old value; None as in `compare_scenes`."""
    if scene is None or len(scene.objects) != 2 or scene.confidence < LEAST_CONFIDENCE:
        return None
    places = [place for place, thing in enumerate(scene.objects) if getattr(thing, attribute) == old]
    return places[0] if len(places) == 1 else None


def _compare(concept: Concept) -> Compare:
    def compare(case: Case, before: Scene | None, after: Scene | None) -> Outcome:
        assert case.at is not None
        return compare_swap(before, after, concept, at=case.at)

    return compare


def _by_prompt(bench: Bench, cases: Sequence[Case], concept: Concept) -> list[Outcome]:
    compare = _compare(concept)
    scenes = [
        scene
        for part in batches(cases, bench.config.batch_size)
        for scene in bench.plain_scenes([c.subject.edited_prompt for c in part], [c.subject.seed for c in part])
    ]
    return [compare(case, case.before, scene) for case, scene in zip(cases, scenes, strict=True)]
