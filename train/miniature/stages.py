"""The training of the miniature, stage by stage, and its exam."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fluxsae.errors import FluxSaeError
from fluxsae.flux import load_flux
from train.miniature.autoencoder import encode_bank, train_autoencoder
from train.miniature.bank import SceneBank, draw_bank
from train.miniature.contrast import save_clip, train_clip
from train.miniature.exam import format_tally, held_out_psnr, sample_sheet, take_exam
from train.miniature.flow import GuidanceDistillation, HandoverLoss, Objective, flow_loss, train_stage
from train.miniature.gates import balance_gates
from train.miniature.models import (
    assemble_pipeline,
    build_autoencoder,
    build_clip,
    build_generator,
    save_flux,
)
from train.miniature.progress import Checkpoint, StageClock

if TYPE_CHECKING:
    from train.miniature.__main__ import MiniatureConfig

CAPTIONS_OF_GATES = 256
"""Captions over which the mean gates are taken."""


def _clock(config: "MiniatureConfig", name: str) -> StageClock:
    minutes = getattr(config, f"{name}_minutes")
    return StageClock(name=name, steps=getattr(config, f"{name}_steps"), budget_seconds=minutes and 60 * minutes)


def _train_generator(
    config: "MiniatureConfig", bank: SceneBank, latents: torch.Tensor, generator: nn.ModuleDict
) -> None:
    """Three stages, each from the average that the one before left."""
    stages: tuple[tuple[str, Callable[[nn.ModuleDict], Objective], float], ...] = (
        ("flow", lambda _: flow_loss, config.learning_rate),
        ("handover", HandoverLoss, config.learning_rate / 2),
        ("guidance", GuidanceDistillation, config.learning_rate / 4),
    )
    for place, (name, build_objective, peak) in enumerate(stages):
        folder = config.checkpoints / name
        if not Checkpoint(folder).is_finished:
            later = [other for other, _, _ in stages[place + 1 :] if Checkpoint(config.checkpoints / other).exists]
            if later:
                raise FluxSaeError(
                    f"{config.checkpoints} holds {later[0]}, the stage that follows {name}, which is not finished: "
                    f"it would start from other weights. Remove the folder {later[0]}, or name other checkpoints."
                )
            objective = build_objective(generator)
            train_stage(
                bank,
                latents,
                generator,
                objective=objective,
                folder=folder,
                clock=_clock(config, name),
                batch_size=config.batch_size,
                peak_learning_rate=peak,
                seed=config.seed + 1 + place,
            )
            if isinstance(objective, HandoverLoss | GuidanceDistillation):
                objective.handover.remove()
        Checkpoint(folder).load_average(generator)


def train_miniature(config: "MiniatureConfig") -> None:
    """All stages in order; each resumes where it stopped and is skipped when it is finished."""
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(config.seed)
    autoencoder, clip, generator = (part.to(device) for part in (build_autoencoder(), build_clip(), build_generator()))
    bank = draw_bank(config.scenes, seed=config.seed, device=device, workers=os.cpu_count() or 1)
    print(f"drew {config.scenes:,} scenes", flush=True)
    stage = config.checkpoints / "autoencoder"
    if not Checkpoint(stage).is_finished:
        clock = _clock(config, "autoencoder")
        train_autoencoder(bank, autoencoder, stage, clock, batch_size=16, seed=config.seed)
    Checkpoint(stage).load_average(autoencoder)
    _train_generator(config, bank, encode_bank(bank, autoencoder), generator)
    balance_gates(generator, bank.captions[:CAPTIONS_OF_GATES, 0].long())
    save_flux(assemble_pipeline(generator.cpu(), autoencoder.cpu()), config.output / "flux")
    stage = config.checkpoints / "clip"
    if not Checkpoint(stage).is_finished:
        clock = _clock(config, "clip")
        train_clip(bank, clip, stage, clock, batch_size=2 * config.batch_size, seed=config.seed + 3)
    Checkpoint(stage).load_average(clip)
    save_clip(clip, config.output / "clip")
    print(f"wrote {config.output / 'flux'} and {config.output / 'clip'}")


def examine_miniature(config: "MiniatureConfig") -> None:
    """Print how the written miniature does on what it never saw."""
    pipe = load_flux(str(config.output / "flux"), device=config.device)
    if config.sheet is not None:
        sample_sheet(pipe, config.sheet)
    print(f"autoencoder alone, whole held-out scenes: {held_out_psnr(pipe):.1f} dB")
    print(format_tally(take_exam(pipe)))
