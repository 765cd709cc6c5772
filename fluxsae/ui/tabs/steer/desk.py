"""What the Steer tab and its endpoints ask for: edits from sliders, images before and after, strips and recipes."""

import base64
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.vocabulary import NameKinds
from fluxsae.pictures.heatmaps import feature_colour
from fluxsae.steering.edits import Recipe, SteeringEdit, load_recipes, png_bytes
from fluxsae.ui.kit import views
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.schemas import FeatureRequest, SteerRequest, SweepRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.job import Steered, SteerJob
from fluxsae.ui.tabs.steer.starters import find_starters
from fluxsae.ui.tabs.steer.swap import SwapJob
from fluxsae.ui.tabs.steer.words import (
    common_region,
    edit_words,
    faint_notice,
    result_words,
    safe_turns,
    short_words,
    unread_notice,
    unsafe_notice,
    where_it_changed,
)

MAX_SUPPRESS = 3.0
"""The left end of a slider: what is taken away, as a share of the feature's own activation. Taking away just what is
there is often too little: other features of the same thing remain."""
MAX_AMPLIFY = 1.0
"""The right end of a slider: multiples of the feature's usual strength that are added."""
STRIP = (-2 / 3, -1 / 3, 0.0, 0.1, 0.2, 0.3, 0.6)
"""Slider positions of the strip: twice the feature taken away, once, nothing, then ever more added."""
MAX_PAGE_EDITS = 6
MAX_MATCHES = 12
SUGGESTED = 14
ALIKE = 0.7
"""How alike in use names of one kind are at least, as in the search for swaps."""
MAX_RIVALS = 16
"""Other names of the kind that CLIP may read instead."""


class SteerDesk:
    """The Steer tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.limits = bench.limits

    # The endpoints

    def steer(self, request: SteerRequest) -> Iterator[StepDone | Done[tuple[Any, Any, Any]]]:
        """Steps, then the image before, the image after, and recipe and measurements."""
        for event in self._run([(), request.edits], request):
            if not isinstance(event, Done):
                yield event
                continue
            before, after = event.value.images
            facts = {"recipe": event.value.recipes[1].to_dict(), "measurements": event.value.measurements[1]}
            yield Done((before, after, facts))

    def sweep(self, request: SweepRequest) -> Iterator[StepDone | Done[tuple[Any, Any]]]:
        """Steps, then one image a strength and the measurements of each."""
        for event in self._run([(), *((edit,) for edit in request.edits())], request):
            if not isinstance(event, Done):
                yield event
                continue
            found = event.value
            pictures = [
                (image, f"{request.mode} {strength:g}")
                for image, strength in zip(found.images[1:], request.strengths, strict=True)
            ]
            rows = [
                {"strength": strength, **(measured or {})}
                for strength, measured in zip(request.strengths, found.measurements[1:], strict=True)
            ]
            yield Done((pictures, rows))

    # The page

    def start(self) -> dict[str, Any]:
        """The tab's first sight: no edit yet, good features to begin with."""
        shown = ("title", "pictures", "names", "colours")
        starters = [{key: starter[key] for key in shown} for starter in self.starters()]
        return {**self._frame(), "edits": [], "starters": starters}

    @functools.cache  # noqa: B019 - one desk a page, for as long as it is served
    def first(self) -> dict[str, Any] | None:
        """A picture to begin with, from the run alone: a demo that was searched, or an image that says much."""
        starters = [starter for starter in self.starters() if starter["pictures"]]
        if starters:
            return {
                **starters[0],
                "kind": "example",
                "words": f"“{starters[0]['prompt']}”, steered",
            }
        cards = self.bench.cards[self.limits.default_hookpoint]
        image_id, _ = views.best_example(cards, SUGGESTED)
        if image_id is None:
            return None
        row = cards.images[image_id]
        words = "Choose a feature: this image is made again with it turned."
        return {
            "kind": "example",
            "pictures": [views.webp_url(row.thumbnail)],
            "panels": [],
            "prompt": row.prompt,
            "seed": row.seed,
            "words": words,
        }

    @functools.cache  # noqa: B019 - one desk a page, for as long as it is served
    def starters(self) -> list[dict[str, Any]]:
        """Recipes that work, from the run's demos."""
        return find_starters(self.bench, self._slider_of)

    def begin(self, chosen: Any) -> tuple[str, int, int, dict[str, Any]]:
        """Prompt, seed, steps and sliders of a starter."""
        place = chosen.get("starter") if isinstance(chosen, Mapping) else None
        starters = self.starters()
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(starters):
            raise FluxSaeError(f"starter is {str(place)[:40]}; give a whole number from 0 to {len(starters) - 1}.")
        starter = starters[place]
        page = {**self._frame(), "edits": [dict(edit) for edit in starter["edits"]]}
        return starter["prompt"], starter["seed"], starter["num_inference_steps"], page

    def follow(self, chosen: Mapping[str, Any]) -> tuple[tuple[str, int, int] | None, dict[str, Any]] | None:
        """Prompt, seed and steps, and the slider, of a feature that another tab sent; None for one only looked at.

        Where it was seen in no picture of the visitor's there are no prompt, seed and steps; else earlier sliders go.
        """
        if chosen.get("for") != "steer":
            return None
        request = FeatureRequest.parse(self.limits, hookpoint=chosen["hookpoint"], feature=chosen["feature"])
        slider = {"found": [], "add": self._slider(request.hookpoint, request.feature), "at": time.monotonic()}
        picture = chosen.get("picture")
        if not isinstance(picture, Mapping):
            return None, slider
        names = ("prompt", "seed", "num_inference_steps")
        made = SteerRequest.parse(self.limits, edits=[], **{name: picture.get(name) for name in names})
        return (made.prompt, made.seed, made.num_inference_steps), {**slider, "alone": True}

    def linked(self, view: Mapping[str, Any]) -> tuple[str, int, int, dict[str, Any]]:
        """Prompt, seed, steps and sliders of a link."""
        names = ("prompt", "edits", "seed", "num_inference_steps")
        request = SteerRequest.parse(self.limits, **{name: view.get(name) for name in names})
        return request.prompt, request.seed, request.num_inference_steps, self.sliders(request.edits)

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
        known = [(edit["hookpoint"], edit["feature"]) for edit in self._edits_of(page)]
        new = [hit for hit in found if (hit["hookpoint"], hit["feature"]) not in known]
        if not new:
            none = "No other feature" if found else "No feature"
            raise FluxSaeError(f"{none} matches {query!r}; search for a colour, a shape or a number.")
        return {"query": str(query), "found": found, "add": new[0], "at": time.monotonic()}

    def turn(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps, then the page's before and after, with a random-direction control beside it."""
        page = self._within(page, steps)
        edits = [self._edit(slider) for slider in self._edits_of(page)]
        request = SteerRequest.parse(
            self.limits, prompt=prompt, edits=[edit.to_dict() for edit in edits], seed=seed, num_inference_steps=steps
        )
        is_turned = not all(edit.is_identity for edit in edits)
        # where nothing is turned all three are one image until the last step
        variants = [(), request.edits, request.edits] if is_turned else [()] * 3
        for event in self._run(variants, request, control=2):
            yield Done(self._result(request, event.value, page)) if isinstance(event, Done) else event

    @functools.cached_property
    def names(self) -> dict[str, list[int]]:
        """The names that can be put in each other's place, with their features, best ranked first."""
        return self.bench.cards[self._turned_hookpoint()].named()

    def first_swap(self) -> list[str] | None:
        """The two names of the first starter, if it is a swap."""
        found = [edit["label"] for starter in self.starters()[:1] for edit in starter["edits"][:2]]
        return found if len(set(found)) == 2 and all(name in self.names for name in found) else None

    def kin(self, name: Any) -> list[str]:
        """The names that are used like one in the run's prompts; all others where none is."""
        alike = self._kinds.alike(str(name), least=ALIKE)
        return [other for other in alike if other in self.names] or [other for other in self.names if other != name]

    def swap(
        self, prompt: Any, seed: Any, steps: Any, old: Any, new: Any
    ) -> Iterator[StepDone | Done[tuple[str, int, int, dict[str, Any]]]]:
        """Steps, then prompt, seed, steps and the sliders that put one name in place of another."""
        for name in (old, new):
            if not isinstance(name, str) or name not in self.names:
                raise FluxSaeError(f"{str(name)[:40]!r} is no name of this run's features; choose one of the list.")
        if old == new:
            raise FluxSaeError(f"“{old}” cannot take its own place; choose two names.")
        request = SteerRequest.parse(self.limits, prompt=prompt, edits=[], seed=seed, num_inference_steps=steps)
        job = SwapJob(
            hookpoint=self._turned_hookpoint(),
            old=old,
            new=new,
            old_features=tuple(self.names[old]),
            new_features=tuple(self.names[new][: MAX_PAGE_EDITS - 1]),
            rivals=tuple(self._kinds.rivals(old, new, least=ALIKE, limit=MAX_RIVALS)),
            prompt=request.prompt,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
        )
        for event in self.bench.cached(job):
            if isinstance(event, Done):
                page = {**self.sliders(event.value.edits), "unread": None if event.value.is_read else [old, new]}
                yield Done((request.prompt, request.seed, request.num_inference_steps, page))
            else:
                yield event

    def strip(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps, then the first slider's feature at seven strengths."""
        sliders = self._edits_of(self._within(page, steps))
        if not sliders:
            raise FluxSaeError("Add a feature first: the strip shows it at seven strengths.")
        edits = [self._edit({**sliders[0], "turn": position}) for position in STRIP]
        request = SteerRequest.parse(
            self.limits, prompt=prompt, edits=[edits[0].to_dict()], seed=seed, num_inference_steps=steps
        )
        for event in self._run([(), *((edit,) for edit in edits)], request):
            yield Done(self._strip(sliders[0], event.value)) if isinstance(event, Done) else event

    def loaded(self, path: str) -> tuple[str, int, int, dict[str, Any]]:
        """Prompt, seed, steps and sliders of a recipe file."""
        try:
            recipe = load_recipes(Path(path))[0]
        except FluxSaeError as error:  # without this machine's folders
            name = Path(path).name
            raise FluxSaeError(f"{name} is no recipe of fluxsae: {str(error).replace(path, name)}") from error
        request = SteerRequest.parse(
            self.limits,
            prompt=recipe.prompt,
            edits=[edit.to_dict() for edit in recipe.edits],
            seed=recipe.seed,
            num_inference_steps=recipe.settings.num_inference_steps,
        )
        return request.prompt, request.seed, request.num_inference_steps, self.sliders(request.edits)

    def sliders(self, edits: Sequence[SteeringEdit]) -> dict[str, Any]:
        """The sliders that stand for edits."""
        return {**self._frame(), "edits": [self._slider_of(edit) for edit in edits[:MAX_PAGE_EDITS]]}

    # How it is done

    @functools.cached_property
    def _kinds(self) -> NameKinds:
        return NameKinds(self.bench.images.prompts, self.names)

    def _run(
        self, variants: Sequence[Sequence[SteeringEdit]], request: SteerRequest | SweepRequest, *, control: int = -1
    ) -> Iterator[StepDone | Done[Steered]]:
        edits = tuple(map(tuple, variants))
        return self.bench.cached(SteerJob(edits, request.prompt, request.seed, request.num_inference_steps, control))

    def _frame(self) -> dict[str, Any]:
        return {
            "rows": self.limits.rows,
            "cols": self.limits.cols,
            "max_steps": self.limits.max_steps,
            "max_suppress": MAX_SUPPRESS,
            "max_amplify": MAX_AMPLIFY,
            "max_edits": MAX_PAGE_EDITS,
            "suggestions": self._suggestions(),
        }

    def _search(self, query: Any) -> list[dict[str, Any]]:
        from fluxsae.ui.serve.schemas import SearchRequest
        from fluxsae.ui.tabs.gallery.desk import GalleryDesk

        hookpoint = self._turned_hookpoint()
        request = SearchRequest.parse(self.limits, query=query, hookpoint=hookpoint, limit=MAX_MATCHES)
        return [self._slider(hookpoint, hit["feature"]) for hit in GalleryDesk(self.bench).search(request)]

    def _suggestions(self) -> list[dict[str, Any]]:
        hookpoint = self._turned_hookpoint()
        cards = self.bench.cards[hookpoint]
        found: dict[str, dict[str, Any]] = {}
        for feature in cards.ranked[:120]:
            label = cards.labels[feature]
            if label and label not in found and cards.features[feature].max_act > 0:
                found[label] = self._slider(hookpoint, feature)
        return list(found.values())[:SUGGESTED]

    @functools.cache  # noqa: B019 - one desk a page, for as long as it is served
    def _turned_hookpoint(self) -> str:
        """Where the run's demos turn features best; without any demo the last."""

        def best(name: str) -> float:
            return max((float(demo["score"]["score"]) for demo in self.bench.run.load_demos(name)), default=0.0)

        return max(reversed(self.bench.hookpoints), key=best)

    def _slider(self, hookpoint: str, feature: int) -> dict[str, Any]:
        summary = views.chip(views.summary(self.bench.cards[hookpoint], feature))
        return {**summary, "turn": 0.0, "steps": None, "region": None, "word": self.bench.word(hookpoint)}

    def _slider_of(self, edit: SteeringEdit) -> dict[str, Any]:
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
                f"No slider stands for {edit.mode} {edit.strength:g}: they go from scale {1 - MAX_SUPPRESS:g} to 1 and "
                f"from add 0 to {MAX_AMPLIFY:g}. Use the /steer endpoint, which knows every mode and strength."
            )
        values = edit.to_dict()
        if isinstance(values["region"], dict):
            raise FluxSaeError("The page cannot show a region that follows a heatmap; use the /steer endpoint.")
        slider = self._slider(values["hookpoint"], edit.feature)
        return {**slider, "turn": turn, "steps": values["steps"], "region": values["region"]}

    def _edit(self, slider: Mapping[str, Any]) -> SteeringEdit:
        """Left of the middle suppresses (scale, strength below 1), right of it amplifies (add)."""
        turn = slider.get("turn")
        if isinstance(turn, bool) or not isinstance(turn, (int, float)) or not -1 <= turn <= 1:
            raise FluxSaeError(f"turn is {str(turn)[:40]}; a slider gives a number from -1 to 1.")
        mode, strength = ("scale", 1.0 + turn * MAX_SUPPRESS) if turn < 0 else ("add", turn * MAX_AMPLIFY)
        return SteeringEdit.from_dict(
            {
                "hookpoint": slider.get("hookpoint"),
                "feature": slider.get("feature"),
                "mode": mode,
                "strength": round(strength, 4),
                "steps": slider.get("steps"),
                "region": slider.get("region"),
            }
        )

    def _within(self, page: Any, n_steps: Any) -> dict[str, Any]:
        """The sliders with step windows that end with the last step of this picture: they are drawn for any number."""

        def cut(slider: dict[str, Any]) -> dict[str, Any]:
            match slider.get("steps"):
                case [start, int(stop)] if isinstance(n_steps, int):
                    return {**slider, "steps": [start, min(stop, n_steps)]}
            return slider

        return {**page, "edits": [cut(slider) for slider in self._edits_of(page)]} if isinstance(page, Mapping) else {}

    def _edits_of(self, page: Any) -> list[dict[str, Any]]:
        edits = page.get("edits", []) if isinstance(page, Mapping) else []
        if not isinstance(edits, list) or len(edits) > MAX_PAGE_EDITS:
            raise FluxSaeError(f"The page holds at most {MAX_PAGE_EDITS} features on sliders.")
        return [self._checked(edit) for edit in edits]

    def _checked(self, edit: Any) -> dict[str, Any]:
        """A slider as the page sent it: its feature and region checked, its label and colour the run's own."""
        if not isinstance(edit, Mapping):
            raise FluxSaeError(f"{str(edit)[:40]!r} is no slider.")
        request = FeatureRequest.parse(self.limits, hookpoint=edit.get("hookpoint"), feature=edit.get("feature"))
        rows, cols, region = self.limits.rows, self.limits.cols, edit.get("region")
        lines = region if isinstance(region, list) and len(region) == rows else [None]
        if region is not None and not all(isinstance(line, list) and len(line) == cols for line in lines):
            raise FluxSaeError(f"region is not {rows} rows of {cols} patches.")
        slider = self._slider(request.hookpoint, request.feature)
        return {**slider, "turn": edit.get("turn"), "steps": edit.get("steps"), "region": region}

    def _result(self, request: SteerRequest, steered: Steered, page: Any) -> dict[str, Any]:
        before, after, random = steered.images
        is_turned = bool(steered.recipes[1].edits)
        recipe = steered.recipes[1]
        values = {
            "prompt": request.prompt,
            "edits": [edit.to_dict() for edit in request.edits],
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
        }
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "picture": _picture_of(recipe),
            "edits": values["edits"],
            "rows": self.limits.rows,
            "cols": self.limits.cols,
            "region": common_region(request.edits),
            "cut": where_it_changed(before, after),
            "before": views.image_url(before),
            "after": views.image_url(after),
            "random": views.image_url(random),
            "words": result_words([(slider, self._edit(slider)) for slider in self._edits_of(page)]),
            "measurement": steered.measurements[1] if is_turned else None,
            "random_measurement": steered.measurements[2] if is_turned else None,
            "png": base64.b64encode(png_bytes(after, [recipe])).decode("ascii"),
            "recipe": recipe.to_dict(),
            "link": views.encode_view({"tab": "steer", **values}),
            "versions": dict(self.bench.versions),
            "notices": [
                *views.notices(steered.unread, before),
                *unread_notice(page.get("unread"), self.names),
                *unsafe_notice(request.edits, steered),
                *faint_notice(request.edits, steered),
            ],
            "code": snippets("steer", values, "before, after, facts"),
        }

    def _strip(self, slider: Mapping[str, Any], steered: Steered) -> dict[str, Any]:
        measurements = steered.measurements[1:]
        edits = [self._edit({**slider, "turn": turn}) for turn in STRIP]
        sound = [measured is not None and measured["is_safe"] for measured in measurements]
        safe = safe_turns(list(zip(STRIP, sound, strict=True)))
        low, high = safe or (0.0, 0.0)
        cells = [
            {
                "turn": turn,
                "image": views.image_url(image),
                "words": edit_words(slider, edit),
                "short": short_words(edit),
                "measurement": measured,
                "safe": low <= turn <= high,
            }
            for turn, edit, image, measured in zip(STRIP, edits, steered.images[1:], measurements, strict=True)
        ]
        return {
            "hookpoint": slider["hookpoint"],
            "feature": slider["feature"],
            "steps": slider.get("steps"),
            "region": slider.get("region"),
            "picture": _picture_of(steered.recipes[0]),
            "colour": feature_colour(slider.get("label")),
            "label": slider.get("label"),
            "cells": cells,
            "safe": safe,
        }


def _picture_of(recipe: Recipe) -> list[Any]:
    """What an unedited picture is made of: a safe range holds for it alone."""
    return [recipe.prompt, recipe.seed, recipe.settings.num_inference_steps]
