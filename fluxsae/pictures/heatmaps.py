"""Token values -> heatmap -> overlay on the picture, with one colour map and one legend for all of them."""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import TokenGrid

COLOUR_MAP = "inferno"
"""Perceptually uniform and readable with every kind of colour blindness (van der Walt & Smith 2015)."""


class HeatCurve(NamedTuple):
    """How heat is laid over a picture, here and on the page.

    A value h in [0, 1] covers the picture by opacity * h^exponent, from `threshold` on. What is silent keeps its
    colours, at `dimming` of their brightness (at full opacity).
    """

    exponent: float = 0.8
    opacity: float = 0.8
    threshold: float = 0.05
    dimming: float = 0.72


HEAT: Final = HeatCurve()

NAMED_COLOURS = {
    "red": "#d63b3b",
    "orange": "#e0882c",
    "yellow": "#d6b922",
    "green": "#2fa84a",
    "cyan": "#25b9cc",
    "blue": "#3a68e0",
    "purple": "#8b43d6",
    "pink": "#e368ae",
    "brown": "#8a5a34",
    "black": "#45454f",
    "gray": "#8a8a96",
    "grey": "#8a8a96",
    "white": "#b9bdcb",
}
"""Chips of labels that name a colour; black and white are moved towards grey, to be seen on any paper."""
NEUTRAL_COLOUR = "#7d8298"
"""Chip of every other feature: a vivid one would be taken for the feature's own."""


def token_heatmap(
    acts: Float[Tensor, " tokens"], grid: TokenGrid, *, reference: float
) -> Float[np.ndarray, "rows cols"]:
    """One feature's activations on the image's token grid, as fractions of `reference`.

    Values are clipped to [0, 1]; `reference` is in SAE activation units, usually the feature's run-wide maximum
    (comparable across images), or the largest of `acts` (each image by itself). A feature that never fired has
    reference 0 and an empty heatmap.

    Raises:
        FluxSaeError: `acts` does not hold `grid.rows * grid.cols` tokens, or a value is not a finite number.
    """
    if acts.numel() != grid.n_tokens:
        raise FluxSaeError(
            f"acts holds {acts.numel()} tokens, the grid {grid.rows} x {grid.cols} needs {grid.n_tokens}; "
            "pass the activations of the image tokens of one image, and the grid of its size"
        )
    if not np.isfinite(reference) or reference < 0:
        raise FluxSaeError(f"reference is {reference}; it must be a finite number of at least 0: the feature's maximum")
    values = acts.detach().double().cpu().numpy().reshape(grid.rows, grid.cols)
    if not np.isfinite(values).all():
        raise FluxSaeError("acts holds NaN or infinite values; only finite activations have a heatmap")
    if reference == 0:
        return np.zeros(values.shape, dtype=np.float32)
    return (values.clip(0.0, reference) / reference).astype(np.float32)


def heat_colours(heatmap: Float[np.ndarray, "rows cols"]) -> UInt8[np.ndarray, "rows cols 3"]:
    """RGB of each value of a heatmap in [0, 1], by the one colour map of the project."""
    colours: UInt8[np.ndarray, "rows cols 4"] = matplotlib.colormaps[COLOUR_MAP](heatmap, bytes=True)
    return colours[..., :3]


def enlarge(image: Image.Image, *, min_side: int) -> Image.Image:
    """The picture in whole multiples of its pixels, crisp, with its longer side at least `min_side` pixels."""
    factor = -(-min_side // max(image.size))
    if factor <= 1:
        return image.convert("RGB")
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def overlay(
    image: Image.Image,
    heatmap: Float[np.ndarray, "rows cols"],
    *,
    opacity: float = HEAT.opacity,
    threshold: float = HEAT.threshold,
    smooth: bool = True,
    min_side: int = 0,
) -> Image.Image:
    """The picture with a heatmap over it: its own colours where the feature is silent, glowing where it fires.

    Works for any picture size and any grid. `opacity` 0 gives the picture back unchanged; values of the heatmap
    below `threshold` (a fraction of the scale) show no heat; `smooth` interpolates between tokens, otherwise each
    token is one flat cell; `min_side` enlarges small pictures first, pixel-crisp.

    Raises:
        FluxSaeError: opacity or threshold outside [0, 1], or a heatmap with values outside [0, 1].
    """
    _check_fraction("opacity", opacity)
    _check_fraction("threshold", threshold)
    if not (np.isfinite(heatmap).all() and heatmap.min() >= 0 and heatmap.max() <= 1):
        raise FluxSaeError("the heatmap holds values outside [0, 1]; make it with token_heatmap")
    picture = enlarge(image, min_side=min_side)
    heat = resize_heat(heatmap, picture.size, smooth=smooth)
    return Image.fromarray(_glow(np.asarray(picture), heat, opacity=opacity, threshold=threshold))


def _glow(
    pixels: UInt8[np.ndarray, "height width 3"],
    heat: Float[np.ndarray, "height width"],
    *,
    opacity: float,
    threshold: float,
) -> UInt8[np.ndarray, "height width 3"]:
    """Dimmed pixels with heat mixed in, more of it where it is stronger, so that weak heat leaves no dark rim."""
    base = pixels * np.float32(1 - opacity * (1 - HEAT.dimming))
    shown = np.where(heat >= max(threshold, 1e-6), heat**HEAT.exponent, 0.0)
    weight = shown[..., None].astype(np.float32) * np.float32(opacity)
    mixed = base + weight * (heat_colours(heat).astype(np.float32) - base)
    glowing: UInt8[np.ndarray, "height width 3"] = np.rint(mixed).clip(0, 255).astype(np.uint8)
    return glowing


def resize_heat(
    heatmap: Float[np.ndarray, "rows cols"], size: tuple[int, int], *, smooth: bool
) -> Float[np.ndarray, "height width"]:
    """The heatmap at a picture's (width, height), still within [0, 1]."""
    kind = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(heatmap.astype(np.float32)).resize(size, kind), dtype=np.float32).clip(0.0, 1.0)


def legend(
    width: int,
    *,
    maximum: float | str,
    opacity: float = HEAT.opacity,
    threshold: float = HEAT.threshold,
) -> Image.Image:
    """A strip with the colours of an overlay on mid grey, from silent to `maximum`.

    `maximum` is in activation units, or words such as "this image's maximum"; a mark stands at the threshold.
    """
    height, bar, pad = 44, 14, 12
    ink, paper = (40, 40, 45), (255, 255, 255)
    strip = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(strip)
    ramp = np.linspace(0, 1, width - 2 * pad, dtype=np.float32)[None].repeat(bar, axis=0)
    ground = np.full((*ramp.shape, 3), 150, dtype=np.uint8)
    strip.paste(Image.fromarray(_glow(ground, ramp, opacity=opacity, threshold=threshold)), (pad, 4))
    x = pad + round(threshold * (width - 2 * pad))
    draw.line([(x, 2), (x, bar + 5)], fill=ink, width=1)
    end = maximum if isinstance(maximum, str) else f"{maximum:.3g}"
    draw.text((pad, bar + 8), "silent", fill=ink, font=font(12))
    draw.text((width - pad, bar + 8), end, fill=ink, font=font(12), anchor="ra")
    if not isinstance(maximum, str):
        draw.text((width // 2, bar + 8), f"{maximum / 2:.3g}", fill=ink, font=font(12), anchor="ma")
    return strip


def with_legend(
    picture: Image.Image,
    *,
    maximum: float | str,
    opacity: float = HEAT.opacity,
    threshold: float = HEAT.threshold,
) -> Image.Image:
    """A picture with the legend strip under it."""
    strip = legend(picture.width, maximum=maximum, opacity=opacity, threshold=threshold)
    joined = Image.new("RGB", (picture.width, picture.height + strip.height))
    joined.paste(picture, (0, 0))
    joined.paste(strip, (0, picture.height))
    return joined


def _words(label: str | None) -> list[str]:
    return re.findall(r"[a-z]+", (label or "").lower())


def names_colour(label: str | None) -> bool:
    """Whether one of a label's words is a colour that a chip can wear."""
    return any(word in NAMED_COLOURS for word in _words(label))


def feature_colour(label: str | None) -> str:
    """The colour chip of a feature as #rrggbb: the colour that its label names, or the neutral one."""
    return next((NAMED_COLOURS[word] for word in _words(label) if word in NAMED_COLOURS), NEUTRAL_COLOUR)


@functools.cache
def font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships, so that pictures look the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise FluxSaeError(f"{name} is {value}; it must lie between 0 and 1")


@dataclass(frozen=True)
class SheetCell:
    """One picture of a contact sheet with one feature's heatmap on it."""

    image: Image.Image
    heatmap: Float[np.ndarray, "rows cols"]
    caption: str = ""
    """Shown under the picture, usually the prompt."""


@dataclass(frozen=True)
class SheetRow:
    """One feature of a contact sheet."""

    feature: int
    label: str
    detail: str
    """Lines under the label: how sure it is, how often it fires."""
    cells: Sequence[SheetCell]
    """The feature's top images, best first."""


def contact_sheet(
    rows: Sequence[SheetRow],
    *,
    title: str = "",
    subtitle: str = "",
    columns: int = 6,
    cell: int = 150,
    opacity: float = 0.85,
    threshold: float = HEAT.threshold,
    smooth: bool = True,
    maximum: str = "the feature's maximum over the run",
) -> Image.Image:
    """A sheet for people: a row a feature, a column a top image, the picture above its overlay, one legend below.

    `cell` is the side of one picture in pixels; pictures that are not square are fitted into it. `maximum` says in
    words what full heat stands for.

    Raises:
        FluxSaeError: there is no row, or a row has no picture.
    """
    if not rows or not all(row.cells for row in rows):
        raise FluxSaeError(f"a contact sheet of {len(rows)} features needs at least one feature, each with a top image")
    return _Sheet(columns, cell, opacity, threshold, smooth, maximum).draw(rows, title, subtitle)


@dataclass(frozen=True)
class _Sheet:
    """Where everything goes on a contact sheet, in pixels."""

    columns: int
    cell: int
    opacity: float
    threshold: float
    smooth: bool
    maximum: str
    margin: int = 36
    gap: int = 8
    label_width: int = 250
    head: int = 92
    foot: int = 70

    @property
    def row_height(self) -> int:
        return 2 * self.cell + 3 * self.gap + 34

    def draw(self, rows: Sequence[SheetRow], title: str, subtitle: str) -> Image.Image:
        width = 2 * self.margin + self.label_width + self.columns * (self.cell + self.gap) - self.gap
        height = self.head + len(rows) * self.row_height + self.foot
        sheet = Image.new("RGB", (width, height), (255, 255, 255))
        pen = ImageDraw.Draw(sheet)
        pen.text((self.margin, 24), title, fill=(20, 20, 25), font=font(24, bold=True))
        pen.text((self.margin, 58), subtitle, fill=(95, 95, 105), font=font(14))
        for index, row in enumerate(rows):
            self._draw_row(sheet, pen, row, self.head + index * self.row_height)
        strip = legend(
            self.columns * (self.cell + self.gap) - self.gap,
            maximum=self.maximum,
            opacity=self.opacity,
            threshold=self.threshold,
        )
        sheet.paste(strip, (self.margin + self.label_width, height - self.foot + 12))
        return sheet

    def _draw_row(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, row: SheetRow, top: int) -> None:
        pen.line([(self.margin, top - 2), (sheet.width - self.margin, top - 2)], fill=(222, 222, 228), width=1)
        top += self.gap
        pen.rectangle([self.margin, top + 4, self.margin + 12, top + 16], fill=feature_colour(row.label))
        pen.text((self.margin + 20, top), f"feature {row.feature}", fill=(95, 95, 105), font=font(14))
        y = top + 26
        for line in wrap(row.label, font(20, bold=True), self.label_width - 16)[:3]:
            pen.text((self.margin, y), line, fill=(20, 20, 25), font=font(20, bold=True))
            y += 26
        for paragraph in row.detail.split("\n"):
            for line in wrap(paragraph, font(13), self.label_width - 16):
                pen.text((self.margin, y + 6), line, fill=(95, 95, 105), font=font(13))
                y += 18
        for column, item in enumerate(row.cells[: self.columns]):
            self._draw_cell(sheet, pen, item, self.margin + self.label_width + column * (self.cell + self.gap), top)

    def _draw_cell(self, sheet: Image.Image, pen: ImageDraw.ImageDraw, item: SheetCell, left: int, top: int) -> None:
        glowing = overlay(
            item.image,
            item.heatmap,
            opacity=self.opacity,
            threshold=self.threshold,
            smooth=self.smooth,
            min_side=2 * self.cell,
        )
        plain = enlarge(item.image, min_side=2 * self.cell)
        for picture, y in ((plain, top), (glowing, top + self.cell + self.gap // 2)):
            picture.thumbnail((self.cell, self.cell), Image.Resampling.LANCZOS)
            sheet.paste(picture, (left + (self.cell - picture.width) // 2, y + (self.cell - picture.height) // 2))
        y = top + 2 * self.cell + self.gap
        lines = wrap(item.caption, font(10), self.cell)
        if len(lines) > 2:
            lines[1] = _cut(f"{lines[1]} {lines[2]}", font(10), self.cell)
        for line in lines[:2]:
            pen.text((left, y), line, fill=(110, 110, 120), font=font(10))
            y += 13


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words; a longer word is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_cut(word, face, width))
    return lines


def _cut(word: str, face: ImageFont.FreeTypeFont, width: int) -> str:
    if face.getlength(word) <= width:
        return word
    while word and face.getlength(f"{word}…") > width:
        word = word[:-1]
    return f"{word}…"
