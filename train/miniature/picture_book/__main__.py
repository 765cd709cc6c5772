"""Train the miniature that paints the picture book, from a pipeline that knows simpler scenes.

python -m train.miniature.picture_book                    train (resumes what lies in `checkpoints`)
python -m train.miniature.picture_book --evaluate         examine the weights that lie there: 500 held-out prompts

The flow stage runs at a constant rate until `flow_minutes` or `flow_steps` are over; more of either prolongs it. While
a file PAUSE lies in `checkpoints`, training waits.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

from fluxsae.miniature import miniature_path
from train.miniature.autoencoder import encode_bank, train_autoencoder
from train.miniature.bank import SceneBank, draw_bank
from train.miniature.flow import HandoverLoss, train_stage
from train.miniature.picture_book.bank import draw_chunk
from train.miniature.picture_book.models import build_book_tokenizer, load_autoencoder, load_generator
from train.miniature.progress import Checkpoint, StageClock


@dataclass(frozen=True)
class PictureBookConfig:
    """How the picture book is trained."""

    start: Path = miniature_path("flux")
    """Pipeline folder whose weights the training begins with."""
    checkpoints: Path = Path("runs/picture-book-training")
    """Folder of the checkpoints; training resumes from what lies there."""
    scenes: int = 16_000
    """Size of the bank of drawn scenes."""
    autoencoder_minutes: float = 12.0
    """Length of the autoencoder's stage; its learning rate falls over the second half."""
    flow_minutes: float = 60.0
    """Length of the flow stage, over all sessions."""
    batch_size: int = 64
    """Scenes a step."""
    learning_rate: float = 2e-3
    """Of the flow stage."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    seed: int = 7
    """Of the bank, the new words' rows and the batches."""


@dataclass
class PausingClock(StageClock):
    """A clock whose steps wait while a file exists."""

    pause: Path = Path("PAUSE")

    def ticks(self) -> Iterator[int]:
        """The steps that are left."""
        for step in super().ticks():
            while self.pause.exists():
                time.sleep(2.0)
            yield step


@dataclass
class ConstantClock(PausingClock):
    """Ends like any other clock, but the learning rate stays where it is after the warm-up."""

    def learning_rate(self, peak: float, *, warmup: int = 300, decay: float = 0.5) -> float:
        """Linear warm-up over `warmup` steps, then `peak`."""
        return peak * min(1.0, self.step / warmup)


def _train_autoencoder(config: PictureBookConfig, bank: SceneBank) -> nn.Module:
    autoencoder = load_autoencoder(config.start).to(bank.images.device)
    folder = config.checkpoints / "autoencoder"
    if not Checkpoint(folder).is_finished:
        clock = PausingClock("autoencoder", 50_000, 60 * config.autoencoder_minutes, pause=config.checkpoints / "PAUSE")
        train_autoencoder(bank, autoencoder, folder, clock, batch_size=16, seed=config.seed)
    Checkpoint(folder).load_average(autoencoder)
    return autoencoder


def train_picture_book(config: PictureBookConfig) -> None:
    """Both stages in order; each resumes where it stopped."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    bank = draw_bank(
        config.scenes,
        seed=config.seed,
        device=device,
        workers=os.cpu_count() or 1,
        draw_chunk=draw_chunk,
        tokenizer=build_book_tokenizer(),
    )
    print(f"drew {config.scenes:,} scenes", flush=True)
    autoencoder = _train_autoencoder(config, bank)
    latents = encode_bank(bank, autoencoder)
    generator = load_generator(config.start).to(device)
    clock = ConstantClock("flow", 1_000_000, 60 * config.flow_minutes, pause=config.checkpoints / "PAUSE")
    train_stage(
        bank,
        latents,
        generator,
        objective=HandoverLoss(generator),
        folder=config.checkpoints / "flow",
        clock=clock,
        batch_size=config.batch_size,
        peak_learning_rate=config.learning_rate,
        seed=config.seed + 1,
    )


if __name__ == "__main__":
    train_picture_book(tyro.cli(PictureBookConfig))
