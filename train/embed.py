"""Embeds the scored images of a run with CLIP.

python -m train.embed --run RUN --model miniature
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from fluxsae.artifacts import RunFolder
from fluxsae.perceptual import load_embedder
from fluxsae.tables import Embeddings


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which images, which CLIP."""

    run: Path
    """Run folder whose images were scored."""
    model: str = "miniature"
    """CLIP: miniature, an open_clip model/weights such as ViT-B-32/laion2b_s34b_b79k, hf-hub:... or local-dir:..."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where CLIP runs."""


def main(config: Config) -> None:
    """Writes clip/embeddings.safetensors."""
    run = RunFolder(config.run)
    images = run.load_images()
    embedder = load_embedder(config.model, device=config.device, batch_size=config.batch_size)
    batches = [
        embedder.embed_images([images.picture(i) for i in range(start, min(start + config.batch_size, len(images)))])
        for start in range(0, len(images), config.batch_size)
    ]
    run.save_embeddings(Embeddings(torch.cat(batches).numpy(), config.model))
    print(f"{len(images)} images embedded with {config.model} in {run.embeddings_path}")


if __name__ == "__main__":
    main(tyro.cli(Config))
