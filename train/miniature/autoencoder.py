"""Training of the miniature's autoencoder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny

from fluxsae.miniature.grounds import IMAGE_SIZE
from train.miniature.bank import SceneBank, to_unit_range
from train.miniature.progress import (
    Checkpoint,
    StageClock,
    average_gradients,
    batch_seed,
    start_average,
    update_average,
)

WINDOW = 40
"""Side of the training windows, in pixels: a small thing fits."""
WINDOWS, WHOLE = 24, 3
"""Windows a step, and whole images a step in the last fifth of the training: about as many pixels."""
LATENT_NOISE = 0.05
PEAK_LEARNING_RATE = 1.5e-3


def _windows(bank: SceneBank, generator: torch.Generator) -> torch.Tensor:
    """Windows around objects, (windows, 3, WINDOW, WINDOW) in [-1, 1]."""
    device = bank.images.device
    scene = torch.randint(len(bank.images), (WINDOWS,), generator=generator, device=device)
    which = torch.randint(2, (WINDOWS,), generator=generator, device=device)
    jitter = (torch.rand(WINDOWS, 2, generator=generator, device=device) - 0.5) * WINDOW
    corner = (bank.centres[scene, which] + jitter - WINDOW / 2).round().long().clamp(0, IMAGE_SIZE - WINDOW)
    offsets = torch.arange(WINDOW, device=device)
    rows, cols = corner[:, 1, None] + offsets, corner[:, 0, None] + offsets
    pixels = bank.images[scene[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return to_unit_range(pixels.permute(0, 3, 1, 2))


def _whole_images(bank: SceneBank, generator: torch.Generator) -> torch.Tensor:
    scene = torch.randint(len(bank.images), (WHOLE,), generator=generator, device=bank.images.device)
    return to_unit_range(bank.images[scene])


def encode_mean(autoencoder: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Latents before scaling, (batch, 16, 16, 16)."""
    latents: torch.Tensor = autoencoder.encode(images).latents
    return latents


def train_autoencoder(
    bank: SceneBank,
    autoencoder: AutoencoderTiny,
    folder: Path,
    clock: StageClock,
    *,
    seed: int,
) -> None:
    """Train until the clock ends, resuming from `folder`; leaves the averaged weights in `autoencoder`."""
    device, checkpoint = bank.images.device, Checkpoint(folder)
    average = start_average(autoencoder)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.99))
    if checkpoint.exists:
        checkpoint.load(autoencoder, average, [optimizer], clock)
    generator = torch.Generator(device)
    for step in clock.ticks():
        optimizer.param_groups[0]["lr"] = clock.learning_rate(PEAK_LEARNING_RATE, warmup=100)
        generator.manual_seed(batch_seed(seed, step))
        images = (_whole_images if clock.progress > 0.8 else _windows)(bank, generator)
        with torch.autocast(device.type, torch.bfloat16):
            latents = encode_mean(autoencoder, images)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            decoded = autoencoder.decode(latents + LATENT_NOISE * noise).sample
        error = decoded.float() - images
        loss = error.abs().mean() + 4 * error.square().mean() + 0.002 * latents.float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(autoencoder)
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        update_average(average, autoencoder, step, decay=0.998)
        clock.report(loss)
        if clock.is_save_due():
            checkpoint.save(autoencoder, average, [optimizer], clock, finished=False)
    checkpoint.save(autoencoder, average, [optimizer], clock, finished=True)
    checkpoint.load_average(autoencoder)


@torch.no_grad()
def encode_bank(bank: SceneBank, autoencoder: AutoencoderTiny, *, batch_size: int = 50) -> torch.Tensor:
    """All scenes as latents; sets the autoencoder's shift and scale so that they have mean 0 and deviation 1."""
    with torch.autocast(bank.images.device.type, torch.bfloat16):
        parts = [encode_mean(autoencoder, to_unit_range(part)).float() for part in bank.images.split(batch_size)]
    raw = torch.cat(parts)
    shift, scale = raw.mean().item(), 1.0 / raw.std().item()
    autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)
    return (raw - shift) * scale


@torch.no_grad()
def reconstruction_psnr(autoencoder: AutoencoderTiny, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio of each whole image (uint8, batch first), in dB."""
    units = to_unit_range(images)
    decoded = autoencoder.decode(encode_mean(autoencoder, units)).sample.float().clamp(-1, 1)
    return -10 * torch.log10(F.mse_loss(decoded / 2, units / 2, reduction="none").mean(dim=(1, 2, 3)))
