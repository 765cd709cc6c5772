"""What lies behind the things: four plain grounds and four places, in colours that are none of the eight.

What decorates a place (a sun, a moon, a cloud) stands in a corner where no thing ever is.
"""

import functools

import numpy as np
from jaxtyping import Float

IMAGE_SIZE = 128
"""Width and height of a scene, in pixels."""
Picture = Float[np.ndarray, "rows cols 3"]
Pixels = Float[np.ndarray, "rows cols"]
PLAIN: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 22),
    "white": (242, 242, 238),
    "gray": (130, 131, 136),
    "brown": (92, 63, 44),
}
PLACES = ("meadow", "sea", "desert", "night")
GROUNDS = (*PLAIN, *PLACES)

_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
_GLOW = 1.03 - 0.07 * ((_Y - IMAGE_SIZE / 2) ** 2 + (_X - IMAGE_SIZE / 2) ** 2) / (IMAGE_SIZE / 2) ** 2
NIGHT_STARS = ((14, 14), (36, 8), (24, 30), (8, 44), (88, 10), (100, 38), (120, 50), (10, 76), (119, 78))


def _sky(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Picture:
    share = np.clip(_Y / 84, 0, 1)[..., None]
    mixed: Picture = np.array(top) * (1 - share) + np.array(bottom) * share
    return mixed


def _lay(pixels: Picture, distance: Pixels, colour: tuple[int, int, int]) -> None:
    """Paints what lies inside `distance` (negative, in pixels)."""
    pixels += np.clip(0.5 - distance, 0, 1)[..., None] * (np.array(colour) - pixels)


def _disc(x: float, y: float, radius: float) -> Pixels:
    distance: Pixels = np.hypot(_X - x, _Y - y) - radius
    return distance


def _hill(height: float, swing: float, period: float, shift: float) -> Pixels:
    """Everything below a wave; `height` is the row of its middle."""
    distance: Pixels = height + swing * np.sin(2 * np.pi * (_X - shift) / period) - _Y
    return distance


def _meadow() -> Picture:
    pixels = _sky((190, 214, 226), (222, 233, 232))
    for x, y, radius in ((16, 19, 6.5), (25, 15, 8.5), (34, 19, 6.0)):
        _lay(pixels, _disc(x, y, radius), (246, 248, 246))
    _lay(pixels, _hill(84, 5, 150, 20), (168, 186, 136))
    _lay(pixels, _hill(98, 4, 120, 95), (144, 166, 110))
    return pixels


def _sea() -> Picture:
    pixels = _sky((206, 220, 226), (232, 232, 224))
    for x, y, radius in ((96, 17, 6.0), (105, 13, 8.0), (114, 17, 6.0)):
        _lay(pixels, _disc(x, y, radius), (247, 247, 244))
    for height, shift, colour in ((82, 0, (128, 162, 180)), (97, 9, (106, 144, 166)), (112, 0, (88, 126, 150))):
        _lay(pixels, _hill(height, 1.8, 18, shift), colour)
    return pixels


def _desert() -> Picture:
    pixels = _sky((228, 220, 206), (244, 234, 214))
    _lay(pixels, _disc(107, 20, 10), (252, 246, 226))
    _lay(pixels, _hill(86, 6, 170, 100), (222, 198, 156))
    _lay(pixels, _hill(100, 5, 130, 20), (206, 178, 132))
    return pixels


def _night() -> Picture:
    pixels = _sky((28, 30, 58), (50, 52, 88))
    for x, y in NIGHT_STARS:
        _lay(pixels, _disc(x, y, 1.3), (222, 220, 204))
    crescent = np.maximum(_disc(110, 19, 10), -_disc(105, 16, 9))
    _lay(pixels, crescent, (236, 230, 204))
    _lay(pixels, _hill(96, 5, 150, 60), (38, 42, 58))
    _lay(pixels, _hill(108, 4, 120, 10), (30, 33, 46))
    return pixels


@functools.cache
def ground_pixels(ground: str) -> Picture:
    """The empty ground, RGB 0 to 255, not rounded; do not write into it."""
    if ground in PLAIN:
        pixels: Picture = np.array(PLAIN[ground]) * _GLOW[..., None]
    else:
        pixels = {"meadow": _meadow, "sea": _sea, "desert": _desert, "night": _night}[ground]()
    pixels.setflags(write=False)
    return pixels
