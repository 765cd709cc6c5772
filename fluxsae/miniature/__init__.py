"""The embedded miniature: a small FLUX trained on drawn scenes, its CLIP, and a prebuilt run."""

from pathlib import Path
from typing import Literal

MiniaturePart = Literal["flux", "clip", "run"]


def miniature_path(part: MiniaturePart) -> Path:
    """Where one part of the miniature lies: `flux` (a diffusers folder), `clip` (an open_clip folder) or `run`."""
    return Path(__file__).parent / part
