"""What the Steer tab says of edits and pictures: in words, as notices, and where to look."""

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, Final

import numpy as np
from PIL import Image

from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.tabs.steer.job import Steered

LEAST_SEEN: Final = 0.01
"""Share of a picture that changes at a glance: below it a demo is no starter, and a result is said to change little."""
LESS: Final = ("scale", "ablate", "project_out")
"""Modes that only change what fires."""
EDIT_WORDS: Final = {
    "unchanged": "unchanged",
    "part": "{} % removed",
    "multiple": "{} × its activation removed",
    "added": "{} × its usual strength added",
}
"""What an edit does, in words; the sliders use the same."""
SHORT_WORDS: Final = EDIT_WORDS | {"multiple": "{} × removed", "added": "{} × added"}
NOTCHES: Final = 4
"""Of a slider, on each side of its middle."""
AT_A_GLANCE: Final = 48
"""Difference of a colour channel, of 255, from which a pixel is seen to change."""


def where_it_changed(before: Image.Image, after: Image.Image) -> float:
    """Where the handle between two pictures splits what differs: 0 at the left edge, 1 at the right."""
    difference = np.abs(np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)).sum(axis=(0, 2))
    if difference.sum() == 0:
        return 0.5
    return float((difference * (np.arange(len(difference)) + 0.5)).sum() / difference.sum() / len(difference))


def share_seen(first: Image.Image, second: Image.Image) -> float:
    """Share of the pixels that anyone sees differ between two pictures of one size."""
    difference = np.abs(np.asarray(first, dtype=np.int16) - np.asarray(second, dtype=np.int16)).max(axis=2)
    return float((difference >= AT_A_GLANCE).mean())


def edit_words(slider: Mapping[str, Any], edit: SteeringEdit) -> str:
    """An edit in plain words with its unit."""
    return f"{slider.get('label') or f'feature {edit.feature}'}: {_worded(edit, EDIT_WORDS)}"


def short_words(edit: SteeringEdit) -> str:
    """An edit in the words that fit under a small picture."""
    return _worded(edit, SHORT_WORDS)


def _worded(edit: SteeringEdit, words: Mapping[str, str]) -> str:
    if edit.is_identity:
        return words["unchanged"]
    match edit.mode:
        case "scale" if edit.strength >= 0:
            return words["part"].format(round(100 * (1 - edit.strength)))
        case "scale":
            return words["multiple"].format(f"{1 - edit.strength:.2g}")
        case "add":
            return words["added"].format(f"{edit.strength:.2g}")
    return f"{edit.mode} {edit.strength:.2g}"


def result_words(turned: Sequence[tuple[Mapping[str, Any], SteeringEdit]]) -> list[str]:
    """Edits in plain words, with where they acted if that was marked; features of one label with their numbers."""
    if turned and all(edit.is_identity for _, edit in turned):
        return ["Nothing is changed yet: move a slider."]
    labels = Counter(slider.get("label") for slider, _ in turned)
    found = []
    for slider, edit in turned:
        label = slider.get("label")
        named = {**slider, "label": f"{label} #{edit.feature}"} if label and labels[label] > 1 else slider
        where = ", in the marked region" if edit.region and not edit.is_identity else ""
        when = f", only where {edit.when.label or 'it'} is there" if edit.when and not edit.is_identity else ""
        found.append(edit_words(named, edit) + where + when)
    return found


def common_region(edits: Sequence[SteeringEdit]) -> Any:
    """The region of all edits as JSON values, to paint on; None where they act everywhere or differ."""
    regions = {edit.region for edit in edits}
    return edits[0].to_dict()["region"] if len(regions) == 1 else None


def read_words(swap: Any, names: Container[str]) -> list[str]:
    """What a swap, (old name, new name), did that CLIP reads."""
    match swap:
        case [old, new] if old in names and new in names:
            return [f"“{old}” became “{new}”: CLIP recognises it in this image."]
    return []


def unread_notice(swap: Any, names: Container[str]) -> list[str]:
    """What to say of a swap, (old name, new name), that CLIP does not read."""
    match swap:
        case [old, new] if old in names and new in names:
            return [f"CLIP does not recognise “{new}” in this image. This is the closest of the swaps that were tried."]
    return []


def unnatural_notice(edits: Sequence[SteeringEdit], steered: Steered) -> list[str]:
    """What to do about an image that does not look natural."""
    measured = steered.measurements[1]
    if measured is None or measured["looks_natural"]:
        return []
    if any(edit.mode == "add" and edit.strength > 0 and edit.region is None for edit in edits):
        return ["This image does not look natural: the feature is added everywhere. Paint where it acts, or add less."]
    return ["This image does not look natural: it may be broken. Move the slider towards the middle."]


def faint_notice(edits: Sequence[SteeringEdit], steered: Steered) -> list[str]:
    """What to try where an edit did little."""
    measured = steered.measurements[1]
    if measured is None or not measured["looks_natural"] or all(edit.is_identity for edit in edits):
        return []
    if any(edit.when for edit in edits) and measured["edited_share"] == 0:
        return ["Nothing changed: the edit acts only in images that show its feature, and this one does not."]
    if share_seen(*steered.images[:2]) >= LEAST_SEEN:
        return []
    if measured["activation_before"] == 0 and all(edit.mode in LESS for edit in edits):
        return ["Nothing changed: this feature does not fire in this image. Put its name into the prompt."]
    return [
        "Little changed. One feature is often weak: add others of the same name, or suppress what it should replace."
    ]


def even_notches(points: Sequence[tuple[float, float]], natural: Sequence[float]) -> list[float]:
    """Slider positions within the natural range: on each side of the middle, steps of equal measured change.

    `points` are positions with the perceptual distance there.
    """
    found = [0.0]
    for end in natural:
        side = sorted((abs(turn), change) for turn, change in points if turn * end > 0 and abs(turn) <= abs(end))
        turns = np.array([0.0, *(turn for turn, _ in side)])
        changes = np.maximum.accumulate([0.0, *(change for _, change in side)])
        if changes[-1] > 0:
            wanted = changes[-1] * np.arange(1, NOTCHES + 1) / NOTCHES
            found += [round(float(np.sign(end) * turn), 4) for turn in np.interp(wanted, changes, turns)]
    return sorted(found)


def natural_turns(points: Sequence[tuple[float, bool]]) -> list[float] | None:
    """The unbroken range of slider positions around the middle whose images look natural."""
    low = high = 0.0
    for side in (-1, 1):
        for turn, is_natural in sorted((p for p in points if p[0] * side > 0), key=lambda p: abs(p[0])):
            if not is_natural:
                break
            low, high = min(low, turn), max(high, turn)
    return [low, high] if low < high else None
