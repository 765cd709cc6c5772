"""The one table of figures behind `python -m train.cost`: what each is, and where it comes from."""

from dataclasses import dataclass, replace
from typing import Literal

from fluxsae.flux.settings import GenerationSettings

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


@dataclass(frozen=True)
class Model:
    """What of a FLUX decides its cost."""

    n_double: int
    n_single: int
    d_model: int
    patch: int
    """Pixels of a token's side."""
    bytes: dict[str, int]
    """Weight files of each component."""
    settings: GenerationSettings
    """What it generates with unless told otherwise."""
    block_operations: int = 24
    """Operations of a block on a token, in squares of its width, beside attention's own."""


_FLUX1_BYTES = {
    "transformer": 23_803_000_000,
    "text_encoder": 246_000_000,
    "text_encoder_2": 9_525_000_000,
    "vae": 168_000_000,
}
BLOCK_OPERATIONS = {"FluxTransformer2DModel": 24, "Flux2Transformer2DModel": 26}
"""FLUX.2's `ff` is gated and 3 wide (18) instead of 4 wide (16); attention's projections take 8 in both."""
_DEV = Model(19, 38, 3072, 16, _FLUX1_BYTES, GenerationSettings())
MODELS: dict[str, Model] = {
    "black-forest-labs/FLUX.1-dev": _DEV,
    "black-forest-labs/FLUX.1-schnell": replace(
        _DEV, settings=GenerationSettings(num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256)
    ),
    "black-forest-labs/FLUX.2-klein-4B": Model(
        5,
        20,
        3072,
        16,
        {"transformer": 7_751_000_000, "text_encoder": 8_045_000_000, "vae": 168_000_000},
        GenerationSettings(num_inference_steps=4, guidance_scale=0.0),
        BLOCK_OPERATIONS["Flux2Transformer2DModel"],
    ),
}
"""Blocks, widths, files in bfloat16 (published on the models' pages; klein's files from its configuration)."""

TEXT_OPERATIONS_PER_BYTE = Figure(1.0, "calculated", "2 operations a token for each weight of 2 bytes")
DECODE_OPERATIONS_PER_PIXEL = Figure(9.9e6, "calculated", "convolutions of the decoder, 10.4 TFLOP at 1024 px")
DECODE_SHARE = Figure(0.15, "calculated", "convolutions in bfloat16 reach about 15 % of the peak")
CLIP_OPERATIONS_PER_IMAGE: dict[str, Figure] = {
    "ViT-B-32": Figure(8.8e9, "published", "ViT-B/32 at 224 px: 4.4 billion multiply-adds"),
    "ViT-L-14": Figure(1.62e11, "published", "ViT-L/14 at 224 px: 81 billion multiply-adds"),
}
OTHER_CLIP = Figure(1.62e11, "calculated", "taken for as large as ViT-L/14")
CLIP_WIDTH = 768
"""Width of an embedding, at most."""
OFFLOAD_BYTES_PER_SECOND = Figure(2.0e10, "calculated", "PCIe 4.0 x16 at 20 of 32 GB/s, pinned or not")
DISK_BYTES_PER_SECOND = Figure(2.0e9, "calculated", "a local NVMe drive read in large pieces")
THUMBNAIL_BYTES = Figure(8_000, "calculated", "WebP of 256 px")
_REHEARSED = "two CPU cores, train/LOG.md, A rehearsal at true widths; longer where more images are scored"
_MINIATURE = "the miniature's committed run"
SECONDS_PER_FEATURE: dict[str, Figure] = {
    "analyze": Figure(98 / 24_576, "measured", _REHEARSED),
    "select": Figure(96 / 24_576, "measured", _REHEARSED),
    "directions": Figure(782 / 24_576, "measured", _REHEARSED),
}
BYTES_PER_FEATURE: dict[str, Figure] = {
    "analyze": Figure(0, "measured", "select writes the same file again"),
    "select": Figure(0.573e6 / 1536, "measured", _MINIATURE),
    "directions": Figure(0.228e6 / 1536, "measured", _MINIATURE),
}
RENDER_SECONDS = Figure(4.3 / 2, "measured", f"{_MINIATURE}, for each hook point")
RENDER_BYTES = Figure(1.727e6 / 2, "measured", f"{_MINIATURE}, for each hook point")
