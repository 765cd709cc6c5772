"""Pictures: from folders and parquet files, as FLUX reads them; heatmaps over images, grids and contact sheets.

And how alike two pictures are (CLIP, LPIPS).
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.pictures.heatmaps import token_heatmap
    from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance, load_distance, load_embedder
    from fluxsae.pictures.sources import PictureSet, fit_picture, load_pictures, open_picture

__all__ = [
    "ImageEmbedder",
    "PerceptualDistance",
    "PictureSet",
    "fit_picture",
    "load_distance",
    "load_embedder",
    "load_pictures",
    "open_picture",
    "token_heatmap",
]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "ImageEmbedder": "perceptual",
        "PerceptualDistance": "perceptual",
        "PictureSet": "sources",
        "fit_picture": "sources",
        "load_distance": "perceptual",
        "load_embedder": "perceptual",
        "load_pictures": "sources",
        "open_picture": "sources",
        "token_heatmap": "heatmaps",
    },
)
