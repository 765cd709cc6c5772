"""What an edit did to a scene, as read back from the pictures: the attribute that was meant, and all the others."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from jaxtyping import Float
from scipy import optimize

from fluxsae.evaluation.intervals import Estimate, bootstrap_weights, interval, weighted_mean
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.laboratory.truths import Concept
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, SceneObject, caption_scene, sample_scene

OBJECT_ATTRIBUTES = tuple(name for name in ATTRIBUTES if name != "background")
OWN_NAMED = 0.75
"""How often the prompt of a picture without the concept names what it shows in the concept's place."""


@dataclass(frozen=True)
class Outcome:
    """One edited picture against its unedited one."""

    has_concept: bool
    """Whether the edited picture shows the concept (and anything at all)."""
    shows_something: bool
    n_others: int
    """Attributes that the edit was not about."""
    n_unchanged: int
    """Those of them that read as before."""
    is_moved: bool
    """Whether the attribute that the edit was about reads other than before."""

    @property
    def share_unchanged(self) -> float:
        """Share of the other attributes that read as before."""
        return self.n_unchanged / self.n_others

    @property
    def keeps_others(self) -> bool:
        """Whether all the other attributes read as before, be it that nothing was changed at all."""
        return self.n_unchanged == self.n_others

    @property
    def is_specific(self) -> bool:
        """Whether the attribute that was meant changed and no other: an edit that does nothing is not specific."""
        return self.is_moved and self.keeps_others

    @property
    def is_idle(self) -> bool:
        """Whether the edited picture reads as the unedited one."""
        return self.keeps_others and not self.is_moved

    def is_success(self, *, wanted: bool) -> bool:
        """Whether the concept came (wanted) or went (not wanted) while there was still something to see."""
        return self.shows_something and self.has_concept == wanted


FAILED: Final = Outcome(has_concept=False, shows_something=False, n_others=1, n_unchanged=0, is_moved=False)
"""An attempt that was not made, or whose picture cannot be read: no success, not specific."""


def compare_scenes(before: Scene | None, after: Scene | None, concept: Concept) -> Outcome:
    """Reads an edit's effect: objects are paired by place; one that vanished or came anew has changed altogether.

    None stands for a picture of NaN or infinite numbers: the attempt failed.
    """
    if before is None or after is None or (after.objects and after.confidence < LEAST_CONFIDENCE):
        return FAILED
    pairs = _pair(before.objects, after.objects)
    if concept.attribute == "background":
        own = [(before.background, after.background)]
    else:
        own = [(getattr(old, concept.attribute), getattr(new, concept.attribute)) for old, new in pairs]
    n_others, n_unchanged = _others(before, after, pairs, attribute=concept.attribute, at=range(len(pairs)))
    return Outcome(
        has_concept=(concept.attribute, concept.value) in after.concepts(),
        shows_something=bool(after.objects),
        n_others=n_others,
        n_unchanged=n_unchanged,
        is_moved=any(old != new for old, new in own) or len(before.objects) != len(after.objects),
    )


def compare_swap(before: Scene | None, after: Scene | None, concept: Concept, *, at: int) -> Outcome:
    """Reads what an edit did that was to give object `at` the concept and to leave all else, other objects included.

    None is as in `compare_scenes`.
    """
    if before is None or after is None:
        return FAILED
    if after.confidence < LEAST_CONFIDENCE or len(after.objects) != len(before.objects):
        return FAILED
    pairs = _pair(before.objects, after.objects)
    place = next(place for place, (old, _) in enumerate(pairs) if old is before.objects[at])
    old, new = (getattr(thing, concept.attribute) for thing in pairs[place])
    n_others, n_unchanged = _others(before, after, pairs, attribute=concept.attribute, at=[place])
    return Outcome(new == concept.value, True, n_others, n_unchanged, is_moved=old != new)


Pairs = list[tuple[SceneObject, SceneObject]]


def _others(before: Scene, after: Scene, pairs: Pairs, *, attribute: str, at: Collection[int]) -> tuple[int, int]:
    """How many attributes an edit of `attribute` of the pairs `at` was not about, and how many read as before.

    An object without a partner has changed altogether.
    """
    kept = [(old, new, name) for place, (old, new) in enumerate(pairs) for name in OBJECT_ATTRIBUTES
            if name != attribute or place not in at]  # fmt: skip
    unchanged = sum(getattr(old, name) == getattr(new, name) for old, new, name in kept)
    alone = max(len(before.objects), len(after.objects)) - len(pairs)
    total = len(kept) + alone * len([name for name in OBJECT_ATTRIBUTES if name != attribute])
    if attribute != "background":
        total, unchanged = total + 1, unchanged + (before.background == after.background)
    return total, unchanged


def _pair(before: Sequence[SceneObject], after: Sequence[SceneObject]) -> Pairs:
    far = np.array([[np.hypot(old.x - new.x, old.y - new.y) for new in after] for old in before])
    if not far.size:
        return []
    rows, columns = optimize.linear_sum_assignment(far)
    return [(before[row], after[column]) for row, column in zip(rows, columns, strict=True)]


@dataclass(frozen=True)
class Subject:
    """A prompt with or without a concept, and the same prompt edited to turn that round."""

    prompt: str
    seed: int
    edited_prompt: str
    """With the concept's attribute named: at the concept's value, or at another one where it was there before."""


def draw_subject(concept: Concept, *, has_concept: bool, seed: int, named: float = 1.0) -> Subject:
    """A caption of a random scene of one object that has, or has not, the concept; one that has it names it.

    Args:
        concept: What an edit is to bring or to take away.
        has_concept: Whether the scene has it.
        seed: Of the scene and of the picture's noise.
        named: Share of the other attributes that the prompt names. One that it leaves open may be drawn either way.
    """
    rng = np.random.default_rng([seed, int(has_concept), *concept.attribute.encode(), *concept.value.encode()])
    scene = sample_scene(rng, n_objects=1, held_out=None)
    while _value(scene, concept.attribute) == concept.value:
        scene = sample_scene(rng, n_objects=1, held_out=None)
    other, scene = scene, (_with(scene, concept) if has_concept else scene)
    edited = other if has_concept else _with(scene, concept)
    share = dict.fromkeys(ATTRIBUTES, named) | {concept.attribute: 1.0 if has_concept else OWN_NAMED}
    words = tuple(name for name in ATTRIBUTES if rng.random() < share[name])
    # a caption with keep=0 names exactly what it always names
    prompt = caption_scene(scene, rng, keep=0.0, always=words)
    return Subject(prompt, seed, caption_scene(edited, rng, keep=0.0, always=(*words, concept.attribute)))


def _value(scene: Scene, attribute: str) -> str:
    return scene.background if attribute == "background" else str(getattr(scene.objects[0], attribute))


def _with(scene: Scene, concept: Concept) -> Scene:
    if concept.attribute == "background":
        return replace(scene, background=concept.value)
    changed: dict[str, Any] = {concept.attribute: concept.value}
    return replace(scene, objects=(replace(scene.objects[0], **changed),))


RATES: Final = ("success", "specificity", "both", "idle", "unchanged")


@dataclass(frozen=True)
class Tally:
    """Outcomes of one kind of edit over all attempts at one concept; rates with 95 % intervals over pictures."""

    outcomes: tuple[Outcome, ...]
    wanted: bool
    """Whether the concept was to come, or to go."""

    @classmethod
    def of(cls, outcomes: Iterable[Outcome], *, wanted: bool, n_failed: int = 0) -> "Tally":
        """The tally of some outcomes and of `n_failed` attempts that were not made."""
        return cls((*outcomes, *[FAILED] * n_failed), wanted)

    @property
    def n(self) -> int:
        """Attempts."""
        return len(self.outcomes)

    def values(self, rate: str) -> Float[np.ndarray, " attempts"]:
        """One number an attempt, whose mean is the rate."""
        of: dict[str, Callable[[Outcome], float]] = {
            "success": lambda outcome: outcome.is_success(wanted=self.wanted),
            "specificity": lambda outcome: outcome.is_specific,
            "both": lambda outcome: outcome.is_success(wanted=self.wanted) and outcome.keeps_others,
            "idle": lambda outcome: outcome.is_idle,
            "unchanged": lambda outcome: outcome.share_unchanged,
        }
        return np.array([of[rate](outcome) for outcome in self.outcomes], dtype=np.float64)

    def rate(self, rate: str) -> Estimate:
        """A rate over all attempts.

        success: the concept came or went. specificity: the attribute changed and no other did. both: success, and no
        other attribute changed. idle: nothing changed. unchanged: mean share of the other attributes that read as
        before. NaN without any attempt.
        """
        if not self.outcomes:
            return Estimate(float("nan"), float("nan"), float("nan"))
        return interval(weighted_mean(self.values(rate), bootstrap_weights(self.n, draws=500, seed=0)))

    @property
    def keeps_others(self) -> float:
        """Share of the attempts in which no other attribute changed, be it that nothing did."""
        return float(np.mean([outcome.keeps_others for outcome in self.outcomes]))

    def to_dict(self) -> dict[str, object]:
        """The rates as JSON values."""
        return {"n": self.n, **{rate: self.rate(rate).to_dict() for rate in RATES}}
