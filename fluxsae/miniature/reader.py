"""Reads a scene back from a picture, in closed form: no learning.

The ground is recognised in the corners, where no thing stands; what differs from it are things. A silhouette's area and
centroid give the pose that each thing would have; the likeliest things are drawn in every colour and texture, and the
drawing that comes nearest wins.
"""

import functools
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage, optimize

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.captions import prompted_attributes
from fluxsae.miniature.drawing import (
    COLOURS,
    POSITIONS,
    RADII,
    SHADE,
    TEXTURE_PERIOD,
    TEXTURES,
    Scene,
    SceneObject,
    Window,
    light,
    object_tints,
    object_window,
    paint_object,
    part_distances,
    rim,
    texture_weight,
)
from fluxsae.miniature.grounds import GROUNDS, IMAGE_SIZE, ground_pixels
from fluxsae.miniature.outlines import THINGS

CONTRAST = 24.0
"""Distance from the ground, in RGB units, from which a pixel counts as drawn."""
EDGE_SHARE = 0.3
"""A pixel with less than this share of the contrast nearby lies outside: keeps blurred outlines where they were."""
SMALLEST_OBJECT = 120
"""Pixels; the smallest drawn thing has 330."""
WIDEST_OBJECT = 66
"""Pixels; the widest drawn thing has 60, so anything wider is two that touch."""
SAME_THING = 30.0
"""Pixels; pieces whose centres are nearer belong to one thing. Those of two things are 50 apart or more."""
MOST_OBJECTS = 4
CANDIDATES = 5
"""Things whose silhouettes are nearest and which are drawn for comparison."""
FRAME_SIDE = 40
"""Samples along each side of the frame in which silhouettes are compared."""
FRAME_REACH = 1.3
"""Half the side of that frame, in square roots of the silhouette's area."""
SIZE_LIMIT = (RADII["large"][0] + RADII["small"][1]) / 2
"""Radius in pixels from which a thing is large."""
WORST_ERROR = 62.0
"""Root mean squared error of the best drawing, in RGB units, from which a thing is unreadable."""

_ROWS, _COLS = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE] + 0.5
_REACH = RADII["large"][1] + 3
_IS_CORNER = (np.abs(_ROWS - IMAGE_SIZE / 2) > _REACH) & (np.abs(_COLS - IMAGE_SIZE / 2) > _REACH)

Pixels = Float[np.ndarray, "rows cols"]
Picture = Float[np.ndarray, "rows cols 3"]
Mask = Bool[np.ndarray, "rows cols"]


def read_scene(image: Image.Image | UInt8[np.ndarray, "height width 3"]) -> Scene:
    """The scene that a picture shows, with a confidence for each object and for the whole, 0 to 1.

    A confidence is the margin of the best reading against the second best, the smallest over an object's attributes;
    it is 0 for an object that looks like nothing the world knows. A picture without objects gives a scene without
    objects and confidence 0. Pictures of another size are resized.

    Raises:
        FluxSaeError: not a picture of three colour channels with values 0 to 255.
    """
    pixels = scene_pixels(image)
    ground, sureness = _read_ground(pixels)
    drawn, cover = _find_drawn(pixels, ground)
    objects = tuple(_read_object(pixels, mask, cover, ground) for mask in _find_objects(drawn))
    confidence = min((thing.confidence for thing in objects), default=0.0)
    return Scene(objects, ground, min(confidence, sureness))


def score_prompt(prompt: str, scene: Scene) -> list[tuple[str, bool]]:
    """For every attribute that a prompt names, whether the scene shows it, and for `number` whether as many things.

    Objects of prompt and scene are paired so that most attributes agree. An object that is missing or unreadable has
    all of its attributes wrong; one too many, readable or not, makes the number wrong.
    """
    wanted, background = prompted_attributes(prompt)
    readable = [thing for thing in scene.objects if thing.confidence > 0]
    scores = [("number", len(wanted) == len(readable) == len(scene.objects))]
    if background is not None:
        scores.append(("background", background == scene.background))
    for attributes, thing in zip(wanted, _pair_objects(wanted, readable), strict=True):
        scores += [(name, thing is not None and getattr(thing, name) == value) for name, value in attributes.items()]
    return scores


def _pair_objects(wanted: list[dict[str, str]], objects: list[SceneObject]) -> list[SceneObject | None]:
    """The object meant by each mapping of attributes: the assignment in which most of them agree."""
    agreeing = [[sum(getattr(thing, n) == v for n, v in names.items()) for thing in objects] for names in wanted]
    paired: list[SceneObject | None] = [None] * len(wanted)
    if objects:
        for row, column in zip(*optimize.linear_sum_assignment(np.array(agreeing), maximize=True), strict=True):
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


def _read_ground(pixels: Picture) -> tuple[str, float]:
    """The ground's name and the margin of the reading."""
    errors = [np.minimum(np.abs(pixels - ground_pixels(name))[_IS_CORNER], 60).mean() for name in GROUNDS]
    return GROUNDS[int(np.argmin(errors))], margin(np.array(errors))


@functools.cache
def _ground_around(ground: str) -> Float[np.ndarray, "shifts rows cols 3"]:
    """The ground moved by up to a pixel each way: edges of hills and clouds need not lie exactly where they should."""
    padded = np.pad(ground_pixels(ground), ((1, 1), (1, 1), (0, 0)), mode="edge")
    return np.stack([padded[y : y + IMAGE_SIZE, x : x + IMAGE_SIZE] for y in range(3) for x in range(3)])


def _find_drawn(pixels: Picture, ground: str) -> tuple[Mask, Pixels]:
    """Where the picture differs from its ground, and how much each pixel is covered (0 to 1)."""
    tone = np.median(pixels[_IS_CORNER] - ground_pixels(ground)[_IS_CORNER], axis=0)
    seen = ndimage.gaussian_filter(pixels - tone, (0.5, 0.5, 0))
    around = _ground_around(ground) if ground_pixels(ground)[_IS_CORNER].std() > 12 else ground_pixels(ground)[None]
    contrast = np.linalg.norm(seen - around, axis=-1).min(axis=0)
    nearby = ndimage.maximum_filter(contrast, size=5)
    drawn = ndimage.binary_fill_holes(contrast > np.maximum(CONTRAST, EDGE_SHARE * nearby))
    cover = np.where(drawn, 1.0, np.clip(contrast / np.maximum(nearby, 2 * CONTRAST), 0, 1))
    return drawn, cover


def _find_objects(drawn: Mask) -> list[Mask]:
    """The drawn pixels object by object, the largest first."""
    parts, count = ndimage.label(drawn, structure=np.ones((3, 3)))
    pieces = [half for index in range(1, count + 1) for half in _split_touching(parts == index)]
    centres: list[tuple[float, float]] = []
    masks: list[Mask] = []
    for piece in sorted(pieces, key=lambda piece: -int(piece.sum())):
        y, x = ndimage.center_of_mass(piece)
        near = [index for index, (row, col) in enumerate(centres) if np.hypot(y - row, x - col) < SAME_THING]
        if near:
            masks[near[0]] = masks[near[0]] | piece
        else:
            centres.append((y, x))
            masks.append(piece)
    return [mask for mask in masks if mask.sum() >= SMALLEST_OBJECT][:MOST_OBJECTS]


def _split_touching(mask: Mask) -> list[Mask]:
    """Two objects that touch, cut where they are narrowest in the middle; one object as it is."""
    for axis, line in ((1, _ROWS), (0, _COLS)):
        profile = mask.sum(axis=axis)
        filled = np.flatnonzero(profile)
        if len(filled) and filled[-1] - filled[0] + 1 > WIDEST_OBJECT:
            third = (filled[-1] - filled[0]) // 3
            cut = filled[0] + third + int(profile[filled[0] + third : filled[-1] - third].argmin())
            return [mask & (line < cut), mask & (line >= cut)]
    return [mask]


@dataclass(frozen=True)
class _Template:
    """A silhouette in the frame of its own area and centroid; area and centroid are those of radius 1."""

    cover: Float[np.ndarray, "side side"]
    area: float
    x: float
    y: float


def _framed(cover: Pixels, *, x: float, y: float, area: float) -> Float[np.ndarray, "side side"]:
    """Samples of `cover` in the frame of a silhouette's area and centroid; pixel centres lie at halves."""
    axis = np.linspace(-FRAME_REACH, FRAME_REACH, FRAME_SIDE) * np.sqrt(area)
    at = np.meshgrid(y - 0.5 + axis, x - 0.5 + axis, indexing="ij")
    sampled: Float[np.ndarray, "side side"] = ndimage.map_coordinates(cover, at, order=1, mode="constant")
    return sampled


@functools.cache
def _templates() -> tuple[_Template, ...]:
    return tuple(_build_template(thing) for thing in THINGS)


def _build_template(thing: str) -> _Template:
    side, radius = 256, 100.0
    y, x = np.mgrid[0:side, 0:side] + 0.5
    outlines = [part.outline((x - side / 2) / radius, (y - side / 2) / radius) for part in THINGS[thing]]
    inside = np.minimum.reduce(outlines) < 0
    area, centre_x, centre_y = float(inside.sum()), float(x[inside].mean()), float(y[inside].mean())
    # Blurred as the silhouettes of small things are by their pixels.
    cover = ndimage.gaussian_filter(inside.astype(float), 3.0)
    framed = _framed(cover, x=centre_x, y=centre_y, area=area)
    return _Template(framed, area / radius**2, (centre_x - side / 2) / radius, (centre_y - side / 2) / radius)


@dataclass(frozen=True)
class _Reading:
    """One thing drawn as it fits best."""

    drawn: SceneObject
    error: float
    surface: float
    """Margin of colour and texture."""


def _read_object(pixels: Picture, mask: Mask, cover: Pixels, ground: str) -> SceneObject:
    near = ndimage.binary_dilation(mask, iterations=1)
    weight = np.where(near, cover, 0.0)
    area = float(weight.sum())
    x, y = float((weight * _COLS).sum() / area), float((weight * _ROWS).sum() / area)
    framed = _framed(weight, x=x, y=y, area=area)
    silhouettes = np.array([np.square(framed - template.cover).mean() for template in _templates()])
    readings = []
    for index in silhouettes.argsort()[:CANDIDATES]:
        template = _templates()[index]
        radius = float(np.sqrt(area / template.area))
        pose = SceneObject(
            thing=list(THINGS)[index],
            colour="red",
            texture="solid",
            size="large" if radius > SIZE_LIMIT else "small",
            position="center",
            x=x - template.x * radius,
            y=y - template.y * radius,
            radius=radius,
        )
        readings.append(_draw_best(pixels, pose, near, ground))
    readings.sort(key=lambda reading: reading.error)
    best = readings[0]
    places = np.array([np.hypot(best.drawn.x - at[0], best.drawn.y - at[1]) for at in POSITIONS.values()])
    sureness = min(
        1 - best.error / max(readings[1].error, 1e-9),
        best.surface,
        margin(places),
        abs(best.drawn.radius - SIZE_LIMIT) / 4,
    )
    return replace(
        best.drawn,
        position=list(POSITIONS)[int(places.argmin())],
        confidence=float(np.clip(sureness, 1e-6, 1)) if best.error < WORST_ERROR else 0.0,
    )


def _draw_best(pixels: Picture, pose: SceneObject, near: Mask, ground: str) -> _Reading:
    """The thing of `pose` in the colour and texture that come nearest, and how near that is over window and mask."""
    window = object_window(pose)
    distances = part_distances(pose, window)
    seen = pixels[window.rows, window.cols]
    colour, texture, weight, surface = _read_surface(seen, pose, window, distances)
    thing = replace(pose, colour=colour, texture=texture)
    canvas = ground_pixels(ground)[window.rows, window.cols].copy()
    paint_object(canvas, thing, window, distances=distances, weight=weight)
    counted = near[window.rows, window.cols] | (distances.min(axis=0) < 1)
    squared = np.square(seen - canvas).mean(axis=-1)[counted].sum()
    # What the mask holds beyond the window is not explained at all.
    outside = near.sum() - near[window.rows, window.cols].sum()
    error = float(np.sqrt((squared + outside * 80.0**2) / (counted.sum() + outside)))
    return _Reading(thing, error, surface)


def _read_surface(
    seen: Picture, pose: SceneObject, window: Window, distances: Float[np.ndarray, "parts rows cols"]
) -> tuple[str, str, Pixels, float]:
    """Colour, texture, the texture's weights over the window, and the margin of the reading.

    Each pair is drawn with the thing's own light on the parts that take its colour, in every shift of the pattern.
    """
    inside = distances < 0
    top = len(inside) - 1 - inside[::-1].argmax(axis=0)
    own = np.array([part.paint in ("body", "shade") for part in THINGS[pose.thing]])
    distance = np.take_along_axis(distances, top[None], axis=0)[0]
    counted = inside.any(axis=0) & own[top] & (distance < -0.6)
    # Where a later part's edge is near, two paints mix.
    for place in range(1, len(inside)):
        counted &= (top == place) | (distances[place] > 0.8)
    if not counted.any():
        return "red", "solid", np.zeros_like(window.dx), 0.0
    shade = np.array([SHADE if part.paint == "shade" else 1.0 for part in THINGS[pose.thing]])
    factor = (light(pose, window.dx, window.dy) * rim(distance) * shade[top])[counted]
    pattern = {texture: _shifted_weights(texture, window.dx[counted], window.dy[counted]) for texture in TEXTURES}
    errors = np.empty((len(COLOURS), len(TEXTURES)))
    shifts = np.empty((len(COLOURS), len(TEXTURES)), dtype=int)
    for row, colour in enumerate(COLOURS):
        for column, texture in enumerate(TEXTURES):
            squared = _surface_errors(seen[counted], factor, pattern[texture], object_tints(colour, texture))
            shifts[row, column] = squared.argmin()
            errors[row, column] = np.sqrt(max(squared.min() / counted.sum(), 1e-9))
    row, column = divmod(int(errors.argmin()), len(TEXTURES))
    texture = TEXTURES[column]
    shift_x, shift_y = _shifts(texture)[shifts[row, column]]
    weight = texture_weight(texture, window.dx - shift_x, window.dy - shift_y)
    return list(COLOURS)[row], texture, weight, min(margin(errors.min(axis=1)), margin(errors[row]))


@functools.cache
def _shifts(texture: str) -> Float[np.ndarray, "shifts 2"]:
    """Shifts (x, y) of a pattern that cover its period, in pixels."""
    along = np.arange(0, TEXTURE_PERIOD, 1.5)
    shifts: Float[np.ndarray, "shifts 2"] = np.zeros((1, 2))
    if texture == "striped":
        shifts = np.stack([along, along], axis=1) / np.sqrt(2)
    if texture == "dotted":
        shifts = np.stack(np.meshgrid(along, along), axis=-1).reshape(-1, 2)
    return shifts


def _shifted_weights(
    texture: str, dx: Float[np.ndarray, " pixels"], dy: Float[np.ndarray, " pixels"]
) -> Float[np.ndarray, "shifts pixels"]:
    """How much of the second tint each pixel shows, for every shift of the pattern."""
    shifts = _shifts(texture)
    return texture_weight(texture, dx - shifts[:, :1], dy - shifts[:, 1:])


def _surface_errors(
    seen: Float[np.ndarray, "pixels 3"],
    factor: Float[np.ndarray, " pixels"],
    weights: Float[np.ndarray, "shifts pixels"],
    tints: tuple[Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]],
) -> Float[np.ndarray, " shifts"]:
    """Summed squared error of each shift of one pattern in one pair of tints.

    With the base tint's error e and the step d to the second tint, |e - weight factor d|^2 is expanded, so that all
    shifts cost two products.
    """
    base, second = tints
    step = second - base
    error = seen - factor[:, None] * base
    found: Float[np.ndarray, " shifts"] = (
        np.square(error).sum() - 2 * weights @ (factor * (error @ step)) + weights**2 @ factor**2 * (step @ step)
    )
    return found
