"""The miniature's language: a caption says what a scene shows and leaves out what it likes."""

import numpy as np

from fluxsae.miniature.drawing import ATTRIBUTES, Scene, SceneObject

PLACES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
SYNONYMS = {
    "grey": "gray",
    "centre": "center",
    "middle": "center",
    "big": "large",
    "huge": "large",
    "little": "small",
    "tiny": "small",
    "violet": "purple",
    "turquoise": "cyan",
    "stripy": "striped",
    "stripes": "striped",
    "spotted": "dotted",
    "plain": "solid",
    "plus": "cross",
    "disc": "circle",
    "donut": "ring",
    "object": "shape",
    "backdrop": "background",
}
"""Words that the miniature's tokenizers read as another word."""


def vocabulary() -> list[str]:
    """All words of the language, in the order of their token ids."""
    glue = ["a", "an", "and", "on", "in", "at", "the", "background", "shape", ","]
    return glue + [word for values in ATTRIBUTES.values() for word in values]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(thing: SceneObject, kept: set[str]) -> str:
    words = [getattr(thing, name) for name in ("size", "colour", "texture") if name in kept]
    words.append(thing.shape if "shape" in kept else "shape")
    place = f" {PLACES[thing.position]}" if "position" in kept else ""
    return _article(" ".join(words)) + place


def caption_scene(
    scene: Scene, rng: np.random.Generator, *, keep: float = 0.75, always: tuple[str, ...] = (), terse: bool = False
) -> str:
    """One caption; every attribute is named with probability `keep`, those in `always` certainly.

    Two objects are named in random order. A terse caption has no articles.
    """
    phrases = []
    for thing in scene.objects:
        kept = {name for name in ATTRIBUTES if name in always or rng.random() < keep}
        phrases.append(_phrase(thing, kept))
    order = rng.permutation(len(phrases))
    text = " and ".join(phrases[index] for index in order)
    if "background" in always or rng.random() < keep:
        text += f" on {_article(scene.background)} background"
    return " ".join(word for word in text.split() if word not in ("a", "an")) if terse else text


def prompted_attributes(prompt: str) -> tuple[list[dict[str, str]], str | None]:
    """What a caption asks for: one mapping attribute -> value per object in the order named, and the background."""
    words = [SYNONYMS.get(word, word) for word in prompt.lower().replace(",", " ").split()]
    background = None
    if "background" in words:
        end = words.index("background")
        background = words[end - 1] if end and words[end - 1] in ATTRIBUTES["background"] else None
        words = words[:end]
    found: list[dict[str, str]] = [{}]
    for word in words:
        if word == "and":
            found.append({})
        for attribute in ("shape", "colour", "texture", "size", "position"):
            if word in ATTRIBUTES[attribute]:
                found[-1][attribute] = word
    return found, background
