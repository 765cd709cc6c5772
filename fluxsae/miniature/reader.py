"""Reads a scene back from its picture: closed form, no learning.

The background is taken from the frame of the picture; what differs from it are objects. An object's area and centroid
bring its mask into a frame of its own, where it is compared with the eight shapes; with shape, place and radius known,
every colour and texture is drawn and the nearest drawing wins.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage, optimize

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.captions import prompted_attributes
from fluxsae.miniature.drawing import (
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    RADII,
    SHAPES,
    TEXTURE_PERIOD,
    TEXTURES,
    Attribute,
    Scene,
    SceneObject,
    object_tints,
    signed_distance,
    texture_weight,
)

CONTRAST = 20.0
"""Distance from the background, in RGB units, from which a pixel counts as drawn."""
EDGE_SHARE = 0.3
"""A pixel with less than this share of the contrast nearby lies outside: keeps blurred outlines where they were."""
LARGEST_HOLE = 70
"""Pixels of a hole that is a dot of the texture and not the hole of a ring."""
SMALLEST_OBJECT = 110
"""Pixels; the smallest drawn object, a small star, has 300."""
WIDEST_OBJECT = 66
"""Pixels; the widest drawn object has 58, so anything wider is two that touch."""
MOST_OBJECTS = 4
FRAME_SIDE = 40
"""Samples along each side of the frame in which shapes are compared."""
FRAME_REACH = 1.06
"""Half the side of that frame, in square roots of the object's area."""
SIZE_LIMIT = (RADII["large"][0] + RADII["small"][1]) / 2
"""Radius in pixels from which an object is large."""

_ROWS, _COLS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
_GLOW = 1.03 - 0.07 * ((_ROWS - IMAGE_SIZE / 2) ** 2 + (_COLS - IMAGE_SIZE / 2) ** 2) / (IMAGE_SIZE / 2) ** 2
_FRAME = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
_FRAME[1:-1, 1:-1] = True
_FRAME[4:-4, 4:-4] = False

Pixels = Float[np.ndarray, "rows cols"]
Mask = Bool[np.ndarray, "rows cols"]
Pixel = Float[np.ndarray, " pixels"]


def read_scene(image: Image.Image | UInt8[np.ndarray, "height width 3"]) -> Scene:
    """The scene that a picture shows, with a confidence for each object and for the whole, 0 to 1.

    A confidence is the margin of the best reading against the second best, the smallest over an object's attributes.
    A picture without objects gives a scene without objects and confidence 0. Pictures of another size are resized.

    Raises:
        FluxSaeError: not a picture of three colour channels with values 0 to 255.
    """
    pixels = scene_pixels(image)
    background, ground, sureness = _read_background(pixels)
    drawn, contrast = _find_drawn(pixels, ground)
    objects = [_read_object(pixels, mask, contrast) for mask in _find_objects(drawn)]
    confidence = min((thing.confidence for thing in objects), default=0.0)
    return Scene(tuple(objects), background, min(confidence, sureness))


def score_prompt(prompt: str, scene: Scene) -> list[tuple[Attribute, bool]]:
    """For every attribute that a prompt names, whether the scene shows it; objects in the prompt's order.

    Objects of prompt and scene are paired so that most attributes agree; a missing object has all of them wrong.
    """
    wanted, background = prompted_attributes(prompt)
    wanted = [attributes for attributes in wanted if attributes]
    scores = [("background", background == scene.background)] if background is not None else []
    for attributes, thing in zip(wanted, _pair_objects(wanted, scene.objects), strict=True):
        scores += [(name, thing is not None and getattr(thing, name) == value) for name, value in attributes.items()]
    return scores  # type: ignore[return-value]  # the names come from ATTRIBUTES


def _pair_objects(wanted: list[dict[str, str]], objects: tuple[SceneObject, ...]) -> list[SceneObject | None]:
    """The object meant by each mapping of attributes: the assignment in which most of them agree."""
    agreeing = np.zeros((len(wanted), len(objects)))
    for row, attributes in enumerate(wanted):
        for column, thing in enumerate(objects):
            agreeing[row, column] = sum(getattr(thing, name) == value for name, value in attributes.items())
    paired: list[SceneObject | None] = [None] * len(wanted)
    for row, column in zip(*optimize.linear_sum_assignment(-agreeing), strict=True):
        paired[row] = objects[column]
    return paired


def scene_pixels(image: Image.Image | np.ndarray) -> Float[np.ndarray, "rows cols 3"]:
    """The picture as RGB floats 0 to 255 at the size of a scene."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise FluxSaeError(
                f"image has dtype {image.dtype} and shape {image.shape}; a scene is read from a PIL image or from "
                "uint8 RGB pixels of shape (height, width, 3)."
            )
        image = Image.fromarray(image)
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def margin(distances: Float[np.ndarray, " candidates"]) -> float:
    """How far the second smallest distance lies above the smallest: 0 (equal) to 1 (the smallest is 0)."""
    best, second = np.partition(distances, 1)[:2]
    return float(1 - best / second) if second > 0 else 0.0


def _read_background(
    pixels: Float[np.ndarray, "rows cols 3"],
) -> tuple[str, Float[np.ndarray, "rows cols 3"], float]:
    """The background's name, what it looks like everywhere, and the margin of the reading."""
    tone = np.median(pixels[_FRAME] / _GLOW[_FRAME][:, None], axis=0)
    distances = np.linalg.norm(np.array(list(BACKGROUNDS.values())) - tone, axis=1)
    return list(BACKGROUNDS)[int(distances.argmin())], np.minimum(tone * _GLOW[..., None], 255), margin(distances)


def _find_drawn(
    pixels: Float[np.ndarray, "rows cols 3"], ground: Float[np.ndarray, "rows cols 3"]
) -> tuple[Mask, Pixels]:
    """Where the picture differs from its background, and how much each pixel is covered (0 to 1)."""
    difference = ndimage.gaussian_filter(pixels - ground, (0.6, 0.6, 0))
    contrast = np.sqrt(np.einsum("rcx,rcx->rc", difference, difference))
    nearby = ndimage.maximum_filter(contrast, size=5)
    drawn = contrast > np.maximum(CONTRAST, EDGE_SHARE * nearby)
    holes, count = ndimage.label(~drawn)
    small = np.bincount(holes.ravel(), minlength=count + 1) <= LARGEST_HOLE
    drawn |= small[holes]
    # Half of the contrast is the outline of a pixel's edge; between a third and two thirds it is partly covered.
    cover = np.where(drawn, 1.0, np.clip(contrast / np.maximum(nearby, 2 * CONTRAST), 0, 1))
    return drawn, cover


def _find_objects(drawn: Mask) -> list[Mask]:
    """The drawn pixels object by object, the largest first."""
    parts, count = ndimage.label(drawn, structure=np.ones((3, 3)))
    masks = [part for index in range(1, count + 1) for part in _split_touching(parts == index)]
    masks = [mask for mask in masks if mask.sum() >= SMALLEST_OBJECT]
    return sorted(masks, key=lambda mask: -int(mask.sum()))[:MOST_OBJECTS]


def _split_touching(mask: Mask) -> list[Mask]:
    """Two objects that touch, cut where they are narrowest in the middle; one object as it is."""
    for axis, line in ((1, _ROWS), (0, _COLS)):
        profile = mask.sum(axis=axis)
        filled = np.flatnonzero(profile)
        if filled[-1] - filled[0] + 1 > WIDEST_OBJECT:
            third = (filled[-1] - filled[0]) // 3
            cut = filled[0] + third + int(profile[filled[0] + third : filled[-1] - third].argmin())
            return [mask & (line < cut), mask & (line >= cut)]
    return [mask]


@dataclass(frozen=True)
class _Template:
    """A shape in the frame of its own area and centroid; area and centroid are those of radius 1."""

    cover: Float[np.ndarray, "side side"]
    area: float
    x: float
    y: float


@functools.cache
def _templates() -> tuple[_Template, ...]:
    return tuple(_build_template(shape) for shape in SHAPES)


def _build_template(shape: str) -> _Template:
    side = 512
    radius = side / 2 / 1.25
    drawn = SceneObject(shape, "red", "solid", "large", "center", side / 2, side / 2, radius)
    distance = signed_distance(drawn, image_size=side)
    rows, cols = np.nonzero(distance < 0)
    area, x, y = len(rows), float(cols.mean() + 0.5), float(rows.mean() + 0.5)
    axis = np.linspace(-FRAME_REACH, FRAME_REACH, FRAME_SIDE) * np.sqrt(area)
    at = np.meshgrid(y - 0.5 + axis, x - 0.5 + axis, indexing="ij")
    softness = 2 * FRAME_REACH / FRAME_SIDE * np.sqrt(area)
    cover = np.clip(0.5 - ndimage.map_coordinates(distance, at, order=1, mode="nearest") / softness, 0, 1)
    return _Template(cover, area / radius**2, (x - side / 2) / radius, (y - side / 2) / radius)


def _read_object(pixels: Float[np.ndarray, "rows cols 3"], mask: Mask, cover: Pixels) -> SceneObject:
    near = ndimage.binary_dilation(mask, iterations=1)
    weight = np.where(near, cover, 0.0)
    area = float(weight.sum())
    x, y = float((weight * _COLS).sum() / area), float((weight * _ROWS).sum() / area)
    distances = _shape_distances(weight, x=x, y=y, area=area)
    best = int(distances.argmin())
    template = _templates()[best]
    radius = float(np.sqrt(area / template.area))
    x, y = x - template.x * radius, y - template.y * radius
    colour, texture, surface = _read_surface(pixels, SHAPES[best], x=x, y=y, radius=radius)
    places = np.array([np.hypot(x - place[0], y - place[1]) for place in POSITIONS.values()])
    sureness = (margin(distances), surface, margin(places), min(1.0, abs(radius - SIZE_LIMIT) / 3))
    return SceneObject(
        shape=SHAPES[best],
        colour=colour,
        texture=texture,
        size="large" if radius > SIZE_LIMIT else "small",
        position=list(POSITIONS)[int(places.argmin())],
        x=x,
        y=y,
        radius=radius,
        confidence=float(min(sureness)),
    )


def _shape_distances(weight: Pixels, *, x: float, y: float, area: float) -> Float[np.ndarray, " shapes"]:
    """Mean squared difference between an object's cover and each shape, in the frame of its area and centroid."""
    axis = np.linspace(-FRAME_REACH, FRAME_REACH, FRAME_SIDE) * np.sqrt(area)
    at = np.meshgrid(y - 0.5 + axis, x - 0.5 + axis, indexing="ij")
    cover = ndimage.map_coordinates(weight, at, order=1, mode="constant")
    return np.array([np.square(cover - template.cover).mean() for template in _templates()])


@functools.cache
def _texture_tables() -> dict[str, tuple[Pixels, Float[np.ndarray, "shifts 2"]]]:
    """Per pattern: its weights on a scene's pixels around the middle, and the shifts (x, y) that cover its period."""
    middle = IMAGE_SIZE / 2
    across = np.arange(0, TEXTURE_PERIOD)
    along = np.arange(0, TEXTURE_PERIOD, 1.5)
    shifts = {
        "striped": np.stack([across, across], axis=1) / np.sqrt(2),
        "dotted": np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2),
    }
    tables = {}
    for texture, shift in shifts.items():
        thing = SceneObject("square", "red", texture, "large", "center", middle, middle, middle)
        tables[texture] = texture_weight(thing), shift
    return tables


def _texture_weights(texture: str, *, dx: Pixel, dy: Pixel) -> Float[np.ndarray, "shifts pixels"]:
    """How much of the second tint pixels at (dx, dy) from an object's centre show, for every shift of the pattern."""
    if texture == "solid":
        return np.zeros((1, len(dx)))
    table, shifts = _texture_tables()[texture]
    middle = (IMAGE_SIZE - 1) / 2
    at = dy + middle - shifts[:, 1:], dx + middle - shifts[:, :1]
    weights: Float[np.ndarray, "shifts pixels"] = ndimage.map_coordinates(table, at, order=1, mode="nearest")
    return weights


def _read_surface(
    pixels: Float[np.ndarray, "rows cols 3"], shape: str, *, x: float, y: float, radius: float
) -> tuple[str, str, float]:
    """Colour, texture and margin: each pair is drawn with the object's own light and compared inside its outline."""
    # Only the object's own window is drawn: distances to a heart's outline are the costly part of reading.
    side = min(IMAGE_SIZE, int(2.4 * radius) + 2)
    left, top = (int(np.clip(centre - side / 2, 0, IMAGE_SIZE - side)) for centre in (x, y))
    window = np.s_[top : top + side, left : left + side]
    thing = SceneObject(shape, "red", "solid", "large", "center", x - left, y - top, radius)
    distance = signed_distance(thing, image_size=side)
    inside = distance < min(-0.7, distance.min() / 2)
    dx, dy = (_COLS[window] - x)[inside], (_ROWS[window] - y)[inside]
    light = (1.0 - 0.10 * (dx + dy) / (2 * radius)) * (1.0 - 0.16 * np.clip(1.0 + distance[inside] / 2.5, 0, 1))
    seen = pixels[window][inside]
    errors = np.empty((len(COLOURS), len(TEXTURES)))
    for column, texture in enumerate(TEXTURES):
        weights = _texture_weights(texture, dx=dx, dy=dy)
        errors[:, column] = [_surface_error(seen, light, weights, object_tints(c, texture)) for c in COLOURS]
    colour, column = divmod(int(errors.argmin()), len(TEXTURES))
    sureness = min(margin(errors.min(axis=1)), margin(errors[colour]))
    return list(COLOURS)[colour], TEXTURES[column], sureness


def _surface_error(
    seen: Float[np.ndarray, "pixels 3"],
    light: Pixel,
    weights: Float[np.ndarray, "shifts pixels"],
    tints: tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]],
) -> float:
    """Root mean squared error, in RGB units, of the best shift of one pattern in one pair of tints.

    With the base tint's error e and the step d to the second tint, |e - weight light d|^2 is expanded, so that all
    shifts cost two products.
    """
    base, second = tints
    step = second - base
    error = seen - light[:, None] * base
    squared = np.square(error).sum() - 2 * weights @ (light * (error @ step)) + weights**2 @ light**2 * (step @ step)
    return float(np.sqrt(max(squared.min() / len(seen), 1e-9)))
