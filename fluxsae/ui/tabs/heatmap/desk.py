"""What the Heatmap tab and its endpoints ask for: readings turned into pages and JSON."""

import random
import time
from collections.abc import Mapping
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import Fired, features_at, ranked_features
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, then
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.serve.arguments import MAX_RESULTS
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import ExplainRequest, FeaturesAtRequest, HeatmapRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.heatmap.lab import diff, example_lab, features_json, fired_chip, lab, overlays, with_alike
from fluxsae.ui.tabs.heatmap.why import ExplainJob, explanation_json

LEAST_DRIVE = 0.05
"""Share of its maximum in the run from which a feature counts as firing where it is explained."""
SHOWN = 10
"""Cards beside the image."""
PATCH_SHOWN = 6
"""Lines about a patch, each of another label as far as there are."""


class HeatmapDesk(Desk):
    """The Heatmap tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        example = self.example(self.limits.default_hookpoint)
        self.example_prompt = example["prompt"] if example else ""
        self.example_seed = example["seed"] if example else 0

    def answers(self) -> Answers:
        """/heatmap, /features_at and /explain."""
        return {
            HeatmapRequest: self.heatmap,
            FeaturesAtRequest: lambda request: then(
                self.features_at(request), lambda found: features_json(self.bench.cards[request.hookpoint], found)
            ),
            ExplainRequest: self.explain,
        }

    def example(self, hookpoint: str) -> dict[str, Any] | None:
        """The ready example, from the run folder."""
        example = example_lab(self.bench.cards[hookpoint], limit=SHOWN)
        return example and {**example, **self._frame(_values(example))}

    def example_request(self) -> dict[str, Any]:
        """The example's values, for questions about its patches."""
        return {
            "prompt": self.example_prompt,
            "hookpoint": self.limits.default_hookpoint,
            "seed": self.example_seed,
            "num_inference_steps": self.limits.default_steps,
        }

    def surprise(self) -> tuple[str, int, int]:
        """Prompt, seed and steps of some image of the run."""
        images = self.bench.images
        row = random.randrange(len(images))
        return images.prompts[row], images.seeds[row], self.limits.default_steps

    def show(self, prompt: Any, hookpoint: Any, seed: Any, steps: Any) -> Events[tuple[Any, None, dict[str, Any]]]:
        """Steps, then the page's data for a prompt, no patch, and the values that the data was made of."""
        values = {"prompt": prompt, "hookpoint": hookpoint, "seed": seed, "num_inference_steps": steps}
        request = HeatmapRequest.parse(self.limits, **values)
        return then(
            self.bench.read(*request.picture),
            lambda reading: (self._lab(reading, request.hookpoint), None, values),
        )

    def change_hookpoint(self, hookpoint: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The same image at another hook point: the reading on screen, or the example where none is."""
        changed = {**values, "hookpoint": hookpoint}
        if not values["prompt"]:  # a run that has no example, and nothing made yet
            return None, changed
        request = HeatmapRequest.parse(self.limits, **changed)
        reading = self.bench.kept_reading(*request.picture)
        if reading is not None:
            return self._lab(reading, request.hookpoint), changed
        example = self.example(request.hookpoint)
        return (None, changed) if example is None else (example, _values(example))

    def pin(self, selection: Any, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The image on screen with a feature that was chosen elsewhere among its cards; None where that cannot be."""
        request = self.chosen(selection)
        reading = self.bench.kept_reading(values["prompt"], values["seed"], values["num_inference_steps"])
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
        request = FeaturesAtRequest.parse(self.limits, **values, **asked, limit=PATCH_SHOWN)
        found = self.features_at(request.model_copy(update={"limit": MAX_RESULTS}))
        return then(found, lambda features: self._patch(request, features))

    def why(self, values: Mapping[str, Any], asked: Any) -> Events[dict[str, Any]]:
        """Steps, then why a feature of the image on screen fires, at a patch or over the whole image."""
        if not isinstance(asked, Mapping):
            raise FluxSaeError("Choose a feature first: its number is missing.")
        named = {name: asked.get(name) for name in ("feature", "step", "row", "column")}
        request = ExplainRequest.parse(self.limits, **values, **named)
        return then(self.explain(request), lambda found: self._why(request, found))

    def compare(self, prompt: Any, other: Any, hookpoint: Any, seed: Any, steps: Any) -> Events[dict[str, Any]]:
        """Steps of two images, then what fires in one and not in the other."""
        common = {"hookpoint": hookpoint, "seed": seed, "num_inference_steps": steps}
        first, second = (HeatmapRequest.parse(self.limits, prompt=text, **common) for text in (prompt, other))
        cards = self.bench.cards[first.hookpoint]
        return then(self.readings(first.picture, second.picture), lambda pair: diff(pair, cards, limit=SHOWN + 2))

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

        return then(self.bench.read(*request.picture), answer)

    def features_at(self, request: FeaturesAtRequest) -> Events[list[Fired]]:
        """Steps, then the ranked features at a patch."""

        def answer(reading: Reading) -> list[Fired]:
            return features_at(
                reading.maps[request.hookpoint],
                self.bench.cards[request.hookpoint],
                token=reading.grid.token(request.row, request.column),
                step=request.step,
                limit=request.limit,
            )

        return then(self.bench.read(*request.picture), answer)

    def explain(self, request: ExplainRequest) -> Events[dict[str, Any]]:
        """Steps, then words and earlier features by effect."""
        return then(
            self.bench.cached(ExplainJob(request)),
            lambda found: explanation_json(found.explanation, request, self.bench),
        )

    def _lab(self, reading: Reading, hookpoint: str, pinned: int | None = None) -> dict[str, Any]:
        page = lab(reading, self.bench.cards[hookpoint], limit=SHOWN, pinned=pinned)
        return {**page, **self._frame(_values(page))}

    def _frame(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return self.frame(HeatmapRequest, {**values, "limit": SHOWN}, tab="heatmap")

    def _patch(self, request: FeaturesAtRequest, features: list[Fired]) -> dict[str, Any]:
        cards = self.bench.cards[request.hookpoint]
        shown = with_alike(features, PATCH_SHOWN, cards.labels)
        return {
            **request.model_dump(),
            "at": time.monotonic(),  # asked again, it is told again
            "features": [fired_chip(cards, feature) for feature in shown],
            "code": snippets(FeaturesAtRequest, request.model_dump()),
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
            "code": snippets(ExplainRequest, request.model_dump()),
        }


def _values(page: Mapping[str, Any]) -> dict[str, Any]:
    """What the image on a page was made of, and where it is looked at."""
    return {name: page[name] for name in ("prompt", "hookpoint", "seed", "num_inference_steps")}
