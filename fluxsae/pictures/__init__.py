"""Pictures: heatmaps over images, grids and contact sheets. And how alike two pictures are (CLIP, LPIPS)."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.pictures.heatmaps import token_heatmap
    from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance, load_distance, load_embedder

__all__ = ["ImageEmbedder", "PerceptualDistance", "load_distance", "load_embedder", "token_heatmap"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "ImageEmbedder": "perceptual",
        "PerceptualDistance": "perceptual",
        "load_distance": "perceptual",
        "load_embedder": "perceptual",
        "token_heatmap": "heatmaps",
    },
)
