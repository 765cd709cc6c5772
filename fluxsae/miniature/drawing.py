"""Scenes of one or two coloured shapes, and how they are drawn, with exact masks.

Everything is closed form: a signed distance per shape gives anti-aliased edges without supersampling, and the same
distance gives the mask that heatmaps are later judged by.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fluxsae.errors import FluxSaeError

IMAGE_SIZE = 128
"""Width and height of a scene, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 44, 40),
    "orange": (246, 138, 24),
    "yellow": (248, 212, 44),
    "green": (46, 164, 72),
    "cyan": (40, 196, 214),
    "blue": (44, 88, 226),
    "purple": (140, 62, 200),
    "pink": (250, 128, 188),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 22),
    "white": (242, 242, 238),
    "gray": (130, 131, 136),
    "brown": (92, 63, 44),
}
RADII: dict[str, tuple[float, float]] = {"large": (24.5, 25.5), "small": (15.5, 16.5)}
"""Range of the circumscribed radius of each size, in pixels."""
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (64.0, 64.0),
    "left": (33.0, 64.0),
    "right": (95.0, 64.0),
    "top": (64.0, 33.0),
    "bottom": (64.0, 95.0),
}
"""Centre (x, y) of each position, in pixels; scenes move it by up to `POSITION_JITTER`."""
POSITION_JITTER = 1.0
TEXTURES = ("solid", "striped", "dotted")
TEXTURE_PERIOD = 9.0
"""Distance between stripes and between dots, in pixels."""
FACING = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
"""Where the second object of a pair stands."""

Pixels = Float[np.ndarray, "rows cols"]


def _box(x: Pixels, y: Pixels, half_width: float, half_height: float) -> Pixels:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    distance: Pixels = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
    return distance


def _polygon(x: Pixels, y: Pixels, corners: Float[np.ndarray, "corners 2"]) -> Pixels:
    """Signed distance to a simple polygon: distance to the nearest side, negative inside (even-odd crossing rule)."""
    distance = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        side_x, side_y = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * side_x + (y - y0) * side_y) / (side_x**2 + side_y**2), 0, 1)
        distance = np.minimum(distance, np.hypot(x - x0 - along * side_x, y - y0 - along * side_y))
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + side_x * (y - y0) / side_y)
    return np.where(inside, -distance, distance)


def _around(angles: Float[np.ndarray, " corners"], radii: Float[np.ndarray, " corners"]) -> Float[np.ndarray, "c 2"]:
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


_TRIANGLE = _around(np.arange(3) * 2 * np.pi / 3, np.full(3, 1.12)) + np.array([0.0, 0.18])
_STAR = _around(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2 == 0, 1.08, 0.46)) + np.array([0.0, 0.06])
_DIAMOND = np.array([[0.0, -1.04], [0.74, 0.0], [0.0, 1.04], [-0.74, 0.0]])
_HEART_TURN = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_HEART_HEIGHT = sum(a * np.cos(n * _HEART_TURN) for n, a in ((1, 13), (2, -5), (3, -2), (4, -1)))
_HEART = np.stack([16 * np.sin(_HEART_TURN) ** 3 / 17, -_HEART_HEIGHT / 17 - 0.14], axis=1)


def _circle(x: Pixels, y: Pixels) -> Pixels:
    distance: Pixels = np.hypot(x, y) - 0.94
    return distance


def _square(x: Pixels, y: Pixels) -> Pixels:
    return _box(x, y, 0.76, 0.76) - 0.06


def _triangle(x: Pixels, y: Pixels) -> Pixels:
    return _polygon(x, y, _TRIANGLE)


def _star(x: Pixels, y: Pixels) -> Pixels:
    return _polygon(x, y, _STAR)


def _ring(x: Pixels, y: Pixels) -> Pixels:
    distance: Pixels = np.abs(np.hypot(x, y) - 0.73) - 0.23
    return distance


def _cross(x: Pixels, y: Pixels) -> Pixels:
    distance: Pixels = np.minimum(_box(x, y, 0.92, 0.3), _box(x, y, 0.3, 0.92)) - 0.03
    return distance


def _diamond(x: Pixels, y: Pixels) -> Pixels:
    return _polygon(x, y, _DIAMOND)


def _heart(x: Pixels, y: Pixels) -> Pixels:
    return _polygon(x, y, _HEART)


_DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
    "diamond": _diamond,
    "heart": _heart,
}
SHAPES = tuple(_DISTANCES)

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(RADII),
    "position": tuple(POSITIONS),
    "background": tuple(BACKGROUNDS),
}
"""Every attribute of a scene with its values; an (attribute, value) pair is one true concept."""

Attribute = Literal["shape", "colour", "texture", "size", "position", "background"]


@dataclass(frozen=True)
class SceneObject:
    """One drawn shape; `x`, `y` and `radius` are in pixels."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    x: float = field(compare=False)
    y: float = field(compare=False)
    radius: float = field(compare=False)
    confidence: float = field(default=1.0, compare=False)
    """1 for a scene that was drawn; for one read back, how sure the reader is, 0 to 1."""


@dataclass(frozen=True)
class Scene:
    """A background and one or two objects. Two scenes are equal when all their attributes are."""

    objects: tuple[SceneObject, ...]
    background: str
    confidence: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise FluxSaeError(f"background is {self.background!r}; a scene knows {', '.join(BACKGROUNDS)}")
        for thing in self.objects:
            for attribute in ("shape", "colour", "texture", "size", "position"):
                value = getattr(thing, attribute)
                if value not in ATTRIBUTES[attribute]:
                    raise FluxSaeError(f"{attribute} is {value!r}; a scene knows {', '.join(ATTRIBUTES[attribute])}")

    def concepts(self) -> set[tuple[str, str]]:
        """All (attribute, value) pairs that are true of this scene."""
        found = {("background", self.background)}
        for thing in self.objects:
            found |= {(name, getattr(thing, name)) for name in ("shape", "colour", "texture", "size", "position")}
        return found


def is_held_out(thing: SceneObject) -> bool:
    """Whether training never shows this (shape, colour, texture): 24 of the 192 combinations, spread evenly."""
    shape, colour, texture = SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), TEXTURES.index(thing.texture)
    return (shape + 3 * colour + 2 * texture) % 8 == 0


def place_object(rng: np.random.Generator, *, position: str, **attributes: str) -> SceneObject:
    """An object at `position`, its exact place and radius drawn from `rng`; attributes left out are drawn too."""
    values: dict[str, Any] = {
        name: attributes.get(name) or str(rng.choice(ATTRIBUTES[name]))
        for name in ("shape", "colour", "texture", "size")
    }
    x, y = np.array(POSITIONS[position]) + rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
    radius = rng.uniform(*RADII[values["size"]])
    return SceneObject(**values, position=position, x=float(x), y=float(y), radius=float(radius))


def sample_scene(rng: np.random.Generator, *, n_objects: int | None = None, held_out: bool | None = False) -> Scene:
    """A random scene of one or two objects.

    `held_out=False` draws only combinations that training may show, `True` only such as it never shows, `None` any.
    """
    count = n_objects if n_objects is not None else int(rng.integers(1, 3))
    if count not in (1, 2):
        raise FluxSaeError(f"n_objects is {count}; a scene holds 1 or 2 objects")
    first = str(rng.choice(list(POSITIONS if count == 1 else FACING)))
    objects = []
    for position in (first, FACING.get(first, ""))[:count]:
        thing = place_object(rng, position=position)
        while held_out is not None and is_held_out(thing) != held_out:
            thing = place_object(rng, position=position)
        objects.append(thing)
    return Scene(tuple(objects), str(rng.choice(list(BACKGROUNDS))))


def signed_distance(thing: SceneObject, *, image_size: int = IMAGE_SIZE) -> Pixels:
    """Distance of every pixel centre to the object's outline, in pixels, negative inside."""
    rows, cols = np.mgrid[0:image_size, 0:image_size] + 0.5
    return _DISTANCES[thing.shape]((cols - thing.x) / thing.radius, (rows - thing.y) / thing.radius) * thing.radius


def object_mask(thing: SceneObject, *, image_size: int = IMAGE_SIZE) -> Bool[np.ndarray, "rows cols"]:
    """The pixels whose centre lies inside the object."""
    return signed_distance(thing, image_size=image_size) < 0


def texture_weight(thing: SceneObject, *, image_size: int = IMAGE_SIZE) -> Pixels:
    """How much of the second tint each pixel shows, 0 to 1: stripes rise to the right, dots sit on a square lattice."""
    rows, cols = np.mgrid[0:image_size, 0:image_size] + 0.5
    x, y = cols - thing.x, rows - thing.y
    weight: Pixels = np.zeros_like(x)
    if thing.texture == "striped":
        across = (x + y) / np.sqrt(2)
        stripe = np.abs((across / TEXTURE_PERIOD + 0.25) % 1.0 - 0.5) * TEXTURE_PERIOD
        weight = np.clip(TEXTURE_PERIOD / 4 - stripe + 0.5, 0, 1)
    if thing.texture == "dotted":
        lattice_x = (x / TEXTURE_PERIOD + 0.5) % 1.0 - 0.5
        lattice_y = (y / TEXTURE_PERIOD + 0.5) % 1.0 - 0.5
        weight = np.clip(2.6 - np.hypot(lattice_x, lattice_y) * TEXTURE_PERIOD + 0.5, 0, 1)
    return weight


def object_tints(colour: str, texture: str) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """An object's main colour and the colour of its stripes (lighter) or dots (darker), each RGB 0 to 255."""
    base = np.array(COLOURS[colour], dtype=np.float64)
    return base, base + 0.55 * (255 - base) if texture == "striped" else base * 0.45


def _object_pixels(thing: SceneObject, distance: Pixels, image_size: int) -> Float[np.ndarray, "rows cols 3"]:
    base, second = object_tints(thing.colour, thing.texture)
    weight = texture_weight(thing, image_size=image_size)[..., None]
    rows, cols = np.mgrid[0:image_size, 0:image_size] + 0.5
    light = 1.0 - 0.10 * ((cols - thing.x) + (rows - thing.y)) / (2 * thing.radius)
    rim = 1.0 - 0.16 * np.clip(1.0 + distance / 2.5, 0, 1)
    lit: Float[np.ndarray, "rows cols 3"] = (base * (1 - weight) + second * weight) * (light * rim)[..., None]
    return lit


def render_scene(scene: Scene, *, image_size: int = IMAGE_SIZE) -> UInt8[np.ndarray, "rows cols 3"]:
    """The scene as RGB pixels: a softly lit background and shaded, anti-aliased objects."""
    rows, cols = np.mgrid[0:image_size, 0:image_size] + 0.5
    glow = 1.03 - 0.07 * ((rows - image_size / 2) ** 2 + (cols - image_size / 2) ** 2) / (image_size / 2) ** 2
    pixels = np.array(BACKGROUNDS[scene.background]) * glow[..., None]
    for thing in scene.objects:
        distance = signed_distance(thing, image_size=image_size)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        pixels = pixels * (1 - cover) + _object_pixels(thing, distance, image_size) * cover
    rounded: UInt8[np.ndarray, "rows cols 3"] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return rounded
