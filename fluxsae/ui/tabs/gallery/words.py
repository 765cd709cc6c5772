"""Which word of its best caption, left out, silences a feature: the one question of the Gallery that needs FLUX."""

import itertools
from collections.abc import Mapping
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, FeatureCard
from fluxsae.features.silencing import WordEffect, prompts_without_words, word_effects
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, then
from fluxsae.ui.serve.arguments import MAX_RESULTS
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import SilenceRequest
from fluxsae.ui.serve.session import ReadJob


class WordsDesk(Desk):
    """Makes a feature's best image again without each word in turn, at the same seed."""

    def cost_words(self, card: FeatureCard) -> str:
        """How many images the question makes of a feature, and how long that takes; nothing where it cannot."""
        if not card.top_images or card.top_images[0].source is not None:
            return ""
        n_images, steps = 1 + len(prompts_without_words(card.top_images[0].prompt)), self.limits.default_steps
        seconds = self.bench.seconds_of(ReadJob("", 0, steps))
        about = "" if seconds is None else f", about {max(1, round(seconds * n_images))} s"
        return f"{n_images} images{about}"

    def silence(self, selection: Any) -> Events[dict[str, Any]]:
        """Steps of all images together, then what is left of the feature without each word.

        Raises:
            FluxSaeError: no such feature, one that never fired, or one whose best image cannot be made again.
        """
        request = self.chosen(selection)
        cards = self.bench.cards[request.hookpoint]
        readings, variants = self._made(cards, request.feature, MAX_RESULTS)
        return then(readings, lambda found: _silence(cards, request.feature, found, variants))

    def answer(self, request: SilenceRequest) -> Events[tuple[Any, Any]]:
        """Steps of all images together, then what is left without each word, and the images."""
        cards = self.bench.cards[request.hookpoint]
        readings, variants = self._made(cards, request.feature, request.limit)
        return then(readings, lambda found: _answer(cards, request.feature, found, variants))

    def _made(self, cards: CardIndex, feature: int, limit: int) -> tuple[Events[list[Reading]], dict[str, str]]:
        """Readings of a feature's best prompt and of what is left of it without each of its first words."""
        images = cards[feature].top_images
        if not images:
            raise FluxSaeError(f"Feature {feature} never fired in this run, so no word can silence it.")
        if images[0].source is not None:
            raise FluxSaeError(f"The best image of feature {feature} was read from a picture, not made from words.")
        prompt, seed, steps = images[0].prompt, images[0].seed, self.limits.default_steps
        variants = dict(itertools.islice(prompts_without_words(prompt).items(), limit))
        return self.readings(*((text, seed, steps) for text in (prompt, *variants.values()))), variants


def _silence(cards: CardIndex, feature: int, readings: list[Reading], variants: Mapping[str, str]) -> dict[str, Any]:
    """The whole prompt's picture, and one without each word with what is left of the feature's peak."""
    by_prompt, whole = {reading.prompt: reading for reading in readings}, readings[0]
    effects = _effects(cards, feature, readings, variants)
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


def _answer(
    cards: CardIndex, feature: int, readings: list[Reading], variants: Mapping[str, str]
) -> tuple[dict[str, Any], list[tuple[Any, str]]]:
    """What the endpoint gives."""
    whole = readings[0]
    effects = _effects(cards, feature, readings, variants)
    by_prompt = {reading.prompt: reading.image for reading in readings}
    words = [{"word": effect.word, "left": 1 + effect.change, "prompt": variants[effect.word]} for effect in effects]
    found = {**views.summary(cards, feature), "prompt": whole.prompt, "seed": whole.seed, "words": words}
    images = [
        (by_prompt[variants[each.word]], f"without “{each.word}”: {1 + each.change:.0%} is left") for each in effects
    ]
    return found, [(whole.image, whole.prompt), *images]


def _effects(cards: CardIndex, feature: int, readings: list[Reading], variants: Mapping[str, str]) -> list[WordEffect]:
    """What taking each word away does to the feature's peak, the most first.

    Raises:
        FluxSaeError: the feature does not fire on the whole prompt.
    """
    peaks = [float(each.maps[str(cards.hookpoint)].acts(feature, None).max()) for each in readings]
    return word_effects(variants, peaks[0], peaks[1:])


def _picture(reading: Reading, cards: CardIndex, feature: int) -> dict[str, Any]:
    acts = reading.maps[str(cards.hookpoint)].acts(feature, None)
    return {
        "image": views.image_url(reading.image),
        "prompt": reading.prompt,
        "map": views.base64_text(views.byte_map(acts, cards.features[feature].max_act)),
    }
