"""Why a feature fires: the work in FLUX's lane, and the words and earlier features by effect, with their names."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxsae.features.cards import CardIndex
from fluxsae.runs.names import SaeName
from fluxsae.ui.serve.given import GivenPicture
from fluxsae.ui.serve.lane import OnStep
from fluxsae.ui.serve.reading import readable_steps
from fluxsae.ui.serve.schemas import ExplainRequest
from fluxsae.ui.serve.session import Workbench

if TYPE_CHECKING:
    from fluxsae.steering.attribution import Explanation

GRADIENT_PASSES = 3
"""Passes that one with its gradient takes as long as."""


@dataclass(frozen=True)
class Explained:
    """An explanation, to be kept."""

    explanation: "Explanation"
    n_bytes: int = 16_384
    """Memory held, roughly."""


@dataclass(frozen=True)
class ExplainJob:
    """Take each word and the strongest earlier features away, one at a time, and measure what the feature loses."""

    request: ExplainRequest

    @property
    def picture(self) -> GivenPicture | None:
        """The visitor's own, where none is made."""
        return self.request.picture

    def n_passes(self, bench: Workbench) -> int:
        """Passes of the transformer over one image that it needs at most."""
        from fluxsae.steering.attribution import content_words

        request, n_words = self.request, len(content_words(self.request.prompt))
        before = 0 if self.picture is not None else request.step
        if before is None:  # the first that was trained on, as far along a schedule of this length; without any model
            first, trained = min(bench.info.steps, default=0), bench.limits.default_steps
            before = math.ceil(first * request.num_inference_steps / trained)
        return before + GRADIENT_PASSES * (1 + n_words) + 2 * (n_words + 1 + request.limit)

    @property
    def n_pictures(self) -> int:
        """It makes no picture."""
        return 0

    def run(self, bench: Workbench, on_step: OnStep) -> Explained:
        """The explanation."""
        from fluxsae.flux import noised_picture
        from fluxsae.steering.attribution import Target, explain

        request, settings = self.request, bench.settings(self.request.num_inference_steps)
        step = self._step(bench)
        snapshot = None
        if self.picture is not None:
            asked: dict[str, Any] = {"prompt": request.prompt, "seed": request.seed, "settings": settings}
            snapshot = noised_picture(bench.pipe, self.picture.image, step=step, **asked)
        token = None
        if request.row is not None and request.column is not None:
            token = request.row * bench.limits.cols + request.column
        place = SaeName.parse(request.hookpoint)
        found = explain(
            bench.pipe,
            {SaeName.parse(name): sae for name, sae in bench.saes.items()},
            Target(place, request.feature, step, token),
            prompt=request.prompt,
            seed=request.seed,
            settings=settings,
            snapshot=snapshot,
            limit=request.limit,
            allow_mismatch=["unknown"],
            on_pass=on_step,
        )
        return Explained(found)

    def _step(self, bench: Workbench) -> int:
        """The step asked for, or the first that the SAE was trained on."""
        from fluxsae.flux import schedule_sigmas

        request, ground = self.request, bench.saes[self.request.hookpoint].config.trained_on
        if request.step is not None or ground is None:
            return request.step or 0
        sigmas = schedule_sigmas(bench.pipe, bench.settings(request.num_inference_steps))
        return readable_steps(sigmas, ground)[1][0]


def explanation_json(found: "Explanation", request: ExplainRequest, bench: Workbench) -> dict[str, Any]:
    """An explanation as the endpoint gives it: plain values, with labels of features."""
    values = found.to_dict()
    del values["token"]
    for word in values["words"]:
        word["acts_on"] = [_labelled(bench.cards, feature) for feature in word["acts_on"]]
    values["features"] = [_labelled(bench.cards, feature) for feature in values["features"]]
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "num_inference_steps": request.num_inference_steps,
        "row": request.row,
        "column": request.column,
        **_labelled(bench.cards, values),
    }


def _labelled(cards: dict[str, CardIndex], values: dict[str, Any]) -> dict[str, Any]:
    """Values of a feature, with its label behind its number."""
    label = cards[values["hookpoint"]].labels[values["feature"]]
    return {"hookpoint": values["hookpoint"], "feature": values["feature"], "label": label, **values}
