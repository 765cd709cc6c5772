"""What an edit did to a scene, as read back from the pictures: the attribute that was meant, and all the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize

from fluxsae.evaluation.intervals import Estimate, bootstrap_weights, interval, weighted_mean
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

    @property
    def share_unchanged(self) -> float:
        """Share of the other attributes that read as before."""
        return self.n_unchanged / self.n_others

    @property
    def is_specific(self) -> bool:
        """Whether all the other attributes read as before."""
        return self.n_unchanged == self.n_others

    def is_success(self, *, wanted: bool) -> bool:
        """Whether the concept came (wanted) or went (not wanted) while there was still something to see."""
        return self.shows_something and self.has_concept == wanted


def compare_scenes(before: Scene, after: Scene, concept: Concept) -> Outcome:
    """Reads an edit's effect: objects are paired by place; one that vanished or came anew has changed altogether."""
    kept = [name for name in OBJECT_ATTRIBUTES if name != concept.attribute]
    pairs = _pair(before.objects, after.objects)
    unchanged = sum(getattr(old, name) == getattr(new, name) for old, new in pairs for name in kept)
    total = len(kept) * max(len(before.objects), len(after.objects))
    if concept.attribute != "background":
        total, unchanged = total + 1, unchanged + (before.background == after.background)
    shown = (concept.attribute, concept.value) in after.concepts()
    return Outcome(shown, bool(after.objects), total, unchanged)


def _pair(before: Sequence[SceneObject], after: Sequence[SceneObject]) -> list[tuple[SceneObject, SceneObject]]:
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


@dataclass(frozen=True)
class Tally:
    """Outcomes of one kind of edit over several pictures, with 95 % bootstrap intervals over pictures."""

    n: int
    success: Estimate
    specificity: Estimate
    """Share of pictures in which all the other attributes read as before."""
    unchanged: Estimate
    """Mean share of the other attributes that read as before."""

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], *, wanted: bool) -> "Tally":
        """The tally of some outcomes; `wanted` says whether the concept was to come or to go."""
        weights = bootstrap_weights(len(outcomes), draws=500, seed=0)
        columns = (
            [float(outcome.is_success(wanted=wanted)) for outcome in outcomes],
            [float(outcome.is_specific) for outcome in outcomes],
            [outcome.share_unchanged for outcome in outcomes],
        )
        return cls(len(outcomes), *(interval(weighted_mean(np.array(column), weights)) for column in columns))

    def to_dict(self) -> dict[str, object]:
        """The tally as JSON values."""
        return {
            "n": self.n,
            "success": self.success.to_dict(),
            "specificity": self.specificity.to_dict(),
            "unchanged": self.unchanged.to_dict(),
        }
