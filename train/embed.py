"""Embeds the scored images of a run with CLIP.

    python -m train.embed --run runs/miniature
    python -m train.embed --run runs/dev --model ViT-L-14/laion2b_s32b_b82k

Without --model, the CLIP that fits the run's images is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.command import start
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder, RunInfo

REAL_CLIP = "ViT-B-32/laion2b_s34b_b79k"


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Which images, which CLIP."""

    run: Path = Path("runs/miniature")
    """Run folder whose images were scored."""
    model: str | None = None
    """CLIP: miniature, an open_clip model/weights such as ViT-B-32/laion2b_s34b_b79k, hf-hub:... or local-dir:...; left
    out, the one that fits the run: the miniature's for generated images of the miniature, ViT-B-32 for all others."""
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
    model = config.model or fitting_clip(run.load_info())
    return run_stage(
        run,
        "embed",
        {"model": model},
        lambda _: _embed(config, run, model),
        outputs=lambda _: [run.embeddings_path],
        force=config.force,
    )


def fitting_clip(info: RunInfo) -> str:
    """The CLIP that knows what a run's images show: the miniature's saw nothing but its drawn scenes."""
    is_drawn = info.flux_id == "miniature" and info.source == "prompts"
    return "miniature" if is_drawn else REAL_CLIP


def _embed(config: EmbedConfig, run: RunFolder, model: str) -> None:
    import torch

    from fluxsae.flux.presets import choose_device
    from fluxsae.pictures.perceptual import load_embedder
    from fluxsae.runs.tables import Embeddings

    images = run.load_images()
    embedder = load_embedder(model, device=str(choose_device(config.device)), batch_size=config.batch_size)
    batches = [
        embedder.embed_images([images.picture(i) for i in range(start, min(start + config.batch_size, len(images)))])
        for start in range(0, len(images), config.batch_size)
    ]
    run.save_embeddings(Embeddings(torch.cat(batches).numpy(), model))
    print(f"{len(images)} images embedded with {model} in {run.embeddings_path}")


if __name__ == "__main__":
    start(main, EmbedConfig, __doc__)
