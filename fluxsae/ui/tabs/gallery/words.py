"""Which word of its best caption, left out, silences a feature: the one question of the Gallery that needs FLUX."""

from collections.abc import Mapping
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.features.silencing import prompts_without_words, silencing_words
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, then
from fluxsae.ui.serve.reading import Reading


class WordsDesk(Desk):
    """Makes a feature's best image again without each word in turn, at the same seed."""

    def silence(self, selection: Any) -> Events[dict[str, Any]]:
        """Steps of all images together, then what is left of the feature without each word.

        Raises:
            FluxSaeError: no such feature, one that never fired, or one whose best image cannot be made again.
        """
        request = self.chosen(selection)
        cards = self.bench.cards[request.hookpoint]
        images = cards[request.feature].top_images
        if not images:
            raise FluxSaeError(f"Feature {request.feature} never fired in this run, so no word can silence it.")
        prompt, seed, steps = images[0].prompt, images[0].seed, self.limits.default_steps
        variants = prompts_without_words(prompt)
        readings = self.readings(*((text, seed, steps) for text in (prompt, *variants.values())))
        return then(readings, lambda found: _silence(cards, request.feature, found, variants))


def _silence(cards: CardIndex, feature: int, readings: list[Reading], variants: Mapping[str, str]) -> dict[str, Any]:
    """The whole prompt's picture, and one without each word with what is left of the feature's peak."""
    by_prompt = {reading.prompt: reading for reading in readings}

    def score(prompts: Any) -> list[float]:
        return [float(by_prompt[each].maps[str(cards.hookpoint)].acts(feature, None).max()) for each in prompts]

    whole = readings[0]
    effects = silencing_words(whole.prompt, score)
    return {
        **views.chip(cards, feature),
        "seed": whole.seed,
        "rows": cards.info.rows,
        "cols": cards.info.cols,
        "prompt": whole.prompt,
        "whole": _picture(whole, cards, feature),
        "without": [
            {
                "word": effect.word,
                "left": 1 + effect.change,
                **_picture(by_prompt[variants[effect.word]], cards, feature),
            }
            for effect in effects
        ],
    }


def _picture(reading: Reading, cards: CardIndex, feature: int) -> dict[str, Any]:
    acts = reading.maps[str(cards.hookpoint)].acts(feature, None)
    return {
        "image": views.image_url(reading.image),
        "prompt": reading.prompt,
        "map": views.base64_text(views.byte_map(acts, cards.features[feature].max_act)),
    }
