"""What the Heatmap tab and its endpoints ask for: readings turned into pages and JSON."""

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import (
    Fired,
    differing_features,
    features_at,
    fired,
    first_thing,
    ranked_features,
    shares_of_maximum,
)
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, then
from fluxsae.ui.kit.snippets import PICTURE
from fluxsae.ui.serve.arguments import MAX_RESULTS
from fluxsae.ui.serve.downloads import Downloads, npz_bytes, whole_number
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.pictures import thumbnail_url
from fluxsae.ui.serve.reading import Reading, StepView
from fluxsae.ui.serve.schemas import (
    CompareRequest,
    ExplainRequest,
    FeaturesAtRequest,
    HeatmapRequest,
    ReadPictureRequest,
    SearchRequest,
)
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.heatmap.lab import (
    diff,
    doubted,
    example_lab,
    features_json,
    fired_chip,
    lab,
    opening_lab,
    overlays,
    with_alike,
)
from fluxsae.ui.tabs.heatmap.why import ExplainJob, explanation_json

LEAST_DRIVE = 0.05
"""Share of its maximum in the run from which a feature counts as firing where it is explained."""
SHOWN = 10
"""Cards beside the image."""
PATCH_SHOWN = 6
"""Lines about a patch, each of another label as far as there are."""
LEAST_FOLLOWED = 0.25
"""Share of its maximum from which a feature goes on being shown while an image is painted."""
NEW_SEEDS = 1_000_000
"""Seeds that another prompt is given one of."""
N_SAMPLES = 4
"""Pictures of the run that are offered to read."""


class HeatmapDesk(Desk):
    """The Heatmap tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        example = self.example(self.limits.default_hookpoint)
        self.example_prompt = example["prompt"] if example else ""
        self.example_seed = example["seed"] if example else 0

    def answers(self) -> Answers:
        """/heatmap, /read_picture, /features_at, /explain and /compare."""
        return {
            HeatmapRequest: self.heatmap,
            ReadPictureRequest: self.read_picture,
            FeaturesAtRequest: lambda request: then(
                self.features_at(request), lambda found: features_json(self.bench.cards[request.hookpoint], found)
            ),
            ExplainRequest: self.explain,
            CompareRequest: self.differing,
        }

    def downloads(self) -> Downloads:
        """activations.npz: all that fires in an image that was made lately, as (step, patch, feature, value)."""
        return {"activations.npz": self._activations}

    def _activations(self, asked: Mapping[str, str]) -> bytes:
        given = {name: whole_number(asked, name) for name in ("seed", "num_inference_steps")}
        request = HeatmapRequest.parse(
            self.limits, prompt=asked.get("prompt"), hookpoint=asked.get("hookpoint"), **given
        )
        reading = self.bench.kept_reading(*request.made_from)
        if reading is None:
            raise FluxSaeError("This image is not kept any more. Make it again, then download.")
        maps = reading.maps[request.hookpoint]
        return npz_bytes(
            {
                "steps": np.array(maps.steps),
                "sigmas": np.array(maps.sigmas),
                "step": np.array(maps.steps)[maps.rows // maps.n_tokens],
                "row": maps.rows % maps.n_tokens // reading.grid.cols,
                "column": maps.rows % maps.n_tokens % reading.grid.cols,
                "feature": maps.features,
                "value": maps.values,
            }
        )

    def example(self, hookpoint: str) -> dict[str, Any] | None:
        """The ready example, from the run folder."""
        cards = self.bench.cards[hookpoint]
        example = opening_lab(self.bench.run, cards) or example_lab(cards, limit=SHOWN)
        return example and {**example, **self._frame(_values(example))}

    def example_request(self) -> dict[str, Any]:
        """The example's values, for questions about its patches."""
        return {
            "prompt": self.example_prompt,
            "hookpoint": self.limits.default_hookpoint,
            "seed": self.example_seed,
            "num_inference_steps": self.limits.default_steps,
            "picture": None,
        }

    def samples(self) -> list[dict[str, Any]]:
        """Pictures of the run, to be read as one's own."""
        images = self.bench.images
        rows = [
            round((len(images) - 1) * place / max(1, N_SAMPLES - 1)) for place in range(min(N_SAMPLES, len(images)))
        ]
        return [{"image": thumbnail_url(images, row), "caption": images.prompts[row]} for row in dict.fromkeys(rows)]

    def surprise(self) -> tuple[str, int, int]:
        """Prompt, seed and steps of some image of the run."""
        images = self.bench.images
        row = random.randrange(len(images))
        return images.prompts[row], images.seeds[row], self.limits.default_steps

    def seed_for(self, prompt: Any, seed: Any, is_pinned: Any, values: Mapping[str, Any]) -> Any:
        """The seed to paint with: another one for another prompt, unless it was pinned or just typed."""
        is_other = isinstance(prompt, str) and " ".join(prompt.split()) != values["prompt"]
        return random.randrange(NEW_SEEDS) if is_other and not is_pinned and seed == values["seed"] else seed

    def show(
        self, prompt: Any, hookpoint: Any, seed: Any, steps: Any, selection: Any = None
    ) -> Events[tuple[Any, None, dict[str, Any]]]:
        """Steps, then the page's data for a prompt, no patch, and the values that the data was made of."""
        values = {"prompt": prompt, "hookpoint": hookpoint, "seed": seed, "num_inference_steps": steps}
        request = HeatmapRequest.parse(self.limits, **values)
        values |= {"prompt": request.prompt, "picture": None}
        return then(
            self.bench.read(*request.made_from, has_previews=True),
            lambda reading: (self._lab(reading, request.hookpoint), None, values),
            see=self._watcher(request.hookpoint, selection),
        )

    def show_given(
        self, given: Any, hookpoint: Any, seed: Any, selection: Any = None
    ) -> Events[tuple[Any, None, dict[str, Any]]]:
        """Steps, then the page's data for a visitor's own picture, no patch, and the values that it was made of."""
        if not isinstance(given, Mapping):
            raise FluxSaeError("Choose a picture first: none was sent.")
        request = ReadPictureRequest.parse(
            self.limits,
            picture=given.get("picture"),
            prompt=given.get("caption", ""),
            hookpoint=hookpoint,
            seed=seed,
        )
        self.bench.receive(request.picture)
        values = {
            "prompt": request.prompt,
            "hookpoint": request.hookpoint,
            "seed": request.seed,
            "num_inference_steps": self.limits.default_steps,
            "picture": request.picture.digest,
        }
        return then(
            self._read(values, has_previews=True),
            lambda reading: (self._lab(reading, request.hookpoint), None, values),
            see=self._watcher(request.hookpoint, selection),
        )

    def change_hookpoint(self, hookpoint: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The same image at another hook point: the reading on screen, or the example where none is."""
        hookpoint = SearchRequest.parse(self.limits, hookpoint=hookpoint).hookpoint
        changed = {**values, "hookpoint": hookpoint}
        if not values["prompt"] and not values["picture"]:  # a run that has no example, and nothing made yet
            return None, changed
        reading = self._kept(values)
        if reading is not None:
            return self._lab(reading, hookpoint), changed
        example = self.example(hookpoint)
        return (None, changed) if example is None else (example, _values(example))

    def pin(self, selection: Any, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The image on screen with a feature that was chosen elsewhere among its cards; None where that cannot be."""
        request = self.chosen(selection)
        reading = self._kept(values)
        if reading is None or values["hookpoint"] != request.hookpoint:
            return None
        return self._lab(reading, request.hookpoint, pinned=request.feature)

    def linked(self, view: Mapping[str, Any]) -> tuple[str, str, int, int]:
        """Prompt, hook point, seed and steps of a link."""
        request = HeatmapRequest.pick(self.limits, view)
        return request.prompt, request.hookpoint, request.seed, request.num_inference_steps

    def patch(self, values: Mapping[str, Any], place: Any) -> Events[dict[str, Any]]:
        """Steps (where the image is made again), then what fires at a patch of the image on screen."""
        if not isinstance(place, Mapping):
            raise FluxSaeError("Choose a patch of the image: its row and column are missing.")
        asked = {name: place.get(name) for name in ("step", "row", "column")}
        request = FeaturesAtRequest.parse(self.limits, **self._with_picture(values), **asked, limit=PATCH_SHOWN)
        found = self.features_at(request.model_copy(update={"limit": MAX_RESULTS}))
        return then(found, lambda features: self._patch(request, features))

    def why(self, values: Mapping[str, Any], asked: Any) -> Events[dict[str, Any]]:
        """Steps, then why a feature of the image on screen fires, at a patch or over the whole image."""
        if not isinstance(asked, Mapping):
            raise FluxSaeError("Choose a feature first: its number is missing.")
        named = {name: asked.get(name) for name in ("feature", "step", "row", "column")}
        request = ExplainRequest.parse(self.limits, **self._with_picture(values), **named)
        return then(self.explain(request), lambda found: self._why(request, found))

    def compare(self, prompt: Any, other: Any, hookpoint: Any, seed: Any, steps: Any) -> Events[dict[str, Any]]:
        """Steps of two images, then what fires in one and not in the other."""
        common = {"hookpoint": hookpoint, "seed": seed, "num_inference_steps": steps}
        first, second = (HeatmapRequest.parse(self.limits, prompt=text, **common) for text in (prompt, other))
        cards = self.bench.cards[first.hookpoint]
        return then(self.readings(first.made_from, second.made_from), lambda pair: diff(pair, cards, limit=SHOWN + 2))

    def differing(self, request: CompareRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps of two images, then the features that differ most, and the images."""
        cards, (prompt, seed, steps) = self.bench.cards[request.hookpoint], request.made_from

        def answer(pair: list[Reading]) -> tuple[Any, Any, Any]:
            maps = [reading.maps[request.hookpoint] for reading in pair]
            shares = [shares_of_maximum(each.peaks(None), cards) for each in maps]
            found = [
                {**views.summary(cards, f), "relative": float(shares[0][f]), "other_relative": float(shares[1][f])}
                for f in differing_features(maps, cards, limit=request.limit)
            ]
            return found, pair[0].image, pair[1].image

        return then(self.readings((prompt, seed, steps), (request.other, seed, steps)), answer)

    def heatmap(self, request: HeatmapRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps, then image, ranked features and overlays."""

        def answer(reading: Reading) -> tuple[Any, Any, Any]:
            cards = self.bench.cards[request.hookpoint]
            maps = reading.maps[request.hookpoint]
            features = ranked_features(maps, cards, step=request.step, limit=request.limit)
            return (
                reading.image,
                features_json(cards, features),
                overlays(reading, cards, features, step=request.step),
            )

        return then(self.bench.read(*request.made_from), answer)

    def read_picture(self, request: ReadPictureRequest) -> Events[tuple[Any, Any, Any]]:
        """Steps, then ranked features, overlays, and how the picture compares with the run's own."""

        def answer(reading: Reading) -> tuple[Any, Any, Any]:
            cards, strangest = self.bench.cards[request.hookpoint], reading.strangest
            found = ranked_features(reading.maps[request.hookpoint], cards, step=request.step, limit=request.limit)
            features = doubted(found, reading)
            compared = strangest and {**asdict(strangest), "is_unlike": strangest.is_unlike}
            return features_json(cards, features), overlays(reading, cards, features, step=request.step), compared

        made_from = (request.prompt, request.seed, self.limits.default_steps)
        return then(self.bench.read(*made_from, picture=request.picture), answer)

    def features_at(self, request: FeaturesAtRequest) -> Events[list[Fired]]:
        """Steps, then the ranked features at a patch."""

        def answer(reading: Reading) -> list[Fired]:
            found = features_at(
                reading.maps[request.hookpoint],
                self.bench.cards[request.hookpoint],
                token=reading.grid.token(request.row, request.column),
                step=request.step,
                limit=request.limit,
            )
            return doubted(found, reading)

        return then(self.bench.read(*request.made_from, picture=request.picture), answer)

    def explain(self, request: ExplainRequest) -> Events[dict[str, Any]]:
        """Steps, then words and earlier features by effect."""
        return then(
            self.bench.cached(ExplainJob(request)),
            lambda found: explanation_json(found.explanation, request, self.bench),
        )

    def _with_picture(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values with the visitor's own picture in place of its name."""
        digest = values["picture"]
        return {**values, "picture": self.bench.received(digest) if digest else None}

    def _read(self, values: Mapping[str, Any], *, has_previews: bool) -> Events[Reading]:
        asked = self._with_picture(values)
        made_from = (asked["prompt"], asked["seed"], asked["num_inference_steps"])
        return self.bench.read(*made_from, picture=asked["picture"], has_previews=has_previews)

    def _kept(self, values: Mapping[str, Any]) -> Reading | None:
        """The reading on screen, where it is still kept."""
        try:
            asked = self._with_picture(values)
        except FluxSaeError:
            return None
        made_from = (asked["prompt"], asked["seed"], asked["num_inference_steps"])
        return self.bench.kept_reading(*made_from, asked["picture"])

    def _lab(self, reading: Reading, hookpoint: str, pinned: int | None = None) -> dict[str, Any]:
        page = lab(reading, self.bench.cards[hookpoint], limit=SHOWN, pinned=pinned)
        return {**page, **self._frame(_values(page))}

    def _frame(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if not values["picture"]:
            shown = {name: value for name, value in values.items() if name != "picture"}
            return self.frame(HeatmapRequest, {**shown, "limit": SHOWN}, tab="heatmap")
        asked = {**values, "picture": PICTURE, "limit": SHOWN}
        return {**self.frame(ReadPictureRequest, asked, tab="heatmap"), "link": None}  # a link cannot hold the picture

    def _watcher(self, hookpoint: str, selection: Any) -> Callable[[StepView], dict[str, Any]]:
        """What the page shows of each step: the preview, and the chosen feature's heat, or that of the most telling."""
        cards = self.bench.cards[hookpoint]
        chosen = selection.get("feature") if isinstance(selection, Mapping) else None
        shown: int | None = chosen if isinstance(chosen, int) and selection.get("hookpoint") == hookpoint else None

        def see(view: StepView) -> dict[str, Any]:
            nonlocal shown
            told = {"image": views.data_url(view.preview), "step": view.step, "sigma": view.sigma}
            maps = view.maps.get(hookpoint)
            if maps is None:
                return told
            now = None if shown is None else fired(cards, shown, float(maps.acts(shown, None).max()))
            if now is None or now.relative < LEAST_FOLLOWED:
                ranked = ranked_features(maps, cards, step=None, limit=SHOWN)
                shown = first_thing([each.feature for each in ranked], cards)
                now = next((each for each in ranked if each.feature == shown), None)
            if now is None:
                return told
            heat = views.byte_map(maps.acts(now.feature, None), cards.features[now.feature].max_act)
            return {**told, "feature": fired_chip(cards, now), "map": views.base64_text(heat)}

        return see

    def _code(self, request: FeaturesAtRequest | ExplainRequest) -> dict[str, str]:
        return self.code(type(request), {**_shown(request), "picture": request.picture and PICTURE})

    def _patch(self, request: FeaturesAtRequest, features: list[Fired]) -> dict[str, Any]:
        cards = self.bench.cards[request.hookpoint]
        shown = with_alike(features, PATCH_SHOWN, cards.labels)
        return {
            **_shown(request),
            "at": time.monotonic(),  # asked again, it is told again
            "features": [fired_chip(cards, feature) for feature in shown],
            "code": self._code(request),
        }

    def _why(self, request: ExplainRequest, found: dict[str, Any]) -> dict[str, Any]:
        cards = self.bench.cards
        return {
            **found,
            "at": time.monotonic(),  # asked again, it is told again
            "asked_step": request.step,
            # below, shares of next to nothing would be told as hundreds of percent
            "fires": found["drive"] >= LEAST_DRIVE * float(cards[request.hookpoint].max_acts[request.feature]),
            "features": [
                {**views.chip(cards[each["hookpoint"]], each["feature"]), "share": each["share"]}
                for each in found["features"]
            ],
            "places": [{**each, "place": self.bench.word(each["hookpoint"])} for each in found["hookpoints"]],
            "picture": _shown(request)["picture"],
            "code": self._code(request),
        }


def _values(page: Mapping[str, Any]) -> dict[str, Any]:
    """What the image on a page was made of, and where it is looked at."""
    return {name: page[name] for name in ("prompt", "hookpoint", "seed", "num_inference_steps", "picture")}


def _shown(request: FeaturesAtRequest | ExplainRequest) -> dict[str, Any]:
    """A request's values for the page, a visitor's own picture by its name."""
    return {**request.model_dump(exclude={"picture"}), "picture": request.picture and request.picture.digest}
