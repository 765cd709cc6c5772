"""The one table of figures behind `python -m train.cost`: what each is, and where it comes from."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["measured", "published", "calculated"]


@dataclass(frozen=True)
class Figure:
    """A number with its source; `calculated` ones have been measured by nobody we know of."""

    value: float
    kind: Kind
    source: str


@dataclass(frozen=True)
class Gpu:
    """One GPU: its datasheet, and which share of it this work reaches."""

    memory_gb: float
    """Device memory, 10^9 bytes (datasheet)."""
    peak_tflops: float
    """Dense bfloat16 matrix products, 10^12 operations a second (datasheet)."""
    bandwidth_gbs: float
    """Device memory, 10^9 bytes a second (datasheet)."""
    step_share: Figure
    """Share of the peak that a FLUX step reaches, eager."""
    compiled_share: Figure
    """The same with compiled blocks."""
    training_share: Figure
    """Share of the peak that dense SAE training reaches."""


_EAGER = Figure(0.318, "published", "6.6 s an image of 28 steps at 1024 px on an H100, eager")
_COMPILED = Figure(0.500, "published", "4.2 s an image of 28 steps at 1024 px on an H100, compiled")
_TRAINING = Figure(0.40, "calculated", "large bfloat16 products reach about 70 % of the peak, training 60 % of that")


def _alike(figure: Figure) -> Figure:
    return Figure(figure.value, "calculated", "taken to reach the same share of its peak as an H100")


def _gpu(memory_gb: float, peak_tflops: float, bandwidth_gbs: float) -> Gpu:
    """A GPU on which nothing was measured."""
    shares = (_alike(_EAGER), _alike(_COMPILED), _alike(_TRAINING))
    return Gpu(memory_gb, peak_tflops, bandwidth_gbs, *shares)


GPUS: dict[str, Gpu] = {
    "H100": Gpu(80, 989, 3350, _EAGER, _COMPILED, _TRAINING),
    "H200": _gpu(141, 989, 4800),
    "A100-80GB": _gpu(80, 312, 2039),
    "A100-40GB": _gpu(40, 312, 1555),
    "L40S": _gpu(48, 362, 864),
    "A6000": _gpu(48, 155, 768),
    "RTX4090": _gpu(24, 165, 1008),
    "A10G": _gpu(24, 70, 600),
}

DEV_BYTES: dict[str, int] = {
    "transformer": 23_803_000_000,
    "text_encoder": 246_000_000,
    "text_encoder_2": 9_525_000_000,
    "vae": 168_000_000,
}
"""Files of black-forest-labs/FLUX.1-dev in bfloat16 (published)."""

N_DOUBLE, N_SINGLE, D_MODEL = 19, 38, 3072
"""Blocks and width of FLUX.1 (published)."""

T5_OPERATIONS_PER_TOKEN = Figure(9.4e9, "calculated", "2 operations for each of T5-XXL's 4.7 billion encoder weights")
DECODE_OPERATIONS_PER_PIXEL = Figure(9.9e6, "calculated", "convolutions of the decoder, 10.4 TFLOP at 1024 px")
DECODE_SHARE = Figure(0.15, "calculated", "convolutions in bfloat16 reach about 15 % of the peak")
CLIP_OPERATIONS_PER_IMAGE = Figure(1.62e11, "published", "ViT-L/14 at 224 px: 81 billion multiply-adds")
OFFLOAD_BYTES_PER_SECOND = Figure(2.0e10, "calculated", "PCIe 4.0 x16 at 20 of 32 GB/s, pinned or not")
DISK_BYTES_PER_SECOND = Figure(2.0e9, "calculated", "a local NVMe drive read in large pieces")
THUMBNAIL_BYTES = Figure(8_000, "calculated", "WebP of 256 px")
HEATMAP_TOP_IMAGES = 16
"""Token grids kept of each alive feature."""
