"""Scenes of one or two things on a plain ground or in a place, and how they are drawn, with exact masks."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.grounds import GROUNDS, IMAGE_SIZE, ground_pixels
from fluxsae.miniature.outlines import THINGS, Paint, Pixels

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
RADII: dict[str, tuple[float, float]] = {"large": (28.0, 29.0), "small": (18.5, 19.5)}
"""Range of the radius of each size, in pixels."""
POSITIONS: dict[str, tuple[float, float]] = {
    "center": (64.0, 64.0),
    "left": (33.0, 64.0),
    "right": (95.0, 64.0),
    "top": (64.0, 33.0),
    "bottom": (64.0, 95.0),
}
"""Centre (x, y) of each position, in pixels."""
FACING = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
"""Where the second object of a pair stands."""
POSITION_JITTER = 1.0
"""How far a thing may stand from its position, in pixels, each way."""
TEXTURES = ("solid", "striped", "dotted")
TEXTURE_PERIOD = 9.0
"""Distance between stripes and between dots, in pixels."""
TINTS: dict[Paint, tuple[int, int, int]] = {
    "ink": (40, 36, 46),
    "cream": (250, 243, 222),
    "wood": (158, 114, 78),
    "leaf": (120, 146, 88),
    "glass": (206, 222, 228),
    "slate": (82, 84, 98),
    "ochre": (214, 166, 92),
}
"""Colours of the parts that do not take the thing's own: none of the eight."""
SHADE = 0.72
"""Brightness of a part painted `shade`."""
RIM = 0.42
"""How much darker a part is at its outline."""
RIM_WIDTH = 2.2
"""In pixels."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "thing": tuple(THINGS),
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": tuple(RADII),
    "position": tuple(POSITIONS),
    "background": tuple(GROUNDS),
}
"""Every attribute of a scene with its values; an (attribute, value) pair is one true concept."""
OF_OBJECTS = ("thing", "colour", "texture", "size", "position")
"""The attributes that each object has for itself."""

Attribute = Literal["thing", "colour", "texture", "size", "position", "background"]


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing; `x`, `y` and `radius` are in pixels."""

    thing: str
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
    """A background and its objects. Two scenes are equal when all their attributes are."""

    objects: tuple[SceneObject, ...]
    background: str
    confidence: float = field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        given = [("background", self.background)]
        given += [(name, getattr(thing, name)) for thing in self.objects for name in OF_OBJECTS]
        for attribute, value in given:
            if value not in ATTRIBUTES[attribute]:
                raise FluxSaeError(f"{attribute} is {value!r}; a scene knows {', '.join(ATTRIBUTES[attribute])}")

    def concepts(self) -> set[tuple[str, str]]:
        """All (attribute, value) pairs that are true of this scene."""
        named = {(name, getattr(thing, name)) for thing in self.objects for name in OF_OBJECTS}
        return named | {("background", self.background)}


def is_held_out(thing: SceneObject) -> bool:
    """Whether training never shows this (thing, colour, texture): an eighth of the combinations, spread evenly."""
    values = [ATTRIBUTES[name].index(getattr(thing, name)) for name in ("thing", "colour", "texture")]
    return int(np.dot(values, (1, 3, 2))) % 8 == 0


def place_object(rng: np.random.Generator, *, position: str, **attributes: str) -> SceneObject:
    """An object at `position`, its exact place and radius drawn from `rng`; attributes left out are drawn too."""
    values: dict[str, Any] = {
        name: attributes.get(name) or str(rng.choice(ATTRIBUTES[name])) for name in OF_OBJECTS if name != "position"
    }
    x, y = np.array(POSITIONS[position]) + rng.uniform(-POSITION_JITTER, POSITION_JITTER, 2)
    radius = rng.uniform(*RADII[values["size"]])
    return SceneObject(**values, position=position, x=float(x), y=float(y), radius=float(radius))


TWINS = 0.3
"""Share of pairs that show one thing twice."""
ALIKE = 0.7
"""Share of those that agree in colour, in texture and in size, each drawn by itself."""


def sample_scene(rng: np.random.Generator, *, n_objects: int | None = None, held_out: bool | None = False) -> Scene:
    """A random scene of one or two objects.

    `held_out=False` draws only combinations that training may show, `True` only such as it never shows, `None` any.
    """
    count = n_objects if n_objects is not None else int(rng.integers(1, 3))
    if count not in (1, 2):
        raise FluxSaeError(f"n_objects is {count}; a scene holds 1 or 2 objects")
    first = str(rng.choice(list(POSITIONS if count == 1 else FACING)))
    objects = [_sample_object(rng, position=first, held_out=held_out)]
    if count == 2:
        shared: dict[str, str] = {}
        if rng.random() < TWINS:
            shared = {n: getattr(objects[0], n) for n in ("colour", "texture", "size") if rng.random() < ALIKE}
            shared["thing"] = objects[0].thing
        objects.append(_sample_object(rng, position=FACING[first], held_out=held_out, **shared))
    return Scene(tuple(objects), str(rng.choice(list(GROUNDS))))


def _sample_object(rng: np.random.Generator, *, position: str, held_out: bool | None, **attributes: str) -> SceneObject:
    while True:
        thing = place_object(rng, position=position, **attributes)
        if held_out is None or is_held_out(thing) == held_out:
            return thing


@dataclass(frozen=True)
class Window:
    """The square of pixels around an object, cut to the picture: offsets from the object's centre, in pixels."""

    rows: slice
    cols: slice
    dx: Pixels
    dy: Pixels


def object_window(thing: SceneObject, *, margin: float = 3.0) -> Window:
    """The pixels that `thing` can reach."""
    reach = 1.02 * thing.radius + margin
    top, bottom, left, right = (
        int(np.clip(round(edge), 0, IMAGE_SIZE))
        for edge in (thing.y - reach, thing.y + reach, thing.x - reach, thing.x + reach)
    )
    dy, dx = np.mgrid[top:bottom, left:right] + 0.5 - np.array([thing.y, thing.x])[:, None, None]
    return Window(slice(top, bottom), slice(left, right), dx, dy)


def part_distances(thing: SceneObject, window: Window) -> Float[np.ndarray, "parts rows cols"]:
    """Distance of every pixel of the window to the outline of every part, in pixels, negative inside."""
    x, y = window.dx / thing.radius, window.dy / thing.radius
    return np.stack([part.outline(x, y) for part in THINGS[thing.thing]]) * thing.radius


def object_mask(thing: SceneObject) -> Bool[np.ndarray, "rows cols"]:
    """The pixels whose centre lies inside the object."""
    return _topmost(thing) >= 0


def part_mask(thing: SceneObject, part: str) -> Bool[np.ndarray, "rows cols"]:
    """The pixels on which the part named `part` of the object is seen.

    Raises:
        FluxSaeError: the thing has no such part.
    """
    names = [known.name for known in THINGS[thing.thing]]
    if part not in names:
        raise FluxSaeError(f"part is {part!r}; a {thing.thing} has {', '.join(names)}")
    mask: Bool[np.ndarray, "rows cols"] = _topmost(thing) == names.index(part)
    return mask


def _topmost(thing: SceneObject) -> Int[np.ndarray, "rows cols"]:
    """The place of the part that is seen on each pixel, -1 outside the object."""
    window = object_window(thing)
    inside = part_distances(thing, window) < 0
    seen = np.full((IMAGE_SIZE, IMAGE_SIZE), -1)
    last = len(inside) - 1 - inside[::-1].argmax(axis=0)
    seen[window.rows, window.cols] = np.where(inside.any(axis=0), last, -1)
    return seen


def texture_weight(texture: str, dx: Pixels, dy: Pixels) -> Pixels:
    """How much of the second tint each pixel shows, 0 to 1: stripes rise to the right, dots sit on a square lattice."""
    weight: Pixels = np.zeros_like(dx)
    if texture == "striped":
        stripe = np.abs(((dx + dy) / np.sqrt(2) / TEXTURE_PERIOD + 0.25) % 1.0 - 0.5) * TEXTURE_PERIOD
        weight = np.clip(TEXTURE_PERIOD / 4 - stripe + 0.5, 0, 1)
    if texture == "dotted":
        lattice_x, lattice_y = ((d / TEXTURE_PERIOD + 0.5) % 1.0 - 0.5 for d in (dx, dy))
        weight = np.clip(2.6 - np.hypot(lattice_x, lattice_y) * TEXTURE_PERIOD + 0.5, 0, 1)
    return weight


def object_tints(colour: str, texture: str) -> tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """An object's main colour and the colour of its stripes (lighter) or dots (darker), each RGB 0 to 255."""
    base = np.array(COLOURS[colour], dtype=np.float64)
    return base, base + 0.55 * (255 - base) if texture == "striped" else base * 0.45


def light(thing: SceneObject, dx: Pixels, dy: Pixels) -> Pixels:
    """Brightness over an object: it falls from the upper left to the lower right."""
    fall: Pixels = 1.04 - 0.14 * (dx + dy) / (2 * thing.radius)
    return fall


def _paint(thing: SceneObject, paint: Paint, weight: Pixels) -> Float[np.ndarray, "rows cols 3"]:
    if paint in TINTS:
        return np.broadcast_to(np.array(TINTS[paint], dtype=np.float64), (*weight.shape, 3))
    base, second = object_tints(thing.colour, thing.texture)
    surface: Float[np.ndarray, "rows cols 3"] = base + weight[..., None] * (second - base)
    return surface * SHADE if paint == "shade" else surface


def rim(distance: Pixels) -> Pixels:
    """Brightness near an outline: it falls towards the edge."""
    fall: Pixels = 1.0 - RIM * np.clip(1.0 + distance / RIM_WIDTH, 0, 1)
    return fall


def paint_object(
    seen: Float[np.ndarray, "rows cols 3"],
    thing: SceneObject,
    window: Window,
    *,
    distances: Float[np.ndarray, "parts rows cols"],
    weight: Pixels,
) -> None:
    """Paints the object onto `seen`, the pixels of its window, part by part; `weight` is that of its texture."""
    lit = light(thing, window.dx, window.dy)
    for part, distance in zip(THINGS[thing.thing], distances, strict=True):
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        seen += cover * (_paint(thing, part.paint, weight) * (lit * rim(distance))[..., None] - seen)


def render_scene(scene: Scene) -> UInt8[np.ndarray, "rows cols 3"]:
    """The scene as RGB pixels."""
    pixels = ground_pixels(scene.background).copy()
    for thing in scene.objects:
        window = object_window(thing)
        paint_object(
            pixels[window.rows, window.cols],
            thing,
            window,
            distances=part_distances(thing, window),
            weight=texture_weight(thing.texture, window.dx, window.dy),
        )
    rounded: UInt8[np.ndarray, "rows cols 3"] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return rounded
