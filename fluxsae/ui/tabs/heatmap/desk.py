"""What the Heatmap tab and its endpoints ask for: readings turned into pages and JSON."""

import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.ui.kit import views
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import MAX_RESULTS, FeatureRequest, FeaturesAtRequest, HeatmapRequest
from fluxsae.ui.serve.session import Workbench

SHOWN = 10
"""Cards beside the image."""
PATCH_SHOWN = 6
"""Lines about a patch, each of another label as far as there are."""


class HeatmapDesk:
    """The Heatmap tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.limits = bench.limits
        example = self.example(self.limits.default_hookpoint)
        self.example_prompt = example["prompt"] if example else ""
        self.example_seed = example["seed"] if example else 0

    def example(self, hookpoint: str) -> dict[str, Any] | None:
        """The ready example, from the run folder."""
        example = views.example_lab(self.bench.cards[hookpoint], limit=SHOWN)
        if example is None:
            return None
        return {**example, **self._frame(example["prompt"], hookpoint, example["seed"], self.limits.default_steps)}

    def example_request(self) -> dict[str, Any]:
        """The example's values, for questions about its patches."""
        return self._values(self.example_prompt, self.limits.default_hookpoint, self.example_seed, None)

    def surprise(self) -> tuple[str, int, int]:
        """Prompt, seed and steps of some image of the run."""
        images = self.bench.images
        row = random.randrange(len(images))
        return images.prompts[row], images.seeds[row], self.limits.default_steps

    def show(self, prompt: Any, hookpoint: Any, seed: Any, steps: Any) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps, then the page's data for a prompt."""
        values = self._values(prompt, hookpoint, seed, steps)
        request = HeatmapRequest.parse(self.limits, **values, step=None, limit=SHOWN)
        for event in self.bench.read(request.prompt, request.seed, request.num_inference_steps):
            yield (
                Done({"lab": self._lab(event.value, request.hookpoint), "request": values})
                if isinstance(event, Done)
                else event
            )

    def change_hookpoint(self, hookpoint: Any, values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The same image at another hook point: the reading on screen, or the example where none is."""
        if not values["prompt"]:  # a run that has no example, and nothing made yet
            return None, {**values, "hookpoint": hookpoint}
        request = HeatmapRequest.parse(
            self.limits,
            **self._values(values["prompt"], hookpoint, values["seed"], values["num_inference_steps"]),
            step=None,
            limit=SHOWN,
        )
        changed = {**values, "hookpoint": request.hookpoint}
        reading = self.bench.kept_reading(request.prompt, request.seed, request.num_inference_steps)
        if reading is not None:
            return self._lab(reading, request.hookpoint), changed
        example = self.example(request.hookpoint)
        if example is None:
            return None, changed
        return example, self._values(example["prompt"], request.hookpoint, example["seed"], None)

    def pin(self, chosen: Any, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """The image on screen with a feature that was chosen elsewhere among its cards; None where that cannot be."""
        request = FeatureRequest.parse(self.limits, hookpoint=chosen.get("hookpoint"), feature=chosen.get("feature"))
        reading = self.bench.kept_reading(values["prompt"], values["seed"], values["num_inference_steps"])
        if reading is None or values["hookpoint"] != request.hookpoint:
            return None
        return self._lab(reading, request.hookpoint, pinned=request.feature)

    def linked(self, view: Mapping[str, Any]) -> tuple[str, str, int, int]:
        """Prompt, hook point, seed and steps of a link."""
        names = ("prompt", "hookpoint", "seed", "num_inference_steps")
        request = HeatmapRequest.parse(self.limits, **{name: view.get(name) for name in names}, step=None, limit=SHOWN)
        return request.prompt, request.hookpoint, request.seed, request.num_inference_steps

    def patch(self, values: Mapping[str, Any], place: Any) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps (where the image is made again), then what fires at a patch of the image on screen."""
        if not isinstance(place, Mapping):
            raise FluxSaeError("Choose a patch of the image: its row and column are missing.")
        request = FeaturesAtRequest.parse(
            self.limits,
            **self._values(**values),
            step=place.get("step"),
            row=place.get("row"),
            column=place.get("column"),
            limit=PATCH_SHOWN,
        )
        for event in self.features_at(request.model_copy(update={"limit": MAX_RESULTS})):
            yield Done(self._patch(request, event.value)) if isinstance(event, Done) else event

    def compare(
        self, prompt: Any, other: Any, hookpoint: Any, seed: Any, steps: Any
    ) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps of two images, then what fires in one and not in the other."""
        first, second = (
            HeatmapRequest.parse(self.limits, **self._values(text, hookpoint, seed, steps), step=None, limit=SHOWN)
            for text in (prompt, other)
        )
        readings = []
        for request in (first, second):
            for event in self.bench.read(request.prompt, request.seed, request.num_inference_steps):
                if isinstance(event, Done):
                    readings.append(event.value)
                else:
                    yield event
        yield Done(views.diff(readings[0], readings[1], self.bench.cards[first.hookpoint], limit=SHOWN + 2))

    def heatmap(self, request: HeatmapRequest) -> Iterator[StepDone | Done[tuple[Any, Any, Any]]]:
        """Steps, then image, ranked features and overlays."""
        for event in self.bench.read(request.prompt, request.seed, request.num_inference_steps):
            yield Done(self._answer(event.value, request)) if isinstance(event, Done) else event

    def features_at(self, request: FeaturesAtRequest) -> Iterator[StepDone | Done[list[dict[str, Any]]]]:
        """Steps, then the ranked features at a patch."""
        for event in self.bench.read(request.prompt, request.seed, request.num_inference_steps):
            if isinstance(event, Done):
                reading: Reading = event.value
                yield Done(
                    views.features_at(
                        reading.maps[request.hookpoint],
                        self.bench.cards[request.hookpoint],
                        token=reading.grid.token(request.row, request.column),
                        step=request.step,
                        limit=request.limit,
                    )
                )
            else:
                yield event

    def _answer(self, reading: Reading, request: HeatmapRequest) -> tuple[Any, Any, Any]:
        cards = self.bench.cards[request.hookpoint]
        maps = reading.maps[request.hookpoint]
        features = views.ranked_features(maps, cards, step=request.step, limit=request.limit)
        return reading.image, features, views.overlays(reading, cards, features, step=request.step)

    def _lab(self, reading: Reading, hookpoint: str, pinned: int | None = None) -> dict[str, Any]:
        steps = reading.settings.num_inference_steps
        page = views.lab(reading, self.bench.cards[hookpoint], step=None, limit=SHOWN, pinned=pinned)
        return {**page, **self._frame(reading.prompt, hookpoint, reading.seed, steps)}

    def _frame(self, prompt: str, hookpoint: str, seed: int, steps: int) -> dict[str, Any]:
        return {
            "hookpoint_word": self.bench.word(hookpoint),
            "code": self._code(prompt, hookpoint, seed, steps),
            "link": views.encode_view({"tab": "heatmap", **self._values(prompt, hookpoint, seed, steps)}),
            "versions": dict(self.bench.versions),
        }

    def _patch(self, request: FeaturesAtRequest, features: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "at": time.monotonic(),  # asked again, it is told again
            "row": request.row,
            "column": request.column,
            "prompt": request.prompt,
            "seed": request.seed,
            "num_inference_steps": request.num_inference_steps,
            "hookpoint": request.hookpoint,
            "features": [views.chip(feature) for feature in views.with_alike(features, PATCH_SHOWN)],
            "code": snippets("features_at", request.model_dump(), "features"),
        }

    def _code(self, prompt: str, hookpoint: str, seed: int, steps: int) -> dict[str, str]:
        values = {**self._values(prompt, hookpoint, seed, steps), "step": None, "limit": SHOWN}
        return snippets("heatmap", values, "image, features, overlays")

    def _values(self, prompt: Any, hookpoint: Any, seed: Any, num_inference_steps: Any) -> dict[str, Any]:
        steps = self.limits.default_steps if num_inference_steps is None else num_inference_steps
        return {"prompt": prompt, "hookpoint": hookpoint, "seed": seed, "num_inference_steps": steps}
