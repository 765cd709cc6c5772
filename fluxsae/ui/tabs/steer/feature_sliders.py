"""The sliders of features on the Steer tab: each stands for one edit of one feature that the run knows.

A slider of a setting, such as denoising steps, is a component in `tab.py` and a field of `SteerRequest`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from fluxsae.errors import FluxSaeError
from fluxsae.steering.conditions import Condition
from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.kit import views
from fluxsae.ui.serve.schemas import FeatureRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.words import EDIT_WORDS

MAX_SUPPRESS: Final = 3.0
"""The left end of a slider: what is removed, as a share of the feature's own activation. Removing just what is there is
often too little: other features of the same thing remain."""
MAX_AMPLIFY: Final = 1.0
"""The right end of a slider: multiples of the feature's usual strength that are added."""
MAX_SLIDERS: Final = 6
SUGGESTED: Final = 14
MAX_PRESENT: Final = 32
"""Features of a name, best ranked first, that tell whether an image shows it; a large run has hundreds."""


class Sliders:
    """Makes sliders of edits and edits of sliders."""

    def __init__(self, bench: Workbench, hookpoint: str) -> None:
        self.bench, self.limits, self.hookpoint = bench, bench.limits, hookpoint
        self._names: dict[str, Mapping[str, Sequence[int]]] = {}

    def page(self, edits: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """What the page needs to draw some sliders and to offer more."""
        return {
            "rows": self.limits.rows,
            "cols": self.limits.cols,
            "max_steps": self.limits.max_steps,
            "max_suppress": MAX_SUPPRESS,
            "max_amplify": MAX_AMPLIFY,
            "max_edits": MAX_SLIDERS,
            "edit_words": EDIT_WORDS,
            "suggestions": self._suggestions,
            "edits": [dict(edit) for edit in edits],
        }

    def page_of(self, edits: Sequence[SteeringEdit]) -> dict[str, Any]:
        """The sliders that stand for edits.

        Raises:
            FluxSaeError: there are more than the page holds, or no slider stands for one.
        """
        if len(edits) > MAX_SLIDERS:
            raise FluxSaeError(
                f"There are {len(edits)} edits, and the page holds at most {MAX_SLIDERS} features on sliders. Use the "
                "/steer endpoint, which takes more."
            )
        return self.page([self.slider_of(edit) for edit in edits])

    def slider(self, hookpoint: str, feature: int) -> dict[str, Any]:
        """A slider in its middle."""
        card = views.chip(self.bench.cards[hookpoint], feature)
        label = card.get("label") or ""
        present = Condition(tuple(self.named(hookpoint).get(label, (feature,))[:MAX_PRESENT]), label=label)
        fresh = {"turn": 0.0, "steps": None, "region": None, "when": None, "present": present.to_dict()}
        return {**card, **fresh, "word": self.bench.word(hookpoint)}

    def slider_of(self, edit: SteeringEdit) -> dict[str, Any]:
        """The slider that stands for an edit exactly.

        Raises:
            FluxSaeError: no slider of this page does.
        """
        turns = {
            "scale": (edit.strength - 1) / MAX_SUPPRESS,
            "ablate": -edit.strength / MAX_SUPPRESS,
            "add": edit.strength / MAX_AMPLIFY,
        }
        low, high = (0.0, 1.0) if edit.mode == "add" else (-1.0, 0.0)
        turn = turns.get(edit.mode)
        if turn is None or not low <= turn <= high:
            raise FluxSaeError(
                f"No slider can show {edit.mode} {edit.strength:g}: sliders go from scale {1 - MAX_SUPPRESS:g} to 1, "
                f"and from add 0 to {MAX_AMPLIFY:g}. Use the /steer endpoint, which takes every mode and strength."
            )
        values = edit.to_dict()
        if isinstance(values["region"], dict):
            raise FluxSaeError("The page cannot show a region that follows a heatmap; use the /steer endpoint.")
        slider = self.slider(values["hookpoint"], edit.feature)
        return {**slider, "turn": turn, **{name: values.get(name) for name in ("steps", "region", "when")}}

    def edit(self, slider: Mapping[str, Any]) -> SteeringEdit:
        """Left of the middle suppresses (scale, strength below 1), right of it amplifies (add)."""
        turn = slider.get("turn")
        if isinstance(turn, bool) or not isinstance(turn, (int, float)) or not -1 <= turn <= 1:
            raise FluxSaeError(f"turn is {str(turn)[:40]}; a slider gives a number from -1 to 1.")
        mode, strength = ("scale", 1.0 + turn * MAX_SUPPRESS) if turn < 0 else ("add", turn * MAX_AMPLIFY)
        given = {name: slider.get(name) for name in ("hookpoint", "feature", "steps", "region", "when")}
        return SteeringEdit.from_dict({**given, "mode": mode, "strength": round(strength, 4)})

    def sent(self, page: Any, n_steps: Any = None) -> list[dict[str, Any]]:
        """The sliders that the page sent, checked; step windows end with the last of `n_steps`, where those are told.

        Raises:
            FluxSaeError: too many, or one that the page never made.
        """
        edits = page.get("edits", []) if isinstance(page, Mapping) else []
        if not isinstance(edits, list) or len(edits) > MAX_SLIDERS:
            raise FluxSaeError(f"The page holds at most {MAX_SLIDERS} features on sliders.")
        return [_within(self._checked(edit), n_steps) for edit in edits]

    def _checked(self, edit: Any) -> dict[str, Any]:
        """A slider with its feature and region checked, its label and colour the run's own."""
        if not isinstance(edit, Mapping):
            raise FluxSaeError(f"{str(edit)[:40]!r} is no slider.")
        request = FeatureRequest.parse(self.limits, hookpoint=edit.get("hookpoint"), feature=edit.get("feature"))
        rows, cols, region = self.limits.rows, self.limits.cols, edit.get("region")
        lines = region if isinstance(region, list) and len(region) == rows else [None]
        if region is not None and not all(isinstance(line, list) and len(line) == cols for line in lines):
            raise FluxSaeError(f"region is not {rows} rows of {cols} patches.")
        given = {name: edit.get(name) for name in ("turn", "steps", "region", "when")}
        return {**self.slider(request.hookpoint, request.feature), **given}

    def named(self, hookpoint: str) -> Mapping[str, Sequence[int]]:
        """The features of each name at a hook point."""
        if hookpoint not in self._names:
            self._names[hookpoint] = self.bench.cards[hookpoint].named()
        return self._names[hookpoint]

    @functools.cached_property
    def _suggestions(self) -> list[dict[str, Any]]:
        """The best feature of each of the best labels."""
        cards = self.bench.cards[self.hookpoint]
        found: dict[str, dict[str, Any]] = {}
        for feature in cards.ranked[:120]:
            label = cards.labels[feature]
            if label and label not in found and cards.features[feature].max_act > 0:
                found[label] = self.slider(self.hookpoint, feature)
        return list(found.values())[:SUGGESTED]


def _within(slider: dict[str, Any], n_steps: Any) -> dict[str, Any]:
    match slider["steps"]:
        case [start, int(stop)] if isinstance(n_steps, int):
            return {**slider, "steps": [start, min(stop, n_steps)]}
    return slider
