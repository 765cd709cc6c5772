"""What the Steer tab and its endpoints ask for: images before and after, several strengths, swaps and recipes."""

import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import best_example
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.steering.edits import Recipe, SteeringEdit, load_recipes, png_bytes, with_features
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, Picture, then
from fluxsae.ui.kit.snippets import PICTURE
from fluxsae.ui.serve.arguments import shortened
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.pictures import made_url, thumbnail_url
from fluxsae.ui.serve.schemas import SearchRequest, SteerRequest, SwapRequest, SweepRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer import words
from fluxsae.ui.tabs.steer.feature_sliders import MAX_SLIDERS, SUGGESTED, Sliders
from fluxsae.ui.tabs.steer.job import Steered, SteerJob
from fluxsae.ui.tabs.steer.names import SwapNames
from fluxsae.ui.tabs.steer.starters import find_starters
from fluxsae.ui.tabs.steer.swap import N_PICTURES as SWAP_PICTURES
from fluxsae.ui.tabs.steer.swap import FoundSwap, SwapJob

STRIP = (-2 / 3, -1 / 3, 0.0, 0.1, 0.2, 0.3, 0.6)
"""Slider positions of the strip: twice the feature removed, once, nothing, then ever more added."""
MAX_MATCHES = 12
Filled = tuple[str, int, int, dict[str, Any]]
"""What fills the tab: prompt, seed, steps and sliders."""


class SteerDesk(Desk):
    """The Steer tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.sliders = Sliders(bench, self._steered_hookpoint())
        self.names = SwapNames(bench, self.sliders.hookpoint)

    # The endpoints

    def answers(self) -> Answers:
        """/steer, /sweep and /swap."""
        return {SteerRequest: self.steer, SweepRequest: self.sweep, SwapRequest: self.swapped}

    def steer(self, request: SteerRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps, then the image before, the image after, and recipe and measurements."""

        def answer(found: Steered) -> tuple[Any, Any, Any]:
            recipe = found.recipes[1].to_dict() if request.picture is None else None
            facts = {"recipe": recipe, "measurements": found.measurements[1]}
            before, after = found.images
            return before, after, facts

        return then(self._made([(), request.edits], request), answer)

    def sweep(self, request: SweepRequest) -> Events[tuple[Any, Any]]:
        """Steps, then one image a strength and the measurements of each."""

        def answer(found: Steered) -> tuple[Any, Any]:
            captions = [f"{request.mode} {strength:g}" for strength in request.strengths]
            rows = [
                {"strength": strength, **(measured or {})}
                for strength, measured in zip(request.strengths, found.measurements[1:], strict=True)
            ]
            return list(zip(found.images[1:], captions, strict=True)), rows

        return then(self._made([(), *((edit,) for edit in request.edits())], request), answer)

    def swapped(self, request: SwapRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps of the search, then those of the image, then before, after, and recipe and measurements."""
        found: FoundSwap | None = None
        for event in self.bench.cached(self._swap_job(request)):
            if isinstance(event, Done):
                found = event.value
            else:
                yield event
        assert found is not None
        edits = [edit.to_dict() for edit in found.edits]
        steering = self.steer(SteerRequest.pick(self.limits, {**request.model_dump(), "edits": edits}))
        yield from then(steering, lambda made: (*made[:2], {**made[2], "is_read": found.is_read}))

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
        images = cards.images
        return {
            "kind": "example",
            "pictures": [thumbnail_url(images, image_id)],
            "panels": [],
            "prompt": images.prompts[image_id],
            "seed": images.seeds[image_id],
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
        if picture.get("given"):
            own = self.bench.received(str(picture["given"]))
            asked = {**picture, "edits": [], "picture": own}
            change = SteerRequest.defaults(self.limits)["change"]
            given = {"digest": own.digest, "image": views.image_url(own.image, is_own=True), "change": change}
            return SteerRequest.pick(self.limits, asked).made_from, {**found, "alone": True, "given": given}
        return SteerRequest.pick(self.limits, {**picture, "edits": []}).made_from, {**found, "alone": True}

    def linked(self, view: Mapping[str, Any]) -> Filled:
        """What a link fills the tab with."""
        request = SteerRequest.pick(self.limits, view)
        return (*request.made_from, self.sliders.page_of(request.edits))

    def loaded(self, path: str) -> Filled:
        """What a recipe file fills the tab with.

        Raises:
            FluxSaeError: no recipe, one of several images, or one that would make another image here.
        """
        try:
            recipes = load_recipes(Path(path))
        except FluxSaeError as error:  # without this machine's folders
            name = Path(path).name
            raise FluxSaeError(f"{name} is no recipe of fluxsae: {str(error).replace(path, name)}") from error
        if len(recipes) > 1:
            raise FluxSaeError(
                f"This file holds {len(recipes)} recipes, and the page shows one. Give one in a file of its own."
            )
        recipe = recipes[0]
        self._check_recipe(recipe)
        edits, steps = [edit.to_dict() for edit in recipe.edits], recipe.settings.num_inference_steps
        given = {"prompt": recipe.prompt, "seed": recipe.seed, "num_inference_steps": steps, "edits": edits}
        return self.linked(given)

    def _check_recipe(self, recipe: Recipe) -> None:
        """Refuses a recipe of another FLUX, SAE or settings than this page's."""
        found = recipe.differences(self.bench.info.identity, self.bench.fingerprints)
        here = self.bench.settings(recipe.settings.num_inference_steps).to_dict()
        settings = {name: value for name, value in recipe.settings.to_dict().items() if value != here[name]}
        told = [*found.values(), *(f"{name} is {here[name]!r}, not {value!r}" for name, value in settings.items())]
        if told:
            raise FluxSaeError(
                f"This recipe was made elsewhere: {'; '.join(told)}. Open it on the page of the run where it was made, "
                "or make its image in Python: fluxsae.steering.sweeps.reproduce(pipe, saes, recipe)."
            )

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
            raise FluxSaeError(f"{none} matches {shortened(query)}. Search for a colour, a thing or a number.")
        return {"query": str(query), "found": found, "add": new[0], "at": time.monotonic()}

    def cost_words(self) -> str:
        """How many images each button makes, and how long that takes here."""
        prompt, seed, steps = "", 0, self.limits.default_steps
        n_turn = 2 if self.bench.is_slow else 3
        jobs = {
            "Steer": SteerJob(((),) * n_turn, prompt, seed, steps),
            "Compare strengths": SteerJob(((),) * (1 + len(STRIP)), prompt, seed, steps),
            "Swap": SteerJob(((),) * (SWAP_PICTURES + n_turn), prompt, seed, steps),
        }
        most = {"Swap": "up to "}
        told = [
            f"{name} makes {most.get(name, '')}{job.n_pictures} images{_about(self.bench.seconds_of(job))}"
            for name, job in jobs.items()
        ]
        waits = " Sliders wait until you press Steer." if self.bench.is_slow else ""
        return f"{'; '.join(told)}.{waits}"

    def moved(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Events[dict[str, Any]]:
        """As `turn`, where that is quick; on a slow model nothing: it waits for the button."""
        return iter(()) if self.bench.is_slow else self.turn(prompt, seed, steps, page)

    def controlled(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Events[dict[str, Any]]:
        """As `turn`, with the control in any case."""
        return self.turn(prompt, seed, steps, page, wants_control=True)

    def turn(
        self, prompt: Any, seed: Any, steps: Any, page: Any, wants_control: bool = False
    ) -> Events[dict[str, Any]]:
        """Steps, then the page's before and after, with a random-direction control where that is quick or asked for."""
        sliders = self.sliders.sent(page, steps)
        request = self._request(prompt, seed, steps, [self.sliders.edit(slider) for slider in sliders], page)
        is_turned = not all(edit.is_identity for edit in request.edits)
        # where nothing is turned all are one image until the last step
        edits = request.edits if is_turned else ()
        has_control = wants_control or not self.bench.is_slow
        swap = {key: page.get(key) for key in ("read", "unread")} if isinstance(page, Mapping) else {}
        made = self._made([(), *[edits] * (1 + has_control)], request, control=2 if has_control else -1)
        return then(made, lambda steered: self._result(request, steered, sliders, swap))

    def strip(self, prompt: Any, seed: Any, steps: Any, page: Any) -> Events[dict[str, Any]]:
        """Steps, then the first slider's feature at seven strengths."""
        sliders = self.sliders.sent(page, steps)
        if not sliders:
            raise FluxSaeError("Add a feature first: its strengths are compared.")
        edits = [self.sliders.edit({**sliders[0], "turn": position}) for position in STRIP]
        request = self._request(prompt, seed, steps, edits[:1], page)
        made = self._made([(), *((edit,) for edit in edits)], request)
        return then(made, lambda steered: _strip(sliders[0], edits, steered, request))

    # Swaps

    def first_swap(self) -> list[str] | None:
        """The two names of the first starter, if it is a swap."""
        found = [edit["label"] for starter in self.starters[:1] for edit in starter["edits"][:2]]
        return found if len(set(found)) == 2 and all(name in self.names.known for name in found) else None

    def swap(self, prompt: Any, seed: Any, steps: Any, old: Any, new: Any) -> Events[Filled]:
        """Steps, then prompt, seed, steps and the sliders that put one name in place of another."""
        request = SwapRequest.parse(self.limits, prompt=prompt, old=old, new=new, seed=seed, num_inference_steps=steps)

        def fill(found: FoundSwap) -> Filled:
            told = {"unread": None, "read": None, "read" if found.is_read else "unread": [request.old, request.new]}
            return (*request.made_from, {**self.sliders.page_of(found.edits), **told})

        return then(self.bench.cached(self._swap_job(request)), fill)

    def swap_on(  # noqa: PLR0917 - the order of the tab's inputs
        self, prompt: Any, seed: Any, steps: Any, old: Any, new: Any, page: Any
    ) -> Events[Filled]:
        """As `swap`, of an image that FLUX makes; the sliders of before come along, to be put back.

        Raises:
            FluxSaeError: the page steers a visitor's own picture.
        """
        if _given(page):
            raise FluxSaeError("Swap works on images that FLUX makes. Move the sliders to steer your own picture.")
        undo = self.sliders.sent(page, steps)
        swapped = self.swap(prompt, seed, steps, old, new)
        return then(swapped, lambda filled: (*filled[:-1], {**filled[-1], "undo": undo}))

    # How it is done

    def _swap_job(self, request: SwapRequest) -> SwapJob:
        """The search for edits.

        Raises:
            FluxSaeError: the names cannot be swapped.
        """
        self.names.check(request.old, request.new)
        return SwapJob(
            hookpoint=self.sliders.hookpoint,
            old=request.old,
            new=request.new,
            old_features=tuple(self.names.known[request.old]),
            new_features=tuple(self.names.addable[request.new][: MAX_SLIDERS - 1]),
            rivals=self.names.rivals(request.old, request.new),
            prompt=request.prompt,
            seed=request.seed,
            num_inference_steps=request.num_inference_steps,
        )

    def _request(self, prompt: Any, seed: Any, steps: Any, edits: Sequence[SteeringEdit], page: Any) -> SteerRequest:
        asked = {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "edits": [e.to_dict() for e in edits]}
        given = _given(page)
        if given:
            asked |= {"picture": self.bench.received(str(given.get("digest"))), "change": given.get("change")}
        return SteerRequest.parse(self.limits, **asked)

    def _made(
        self,
        variants: Sequence[Sequence[SteeringEdit]],
        request: SteerRequest | SweepRequest,
        *,
        control: int = -1,
    ) -> Events[Steered]:
        filled = tuple(with_features(edits, self._labelled) for edits in variants)
        own: dict[str, Any] = {}
        if isinstance(request, SteerRequest) and request.picture is not None:
            own = {"picture": request.picture, "change": request.change}
        return self.bench.cached(SteerJob(filled, *request.made_from, control, **own))

    def _labelled(self, hookpoint: HookPoint, label: str) -> Sequence[int]:
        return self.sliders.named(str(hookpoint)).get(label, ())

    def _search(self, query: Any) -> list[dict[str, Any]]:
        hookpoint = self.sliders.hookpoint
        request = SearchRequest.parse(self.limits, query=query, hookpoint=hookpoint, limit=MAX_MATCHES)
        return [self.sliders.slider(hookpoint, hit["feature"]) for hit in views.search(self.bench, request)]

    def _steered_hookpoint(self) -> str:
        """Where the run's demos steer best; without any demo the last."""

        def best(name: str) -> float:
            return max(map(_score, self.bench.demos(name)), default=0.0)

        return max(reversed(self.bench.hookpoints), key=best)

    def _result(
        self, request: SteerRequest, steered: Steered, sliders: Sequence[Mapping[str, Any]], swap: Mapping[str, Any]
    ) -> dict[str, Any]:
        before, after, *random = steered.images
        is_own, png = request.picture is not None, png_bytes(after, [steered.recipes[1]] * (request.picture is None))
        recipe = steered.recipes[1]
        edits = [edit.to_dict() for edit in request.edits]
        measured = (*steered.measurements[1:], None) if recipe.edits else (None, None)
        return {
            "prompt": request.prompt,
            "seed": request.seed,
            "picture": _picture_of(request),
            "given": self._given_words(request, steered),
            "edits": edits,
            "rows": self.limits.rows,
            "cols": self.limits.cols,
            "region": words.common_region(request.edits),
            "cut": words.where_it_changed(before, after),
            "before": views.image_url(before, is_own=is_own),
            "after": views.image_url(after, is_own=is_own),
            "random": views.image_url(random[0], is_own=is_own) if random else None,
            "words": [
                *words.read_words(swap.get("read"), self.names.known),
                *words.result_words(list(zip(sliders, request.edits, strict=True))),
            ],
            "measurement": measured[0],
            "random_measurement": measured[1],
            "png": made_url(png, kind="png") if request.picture is None else views.data_url(png, kind="png"),
            "recipe": recipe.to_dict() if request.picture is None else None,
            "notices": [
                *views.notices(steered.unread, before),
                *words.unread_notice(swap.get("unread"), self.names.known),
                *words.unnatural_notice(request.edits, steered),
                *words.faint_notice(request.edits, steered),
            ],
            **self._frame(request, edits),
        }

    def _frame(self, request: SteerRequest, edits: list[dict[str, Any]]) -> dict[str, Any]:
        values = {**request.model_dump(exclude={"edits", "picture", "change"}), "edits": edits}
        if request.picture is None:
            return self.frame(SteerRequest, values, tab="steer")
        values |= {"picture": PICTURE, "change": request.change}
        return {**self.frame(SteerRequest, values, tab="steer"), "link": None}  # a link cannot hold the picture

    def _given_words(self, request: SteerRequest, steered: Steered) -> str | None:
        """What "before" is of a visitor's own picture."""
        if request.picture is None or steered.first_step is None:
            return None
        return (
            f"Before is your picture, covered with {100 * request.change:.0f} % noise and painted on by FLUX without "
            f"the edits, from step {steered.first_step + 1} of {request.num_inference_steps}."
        )


def _given(page: Any) -> Mapping[str, Any] | None:
    """What the page says of a visitor's own picture that is steered."""
    given = page.get("given") if isinstance(page, Mapping) else None
    return given if isinstance(given, Mapping) else None


def _strip(
    slider: Mapping[str, Any], edits: Sequence[SteeringEdit], steered: Steered, request: SteerRequest
) -> dict[str, Any]:
    measurements = steered.measurements[1:]
    sound = [measured is not None and measured["looks_natural"] for measured in measurements]
    natural = words.natural_turns(list(zip(STRIP, sound, strict=True)))
    low, high = natural or (0.0, 0.0)
    changes = [
        (turn, measured["distance"]) for turn, measured in zip(STRIP, measurements, strict=True) if measured is not None
    ]
    cells = [
        {
            "image": views.image_url(image, is_own=request.picture is not None),
            "words": words.edit_words(slider, edit),
            "short": words.short_words(edit),
            "measurement": measured,
            "natural": low <= turn <= high,
        }
        for turn, edit, image, measured in zip(STRIP, edits, steered.images[1:], measurements, strict=True)
    ]
    shown = ("hookpoint", "feature", "steps", "region", "when", "colour", "label")
    return {
        **{key: slider[key] for key in shown},
        "picture": _picture_of(request),
        "cells": cells,
        "natural": natural,
        "notches": words.even_notches(changes, natural) if natural else [],
    }


def _about(seconds: float | None) -> str:
    return "" if seconds is None else f", in about {max(1, round(seconds))} s"


def _score(demo: Mapping[str, Any]) -> float:
    """How well a demo steers; 0 where it does not say."""
    try:
        return float(demo["score"]["score"])
    except (KeyError, TypeError, ValueError):
        return 0.0


def _picture_of(request: SteerRequest) -> list[Any]:
    """What an unedited picture is made of: a natural range holds for it alone."""
    own = [] if request.picture is None else [request.picture.digest, request.change]
    return [*request.made_from, *own]
