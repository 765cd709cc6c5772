"""Train the miniature that paints the picture book, from a pipeline that knows simpler scenes.

python -m train.miniature.picture_book                            train; resumes what lies in `checkpoints`
python -m train.miniature.picture_book --action finish            let the rate fall, distil guidance, write `output`
python -m train.miniature.picture_book --action export            write `output` from the averages as they are
torchrun --nproc-per-node 2 -m train.miniature.picture_book       the same in two processes, each with its own batches
python -m train.miniature.picture_book --action examine           examine `output`: 500 held-out prompts

The flow stage runs at a constant rate until `flow_minutes` are over; a larger number prolongs it. While a file PAUSE
lies in `checkpoints`, training waits. What `export` writes can be a later training's `origin`.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from diffusers import AutoencoderTiny, FluxPipeline
from safetensors.torch import load_file
from torch import nn

from fluxsae.files import save_tensors
from fluxsae.miniature import miniature_path
from fluxsae.sae.training.processes import Processes
from train.miniature.autoencoder import encode_bank, train_autoencoder
from train.miniature.bank import SceneBank, draw_bank
from train.miniature.contrast import save_clip, train_clip
from train.miniature.exam import format_tally, save_sheet
from train.miniature.flow import GuidanceDistillation, HandoverLoss, train_stage
from train.miniature.gates import balance_gates
from train.miniature.models import assemble_pipeline, build_clip, save_flux
from train.miniature.picture_book.bank import draw_chunk
from train.miniature.picture_book.exam import (
    ATTRIBUTES_OF_EXAM,
    FIRST_PROMPTS,
    exam_prompts,
    held_out_psnr,
    painter,
    take_exam,
)
from train.miniature.picture_book.models import build_book_tokenizer, load_autoencoder, load_generator
from train.miniature.progress import Checkpoint, StageClock
from train.processes import processes

ENDLESS = 1_000_000
"""Steps of a stage that only the clock ends."""
CAPTIONS_OF_GATES = 256
"""Captions over which the mean gates are taken."""


@dataclass(frozen=True)
class PictureBookConfig:
    """How the picture book is trained."""

    action: Literal["train", "finish", "export", "examine"] = "train"
    """What to do."""
    origin: Path = field(default_factory=lambda: miniature_path("flux"))
    """Pipeline folder whose weights the training begins with."""
    checkpoints: Path = Path("runs/picture-book-training")
    """Folder of the checkpoints; training resumes from what lies there."""
    output: Path = Path("runs/picture-book/flux")
    """Pipeline folder that is written or examined; `finish` writes the CLIP into the folder `clip` beside it."""
    scenes: int = 12_000
    """Size of the bank of drawn scenes."""
    autoencoder_minutes: float = 12.0
    """Length of the autoencoder's stage; its learning rate falls over the second half."""
    flow_minutes: float = 60.0
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
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""
    seed: int = 7
    """Of the bank, the new words' rows and the batches."""


@dataclass
class PausingClock(StageClock):
    """A clock whose steps wait while a file exists; the time waited does not count."""

    pause: Path = Path("PAUSE")

    def ticks(self) -> Iterator[int]:
        """The steps that are left."""
        for step in super().ticks():
            began = time.monotonic()
            while Processes.current().rank == 0 and self.pause.exists():
                time.sleep(1.0)
            self.elapsed_before -= time.monotonic() - began
            yield step


@dataclass
class ConstantClock(PausingClock):
    """Ends like any other clock, but the learning rate stays where it is after the warm-up."""

    def learning_rate(self, peak: float, *, warmup: int = 300, decay: float = 0.5) -> float:
        """Linear warm-up over `warmup` steps, then `peak`; there is no `decay`."""
        return peak * min(1.0, self.step / warmup)


def _clock(config: PictureBookConfig, name: str, minutes: float) -> PausingClock:
    kind = ConstantClock if name == "flow" else PausingClock
    return kind(name, ENDLESS, 60 * minutes, pause=config.checkpoints / "PAUSE")


def _draw(config: PictureBookConfig) -> SceneBank:
    bank = draw_bank(
        config.scenes,
        seed=config.seed,
        device=torch.device(config.device),
        workers=max(1, (os.cpu_count() or 1) // Processes.current().world_size),
        draw_chunk=draw_chunk,
        tokenizer=build_book_tokenizer(),
    )
    print(f"drew {config.scenes:,} scenes", flush=True)
    return bank


def _train_autoencoder(config: PictureBookConfig, bank: SceneBank) -> tuple[AutoencoderTiny, torch.Tensor]:
    """The autoencoder, which then lies in `checkpoints` as in a pipeline folder, and the bank's latents."""
    encoded = config.checkpoints / f"latents-{config.scenes}.safetensors"
    if encoded.exists():
        return load_autoencoder(config.checkpoints), load_file(encoded)["latents"].to(config.device)
    autoencoder = load_autoencoder(config.origin).to(bank.images.device)
    _train_windows(config, bank, autoencoder, stage=("autoencoder", config.autoencoder_minutes))
    peers = Processes.current()
    if peers.rank == 0:
        latents = encode_bank(bank, autoencoder)
        autoencoder.save_pretrained(config.checkpoints / "vae")
        save_tensors(encoded, {"latents": latents})
    peers.wait()
    return _train_autoencoder(config, bank)


def _train_windows(
    config: PictureBookConfig, bank: SceneBank, autoencoder: AutoencoderTiny, *, stage: tuple[str, float]
) -> None:
    """One stage, given as name and minutes; leaves the averaged weights in `autoencoder`."""
    name, minutes = stage
    folder = config.checkpoints / name
    # In this layout a step takes half the time on a CPU.
    autoencoder.to(memory_format=torch.channels_last)
    if minutes > 0 and not Checkpoint(folder).is_finished:
        train_autoencoder(
            bank,
            autoencoder,
            folder,
            _clock(config, name, minutes),
            batch_size=24,
            batch_whole=3,
            window=40,
            seed=config.seed,
        )
    if minutes > 0:
        Checkpoint(folder).load_average(autoencoder)


def _train_flow(
    config: PictureBookConfig,
    bank: SceneBank,
    latents: torch.Tensor,
    generator: nn.ModuleDict,
    *,
    stage: tuple[str, float, float],
    build_objective: Callable[[nn.ModuleDict], HandoverLoss | GuidanceDistillation] = HandoverLoss,
) -> None:
    """One stage, given as name, minutes and learning rate; leaves its averaged weights in `generator`."""
    name, minutes, rate = stage
    objective = build_objective(generator)
    train_stage(
        bank,
        latents,
        generator,
        objective=objective,
        folder=config.checkpoints / name,
        clock=_clock(config, name, minutes),
        batch_size=config.batch_size,
        peak_learning_rate=rate,
        seed=config.seed + len(name),
    )
    objective.handover.remove()


def train_picture_book(config: PictureBookConfig, *, finish: bool) -> None:
    """The autoencoder, then the flow; with `finish` the stages that end the training, from the flow's average."""
    torch.manual_seed(config.seed)
    bank = _draw(config)
    autoencoder, latents = _train_autoencoder(config, bank)
    generator = load_generator(config.origin).to(config.device)
    if not finish:
        _train_flow(config, bank, latents, generator, stage=("flow", config.flow_minutes, config.learning_rate))
        return
    Checkpoint(config.checkpoints / "flow").load_average(generator)
    _train_flow(config, bank, latents, generator, stage=("settle", config.settle_minutes, config.learning_rate))
    _train_flow(
        config,
        bank,
        latents,
        generator,
        stage=("guidance", config.guidance_minutes, config.learning_rate / 2),
        build_objective=GuidanceDistillation,
    )
    # The flow has learned this encoder's latents, so only what is seen of them may still change.
    autoencoder.encoder.requires_grad_(False)
    _train_windows(config, bank, autoencoder, stage=("decoder", config.decoder_minutes))
    balance_gates(generator, bank.captions[:CAPTIONS_OF_GATES, 0].long())
    if Processes.current().rank == 0:
        save_flux(_assemble(generator, autoencoder), config.output)
    _train_clip(config, bank)


def _train_clip(config: PictureBookConfig, bank: SceneBank) -> None:
    """The CLIP that knows the picture book's words; written beside `output`."""
    clip, folder = build_clip().to(config.device), config.checkpoints / "clip"
    if not Checkpoint(folder).is_finished:
        clock = _clock(config, "clip", config.clip_minutes)
        train_clip(bank, clip, folder, clock, batch_size=2 * config.batch_size, seed=config.seed)
    Checkpoint(folder).load_average(clip)
    if Processes.current().rank == 0:
        save_clip(clip, config.output.parent / "clip", tokenizer=build_book_tokenizer())


def export_averages(config: PictureBookConfig) -> None:
    """Writes the pipeline of the averages that lie in `checkpoints`, guidance not distilled."""
    generator = load_generator(config.origin)
    Checkpoint(config.checkpoints / "flow").load_average(generator)
    save_flux(_assemble(generator, load_autoencoder(config.checkpoints)), config.output)


def _assemble(generator: nn.ModuleDict, autoencoder: AutoencoderTiny) -> FluxPipeline:
    return assemble_pipeline(generator.cpu(), autoencoder.cpu(), tokenizer=build_book_tokenizer())


def examine(config: PictureBookConfig) -> None:
    """Print how the written pipeline does on what it never saw."""
    pipe = FluxPipeline.from_pretrained(config.output, torch_dtype=torch.float32).to(config.device)
    paint = painter(pipe, true_guidance=config.true_guidance)
    if config.sheet is not None:
        save_sheet(paint(exam_prompts(64), list(range(64))), config.sheet)
        first = [prompt for prompt in FIRST_PROMPTS for _ in range(5)]
        save_sheet(paint(first, [*range(5)] * 10), config.sheet.with_stem(f"{config.sheet.stem}-first"), columns=10)
    quality = held_out_psnr(pipe.vae, n_scenes=config.n_scenes)
    print(f"autoencoder alone, whole held-out scenes: {quality.mean():.1f} dB, worst {quality.min():.1f}")
    if config.n_prompts:
        print(format_tally(take_exam(paint, n_prompts=config.n_prompts), ATTRIBUTES_OF_EXAM))


def main(config: PictureBookConfig) -> None:
    """Train, finish, export or examine."""
    if config.action == "examine":
        examine(config)
    elif config.action == "export":
        export_averages(config)
    else:
        with processes():
            train_picture_book(config, finish=config.action == "finish")


if __name__ == "__main__":
    main(tyro.cli(PictureBookConfig))
