"""Which words of a prompt a feature depends on: what is left of it when one is taken away."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fluxsae.errors import FluxSaeError
from fluxsae.features.labels import STOP_WORDS
from fluxsae.runs.prompts import word_pattern, words_of


@dataclass(frozen=True)
class WordEffect:
    """What taking one word out of a prompt does to a feature."""

    word: str
    score: float
    """S without the word, in activation units, at the same seed."""
    change: float = field(compare=False)
    """(S without - S with) / S with: -1 where the feature falls silent."""


def prompts_without_words(prompt: str) -> dict[str, str]:
    """Each content word of a prompt, in order -> the prompt without it; never a blank prompt.

    Raises:
        FluxSaeError: the prompt has no content word, or nothing else.
    """
    words = dict.fromkeys(word for word in words_of(prompt) if word.lower() not in STOP_WORDS)
    left = {word: _without(word, prompt) for word in words}
    variants = {word: text for word, text in left.items() if text}
    if not variants:
        raise FluxSaeError(
            f"the prompt {prompt!r} has no word to take away; give one with a content word and something beside it"
        )
    return variants


def _without(word: str, prompt: str) -> str:
    return " ".join(word_pattern().sub(lambda found: " " if found[0] == word else found[0], prompt).split())


def silencing_words(prompt: str, score: Callable[[Sequence[str]], Sequence[float]]) -> list[WordEffect]:
    """Each content word of a prompt and what is left of a feature without it, the most silencing first.

    `score` generates an image for each prompt at one fixed seed and gives the feature's S; it is called once, with
    the whole prompt first.

    Raises:
        FluxSaeError: there is no word to take away, or the feature does not fire on the prompt to begin with.
    """
    variants = prompts_without_words(prompt)
    whole, *without = score([prompt, *variants.values()])
    return word_effects(variants, whole, without)


def word_effects(words: Iterable[str], whole: float, without: Iterable[float]) -> list[WordEffect]:
    """The words by what is left of the feature without each, the one that silences it most first.

    Raises:
        FluxSaeError: the feature does not fire on the whole prompt.
    """
    if whole <= 0:
        raise FluxSaeError("The feature is silent on this prompt and seed. Choose another of its top images.")
    effects = [WordEffect(word, left, (left - whole) / whole) for word, left in zip(words, without, strict=True)]
    return sorted(effects, key=lambda effect: effect.change)


@dataclass(frozen=True)
class Dependence:
    """A word on which a feature depends in some images, and what is left of it there without the word."""

    word: str
    left: tuple[float, ...]
    """Share of the peak that is left, one for each image."""


def dependences(images: Sequence[Sequence[WordEffect]], *, most: float) -> tuple[list[Dependence], list[float]]:
    """As few words as tell the images apart, the one for most images first; and what is left in the other images.

    A word counts for an image where at `most` this share of the feature's peak is left without it. What is left in
    an image for which no word counts is the least that taking any one of them away leaves.
    """
    left = [{effect.word.lower(): max(0.0, 1 + effect.change) for effect in effects} for effects in images]
    open_images, found = list(range(len(left))), list[Dependence]()
    while True:
        by_word: dict[str, list[int]] = {}
        for image in open_images:
            for word, share in left[image].items():
                if share <= most:
                    by_word.setdefault(word, []).append(image)
        if not by_word:
            return found, [min(left[image].values()) for image in open_images]
        word = max(by_word, key=lambda each: (len(by_word[each]), -sum(left[image][each] for image in by_word[each])))
        found.append(Dependence(word, tuple(left[image][word] for image in by_word[word])))
        open_images = [image for image in open_images if image not in by_word[word]]
