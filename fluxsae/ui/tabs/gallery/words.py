"""Which word of its best caption, taken away, silences a feature: the one question of the Gallery that needs FLUX."""

from collections.abc import Iterator, Mapping
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.features.silencing import prompts_without_words, silencing_words
from fluxsae.ui.kit import views
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import FeatureRequest
from fluxsae.ui.serve.session import Workbench


class WordsDesk:
    """Makes a feature's best image again without each word in turn, at the same seed."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench

    def silence(self, chosen: Any) -> Iterator[StepDone | Done[dict[str, Any]]]:
        """Steps of all images together, then what is left of the feature without each word.

        Raises:
            FluxSaeError: no such feature, one that never fired, or one whose best image cannot be made again.
        """
        if not isinstance(chosen, Mapping):
            raise FluxSaeError("Choose a feature first: its hook point and number are missing.")
        request = FeatureRequest.parse(
            self.bench.limits, hookpoint=chosen.get("hookpoint"), feature=chosen.get("feature")
        )
        cards = self.bench.cards[request.hookpoint]
        images = cards[request.feature].top_images
        if not images:
            raise FluxSaeError(f"Feature {request.feature} never fired in this run: there is nothing to silence.")
        prompt, seed = images[0].prompt, images[0].seed
        variants = prompts_without_words(prompt)
        readings: dict[str, Reading] = {}
        for event in self._read([prompt, *variants.values()], seed):
            if isinstance(event, Done):
                readings[event.value.prompt] = event.value
            else:
                yield event
        yield Done(self._page(cards, request.feature, readings, prompt=prompt, variants=variants))

    def _read(self, prompts: list[str], seed: int) -> Iterator[StepDone | Done[Reading]]:
        for place, prompt in enumerate(prompts):
            for event in self.bench.read(prompt, seed, self.bench.limits.default_steps):
                if isinstance(event, StepDone):
                    yield StepDone(place * event.n_steps + event.step, len(prompts) * event.n_steps)
                else:
                    yield event

    def _page(
        self,
        cards: CardIndex,
        feature: int,
        readings: Mapping[str, Reading],
        *,
        prompt: str,
        variants: Mapping[str, str],
    ) -> dict[str, Any]:
        def score(prompts: Any) -> list[float]:
            return [float(readings[each].maps[str(cards.hookpoint)].acts(feature, None).max()) for each in prompts]

        effects = silencing_words(prompt, score)
        maximum = cards.features[feature].max_act
        return {
            **views.chip(views.summary(cards, feature)),
            "prompt": prompt,
            "seed": readings[prompt].seed,
            "rows": cards.info.rows,
            "cols": cards.info.cols,
            "whole": _picture(readings[prompt], cards, feature, maximum),
            "without": [
                {
                    "word": effect.word,
                    "left": 1 + effect.change,
                    **_picture(readings[variants[effect.word]], cards, feature, maximum),
                }
                for effect in effects
            ],
        }


def _picture(reading: Reading, cards: CardIndex, feature: int, maximum: float) -> dict[str, Any]:
    acts = reading.maps[str(cards.hookpoint)].acts(feature, None)
    return {
        "image": views.image_url(reading.image),
        "prompt": reading.prompt,
        "map": views.base64_text(views.byte_map(acts, maximum)),
    }
