"""Which word of its best captions, left out, silences a feature: the one question of the Gallery that needs FLUX."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, FeatureCard, TopImage
from fluxsae.features.silencing import WordEffect, dependences, prompts_without_words, word_effects
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk, Events, then
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import SilenceRequest
from fluxsae.ui.serve.session import ReadJob

DEPENDS: Final = 0.6
"""Share of a feature's peak that is left at most without a word on which it depends."""
ROUNDING: Final = 1e-9
"""What arithmetic adds to a whole percentage."""


@dataclass(frozen=True)
class Trial:
    """One of a feature's best images, to be made again without each of some words."""

    prompt: str
    seed: int
    without: dict[str, str]
    """Word -> the prompt without it."""
    n_words: int
    """Words of the prompt that could be taken away."""


@dataclass(frozen=True, eq=False)
class Made:
    """An image that was made, and where the feature fires in it: all that is kept of a reading."""

    image: Image.Image
    acts: np.ndarray

    @property
    def peak(self) -> float:
        """The feature's highest activation over the image."""
        return float(self.acts.max())


@dataclass(frozen=True, eq=False)
class TriedImage:
    """An image on which the feature fires, and what is left of it without each word, the least first."""

    trial: Trial
    whole: Made
    effects: list[WordEffect]
    without: dict[str, Made]


@dataclass(frozen=True, eq=False)
class Tried:
    """What was found on a feature's images."""

    images: list[TriedImage]
    n_silent: int
    """Further images on which, made again, it does not fire."""


class WordsDesk(Desk):
    """Makes some of a feature's best images again without each word in turn, each at its own seed."""

    def cost_words(self, card: FeatureCard) -> str:
        """How many images the question makes of a feature, and how long that takes; nothing where it cannot."""
        n_images, steps = _n_made(trials(card, self._asked(card))), self.limits.default_steps
        if not n_images:
            return ""
        seconds = self.bench.seconds_of(ReadJob("", 0, steps))
        about = "" if seconds is None else f", about {max(1, round(seconds * n_images))} s"
        return f"{n_images} images{about}"

    def silence(self, selection: Any) -> Events[dict[str, Any]]:
        """Steps of all images together, then what is left of the feature without each word.

        Raises:
            FluxSaeError: no such feature, one that never fired, or one whose best images cannot be made again.
        """
        chosen = self.chosen(selection)
        cards = self.bench.cards[chosen.hookpoint]
        request = self._asked(cards[chosen.feature])
        return then(self._tried(request), lambda found: _page(cards, request.feature, found))

    def answer(self, request: SilenceRequest) -> Events[tuple[Any, Any]]:
        """Steps of all images together, then what is left without each word, and the images."""
        cards = self.bench.cards[request.hookpoint]
        return then(self._tried(request), lambda found: _answer(cards, request.feature, found))

    def _asked(self, card: FeatureCard) -> SilenceRequest:
        """What the page asks: of as many images as the endpoint by default, or fewer where a visitor may make few."""
        values = {"hookpoint": card.hookpoint, "feature": card.feature}
        request = SilenceRequest.parse(self.limits, **values)
        most = self.bench.visitors.limit
        while most and request.n_images > 1 and _n_made(trials(card, request)) > most:
            request = SilenceRequest.parse(self.limits, **values, n_images=request.n_images - 1)
        return request

    def _tried(self, request: SilenceRequest) -> Events[Tried]:
        card, steps = self.bench.cards[request.hookpoint][request.feature], self.limits.default_steps
        if not card.top_images:
            raise FluxSaeError(f"Feature {request.feature} never fired in this run, so no word can silence it.")
        tried = trials(card, request)
        if not tried:
            raise FluxSaeError(
                f"No word can be taken away from the best images of feature {request.feature}: they were read from "
                "pictures, or have captions of one word. Choose another feature."
            )

        def take(reading: Reading) -> Made:
            return Made(reading.image, reading.maps[request.hookpoint].acts(request.feature, None))

        asked = [(prompt, trial.seed, steps) for trial in tried for prompt in (trial.prompt, *trial.without.values())]
        return then(self.readings(*asked, take=take), lambda made: _sorted_out(tried, made))


def trials(card: FeatureCard, request: SilenceRequest) -> list[Trial]:
    """The best images that can be made again, of different captions where there are; none where none can.

    Of each caption `request.limit` words are taken away at most, first those that most of the captions have.
    """
    made = [(top, variants) for top in card.top_images if top.source is None and (variants := _variants(top))]
    first = {top.prompt: top.image_id for top, _ in reversed(made)}
    made.sort(key=lambda one: first[one[0].prompt] != one[0].image_id)
    chosen = made[: request.n_images]
    shared = Counter(word.lower() for _, variants in chosen for word in variants)
    rank = {word: place for place, (word, _) in enumerate(shared.most_common())}
    found = []
    for top, variants in chosen:
        kept = sorted(variants, key=lambda word: rank[word.lower()])[: request.limit]
        without = {word: text for word, text in variants.items() if word in kept}
        found.append(Trial(top.prompt, top.seed, without, len(variants)))
    return found


def _variants(top: TopImage) -> dict[str, str]:
    try:
        return prompts_without_words(top.prompt)
    except FluxSaeError:  # it has no word that can be taken away
        return {}


def _n_made(tried: Sequence[Trial]) -> int:
    return sum(1 + len(trial.without) for trial in tried)


def _sorted_out(tried: Sequence[Trial], made: Sequence[Made]) -> Tried:
    """What each trial shows, of its whole prompt and of the prompts without a word, which were made in this order.

    Raises:
        FluxSaeError: the feature fires on no whole prompt.
    """
    left, found = iter(made), []
    for trial in tried:
        whole, without = next(left), {word: next(left) for word in trial.without}
        if whole.peak > 0:
            effects = word_effects(without, whole.peak, [each.peak for each in without.values()])
            found.append(TriedImage(trial, whole, effects, without))
    if not found:
        raise FluxSaeError("Made again, its best images do not show this feature. Choose another feature.")
    return Tried(found, len(tried) - len(found))


def verdict(images: Sequence[Sequence[WordEffect]]) -> str:
    """On which words the feature depends, and in how many of the images that is so."""
    n, (words, rest) = len(images), dependences(images, most=DEPENDS)

    def where(count: int) -> str:
        return "in this image" if n == 1 else f"in {count} of {n} images"

    parts = [f"without “{each.word}” {_falls(max(each.left))} {where(len(each.left))}" for each in words]
    if rest:
        least = math.floor(100 * min(rest) + ROUNDING)
        parts.append(f"{where(len(rest))} no word alone silences it: {least} % or more is left without any one")
    told = f"{'; '.join(parts)}."
    return f"The words differ between images: {told}" if len(words) > 1 else told[0].upper() + told[1:]


def _falls(share: float) -> str:
    most = math.ceil(100 * share - ROUNDING)
    return f"its activation falls to {most} % or less" if most else "it is silent"


def remarks(found: Tried) -> str:
    """What was done, and what was left out."""
    images = found.images
    n_tried, n_words = sum(len(image.effects) for image in images), sum(image.trial.n_words for image in images)
    which = "One of its best images was" if len(images) == 1 else f"{len(images)} of its best images were"
    told = [f"{which} made again without each word of the caption in turn, at the same seed."]
    if n_tried < n_words:
        told.append(f"{n_tried} of {n_words} words were tried.")
    if found.n_silent:
        told.append(f"In {found.n_silent} more, made again, the feature did not fire; no word was judged there.")
    told.append("Percentages are of its peak with all words. In other images it may depend on other words.")
    return " ".join(told)


def _page(cards: CardIndex, feature: int, found: Tried) -> dict[str, Any]:
    """Each image of the whole prompt, and those without each word with what is left of the feature's peak."""
    peak = cards.features[feature].max_act

    def picture(prompt: str, made: Made) -> dict[str, Any]:
        heat = views.base64_text(views.byte_map(made.acts, peak))
        return {"image": views.image_url(made.image), "prompt": prompt, "map": heat}

    return {
        **views.chip(cards, feature),
        "rows": cards.info.rows,
        "cols": cards.info.cols,
        "verdict": verdict([image.effects for image in found.images]),
        "remarks": remarks(found),
        "images": [
            {
                "prompt": image.trial.prompt,
                "seed": image.trial.seed,
                "whole": picture(image.trial.prompt, image.whole),
                "without": [
                    {
                        "word": effect.word,
                        "left": 1 + effect.change,
                        **picture(image.trial.without[effect.word], image.without[effect.word]),
                    }
                    for effect in image.effects
                ],
            }
            for image in found.images
        ],
    }


def _answer(cards: CardIndex, feature: int, found: Tried) -> tuple[dict[str, Any], list[tuple[Image.Image, str]]]:
    """What the endpoint gives."""
    images = [
        {
            "prompt": image.trial.prompt,
            "seed": image.trial.seed,
            "peak": image.whole.peak,
            "words": [
                {"word": each.word, "left": 1 + each.change, "prompt": image.trial.without[each.word]}
                for each in image.effects
            ],
        }
        for image in found.images
    ]
    gallery = []
    for image in found.images:
        gallery.append((image.whole.image, f"{image.trial.prompt} (seed {image.trial.seed})"))
        for each in image.effects:
            left = f"without “{each.word}”: {1 + each.change:.0%} is left"
            gallery.append((image.without[each.word].image, left))
    told = {"verdict": verdict([image.effects for image in found.images]), "remarks": remarks(found)}
    return {**views.summary(cards, feature), **told, "images": images}, gallery
