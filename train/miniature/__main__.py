"""Train the embedded miniature FLUX and its CLIP, or examine them.

python -m train.miniature                      train (resumes), then write fluxsae/miniature/flux and clip
python -m train.miniature --evaluate           examine what is written: 500 prompts never trained on
    python -m train.miniature --flow-minutes 60    the same training, its long stage cut to an hour
"""

from dataclasses import dataclass
from pathlib import Path

from fluxsae.miniature import miniature_path
from train.command import start


@dataclass(frozen=True)
class MiniatureConfig:
    """How the miniature is trained."""

    evaluate: bool = False
    """Examine the written miniature instead of training."""
    sheet: Path | None = None
    """With `evaluate`: also write a sheet of 64 samples here (png)."""
    checkpoints: Path = Path("runs/miniature-training")
    """Folder of the checkpoints; training resumes from what lies there."""
    output: Path = miniature_path("flux").parent
    """Folder that receives `flux/` and `clip/`."""
    scenes: int = 60_000
    """Size of the bank of drawn scenes."""
    autoencoder_steps: int = 12_000
    """Steps of 64 windows each."""
    autoencoder_minutes: float | None = None
    """End the stage after this many minutes, its learning rate decayed by then."""
    clip_steps: int = 6_000
    """Steps of `batch_size` scenes each."""
    clip_minutes: float | None = None
    """End the stage after this many minutes, its learning rate decayed by then."""
    flow_steps: int = 40_000
    """Steps of `batch_size` scenes each."""
    flow_minutes: float | None = None
    """End the stage after this many minutes, its learning rate decayed by then."""
    handover_steps: int = 12_000
    """Steps of `batch_size` scenes each, during which single-stream blocks read other captions."""
    handover_minutes: float | None = None
    """End the stage after this many minutes, its learning rate decayed by then."""
    guidance_steps: int = 6_000
    """Distillation steps of `batch_size` scenes each."""
    guidance_minutes: float | None = None
    """End the stage after this many minutes, its learning rate decayed by then."""
    batch_size: int = 256
    """Scenes a step; 64 is enough on a CPU."""
    learning_rate: float = 3e-3
    """Peak of the flow stage; the handover stage peaks at a half, the guidance stage at a quarter."""
    device: str | None = None
    """cuda or cpu; left out, cuda where it is there."""
    seed: int = 0
    """Of the bank, the initial weights and the batches."""


def main(config: MiniatureConfig) -> None:
    """Train, or examine."""
    from train.miniature.stages import examine_miniature, train_miniature

    (examine_miniature if config.evaluate else train_miniature)(config)


if __name__ == "__main__":
    start(main, MiniatureConfig, __doc__)
