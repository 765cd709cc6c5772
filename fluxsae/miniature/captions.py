"""The language of the picture book: captions as people write them, and what a prompt asks for.

Every form that the language knows is folded into one word of `vocabulary()`, for the tokenizer as well.
"""

import difflib
import re

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.drawing import ATTRIBUTES, OF_OBJECTS, Scene, SceneObject
from fluxsae.miniature.grounds import GROUNDS, PLAIN

POSITION_PHRASES = {
    "center": "in the center",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "meadow": ("in a meadow", "in the meadow", "on a meadow"),
    "sea": ("on the sea", "in the sea", "at the sea"),
    "desert": ("in the desert", "in a desert", "on the desert"),
    "night": ("at night", "at night", "in the night"),
}
"""How captions say a place, the likelier ones twice."""
PHRASES = {
    **POSITION_PHRASES,
    **{ground: f"on a {ground} background" for ground in PLAIN},
    **{place: said[0] for place, said in PLACE_PHRASES.items()},
}
"""Word of the vocabulary -> how a prompt says it, where that is more than the word."""
GLUE = ("a", "an", "and", "on", "in", "at", "the", "two", "background", "thing")
FORMS: dict[str, tuple[str, ...]] = {
    "cat": ("kitten", "kitty"),
    "dog": ("puppy", "doggy", "hound"),
    "fish": ("goldfish",),
    "bird": ("birdie", "chick"),
    "butterfly": ("moth",),
    "flower": ("blossom", "daisy"),
    "mushroom": ("toadstool", "fungus"),
    "house": ("home", "cottage", "hut", "cabin"),
    "car": ("auto", "automobile"),
    "boat": ("ship", "sailboat", "yacht"),
    "circle": ("disc", "disk", "ball"),
    "thing": ("object",),
    "purple": ("violet",),
    "cyan": ("turquoise",),
    "gray": ("grey",),
    "solid": ("plain",),
    "striped": ("stripy", "stripey", "stripes"),
    "dotted": ("spotted", "spotty", "dots"),
    "large": ("big", "huge"),
    "small": ("little", "tiny"),
    "center": ("centre", "middle"),
    "background": ("backdrop",),
    "meadow": ("field", "grass", "garden"),
    "sea": ("ocean", "water", "lake"),
    "desert": ("beach", "sand"),
    "night": ("night sky", "nighttime"),
    "two": ("2", "a pair of", "a couple of"),
    "and": ("with", "beside", "&"),
    "at": ("under", "by"),
    "on": ("onto",),
    "in": ("inside",),
}
"""Word -> what people also write for it."""


def plural(noun: str) -> str:
    """Its plural as people write it."""
    if noun.endswith("fish"):
        return noun
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"


PLURALS = {
    plural(form): noun
    for noun in (*ATTRIBUTES["thing"], "thing")
    for form in (noun, *FORMS.get(noun, ()))
    if plural(form) != form
}
"""Plural -> the thing; only "two" may stand before a plural."""
SYNONYMS = {form: word for word, forms in FORMS.items() for form in forms} | PLURALS
"""What people write -> the word of the vocabulary that is meant."""
ALIKE = 0.6
"""Likeness in spelling, 0 to 1, from which a word may be meant."""
NEAR_MEANINGS: dict[str, tuple[str, ...]] = {
    "cat": ("lion", "tiger", "leopard", "fox", "mouse", "rabbit", "bunny"),
    "dog": ("horse", "cow", "pig", "sheep", "wolf", "bear", "elephant", "animal", "man", "woman", "person"),
    "fish": ("whale", "shark", "dolphin", "frog"),
    "bird": ("duck", "chicken", "owl", "eagle", "penguin", "plane", "airplane", "dragon"),
    "butterfly": ("bee", "bug", "insect", "ladybug", "beetle", "spider"),
    "tree": ("bush", "forest", "palm", "plant", "mountain"),
    "flower": ("rose", "tulip", "sunflower"),
    "apple": ("pear", "banana", "cherry", "fruit", "cake", "pumpkin"),
    "house": ("castle", "building", "tower", "church", "city", "tent"),
    "car": ("bus", "truck", "train", "bike", "bicycle", "tractor", "vehicle"),
    "boat": ("canoe", "ferry", "raft", "submarine"),
    "star": ("sun", "moon", "triangle", "diamond", "cross", "snowflake"),
    "circle": ("ring", "balloon", "planet", "wheel", "ellipse"),
    "square": ("box", "cube", "rectangle"),
    "brown": ("beige", "tan"),
    "yellow": ("gold", "golden"),
    "red": ("crimson", "scarlet"),
    "pink": ("magenta",),
    "blue": ("navy", "indigo"),
    "green": ("lime", "olive"),
    "gray": ("silver",),
    "meadow": ("park", "hill", "hills", "farm"),
    "sea": ("river", "pond", "waves"),
    "two": ("three", "four", "five", "many", "some", "several"),
}
"""Word -> words that the language does not know, for which it is the nearest in meaning."""
FILLERS = (
    r"(?:an? |the )?(?:picture|photo|drawing|image|painting|illustration) of",
    r"there (?:is|are)",
    r"(?:very|one)\b",
    r"[.,!;:]",
)
"""Patterns that mean nothing here."""


def vocabulary() -> list[str]:
    """All words of the language, in the order of their token ids."""
    return [*GLUE, *(word for values in ATTRIBUTES.values() for word in values)]


def folds() -> list[tuple[str, str]]:
    """(pattern, what it is replaced by), in order: forms that the language knows, as words of its vocabulary."""
    known = sorted(SYNONYMS.items(), key=lambda pair: -len(pair[0]))
    return [*((pattern, " ") for pattern in FILLERS), *((rf"(?<!\w){form}(?!\w)", word) for form, word in known)]


def _place_phrase(background: str, rng: np.random.Generator) -> str:
    if background in PLAIN:
        return f"on {_article(background)} background"
    return str(rng.choice(PLACE_PHRASES[background]))


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _adjectives(thing: SceneObject, kept: set[str]) -> str:
    return " ".join(getattr(thing, name) for name in ("size", "colour", "texture") if name in kept)


def _phrase(thing: SceneObject, kept: set[str]) -> str:
    noun = thing.thing if "thing" in kept else "thing"
    place = f" {POSITION_PHRASES[thing.position]}" if "position" in kept else ""
    return _article(f"{_adjectives(thing, kept)} {noun}".strip()) + place


def caption_scene(
    scene: Scene, rng: np.random.Generator, *, keep: float = 0.75, always: tuple[str, ...] = (), terse: bool = False
) -> str:
    """One caption; every attribute is named with probability `keep`, those in `always` certainly.

    Two objects are named in random order, or as "two ..." where one phrase fits both. A terse caption has no articles.
    """
    kept = [{name for name in OF_OBJECTS if name in always or rng.random() < keep} for _ in scene.objects]
    differ = {n for n in OF_OBJECTS if len({getattr(thing, n) for thing in scene.objects}) > 1}
    # A phrase for both cannot say what they differ in, so it is used where nothing that has to be said is lost.
    told = kept[0] - {"position"}
    if len(scene.objects) == 2 and "thing" in told and not (differ - {"position"}) & (told | set(always)):
        text = f"two {_adjectives(scene.objects[0], told)} {plural(scene.objects[0].thing)}"
    else:
        phrases = [_phrase(thing, names) for thing, names in zip(scene.objects, kept, strict=True)]
        text = " and ".join(phrases[index] for index in rng.permutation(len(phrases)))
    if "background" in always or rng.random() < keep:
        text += f" {_place_phrase(scene.background, rng)}"
    return " ".join(word for word in text.split() if not (terse and word in ("a", "an")))


def _folded(prompt: str) -> str:
    text = prompt.lower()
    for pattern, word in folds():
        text = re.sub(pattern, word, text)
    return text


def unknown_words(prompt: str) -> dict[str, str | None]:
    """The words that the language does not know, each with the nearest that it does, if one is near.

    A plural without "two" before its phrase counts as unknown: the picture book paints one or two of a thing.
    """
    known = set(vocabulary())
    found: dict[str, str | None] = {word: nearest_word(word) for word in _folded(prompt).split() if word not in known}
    for phrase in re.split(rf"\b(?:and|{'|'.join(FORMS['and'])})\b", prompt.lower()):
        if "two" not in _folded(phrase).split():
            found |= {word: f"two {word}" for word in re.findall(r"\w+", phrase) if word in PLURALS}
    return found


def nearest_word(word: str) -> str | None:
    """The known word that is nearest: in meaning where a list knows it, else in spelling; None if none is near."""
    for near, words in NEAR_MEANINGS.items():
        if word in words or word.removesuffix("s") in words:
            return near
    forms = SYNONYMS | {name: name for name in vocabulary() if name not in GLUE or len(name) > 3}
    close = difflib.get_close_matches(word, forms, n=1, cutoff=ALIKE)
    return forms[close[0]] if close else None


def check_prompt(prompt: str) -> None:
    """Says which words of a prompt the miniature cannot paint.

    Raises:
        FluxSaeError: with every unknown word and the nearest known one.
    """
    unknown = unknown_words(prompt)
    if unknown:
        hints = "; ".join(f"{word!r}" + (f" (nearest: {near!r})" if near else "") for word, near in unknown.items())
        raise FluxSaeError(
            f"The miniature does not know {hints}. It paints one or two of: {', '.join(ATTRIBUTES['thing'])}."
        )


def prompted_attributes(prompt: str) -> tuple[list[dict[str, str]], str | None]:
    """What a caption asks for: one mapping attribute -> value per object in the order named, and the background.

    Words that are unknown are passed over. "two red fish" are two objects.
    """
    objects: list[dict[str, str]] = []
    background: str | None = None
    owner = {word: name for name in OF_OBJECTS for word in ATTRIBUTES[name]}
    for phrase in _folded(prompt).split(" and "):
        words = phrase.split()
        found: dict[str, str] = {}
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word in GROUNDS and (word not in PLAIN or following == "background"):
                background = word
            elif word in owner:
                found[owner[word]] = word
        is_named = bool(found) or "thing" in words
        objects += [dict(found) for _ in range((2 if "two" in words else 1) if is_named else 0)]
    return objects, background
