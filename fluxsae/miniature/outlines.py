"""The outline of every thing, part by part, as signed distances in a frame where the thing has radius 1.

x runs to the right and y down, both from -1 to 1. Parts are listed in the order in which they are painted.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Pixels = Float[np.ndarray, "rows cols"]
Outline = Callable[[Pixels, Pixels], Pixels]
Paint = Literal["body", "shade", "ink", "cream", "wood", "leaf", "glass", "slate", "ochre"]
"""`body` is the thing's colour with its texture, `shade` a darker tone of it; the rest are fixed tints."""


@dataclass(frozen=True)
class Part:
    """A named part of a thing."""

    name: str
    outline: Outline
    paint: Paint = "body"


def _ellipse(x: float, y: float, width: float, height: float, *, turn: float = 0.0) -> Outline:
    """Half axes `width` and `height`, turned clockwise by `turn` radians."""
    cos, sin = np.cos(turn), np.sin(turn)

    def distance(px: Pixels, py: Pixels) -> Pixels:
        dx, dy = px - x, py - y
        along, across = (dx * cos + dy * sin) / width, (dy * cos - dx * sin) / height
        reach = np.hypot(along, across)
        slope = np.maximum(np.hypot(along / width, across / height), 1e-9)
        found: Pixels = np.where(reach < 1e-6, -min(width, height), reach * (reach - 1) / slope)
        return found

    return distance


def _disc(x: float, y: float, radius: float) -> Outline:
    def distance(px: Pixels, py: Pixels) -> Pixels:
        found: Pixels = np.hypot(px - x, py - y) - radius
        return found

    return distance


def _box(x: float, y: float, width: float, height: float, *, rounding: float = 0.0) -> Outline:
    """Half sides `width` and `height`, corners rounded."""

    def distance(px: Pixels, py: Pixels) -> Pixels:
        dx, dy = np.abs(px - x) - width + rounding, np.abs(py - y) - height + rounding
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        found: Pixels = outside + np.minimum(np.maximum(dx, dy), 0) - rounding
        return found

    return distance


def _line(*points: tuple[float, float], width: float) -> Outline:
    """A line through `points`, `width` thick to either side, its ends round."""

    def distance(px: Pixels, py: Pixels) -> Pixels:
        found: Pixels = np.full(px.shape, np.inf)
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            side_x, side_y = x1 - x0, y1 - y0
            along = np.clip(((px - x0) * side_x + (py - y0) * side_y) / (side_x**2 + side_y**2), 0, 1)
            found = np.minimum(found, np.hypot(px - x0 - along * side_x, py - y0 - along * side_y))
        return found - width

    return distance


def _polygon(*corners: tuple[float, float], rounding: float = 0.0) -> Outline:
    """A simple polygon, grown by `rounding`; inside by the even-odd rule."""

    def distance(px: Pixels, py: Pixels) -> Pixels:
        edge = _line(*corners, corners[0], width=0.0)(px, py)
        inside = np.zeros(px.shape, dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
            if y0 != y1:
                inside ^= ((y0 > py) != (y1 > py)) & (px < x0 + (x1 - x0) * (py - y0) / (y1 - y0))
        found: Pixels = np.where(inside, -edge, edge) - rounding
        return found

    return distance


def _union(*outlines: Outline) -> Outline:
    def distance(px: Pixels, py: Pixels) -> Pixels:
        found: Pixels = np.minimum.reduce([outline(px, py) for outline in outlines])
        return found

    return distance


def _overlap(*outlines: Outline) -> Outline:
    def distance(px: Pixels, py: Pixels) -> Pixels:
        found: Pixels = np.maximum.reduce([outline(px, py) for outline in outlines])
        return found

    return distance


def _mirrored(outline: Outline) -> Outline:
    """The outline and its mirror image on the other side of the vertical axis."""

    def distance(px: Pixels, py: Pixels) -> Pixels:
        found: Pixels = np.minimum(outline(px, py), outline(-px, py))
        return found

    return distance


def _star_corners() -> list[tuple[float, float]]:
    turns, reach = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2 == 0, 0.98, 0.44)
    return [(float(r * np.sin(t)), float(0.07 - r * np.cos(t))) for t, r in zip(turns, reach, strict=True)]


def _petals(count: int, *, y: float, reach: float, radius: float) -> Outline:
    turns = np.arange(count) * 2 * np.pi / count
    return _union(*[_disc(float(reach * np.sin(t)), float(y - reach * np.cos(t)), radius) for t in turns])


THINGS: dict[str, tuple[Part, ...]] = {
    "cat": (
        Part("tail", _line((0.3, 0.82), (0.66, 0.8), (0.84, 0.56), (0.8, 0.24), (0.66, 0.1), width=0.12)),
        Part("body", _union(_ellipse(-0.06, 0.5, 0.47, 0.48), _mirrored(_ellipse(0.2, 0.86, 0.24, 0.12)))),
        Part("ears", _mirrored(_polygon((0.14, -0.68), (0.5, -0.95), (0.52, -0.4), rounding=0.04))),
        Part("head", _ellipse(0.0, -0.32, 0.58, 0.46)),
        Part("eyes", _mirrored(_ellipse(0.25, -0.36, 0.16, 0.17)), "cream"),
        Part("pupils", _mirrored(_ellipse(0.24, -0.35, 0.09, 0.12)), "ink"),
        Part("nose", _polygon((-0.08, -0.15), (0.08, -0.15), (0.0, -0.06), rounding=0.03), "ink"),
    ),
    "dog": (
        Part("tail", _line((0.6, 0.1), (0.82, -0.12), (0.88, -0.4), width=0.1)),
        Part("legs", _union(*[_line((x, 0.3), (x, 0.82), width=0.12) for x in (-0.26, 0.02, 0.38, 0.62)])),
        Part("body", _box(0.18, 0.2, 0.6, 0.32, rounding=0.3)),
        Part("head", _union(_ellipse(-0.44, -0.36, 0.38, 0.4), _box(-0.68, -0.22, 0.3, 0.2, rounding=0.18))),
        Part("ear", _ellipse(-0.16, -0.32, 0.16, 0.36, turn=-0.25), "shade"),
        Part("eye", _disc(-0.54, -0.46, 0.16), "cream"),
        Part("pupil", _disc(-0.56, -0.45, 0.095), "ink"),
        Part("nose", _ellipse(-0.92, -0.3, 0.11, 0.1), "ink"),
    ),
    "fish": (
        Part("tail", _polygon((0.36, 0.0), (0.9, -0.48), (0.78, 0.0), (0.9, 0.48), rounding=0.07)),
        Part(
            "fins",
            _union(
                _polygon((-0.35, -0.4), (0.02, -0.72), (0.34, -0.62), (0.32, -0.25), rounding=0.04),
                _polygon((-0.1, 0.4), (0.12, 0.66), (0.3, 0.6), (0.26, 0.25), rounding=0.04),
            ),
            "shade",
        ),
        Part("body", _ellipse(-0.2, 0.0, 0.76, 0.5)),
        Part("gill", _line((-0.3, -0.26), (-0.22, -0.08), (-0.22, 0.08), (-0.3, 0.26), width=0.045), "shade"),
        Part("eye", _disc(-0.58, -0.1, 0.17), "cream"),
        Part("pupil", _disc(-0.6, -0.09, 0.1), "ink"),
    ),
    "bird": (
        Part(
            "legs",
            _union(_line((-0.04, 0.5), (-0.04, 0.92), width=0.05), _line((0.22, 0.5), (0.22, 0.92), width=0.05)),
            "ochre",
        ),
        Part("tail", _polygon((0.4, 0.0), (0.94, -0.36), (0.92, 0.06), (0.5, 0.34), rounding=0.05)),
        Part("beak", _polygon((-0.7, -0.48), (-0.98, -0.28), (-0.68, -0.14), rounding=0.02), "ochre"),
        Part(
            "body",
            _union(
                _ellipse(0.06, 0.18, 0.58, 0.46),
                _disc(-0.38, -0.36, 0.4),
                _polygon((-0.7, -0.1), (0.0, -0.3), (0.2, 0.3), (-0.4, 0.4)),
            ),
        ),
        Part("wing", _ellipse(0.2, 0.14, 0.4, 0.22, turn=0.25), "shade"),
        Part("eye", _disc(-0.46, -0.42, 0.16), "cream"),
        Part("pupil", _disc(-0.48, -0.41, 0.095), "ink"),
    ),
    "butterfly": (
        Part("antennae", _mirrored(_line((0.02, -0.46), (0.12, -0.78), (0.28, -0.9), width=0.045)), "slate"),
        Part(
            "wings",
            _mirrored(_union(_ellipse(0.52, -0.3, 0.46, 0.4, turn=-0.5), _ellipse(0.42, 0.42, 0.36, 0.38, turn=0.5))),
        ),
        Part("spots", _mirrored(_union(_disc(0.6, -0.34, 0.15), _disc(0.48, 0.46, 0.11))), "cream"),
        Part("body", _line((0.0, -0.44), (0.0, 0.62), width=0.1), "slate"),
    ),
    "tree": (
        Part("trunk", _polygon((-0.13, 0.2), (0.13, 0.2), (0.2, 0.94), (-0.2, 0.94), rounding=0.02), "wood"),
        Part("crown", _union(_disc(0.0, -0.5, 0.46), _mirrored(_disc(0.44, -0.12, 0.44)), _disc(0.0, 0.04, 0.4))),
    ),
    "flower": (
        Part("stem", _line((0.0, 0.0), (0.0, 0.93), width=0.065), "leaf"),
        Part("leaves", _mirrored(_ellipse(0.27, 0.66, 0.28, 0.12, turn=-0.5)), "leaf"),
        Part("petals", _petals(6, y=-0.3, reach=0.4, radius=0.28)),
        Part("middle", _disc(0.0, -0.3, 0.23), "cream"),
    ),
    "mushroom": (
        Part("stem", _polygon((-0.2, 0.0), (0.2, 0.0), (0.28, 0.88), (-0.28, 0.88), rounding=0.06), "cream"),
        Part("cap", _overlap(_ellipse(0.0, 0.12, 0.96, 1.0), _box(0.0, -0.9, 1.0, 1.04, rounding=0.08))),
        Part("spots", _union(_disc(-0.45, -0.3, 0.16), _disc(0.08, -0.56, 0.17), _disc(0.52, -0.2, 0.14)), "cream"),
    ),
    "apple": (
        Part("stem", _line((0.0, -0.4), (0.08, -0.9), width=0.06), "wood"),
        Part("fruit", _union(_mirrored(_ellipse(0.32, 0.16, 0.56, 0.66, turn=0.15)), _ellipse(0.0, 0.24, 0.6, 0.6))),
        Part("leaf", _ellipse(0.4, -0.72, 0.34, 0.15, turn=-0.4), "leaf"),
    ),
    "house": (
        Part("chimney", _box(0.46, -0.62, 0.12, 0.28), "wood"),
        Part("walls", _box(0.0, 0.38, 0.68, 0.54)),
        Part("roof", _polygon((-0.88, -0.1), (0.0, -0.88), (0.88, -0.1), rounding=0.06), "shade"),
        Part("door", _box(-0.26, 0.58, 0.18, 0.34, rounding=0.03), "wood"),
        Part("window", _box(0.3, 0.34, 0.2, 0.2, rounding=0.03), "cream"),
    ),
    "car": (
        Part("roof", _polygon((-0.56, 0.0), (-0.36, -0.5), (0.34, -0.5), (0.66, 0.0), rounding=0.08)),
        Part("body", _box(0.0, 0.2, 0.98, 0.32, rounding=0.16)),
        Part(
            "windows",
            _union(
                _polygon((-0.42, -0.08), (-0.29, -0.4), (-0.06, -0.4), (-0.06, -0.08), rounding=0.02),
                _polygon((0.1, -0.08), (0.1, -0.4), (0.3, -0.4), (0.5, -0.08), rounding=0.02),
            ),
            "glass",
        ),
        Part("wheels", _mirrored(_disc(0.52, 0.5, 0.27)), "slate"),
        Part("hubs", _mirrored(_disc(0.52, 0.5, 0.11)), "cream"),
    ),
    "boat": (
        Part("mast", _line((-0.06, -0.92), (-0.06, 0.4), width=0.06), "wood"),
        Part(
            "sails",
            _union(
                _polygon((0.04, -0.78), (0.04, 0.14), (0.78, 0.14), rounding=0.05),
                _polygon((-0.16, -0.5), (-0.16, 0.14), (-0.66, 0.14), rounding=0.05),
            ),
            "cream",
        ),
        Part("hull", _polygon((-0.92, 0.3), (0.92, 0.3), (0.58, 0.86), (-0.58, 0.86), rounding=0.06)),
    ),
    "star": (Part("star", _polygon(*_star_corners(), rounding=0.04)),),
    "heart": (
        Part(
            "heart",
            _union(
                _mirrored(_disc(0.44, -0.32, 0.48)),
                _polygon((-0.8, -0.04), (0.0, 0.86), (0.8, -0.04), (0.0, -0.5), rounding=0.02),
            ),
        ),
    ),
    "circle": (Part("circle", _disc(0.0, 0.0, 0.9)),),
    "square": (Part("square", _box(0.0, 0.0, 0.78, 0.78, rounding=0.06)),),
}
"""Every thing with its parts, in painting order."""
