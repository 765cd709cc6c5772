"""The miniature's things: outlines, parts, masks and grounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.drawing import (
    ATTRIBUTES,
    COLOURS,
    IMAGE_SIZE,
    RADII,
    TINTS,
    Scene,
    SceneObject,
    is_held_out,
    object_mask,
    part_mask,
    place_object,
    render_scene,
    sample_scene,
)
from fluxsae.miniature.grounds import GROUNDS, PLACES, ground_pixels
from fluxsae.miniature.outlines import THINGS

SEEDS = st.integers(0, 2**32 - 1)


def a_thing(thing: str, **changes: object) -> SceneObject:
    values = dict(
        thing=thing, colour="red", texture="solid", size="large", position="center", x=64.0, y=64.0, radius=29
    )
    return SceneObject(**{**values, **changes})


def test_the_world_has_what_was_promised() -> None:
    assert {name: len(set(values)) for name, values in ATTRIBUTES.items()} == {
        "thing": 16,
        "colour": 8,
        "texture": 3,
        "size": 2,
        "position": 5,
        "background": 8,
    }


def test_the_mask_of_a_circle_has_the_area_of_a_circle() -> None:
    # radius 0.9 * 29 = 26.1 px, so pi * 26.1^2 = 2140 px
    assert object_mask(a_thing("circle")).sum() == pytest.approx(2140, rel=0.01)


@pytest.mark.parametrize("thing", THINGS)
def test_pixels_change_exactly_where_the_mask_is(thing: str) -> None:
    drawn, empty = render_scene(Scene((a_thing(thing),), "black")), render_scene(Scene((), "black"))
    changed = (drawn != empty).any(axis=2)
    mask = object_mask(a_thing(thing))
    assert changed[mask].all()
    # Anti-aliased edges reach half a pixel beyond the mask.
    assert not (changed & ~ndimage.binary_dilation(mask)).any()


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("size", RADII)
def test_parts_tile_the_thing_and_each_is_seen(thing: str, size: str) -> None:
    drawn = a_thing(thing, radius=RADII[size][0])
    masks = np.stack([part_mask(drawn, part.name) for part in THINGS[thing]])
    assert (masks.sum(axis=0) == object_mask(drawn)).all()
    assert masks.sum(axis=(1, 2)).min() >= 4


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("size", RADII)
def test_a_thing_is_in_one_piece_within_its_radius(thing: str, size: str) -> None:
    mask = object_mask(a_thing(thing, radius=RADII[size][0]))
    assert ndimage.label(mask, structure=np.ones((3, 3)))[1] == 1
    rows, cols = np.nonzero(mask)
    # A pixel's centre may lie half a pixel further out than the outline is seen to reach.
    assert max(np.abs(rows + 0.5 - 64).max(), np.abs(cols + 0.5 - 64).max()) <= RADII[size][0] + 0.5


def test_a_part_has_the_colour_of_its_paint() -> None:
    pixels = render_scene(Scene((a_thing("house", colour="blue"),), "white")).astype(float)
    house = a_thing("house")
    window = ndimage.binary_erosion(part_mask(house, "window"), iterations=3)
    walls = ndimage.binary_erosion(part_mask(house, "walls"), iterations=3)
    assert np.abs(pixels[window].mean(axis=0) - TINTS["cream"]).max() < 20
    assert np.abs(pixels[walls].mean(axis=0) - COLOURS["blue"]).max() < 20


def test_an_unknown_part_is_refused_with_those_that_exist() -> None:
    with pytest.raises(FluxSaeError, match=r"part is 'wing'; a boat has mast, sails, hull"):
        part_mask(a_thing("boat"), "wing")


def test_a_scene_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(FluxSaeError, match="thing is 'zebra'"):
        Scene((a_thing("zebra"),), "white")
    with pytest.raises(FluxSaeError, match="background is 'moon'"):
        Scene((), "moon")


@pytest.mark.parametrize("ground", GROUNDS)
def test_no_ground_shows_one_of_the_eight_colours(ground: str) -> None:
    pixels = ground_pixels(ground).reshape(-1, 1, 3)
    assert np.linalg.norm(pixels - np.array(list(COLOURS.values())), axis=-1).min() > 40


def test_what_decorates_a_place_stands_where_no_thing_is() -> None:
    rows, cols = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
    reach = RADII["large"][1] + 2
    middle = (np.abs(rows - 64) < reach) & (np.abs(cols - 64) < reach)
    for place in PLACES:
        # Sky and hills change by small steps; the edge of a sun or a cloud in front of a thing would be a large one.
        sky = middle & (rows < 64)
        steps = np.abs(np.diff(ground_pixels(place), axis=1)).max(axis=2)
        assert steps[sky[:, 1:]].max() < 4


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_training_scenes_never_show_what_is_held_out(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not any(is_held_out(thing) for thing in sample_scene(rng).objects)
    assert all(is_held_out(thing) for thing in sample_scene(rng, held_out=True).objects)


def test_an_eighth_of_the_combinations_is_held_out_of_every_value() -> None:
    combinations = [
        a_thing(thing, colour=colour, texture=texture)
        for thing in ATTRIBUTES["thing"]
        for colour in ATTRIBUTES["colour"]
        for texture in ATTRIBUTES["texture"]
    ]
    held_out = [thing for thing in combinations if is_held_out(thing)]
    assert len(held_out) == len(combinations) // 8
    for name in ("thing", "colour", "texture"):
        assert {getattr(thing, name) for thing in held_out} == set(ATTRIBUTES[name])


def test_scenes_hold_one_or_two_things() -> None:
    rng = np.random.default_rng(0)
    assert {len(sample_scene(rng).objects) for _ in range(20)} == {1, 2}
    with pytest.raises(FluxSaeError, match="n_objects is 3"):
        sample_scene(rng, n_objects=3)


def test_what_is_not_named_is_drawn_at_random_and_what_is_named_stays() -> None:
    rng = np.random.default_rng(0)
    placed = [place_object(rng, position="left", thing="cat") for _ in range(30)]
    assert {thing.thing for thing in placed} == {"cat"}
    assert len({thing.colour for thing in placed}) > 4
