"""The miniature's world: drawn scenes, their masks and their captions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.scenes import (
    ATTRIBUTES,
    SYNONYMS,
    Scene,
    SceneObject,
    caption_scene,
    is_held_out,
    object_mask,
    place_object,
    prompted_attributes,
    render_scene,
    sample_scene,
    vocabulary,
)

SEEDS = st.integers(0, 2**32 - 1)


def a_circle(**changes: object) -> SceneObject:
    values = dict(
        shape="circle", colour="red", texture="solid", size="large", position="center", x=64.0, y=64.0, radius=25.0
    )
    return SceneObject(**{**values, **changes})


def test_the_vocabulary_has_the_promised_number_of_values() -> None:
    least = {"shape": 8, "colour": 8, "texture": 3, "size": 2, "position": 5, "background": 4}
    assert all(len(set(ATTRIBUTES[name])) >= count for name, count in least.items())
    words = vocabulary()
    assert len(set(words)) == len(words)
    assert set(SYNONYMS.values()) <= set(words)


def test_the_mask_of_a_circle_has_the_area_of_a_circle() -> None:
    # radius 0.94 * 25 = 23.5 px, so pi * 23.5^2 = 1735 px
    assert object_mask(a_circle()).sum() == pytest.approx(1735, rel=0.02)


@pytest.mark.parametrize("shape", ATTRIBUTES["shape"])
def test_pixels_change_exactly_where_the_mask_is(shape: str) -> None:
    thing = a_circle(shape=shape)
    drawn, empty = render_scene(Scene((thing,), "black")), render_scene(Scene((), "black"))
    changed = (drawn != empty).any(axis=2)
    mask = object_mask(thing)
    assert changed[mask].all()
    # Anti-aliased edges reach half a pixel beyond the mask.
    assert (changed & ~mask).sum() < 0.2 * mask.sum()


def test_an_edge_pixel_is_partly_covered() -> None:
    drawn = render_scene(Scene((a_circle(colour="red"),), "black"))[64, :, 0].astype(int)
    steps = drawn[(drawn > 30) & (drawn < 170)]
    assert 1 <= len(steps) <= 4


@pytest.mark.parametrize("texture", ["striped", "dotted"])
def test_a_texture_shows_two_tints(texture: str) -> None:
    plain = render_scene(Scene((a_circle(),), "black")).astype(int)
    patterned = render_scene(Scene((a_circle(texture=texture),), "black")).astype(int)
    inside = object_mask(a_circle(radius=22.0))
    differs = np.abs(plain - patterned).max(axis=2)[inside] > 40
    assert 0.15 < differs.mean() < 0.65


@given(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_two_objects_never_overlap(seed: int) -> None:
    first, second = sample_scene(np.random.default_rng(seed), n_objects=2).objects
    assert not (object_mask(first) & object_mask(second)).any()


@given(seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_objects_lie_inside_the_picture(seed: int) -> None:
    for thing in sample_scene(np.random.default_rng(seed)).objects:
        mask = object_mask(thing)
        assert mask.sum() > 250
        frame = np.ones_like(mask)
        frame[1:-1, 1:-1] = False
        assert not (mask & frame).any()


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_training_never_shows_a_held_out_combination(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert not any(is_held_out(thing) for thing in sample_scene(rng).objects)
    assert all(is_held_out(thing) for thing in sample_scene(rng, held_out=True).objects)


def test_every_value_occurs_among_the_held_out_combinations() -> None:
    held = [
        (shape, colour, texture)
        for shape in ATTRIBUTES["shape"]
        for colour in ATTRIBUTES["colour"]
        for texture in ATTRIBUTES["texture"]
        if is_held_out(a_circle(shape=shape, colour=colour, texture=texture))
    ]
    assert len(held) == 24
    for index, name in enumerate(("shape", "colour", "texture")):
        assert {one[index] for one in held} == set(ATTRIBUTES[name])


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_full_caption_names_every_attribute_of_every_object(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    objects, background = prompted_attributes(caption_scene(scene, rng, keep=1.0))
    names = ("shape", "colour", "texture", "size", "position")
    drawn = sorted(tuple(getattr(thing, name) for name in names) for thing in scene.objects)
    assert sorted(tuple(one[name] for name in names) for one in objects) == drawn
    assert background == scene.background


@given(seed=SEEDS)
@settings(max_examples=200, deadline=None)
def test_a_partial_caption_says_nothing_untrue_and_only_known_words(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = sample_scene(rng)
    caption = caption_scene(scene, rng, keep=0.4)
    objects, background = prompted_attributes(caption)
    assert len(objects) == len(scene.objects)
    assert background in (None, scene.background)
    for wanted in objects:
        assert any(wanted.items() <= vars(thing).items() for thing in scene.objects)
    assert set(caption.replace(",", " , ").split()) <= set(vocabulary())


def test_attributes_are_dropped_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    captions = [caption_scene(sample_scene(rng, n_objects=1), rng, keep=0.75) for _ in range(1000)]
    named = np.mean(["background" in caption for caption in captions])
    assert named == pytest.approx(0.75, abs=0.05)


def test_what_must_be_named_always_is() -> None:
    rng = np.random.default_rng(0)
    scene = Scene((a_circle(),), "gray")
    captions = [caption_scene(scene, rng, keep=0.0, always=("colour", "background")) for _ in range(20)]
    assert set(captions) == {"a red shape on a gray background"}


def test_synonyms_are_read_as_the_word_they_stand_for() -> None:
    assert prompted_attributes("a big spotted disc on a grey backdrop")[0] == [
        {"size": "large", "texture": "dotted", "shape": "circle"}
    ]
    assert prompted_attributes("a tiny violet donut on a grey background") == (
        [{"size": "small", "colour": "purple", "shape": "ring"}],
        "gray",
    )


def test_place_object_keeps_what_is_given() -> None:
    thing = place_object(np.random.default_rng(3), position="left", shape="heart", colour="cyan")
    assert (thing.position, thing.shape, thing.colour) == ("left", "heart", "cyan")
    assert thing.x < 40


def test_an_unknown_value_is_refused_with_the_known_ones() -> None:
    with pytest.raises(FluxSaeError, match=r"teal.*black, white, gray, brown"):
        Scene((), "teal")
    with pytest.raises(FluxSaeError, match=r"shape is 'hexagon'.*circle"):
        Scene((a_circle(shape="hexagon"),), "black")
    with pytest.raises(FluxSaeError, match="n_objects is 3"):
        sample_scene(np.random.default_rng(0), n_objects=3)
