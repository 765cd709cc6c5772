"""Reading a scene back from its picture."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.reader import read_scene, score_prompt
from fluxsae.miniature.scenes import Scene, SceneObject, caption_scene, render_scene, sample_scene

OBJECT_ATTRIBUTES = ("shape", "colour", "texture", "size", "position")


def damaged(pixels: np.ndarray, rng: np.random.Generator, damage: str) -> np.ndarray:
    values = pixels.astype(np.float64)
    if damage in ("blur", "all"):
        values = ndimage.gaussian_filter(values, (1.0, 1.0, 0))
    if damage in ("tint", "all"):
        values = values * (1 + rng.normal(0, 0.05, 3)) + rng.normal(0, 6, 3)
    if damage in ("noise", "all"):
        values = values + rng.normal(0, 6, values.shape)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def share_right(count: int, damage: str = "none") -> dict[str, float]:
    """The share of attributes read back right, per attribute, over random scenes."""
    rng = np.random.default_rng(7)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for _ in range(count):
        scene = sample_scene(rng, held_out=None)
        read = read_scene(damaged(render_scene(scene), rng, damage))
        for attribute, is_right in score_prompt(caption_scene(scene, rng, keep=1.0), read):
            right[attribute] += is_right
            total[attribute] += 1
    return {attribute: right[attribute] / total[attribute] for attribute in total}


def test_true_renders_are_read_back_right() -> None:
    shares = share_right(120)
    assert set(shares) == {*OBJECT_ATTRIBUTES, "background"}
    assert min(shares.values()) >= 0.995, shares


@pytest.mark.parametrize(("damage", "least"), [("noise", 0.99), ("blur", 0.99), ("tint", 0.99), ("all", 0.98)])
def test_small_faults_of_generated_pictures_are_forgiven(damage: str, least: float) -> None:
    shares = share_right(40, damage)
    assert min(shares.values()) >= least, shares


def test_place_and_radius_are_read_to_about_a_pixel() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        scene = sample_scene(rng, n_objects=1)
        (drawn,), (read,) = scene.objects, read_scene(render_scene(scene)).objects
        assert np.hypot(drawn.x - read.x, drawn.y - read.y) < 1.2
        assert abs(drawn.radius - read.radius) < 1.5


def test_confidence_falls_with_the_quality_of_the_picture() -> None:
    rng = np.random.default_rng(4)
    scenes = [sample_scene(rng) for _ in range(20)]
    clear = [read_scene(render_scene(scene)).confidence for scene in scenes]
    poor = [read_scene(damaged(render_scene(scene), rng, "all")).confidence for scene in scenes]
    assert all(0 < value <= 1 for value in clear)
    assert np.mean(poor) < np.mean(clear)


@pytest.mark.parametrize("background", ["black", "white", "gray", "brown"])
def test_an_empty_picture_has_no_objects_and_no_confidence(background: str) -> None:
    read = read_scene(render_scene(Scene((), background)))
    assert read == Scene((), background)
    assert read.confidence == 0.0


def test_a_picture_of_noise_is_read_without_confidence() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert read_scene(noise).confidence < 0.1


def test_two_objects_that_touch_are_two() -> None:
    left = SceneObject("square", "red", "solid", "large", "left", 39.0, 64.0, 26.0)
    right = SceneObject("square", "red", "solid", "large", "right", 81.0, 64.0, 26.0)
    read = read_scene(render_scene(Scene((left, right), "black")))
    assert len(read.objects) == 2
    assert {thing.position for thing in read.objects} == {"left", "right"}


def test_a_picture_of_another_size_or_mode_is_read_alike() -> None:
    scene = sample_scene(np.random.default_rng(9), n_objects=2)
    picture = Image.fromarray(render_scene(scene))
    assert set(read_scene(picture.resize((256, 256)).convert("RGBA")).objects) == set(scene.objects)


@pytest.mark.parametrize(
    "spoil", [lambda pixels: pixels.astype(np.float32), lambda pixels: pixels[..., 0], lambda pixels: pixels[..., :2]]
)
def test_something_that_is_no_rgb_picture_is_refused(spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    with pytest.raises(FluxSaeError, match="uint8 RGB pixels"):
        read_scene.__wrapped__(spoil(render_scene(Scene((), "black"))))  # past the type checks of the tests


def a_star(**changes: object) -> SceneObject:
    values = dict(
        shape="star", colour="blue", texture="solid", size="small", position="right", x=95.0, y=64.0, radius=15.0
    )
    return SceneObject(**{**values, **changes})


def test_objects_of_prompt_and_picture_are_paired_in_the_best_way() -> None:
    circle = a_star(shape="circle", colour="red", position="left")
    scores = score_prompt(
        "a red circle on the left and a blue star on a black background", Scene((a_star(), circle), "black")
    )
    assert scores == [
        ("background", True),
        ("colour", True),
        ("shape", True),
        ("position", True),
        ("colour", True),
        ("shape", True),
    ]


def test_a_missing_object_has_all_its_attributes_wrong() -> None:
    scores = score_prompt("a red circle and a small blue star", Scene((a_star(),), "black"))
    assert scores == [("colour", False), ("shape", False), ("size", True), ("colour", True), ("shape", True)]


def test_only_what_the_prompt_names_is_scored() -> None:
    assert score_prompt("a blue shape", Scene((a_star(),), "black")) == [("colour", True)]
    assert score_prompt("a shape", Scene((), "black")) == []
