"""A grammar of prompts: subjects with what fits them; then place, style, light, composition and mood, now and then.

Every seed gives its own endless order; prompts do not repeat.
"""

import random
from collections.abc import Callable, Iterator

from train.prompts import words

Draw = Callable[[tuple[str, ...]], str]
_PLURALS = ("dumplings", "tacos", "oysters on ice", "pears", "figs", "avocados", "artichokes", "mushrooms", "macarons")
_UNCOUNTED = (*_PLURALS, "tomatoes on the vine", "twin sisters", "moss", "ivy", "lavender", "dice", "peeling paint",
              "marbled paper", "cracked mud", "frost on a pane", "woven rope", "tartan cloth", "patchwork", "paella",
              "ratatouille", "rice terraces", "sliced kiwi")  # fmt: skip


def draw_prompts(seed: int | str) -> Iterator[str]:
    """Different prompts without end, in an order that the seed decides."""
    rng = random.Random(f"prompts/{seed}")
    seen: set[str] = set()
    while True:
        prompt = compose_prompt(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def compose_prompt(rng: random.Random) -> str:
    """One prompt of the grammar."""
    subject = _subject(rng)
    if rng.random() < 0.45:
        subject = f"{with_article(rng.choice(words.STYLES))} of {subject}"
    light = [rng.choice(words.LIGHTS)] if rng.random() < 0.55 else []
    composition = [rng.choice(words.COMPOSITIONS)] if rng.random() < 0.4 else []
    mood = [f"{rng.choice(words.MOODS)} mood"] if rng.random() < 0.15 else []
    text = ", ".join([subject, *light, *composition, *mood])
    return text[0].upper() + text[1:]


def with_article(phrase: str) -> str:
    """The phrase with a or an, or as it is where it is no single countable thing."""
    if any(phrase == word or phrase.endswith(f" {word}") for word in _UNCOUNTED):
        return phrase
    sound = phrase.lower()
    vowel = sound.startswith("hour") or (sound[0] in "aeiou" and not sound.startswith(("uni", "ukiyo", "one")))
    return f"{'an' if vowel else 'a'} {phrase}"


def _subject(rng: random.Random) -> str:
    """Who or what, how it looks, what it does and where."""
    draw: Draw = rng.choice
    kinds: list[tuple[Callable[[Draw, random.Random], str], int]] = [
        (_animal, 5), (_person, 5), (_object, 6), (_food, 2), (_plant, 2), (_vehicle, 2), (_building, 2),
        (_landscape, 2), (_pattern, 1), (_fantasy, 1),
    ]  # fmt: skip
    makers, weights = zip(*kinds, strict=True)
    return str(rng.choices(makers, weights)[0](draw, rng))


def _place(draw: Draw, rng: random.Random, share: float = 0.6) -> str:
    return f" {draw(words.PLACES)}" if rng.random() < share else ""


def _looks(draw: Draw, rng: random.Random, looks: tuple[str, ...], noun: str, share: float = 0.6) -> str:
    return with_article(f"{draw(looks)} {noun}" if rng.random() < share else noun)


def _animal(draw: Draw, rng: random.Random) -> str:
    deed = f" {draw(words.ANIMAL_DEEDS)}" if rng.random() < 0.5 else ""
    return _looks(draw, rng, words.ANIMAL_LOOKS, draw(words.ANIMALS)) + deed + _place(draw, rng)


def _person(draw: Draw, rng: random.Random) -> str:
    deed = f" {draw(words.PERSON_DEEDS)}" if rng.random() < 0.7 else ""
    return _looks(draw, rng, words.PERSON_LOOKS, draw(words.PEOPLE)) + deed + _place(draw, rng)


def _object(draw: Draw, rng: random.Random) -> str:
    noun = draw(words.OBJECTS)
    if rng.random() < 0.35:
        noun = f"{draw(words.COLOURS)} {noun}"
    made = f" made of {draw(words.MATERIALS)}" if rng.random() < 0.5 else ""
    return _looks(draw, rng, words.OBJECT_LOOKS, noun) + made + _place(draw, rng)


def _food(draw: Draw, rng: random.Random) -> str:
    plate = with_article(f"{draw(words.COLOURS)} plate")
    dish = f" on {plate}" if rng.random() < 0.35 else _place(draw, rng, 0.4)
    return _looks(draw, rng, words.FOOD_LOOKS, draw(words.FOODS)) + dish


def _plant(draw: Draw, rng: random.Random) -> str:
    return _looks(draw, rng, words.PLANT_LOOKS, draw(words.PLANTS)) + _place(draw, rng)


def _vehicle(draw: Draw, rng: random.Random) -> str:
    noun = draw(words.VEHICLES)
    if rng.random() < 0.5:
        noun = f"{draw(words.COLOURS)} {noun}"
    return _looks(draw, rng, words.VEHICLE_LOOKS, noun) + _place(draw, rng)


def _building(draw: Draw, rng: random.Random) -> str:
    beside = f" beside {with_article(draw(words.LANDSCAPES))}" if rng.random() < 0.5 else ""
    return _looks(draw, rng, words.BUILDING_LOOKS, draw(words.BUILDINGS)) + beside


def _landscape(draw: Draw, rng: random.Random) -> str:
    inhabitant = (
        f" with {_looks(draw, rng, words.ANIMAL_LOOKS, draw(words.ANIMALS), 0.3)}" if rng.random() < 0.5 else ""
    )
    return with_article(draw(words.LANDSCAPES)) + inhabitant


def _pattern(draw: Draw, rng: random.Random) -> str:
    colours = f" in {draw(words.COLOURS)} and {draw(words.COLOURS)}"
    made = f", made of {draw(words.MATERIALS)}" if rng.random() < 0.4 else ""
    return with_article(draw(words.PATTERNS)) + colours + made


def _fantasy(draw: Draw, rng: random.Random) -> str:
    return _looks(draw, rng, words.OBJECT_LOOKS[:4] + words.ANIMAL_LOOKS[-2:], draw(words.FANTASY), 0.3) + _place(
        draw, rng, 0.5
    )
