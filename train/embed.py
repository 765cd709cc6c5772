"""Embeds the scored images of a run with CLIP.

python -m train.embed --run runs/miniature --model miniature
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from fluxsae.pictures.perceptual import load_embedder
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import Embeddings
from train.stages import StageResult, run_stage


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which images, which CLIP."""

    run: Path = Path("runs/miniature")
    """Run folder whose images were scored."""
    model: str = "miniature"
    """CLIP: miniature, an open_clip model/weights such as ViT-B-32/laion2b_s34b_b79k, hf-hub:... or local-dir:..."""
    batch_size: int = 64
    """Images at a time."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where CLIP runs."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: EmbedConfig) -> StageResult:
    """Writes clip/embeddings.safetensors."""
    run = RunFolder(config.run)
    settings = {"model": config.model}
    return run_stage(
        run, "embed", settings, lambda: _embed(config, run), outputs=lambda: [run.embeddings_path], force=config.force
    )


def _embed(config: EmbedConfig, run: RunFolder) -> None:
    images = run.load_images()
    embedder = load_embedder(config.model, device=config.device, batch_size=config.batch_size)
    batches = [
        embedder.embed_images([images.picture(i) for i in range(start, min(start + config.batch_size, len(images)))])
        for start in range(0, len(images), config.batch_size)
    ]
    run.save_embeddings(Embeddings(torch.cat(batches).numpy(), config.model))
    print(f"{len(images)} images embedded with {config.model} in {run.embeddings_path}")


if __name__ == "__main__":
    main(tyro.cli(EmbedConfig, description=__doc__))
