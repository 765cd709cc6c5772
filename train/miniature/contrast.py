"""Training of the miniature's CLIP, the judge that tells how well words and pictures agree."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file

from train.miniature.bank import SceneBank, to_unit_range
from train.miniature.models import CLIP_CONFIG, CLIP_PREPROCESSING, build_tokenizer
from train.miniature.progress import (
    Checkpoint,
    StageClock,
    average_gradients,
    batch_seed,
    start_average,
    update_average,
)

PEAK_LEARNING_RATE = 1e-3


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slight noise, exposure and blur, so that generated images are judged like drawn ones."""
    device, count = images.device, len(images)
    exposure = 1 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator, device=device)
    noise = 0.04 * torch.randn(images.shape, generator=generator, device=device)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    return (torch.lerp(images, blurred, mix) * exposure + noise).clamp(-1, 1)


def contrastive_loss(clip: CLIP, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Symmetric cross-entropy over the batch; equal captions count as equally right."""
    image_features = clip.encode_image(images, normalize=True)
    text_features = clip.encode_text(tokens, normalize=True)
    logits = clip.logit_scale.exp() * image_features.float() @ text_features.float().T
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def train_clip(bank: SceneBank, clip: CLIP, folder: Path, clock: StageClock, *, batch_size: int, seed: int) -> None:
    """Train until the clock ends, resuming from `folder`; leaves the averaged weights in `clip`."""
    device, checkpoint = bank.images.device, Checkpoint(folder)
    average = start_average(clip)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    if checkpoint.exists:
        checkpoint.load(clip, average, [optimizer], clock)
    generator = torch.Generator(device)
    for step in clock.ticks():
        optimizer.param_groups[0]["lr"] = clock.learning_rate(PEAK_LEARNING_RATE)
        generator.manual_seed(batch_seed(seed, step))
        scene = torch.randint(len(bank.images), (batch_size,), generator=generator, device=device)
        variant = torch.randint(bank.captions.shape[1], (batch_size,), generator=generator, device=device)
        images = _augment(to_unit_range(bank.images[scene]), generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = contrastive_loss(clip, images, bank.captions[scene, variant].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(clip)
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, 4.6052)
        update_average(average, clip, step, decay=0.998)
        clock.report(loss)
        if clock.is_save_due():
            checkpoint.save(clip, average, [optimizer], clock, finished=False)
    checkpoint.save(clip, average, [optimizer], clock, finished=True)
    checkpoint.load_average(clip)


def save_clip(clip: CLIP, folder: Path) -> None:
    """Write the folder that `open_clip` loads as `local-dir:`; weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": CLIP_PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    build_tokenizer().save_pretrained(folder)
