"""Steering grids as pictures: a row a feature, a column a strength, so that a stranger sees what was turned."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from PIL import Image, ImageDraw

from fluxsae.errors import FluxSaeError
from fluxsae.pictures.heatmaps import enlarge, feature_colour, font, wrap

INK, MUTED, PAPER = (20, 20, 25), (105, 105, 115), (255, 255, 255)
LESS, MORE, ODD = (46, 98, 190), (190, 88, 20), (176, 40, 60)
STRIP_GAP: Final = 4
"""White columns between pictures side by side."""
_GAP: Final = 12
_LABEL_WIDTH: Final = 250
_CAPTION: Final = 46
_HEAD: Final = 92


@dataclass(frozen=True)
class GridCell:
    """One image of a row."""

    image: Image.Image
    caption: str
    """What was done, in words: "unchanged", "half taken away", "2 x added"."""
    note: str = ""
    """A measured number under the caption."""
    direction: int = 0
    """-1 turned down, 0 unchanged, 1 turned up: the colour of the caption."""
    looks_natural: bool = True
    """Whether FLUX takes the picture for one of its own; a cell that does not look natural is marked."""


@dataclass(frozen=True)
class GridRow:
    """One feature."""

    feature: int
    label: str
    """What the feature stands for."""
    detail: str
    """Small lines under the label: prompt, seed, figures."""
    cells: Sequence[GridCell]


def steering_grid(rows: Sequence[GridRow], *, title: str, subtitle: str = "", cell: int = 160) -> Image.Image:
    """The rows under a title, every image at least `cell` pixels wide.

    Raises:
        FluxSaeError: no rows, or rows of different lengths.
    """
    if not rows or len({len(row.cells) for row in rows}) != 1 or not rows[0].cells:
        raise FluxSaeError("A steering grid needs at least one row, and the same number of images in each.")
    pictures = [[enlarge(one.image, min_side=cell) for one in row.cells] for row in rows]
    width, height = (max(picture.size[axis] for line in pictures for picture in line) for axis in (0, 1))
    step_x, step_y = width + _GAP, height + _CAPTION + _GAP
    size = (_GAP + _LABEL_WIDTH + len(rows[0].cells) * step_x, _HEAD + len(rows) * step_y)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), title, fill=INK, font=font(24, bold=True))
    pen.text((_GAP, _GAP + 36), subtitle, fill=MUTED, font=font(14))
    for number, (row, line) in enumerate(zip(rows, pictures, strict=True)):
        top = _HEAD + number * step_y
        _draw_label(pen, row, top=top)
        for column, (one, picture) in enumerate(zip(row.cells, line, strict=True)):
            left = _GAP + _LABEL_WIDTH + column * step_x
            sheet.paste(picture, (left, top))
            _draw_caption(pen, one, left=left, top=top + height, width=width)
            if not one.looks_natural:
                pen.rectangle((left, top, left + picture.width - 1, top + picture.height - 1), outline=ODD, width=3)
    return sheet


def _draw_label(pen: ImageDraw.ImageDraw, row: GridRow, *, top: int) -> None:
    pen.rectangle((_GAP, top, _GAP + 5, top + 44), fill=feature_colour(row.label))
    pen.text((_GAP + 14, top), row.label, fill=INK, font=font(20, bold=True))
    pen.text((_GAP + 14, top + 26), f"feature {row.feature}", fill=MUTED, font=font(14))
    lines = [line for part in row.detail.split("\n") for line in wrap(part, font(13), _LABEL_WIDTH - 36)]
    for number, line in enumerate(lines[:6]):
        pen.text((_GAP + 14, top + 54 + 17 * number), line, fill=MUTED, font=font(13))


def _draw_caption(pen: ImageDraw.ImageDraw, one: GridCell, *, left: int, top: int, width: int) -> None:
    colour = {-1: LESS, 0: INK, 1: MORE}[one.direction]
    pen.text((left, top + 5), one.caption, fill=colour, font=font(15, bold=True))
    note = one.note if one.looks_natural else f"{one.note} · not natural"
    for number, line in enumerate(wrap(note, font(12), width)[:1]):
        pen.text((left, top + 25 + 14 * number), line, fill=MUTED if one.looks_natural else ODD, font=font(12))


def join_pictures(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures side by side on white."""
    width = sum(picture.width for picture in pictures) + STRIP_GAP * (len(pictures) - 1)
    strip = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + STRIP_GAP
    return strip


def split_pictures(strip: Image.Image, count: int) -> list[Image.Image]:
    """The pictures of one width that `join_pictures` put side by side."""
    width = (strip.width - (count - 1) * STRIP_GAP) // count
    lefts = [place * (width + STRIP_GAP) for place in range(count)]
    return [strip.crop((left, 0, left + width, strip.height)) for left in lefts]
