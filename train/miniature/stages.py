"""The training of the miniature, stage by stage; each resumes where it stopped and is skipped when it is finished."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderTiny, FluxPipeline
from safetensors.torch import load_file
from torch import nn

from fluxsae.errors import FluxSaeError
from fluxsae.files import save_tensors
from fluxsae.pictures.perceptual import load_embedder
from fluxsae.sae.training.processes import Processes
from train.miniature.autoencoder import encode_bank, train_autoencoder
from train.miniature.bank import SceneBank, draw_bank
from train.miniature.contrast import load_trained_clip, save_clip, train_clip
from train.miniature.exam import format_tally, held_out_psnr, painter, reading_shares, save_sheets, take_exam
from train.miniature.flow import GuidanceDistillation, HandoverLoss, train_stage
from train.miniature.gates import balance_gates
from train.miniature.models import (
    assemble_pipeline,
    build_autoencoder,
    build_clip,
    build_generator,
    load_autoencoder,
    load_generator,
    save_flux,
)
from train.miniature.progress import Checkpoint, ConstantClock, StageClock
from train.processes import processes

if TYPE_CHECKING:
    from train.miniature.__main__ import MiniatureConfig

ENDLESS = 1_000_000
"""Steps of a stage that only the clock ends."""
CAPTIONS_OF_GATES = 256
"""Captions over which the mean gates are taken."""
STAGES = ("autoencoder", "flow", "settle", "guidance", "decoder", "clip")


def _clock(config: "MiniatureConfig", name: str) -> StageClock:
    kind = ConstantClock if name == "flow" else StageClock
    return kind(name, ENDLESS, 60 * getattr(config, f"{name}_minutes"), pause=config.checkpoints / "PAUSE")


def _begin(config: "MiniatureConfig", name: str) -> Checkpoint:
    """The stage's checkpoint.

    Raises:
        FluxSaeError: the stage is not finished, but a later one began.
    """
    checkpoint = Checkpoint(config.checkpoints / name)
    if not checkpoint.is_finished:
        later = [n for n in STAGES[STAGES.index(name) + 1 :] if Checkpoint(config.checkpoints / n).exists]
        if later:
            raise FluxSaeError(
                f"{config.checkpoints} holds {later[0]}, a stage that follows {name}, which is not finished: it would "
                f"start from other weights. Remove the folder {later[0]}, or name other checkpoints."
            )
    return checkpoint


def _device(config: "MiniatureConfig") -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def train_miniature(config: "MiniatureConfig") -> None:
    """All stages in order, in the processes of a `torchrun` if there are any."""
    with processes():
        torch.manual_seed(config.seed)
        peers = Processes.current()
        workers = max(1, (os.cpu_count() or 1) // peers.world_size)
        bank = draw_bank(config.scenes, seed=config.seed, device=_device(config), workers=workers)
        autoencoder, latents = _train_autoencoder(config, bank)
        generator = _first_generator(config).to(_device(config))
        _train_generator(config, bank, latents, generator)
        # The flow has learned this encoder's latents, so only what is seen of them may still change.
        autoencoder.encoder.requires_grad_(False)
        _train_windows(config, bank, autoencoder, name="decoder")
        balance_gates(generator, bank.captions[:CAPTIONS_OF_GATES, 0].long())
        if peers.rank == 0:
            save_flux(assemble_pipeline(generator.cpu(), autoencoder.cpu()), config.output / "flux")
        _train_clip(config, bank)


def _train_autoencoder(config: "MiniatureConfig", bank: SceneBank) -> tuple[AutoencoderTiny, torch.Tensor]:
    """The autoencoder, which then lies in `checkpoints` as in a pipeline folder, and the bank's latents."""
    encoded = config.checkpoints / f"latents-{config.scenes}.safetensors"
    if encoded.exists():
        return load_autoencoder(config.checkpoints), load_file(encoded)["latents"].to(bank.images.device)
    autoencoder = build_autoencoder() if config.origin is None else load_autoencoder(config.origin)
    autoencoder.to(bank.images.device)
    _train_windows(config, bank, autoencoder, name="autoencoder")
    peers = Processes.current()
    if peers.rank == 0:
        latents = encode_bank(bank, autoencoder)
        autoencoder.save_pretrained(config.checkpoints / "vae")
        save_tensors(encoded, {"latents": latents})
    peers.wait()
    return _train_autoencoder(config, bank)


def _train_windows(config: "MiniatureConfig", bank: SceneBank, autoencoder: AutoencoderTiny, *, name: str) -> None:
    """The stage `autoencoder` or `decoder`; leaves the averaged weights in `autoencoder`."""
    checkpoint = _begin(config, name)
    # In this layout a step takes half the time on a CPU.
    autoencoder.to(device=bank.images.device, memory_format=torch.channels_last)
    if not checkpoint.is_finished:
        train_autoencoder(bank, autoencoder, checkpoint.folder, _clock(config, name), seed=config.seed)
    checkpoint.load_average(autoencoder)


def _first_generator(config: "MiniatureConfig") -> nn.ModuleDict:
    generator = build_generator() if config.origin is None else load_generator(config.origin)
    if _device(config).type == "cpu":
        # Two thirds of the time a step: at so few tokens the gradient of the flash kernel costs more than all the rest.
        transformer: Any = generator["transformer"]
        transformer.set_attention_backend("_native_math")
    return generator


def _train_generator(
    config: "MiniatureConfig", bank: SceneBank, latents: torch.Tensor, generator: nn.ModuleDict
) -> None:
    """Three stages, each from the average that the one before left."""
    stages: tuple[tuple[str, Callable[[nn.ModuleDict], HandoverLoss | GuidanceDistillation], float], ...] = (
        ("flow", HandoverLoss, config.learning_rate),
        ("settle", HandoverLoss, config.learning_rate),
        ("guidance", GuidanceDistillation, config.learning_rate / 2),
    )
    for name, build_objective, rate in stages:
        checkpoint = _begin(config, name)
        if not checkpoint.is_finished:
            objective = build_objective(generator)
            train_stage(
                bank,
                latents,
                generator,
                objective=objective,
                folder=checkpoint.folder,
                clock=_clock(config, name),
                batch_size=config.batch_size,
                peak_learning_rate=rate,
                seed=config.seed + len(name),
            )
            objective.handover.remove()
        checkpoint.load_average(generator)


def _train_clip(config: "MiniatureConfig", bank: SceneBank) -> None:
    """The CLIP that knows the same words."""
    clip, checkpoint = build_clip().to(bank.images.device), _begin(config, "clip")
    if not checkpoint.is_finished:
        clock = _clock(config, "clip")
        train_clip(bank, clip, checkpoint.folder, clock, batch_size=2 * config.batch_size, seed=config.seed)
    load_trained_clip(bank, clip, checkpoint)
    if Processes.current().rank == 0:
        save_clip(clip, config.output / "clip")


def export_averages(config: "MiniatureConfig") -> None:
    """Writes the pipeline of the averages that the flow stage has reached; its guidance is not distilled."""
    generator = build_generator()
    Checkpoint(config.checkpoints / "flow").load_average(generator)
    save_flux(assemble_pipeline(generator, load_autoencoder(config.checkpoints)), config.output / "flux")


def examine_miniature(config: "MiniatureConfig") -> None:
    """Print how the written miniature does on what it never saw."""
    if (config.output / "clip").is_dir():
        shares = reading_shares(load_embedder(f"local-dir:{config.output / 'clip'}"))
        print("CLIP reads of drawn scenes: " + ", ".join(f"{kind} {share:.1%}" for kind, share in shares.items()))
    pipe = FluxPipeline.from_pretrained(config.output / "flux", torch_dtype=torch.float32).to(_device(config))
    paint = painter(pipe, true_guidance=config.true_guidance)
    if config.sheet is not None:
        save_sheets(paint, config.sheet)
    quality = held_out_psnr(pipe.vae, n_scenes=config.n_scenes)
    print(f"autoencoder alone, whole held-out scenes: {quality.mean():.1f} dB, worst {quality.min():.1f}")
    if config.n_prompts:
        print(format_tally(take_exam(paint, n_prompts=config.n_prompts)))
