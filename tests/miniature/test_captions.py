"""The miniature's language."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.captions import (
    caption_scene,
    check_prompt,
    nearest_word,
    plural,
    prompted_attributes,
    unknown_words,
    vocabulary,
)
from fluxsae.miniature.drawing import ATTRIBUTES, OF_OBJECTS, sample_scene
from train.miniature.models import TEXT_TOKENS, build_tokenizer, tokenize

SEEDS = st.integers(0, 2**32 - 1)


def words(prompt: str) -> list[str]:
    return build_tokenizer().tokenize(prompt)


def test_no_word_is_twice_in_the_vocabulary() -> None:
    assert len(set(vocabulary())) == len(vocabulary())


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_a_complete_caption_says_the_scene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    caption = caption_scene(scene, rng, keep=1.0)
    objects, background = prompted_attributes(caption)
    assert background == scene.background
    said = {frozenset(found.items()) for found in objects}
    shown = {frozenset((name, getattr(thing, name)) for name in OF_OBJECTS) for thing in scene.objects}
    if caption.startswith("two "):
        shown = {frozenset(pair for pair in pairs if pair[0] != "position") for pairs in shown}
    assert said == shown


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_a_caption_never_says_what_the_scene_does_not_show(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    objects, background = prompted_attributes(caption_scene(scene, rng, keep=0.5))
    assert background in (None, scene.background)
    for found in objects:
        assert any(all(getattr(thing, n) == v for n, v in found.items()) for thing in scene.objects)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0, 1), st.booleans())
def test_every_caption_is_known_word_for_word_and_fits(seed: int, keep: float, terse: bool) -> None:
    rng = np.random.default_rng(seed)
    caption = caption_scene(sample_scene(rng), rng, keep=keep, terse=terse)
    check_prompt(caption)
    assert "[unknown]" not in words(caption)
    assert len(words(caption)) < TEXT_TOKENS


def test_two_of_one_thing_are_asked_for_with_one_phrase() -> None:
    assert prompted_attributes("two red fish in the sea") == ([{"colour": "red", "thing": "fish"}] * 2, "sea")
    assert prompted_attributes("a pair of kittens and a tree")[0] == [{"thing": "cat"}] * 2 + [{"thing": "tree"}]


@pytest.mark.parametrize(
    ("prompt", "meant"),
    [
        ("A big grey ship on the ocean.", "a large gray boat on the sea"),
        ("a picture of 2 puppies on the beach", "two dog on the desert"),
        ("a violet kitten under the night sky", "a purple cat at the night"),
        ("a house with a tree", "a house and a tree"),
        ("two butterflies", "two butterfly"),
    ],
)
def test_what_people_write_is_read_as_the_words_of_the_vocabulary(prompt: str, meant: str) -> None:
    assert words(prompt) == meant.split()
    assert prompted_attributes(prompt) == prompted_attributes(meant)


@pytest.mark.parametrize("thing", ATTRIBUTES["thing"])
def test_every_plural_is_read_as_its_thing(thing: str) -> None:
    assert words(f"two {plural(thing)}") == ["two", thing]


def test_a_colour_before_background_is_no_colour_of_the_thing() -> None:
    assert prompted_attributes("a red cat on a white background") == ([{"colour": "red", "thing": "cat"}], "white")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a horse in a meadow", {"horse": "dog"}),
        ("three cats", {"three": "two", "cats": "two cats"}),
        ("kittens at night", {"kittens": "two kittens"}),
        ("a flwer", {"flwer": "flower"}),
        ("two cats and dogs", {"dogs": "two dogs"}),
        ("a red house on the sea", {}),
    ],
)
def test_unknown_words_and_other_plurals_are_told_with_the_nearest(prompt: str, unknown: dict[str, str]) -> None:
    assert unknown_words(prompt) == unknown


def test_a_refusal_says_what_can_be_painted() -> None:
    with pytest.raises(FluxSaeError, match=r"'horse' \(nearest: 'dog'\).*cat, dog, fish"):
        check_prompt("a horse")


def test_a_nearest_word_is_known_and_a_word_that_is_like_none_has_none() -> None:
    found = [nearest_word(word) for word in ("lion", "castle", "golden", "mushrom", "zzz")]
    assert found == ["cat", "house", "yellow", "mushroom", None]


def test_the_tokens_of_a_prompt_end_and_are_padded() -> None:
    tokens = tokenize(build_tokenizer(), ["a cat"])
    assert tokens.shape == (1, TEXT_TOKENS)
    assert int((tokens != 0).sum()) == 3
