"""Embeds the scored images of a run with CLIP.

python -m train.embed --run runs/miniature --model miniature
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.command import start
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which images, which CLIP."""

    run: Path = Path("runs/miniature")
    """Run folder whose images were scored."""
    model: str = "miniature"
    """CLIP: miniature, an open_clip model/weights such as ViT-B-32/laion2b_s34b_b79k, hf-hub:... or local-dir:..."""
    batch_size: int = 64
    """Images at a time."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: EmbedConfig) -> StageResult:
    """Writes clip/embeddings.safetensors."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    settings = {"model": config.model}
    return run_stage(
        run, "embed", settings, lambda: _embed(config, run), outputs=lambda: [run.embeddings_path], force=config.force
    )


def _embed(config: EmbedConfig, run: RunFolder) -> None:
    import torch

    from fluxsae.flux.presets import choose_device
    from fluxsae.pictures.perceptual import load_embedder
    from fluxsae.runs.tables import Embeddings

    images = run.load_images()
    embedder = load_embedder(config.model, device=str(choose_device(config.device)), batch_size=config.batch_size)
    batches = [
        embedder.embed_images([images.picture(i) for i in range(start, min(start + config.batch_size, len(images)))])
        for start in range(0, len(images), config.batch_size)
    ]
    run.save_embeddings(Embeddings(torch.cat(batches).numpy(), config.model))
    print(f"{len(images)} images embedded with {config.model} in {run.embeddings_path}")


if __name__ == "__main__":
    start(main, EmbedConfig, __doc__)
