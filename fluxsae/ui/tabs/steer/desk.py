"""What the Steer tab and its endpoints ask for: images before and after, several strengths, swaps and recipes."""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import best_example
from fluxsae.features.vocabulary import NameKinds
from fluxsae.steering.edits import Recipe, SteeringEdit, load_recipes, png_bytes
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, Picture, then
from fluxsae.ui.serve.arguments import shortened
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.schemas import SearchRequest, SteerRequest, SweepRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer import words
from fluxsae.ui.tabs.steer.feature_sliders import MAX_SLIDERS, SUGGESTED, Sliders
from fluxsae.ui.tabs.steer.job import Steered, SteerJob
from fluxsae.ui.tabs.steer.starters import find_starters
from fluxsae.ui.tabs.steer.swap import FoundSwap, SwapJob

STRIP = (-2 / 3, -1 / 3, 0.0, 0.1, 0.2, 0.3, 0.6)
"""Slider positions of the strip: twice the feature removed, once, nothing, then ever more added."""
MAX_MATCHES = 12
ALIKE = 0.7
"""How alike in use names of one kind are at least, as in the search for swaps."""
MAX_RIVALS = 16
"""Other names of the kind that CLIP may read instead."""
Filled = tuple[str, int, int, dict[str, Any]]
"""What fills the tab: prompt, seed, steps and sliders."""


class SteerDesk(Desk):
    """The Steer tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.sliders = Sliders(bench, self._steered_hookpoint())

    # The endpoints

    def answers(self) -> Answers:
        """/steer and /sweep."""
        return {SteerRequest: self.steer, SweepRequest: self.sweep}

    def steer(self, request: SteerRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps, then the image before, the image after, and recipe and measurements."""

        def answer(found: Steered) -> tuple[Any, Any, Any]:
            facts = {"recipe": found.recipes[1].to_dict(), "measurements": found.measurements[1]}
            before, after = found.images
            return before, after, facts

        return then(self._made([(), request.edits], request.picture), answer)

    def sweep(self, request: SweepRequest) -> Events[tuple[Any, Any]]:
        """Steps, then one image a strength and the measurements of each."""

        def answer(found: Steered) -> tuple[Any, Any]:
            captions = [f"{request.mode} {strength:g}" for strength in request.strengths]
            rows = [
                {"strength": strength, **(measured or {})}
                for strength, measured in zip(request.strengths, found.measurements[1:], strict=True)
            ]
            return list(zip(found.images[1:], captions, strict=True)), rows

        return then(self._made([(), *((edit,) for edit in request.edits())], request.picture), answer)

    # The page

    def start(self) -> dict[str, Any]:
        """The tab's first sight: no edit yet, good features to begin with."""
        shown = ("title", "pictures", "names", "colours")
        starters = [{key: starter[key] for key in shown} for starter in self.starters]
        return {**self.sliders.page(), "starters": starters}

    @functools.cached_property
    def first(self) -> dict[str, Any]:
        """A picture to begin with, from the run alone: a demo that was searched, or an image that says much."""
        for starter in self.starters:
            if starter["pictures"]:
                return {**starter, "kind": "example", "words": f"“{starter['prompt']}”, steered"}
        cards = self.bench.cards[self.limits.default_hookpoint]
        image_id, _ = best_example(cards, SUGGESTED)
        if image_id is None:
            return {}
        row = cards.images[image_id]
        return {
            "kind": "example",
            "pictures": [views.webp_url(row.thumbnail)],
            "panels": [],
            "prompt": row.prompt,
            "seed": row.seed,
            "words": "Choose a feature. FLUX then makes this image again with the feature steered.",
        }

    @functools.cached_property
    def starters(self) -> list[dict[str, Any]]:
        """Recipes that work, from the run's demos."""
        return find_starters(self.bench, self.sliders.slider_of)

    def begin(self, chosen: Any) -> Filled:
        """What a starter fills the tab with."""
        place = chosen.get("starter") if isinstance(chosen, Mapping) else None
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(self.starters):
            most = len(self.starters) - 1
            raise FluxSaeError(f"starter is {str(place)[:40]}; give a whole number from 0 to {most}.")
        starter = self.starters[place]
        page = self.sliders.page(starter["edits"])
        return starter["prompt"], starter["seed"], starter["num_inference_steps"], page

    def follow(self, selection: Mapping[str, Any]) -> tuple[Picture | None, dict[str, Any]] | None:
        """Prompt, seed and steps, and the slider, of a feature that another tab sent; None for one only looked at.

        Where it was seen in no picture of the visitor's there are no prompt, seed and steps; else earlier sliders go.
        """
        if selection.get("for") != "steer":
            return None
        request = self.chosen(selection)
        slider = self.sliders.slider(request.hookpoint, request.feature)
        found = {"found": [], "add": slider, "at": time.monotonic()}
        picture = selection.get("picture")
        if not isinstance(picture, Mapping):
            return None, found
        return SteerRequest.pick(self.limits, {**picture, "edits": []}).picture, {**found, "alone": True}

    def linked(self, view: Mapping[str, Any]) -> Filled:
        """What a link fills the tab with."""
        request = SteerRequest.pick(self.limits, view)
        return (*request.picture, self.sliders.page_of(request.edits))

    def loaded(self, path: str) -> Filled:
        """What a recipe file fills the tab with."""
        try:
            recipe = load_recipes(Path(path))[0]
        except FluxSaeError as error:  # without this machine's folders
            name = Path(path).name
            raise FluxSaeError(f"{name} is no recipe of fluxsae: {str(error).replace(path, name)}") from error
        edits, steps = [edit.to_dict() for edit in recipe.edits], recipe.settings.num_inference_steps
        given = {"prompt": recipe.prompt, "seed": recipe.seed, "num_inference_steps": steps, "edits": edits}
        return self.linked(given)

    def matches(self, query: Any) -> dict[str, Any] | None:
        """The sliders that a search finds, to choose from; None without a query."""
        if not str(query).strip():
            return None
        try:
            return {"query": str(query), "found": self._search(query)}
        except FluxSaeError as error:  # a number that no feature has
            return {"query": str(query), "found": [], "error": str(error)}

    def find(self, query: Any, page: Any) -> dict[str, Any]:
        """The sliders that a search finds, the first that is not on the page to be added."""
        found = self._search(query)
        known = [(edit["hookpoint"], edit["feature"]) for edit in self.sliders.sent(page)]
        new = [hit for hit in found if (hit["hookpoint"], hit["feature"]) not in known]
        if not new:
            none = "No other feature" if found else "No feature"
            raise FluxSaeError(f"{none} matches {shortened(query)}. Search for a colour, a shape or a number.")
        return {"query": str(query), "found": found, "add": new[0], "at": time.monotonic()}

    def turn(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Events[dict[str, Any]]:
        """Steps, then the page's before and after, with a random-direction control beside it."""
        sliders = self.sliders.sent(page, steps)
        request = self._request(prompt, seed, steps, [self.sliders.edit(slider) for slider in sliders])
        is_turned = not all(edit.is_identity for edit in request.edits)
        # where nothing is turned all three are one image until the last step
        variants = [(), request.edits, request.edits] if is_turned else [()] * 3
        swap = page.get("unread") if isinstance(page, Mapping) else None
        made = self._made(variants, request.picture, control=2)
        return then(made, lambda steered: self._result(request, steered, sliders, swap))

    def strip(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Events[dict[str, Any]]:
        """Steps, then the first slider's feature at seven strengths."""
        sliders = self.sliders.sent(page, steps)
        if not sliders:
            raise FluxSaeError("Add a feature first: its strengths are compared.")
        edits = [self.sliders.edit({**sliders[0], "turn": position}) for position in STRIP]
        request = self._request(prompt, seed, steps, edits[:1])
        made = self._made([(), *((edit,) for edit in edits)], request.picture)
        return then(made, lambda steered: _strip(sliders[0], edits, steered))

    # Swaps

    @functools.cached_property
    def names(self) -> dict[str, list[int]]:
        """The names that can be put in each other's place, with their features, best ranked first."""
        return self.bench.cards[self.sliders.hookpoint].named()

    def first_swap(self) -> list[str] | None:
        """The two names of the first starter, if it is a swap."""
        found = [edit["label"] for starter in self.starters[:1] for edit in starter["edits"][:2]]
        return found if len(set(found)) == 2 and all(name in self.names for name in found) else None

    def kin(self, name: Any) -> list[str]:
        """The names that are used like one in the run's prompts; all others where none is."""
        alike = self._kinds.alike(str(name), least=ALIKE)
        return [other for other in alike if other in self.names] or [other for other in self.names if other != name]

    def swap(self, prompt: Any, seed: Any, steps: Any, old: Any, new: Any) -> Events[Filled]:
        """Steps, then prompt, seed, steps and the sliders that put one name in place of another."""
        for name in (old, new):
            if not isinstance(name, str) or name not in self.names:
                raise FluxSaeError(f"{str(name)[:40]!r} is no name of this run's features; choose one of the list.")
        if old == new:
            raise FluxSaeError(f"“{old}” cannot replace itself; choose two different names.")
        request = self._request(prompt, seed, steps, [])
        job = SwapJob(
            hookpoint=self.sliders.hookpoint,
            old=old,
            new=new,
            old_features=tuple(self.names[old]),
            new_features=tuple(self.names[new][: MAX_SLIDERS - 1]),
            rivals=tuple(self._kinds.rivals(old, new, least=ALIKE, limit=MAX_RIVALS)),
            prompt=request.prompt,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
        )

        def fill(found: FoundSwap) -> Filled:
            unread = None if found.is_read else [old, new]
            return (*request.picture, {**self.sliders.page_of(found.edits), "unread": unread})

        return then(self.bench.cached(job), fill)

    # How it is done

    @functools.cached_property
    def _kinds(self) -> NameKinds:
        return NameKinds(self.bench.images.prompts, self.names)

    def _request(self, prompt: Any, seed: Any, steps: Any, edits: Sequence[SteeringEdit]) -> SteerRequest:
        given = [edit.to_dict() for edit in edits]
        return SteerRequest.parse(self.limits, prompt=prompt, edits=given, seed=seed, num_inference_steps=steps)

    def _made(
        self, variants: Sequence[Sequence[SteeringEdit]], picture: Picture, *, control: int = -1
    ) -> Events[Steered]:
        return self.bench.cached(SteerJob(tuple(map(tuple, variants)), *picture, control))

    def _search(self, query: Any) -> list[dict[str, Any]]:
        hookpoint = self.sliders.hookpoint
        request = SearchRequest.parse(self.limits, query=query, hookpoint=hookpoint, limit=MAX_MATCHES)
        return [self.sliders.slider(hookpoint, hit["feature"]) for hit in views.search(self.bench, request)]

    def _steered_hookpoint(self) -> str:
        """Where the run's demos steer best; without any demo the last."""

        def best(name: str) -> float:
            return max((float(demo["score"]["score"]) for demo in self.bench.run.load_demos(name)), default=0.0)

        return max(reversed(self.bench.hookpoints), key=best)

    def _result(
        self, request: SteerRequest, steered: Steered, sliders: Sequence[Mapping[str, Any]], swap: Any
    ) -> dict[str, Any]:
        before, after, random = steered.images
        recipe = steered.recipes[1]
        edits = [edit.to_dict() for edit in request.edits]
        measured = steered.measurements[1:] if recipe.edits else (None, None)
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "picture": _picture_of(recipe),
            "edits": edits,
            "rows": self.limits.rows,
            "cols": self.limits.cols,
            "region": words.common_region(request.edits),
            "cut": words.where_it_changed(before, after),
            "before": views.image_url(before),
            "after": views.image_url(after),
            "random": views.image_url(random),
            "words": words.result_words(list(zip(sliders, request.edits, strict=True))),
            "measurement": measured[0],
            "random_measurement": measured[1],
            "png": views.base64_text(png_bytes(after, [recipe])),
            "recipe": recipe.to_dict(),
            "notices": [
                *views.notices(steered.unread, before),
                *words.unread_notice(swap, self.names),
                *words.unsafe_notice(request.edits, steered),
                *words.faint_notice(request.edits, steered),
            ],
            **self.frame(SteerRequest, {**request.model_dump(exclude={"edits"}), "edits": edits}, tab="steer"),
        }


def _strip(slider: Mapping[str, Any], edits: Sequence[SteeringEdit], steered: Steered) -> dict[str, Any]:
    measurements = steered.measurements[1:]
    sound = [measured is not None and measured["is_safe"] for measured in measurements]
    safe = words.safe_turns(list(zip(STRIP, sound, strict=True)))
    low, high = safe or (0.0, 0.0)
    cells = [
        {
            "image": views.image_url(image),
            "words": words.edit_words(slider, edit),
            "short": words.short_words(edit),
            "measurement": measured,
            "safe": low <= turn <= high,
        }
        for turn, edit, image, measured in zip(STRIP, edits, steered.images[1:], measurements, strict=True)
    ]
    shown = ("hookpoint", "feature", "steps", "region", "colour", "label")
    return {
        **{key: slider[key] for key in shown},
        "picture": _picture_of(steered.recipes[0]),
        "cells": cells,
        "safe": safe,
    }


def _picture_of(recipe: Recipe) -> list[Any]:
    """What an unedited picture is made of: a safe range holds for it alone."""
    return [recipe.prompt, recipe.seed, recipe.settings.num_inference_steps]
