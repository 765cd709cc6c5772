"""Train the miniature FLUX and its CLIP, or examine them.

python -m train.miniature                                     every stage in order; resumes what lies in `checkpoints`
python -m train.miniature --flow-minutes 1                    end the flow stage where it stands, and go on
torchrun --nproc-per-node 2 -m train.miniature                the same in two processes, each with its own batches
python -m train.miniature --action export --output runs/new   write the averages as they are, guidance not distilled
python -m train.miniature --action examine                    500 prompts never trained on, read back

The flow stage keeps a constant rate until `flow_minutes` are over; a larger number prolongs it, as long as no later
stage has begun. While a file PAUSE lies in `checkpoints`, training waits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluxsae.miniature import miniature_path
from train.command import start


@dataclass(frozen=True)
class MiniatureConfig:
    """How the miniature is trained."""

    action: Literal["train", "export", "examine"] = "train"
    """What to do."""
    checkpoints: Path = Path("runs/miniature-training")
    """Folder of the checkpoints; training resumes from what lies there."""
    output: Path = miniature_path("flux").parent
    """Folder that receives `flux/` and `clip/`, or holds what is examined."""
    origin: Path | None = None
    """Pipeline folder whose weights the training begins with; left out, from fresh ones."""
    scenes: int = 12_000
    """Size of the bank of drawn scenes."""
    autoencoder_minutes: float = 30.0
    """Length of the autoencoder's stage; its learning rate falls over the second half."""
    flow_minutes: float = 180.0
    """Length of the flow stage, over all sessions, at a constant rate."""
    settle_minutes: float = 15.0
    """Length of the stage after it, whose rate falls to zero."""
    guidance_minutes: float = 10.0
    """Length of the distillation of guidance."""
    decoder_minutes: float = 15.0
    """Length of the decoder's last refinement, its encoder as it is."""
    clip_minutes: float = 15.0
    """Length of the CLIP's training, which comes last."""
    batch_size: int = 64
    """Scenes a step and process."""
    learning_rate: float = 2e-3
    """Of the flow stage; settling peaks at as much, guidance at a half."""
    true_guidance: float | None = None
    """With `examine`: ask for the empty prompt at every step too, for weights whose guidance is not distilled."""
    n_prompts: int = 500
    """With `examine`: prompts of the exam."""
    n_scenes: int = 200
    """With `examine`: held-out scenes on which the autoencoder is measured."""
    sheet: Path | None = None
    """With `examine`: write sheets of 64 exam prompts and of 50 first prompts here (png, `-first.png`)."""
    device: str | None = None
    """cuda or cpu; left out, cuda where it is there."""
    seed: int = 7
    """Of the bank, the fresh weights and the batches."""


def main(config: MiniatureConfig) -> None:
    """Train, export or examine."""
    from train.miniature import stages

    actions = {"train": stages.train_miniature, "export": stages.export_averages, "examine": stages.examine_miniature}
    actions[config.action](config)


if __name__ == "__main__":
    start(main, MiniatureConfig, __doc__)
