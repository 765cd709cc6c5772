"""The miniature's reader."""

from dataclasses import replace

import numpy as np
import pytest

from fluxsae.miniature.drawing import ATTRIBUTES, OF_OBJECTS, Scene, place_object, render_scene, sample_scene
from fluxsae.miniature.reader import read_scene, score_prompt


def test_true_renders_are_read_back() -> None:
    # 0.995 of the attributes are asked for; 24 scenes hold some 200, so that one may be wrong.
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(24):
        scene = sample_scene(rng, held_out=None)
        read = read_scene(render_scene(scene))
        order = {thing.position: thing for thing in read.objects}
        wrong += (read.background != scene.background) + (len(read.objects) != len(scene.objects))
        for thing in scene.objects:
            found = order.get(thing.position)
            wrong += sum(found is None or getattr(found, name) != getattr(thing, name) for name in OF_OBJECTS)
    assert wrong <= 1


@pytest.mark.parametrize("ground", ATTRIBUTES["background"])
def test_an_empty_ground_holds_nothing(ground: str) -> None:
    read = read_scene(render_scene(Scene((), ground)))
    assert read.background == ground
    assert read.objects == ()
    assert read.confidence == 0


def test_a_blot_is_unreadable() -> None:
    pixels = render_scene(Scene((), "white"))
    pixels[40:90, 40:90] = np.random.default_rng(0).integers(0, 255, (50, 50, 3))
    (blot,) = read_scene(pixels).objects
    assert blot.confidence == 0


def a_scene(*names: str) -> Scene:
    rng = np.random.default_rng(0)
    places = ("left", "right", "top")
    return Scene(
        tuple(
            place_object(rng, position=place, thing=name, colour="red", texture="solid", size="small")
            for place, name in zip(places, names, strict=False)
        ),
        "white",
    )


def test_a_missing_thing_has_all_its_attributes_wrong() -> None:
    scores = score_prompt("a red cat and a red dog", a_scene("cat"))
    assert scores == [("number", False), ("colour", True), ("thing", True), ("colour", False), ("thing", False)]


def test_a_thing_too_many_makes_the_number_wrong() -> None:
    assert ("number", True) in score_prompt("a cat", a_scene("cat"))
    assert ("number", False) in score_prompt("a cat", a_scene("cat", "dog"))


def test_an_unreadable_thing_is_one_too_many_and_shows_nothing() -> None:
    scene = a_scene("cat")
    blurred = replace(scene, objects=(replace(scene.objects[0], confidence=0.0),))
    assert score_prompt("a red cat", blurred) == [("number", False), ("colour", False), ("thing", False)]


def test_two_of_a_thing_are_both_looked_for() -> None:
    assert [right for _, right in score_prompt("two cats", a_scene("cat", "dog"))] == [True, True, False]
