"""Names against drawn scenes: true or not, and where beside the thing a planted feature fires."""

import numpy as np
import pytest

from fluxsae.features.naming import PLACES
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.laboratory.naming import cover_of, find_place, is_true, places_of
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, place_object, sample_scene

GRID = TokenGrid(8, 8)
# a block of 2 x 2 patches in rows and columns 3 and 4, its right column only half
BLOCK = np.zeros((8, 8))
BLOCK[3:5, 3], BLOCK[3:5, 4] = 1.0, 0.4


def told(row: int, col: int) -> set[str]:
    found = places_of(row * 8 + col, BLOCK.ravel(), GRID)
    return {place for place, holds in zip(PLACES, found, strict=True) if holds}


def test_places_by_hand() -> None:
    assert told(3, 3) == {"inside"}
    assert told(3, 4) == {"inside", "edge"}  # less than half of the patch
    assert told(5, 3) == {"below", "edge"}
    assert told(2, 4) == {"above", "edge"}
    assert told(7, 3) == {"below", "away"}
    assert told(3, 0) == {"left", "away"}
    assert told(4, 7) == {"right", "away"}
    assert told(5, 5) == {"below", "right", "edge"}  # a corner is on both sides


def scene() -> Scene:
    rng = np.random.default_rng(0)
    shape, colour = next(iter(ATTRIBUTES)), "colour"
    values = {shape: ATTRIBUTES[shape][0], colour: ATTRIBUTES[colour][0]}
    return Scene((place_object(rng, position="left", **values),), ATTRIBUTES["background"][0])


def test_a_name_is_true_of_one_object_or_of_the_ground() -> None:
    shown = scene()
    (thing,), kind = shown.objects, next(iter(ATTRIBUTES))
    name, colour = getattr(thing, kind), thing.colour
    assert is_true(f"{colour} {name}", shown)
    assert is_true(f"{colour} {kind}", shown)  # the word for any thing says nothing
    assert not is_true(kind, shown)
    assert is_true(f"{shown.background} background", shown)
    assert not is_true(f"{colour} background", shown)
    other = next(value for value in ATTRIBUTES["colour"] if value != colour)
    assert not is_true(f"{other} {name}", shown)


def test_the_ground_covers_what_the_things_do_not() -> None:
    shown = scene()
    thing, ground = (
        cover_of(name, shown, GRID) for name in (shown.objects[0].colour, f"{shown.background} background")
    )
    assert thing is not None
    assert ground is not None
    assert thing + ground == pytest.approx(np.ones(64))
    assert cover_of("nothing of the kind", shown, GRID) is None


@pytest.mark.parametrize("place", ["inside", "below", "varies"])
def test_a_planted_place_is_found_and_shuffled_tokens_have_none(place: str) -> None:
    rng = np.random.default_rng(1)
    scenes = {i: sample_scene(rng, n_objects=1) for i in range(60)}
    name = "large"
    shown = np.array([is_true(name, each) for each in scenes.values()])
    tokens = rng.integers(64, size=60)
    for image in np.flatnonzero(shown) if place != "varies" else []:
        cover = cover_of(name, scenes[int(image)], GRID)
        assert cover is not None
        fits = [t for t in range(64) if places_of(t, cover, GRID)[list(PLACES).index(place)]]
        tokens[image] = rng.choice(fits)
    held_out = np.arange(60) % 2 == 0
    found = find_place(name, shown.astype(float), tokens, scenes, grid=GRID, held_out=held_out)
    assert found is not None
    assert found.place == place
    assert found.n_images == (shown & held_out).sum()
    assert (found.share == 1.0) == (place != "varies")


def test_too_few_images_tell_no_place() -> None:
    scenes = {0: scene(), 1: scene()}
    name = scenes[0].objects[0].colour
    assert find_place(name, np.ones(2), np.zeros(2, int), scenes, grid=GRID, held_out=np.array([True, False])) is None
