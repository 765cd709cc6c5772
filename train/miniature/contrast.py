"""Training of the miniature's CLIP, the judge that tells how well words and pictures agree."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Integer
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch.optim.swa_utils import update_bn
from transformers import PreTrainedTokenizerFast

from fluxsae.miniature.drawing import ATTRIBUTES
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
CHANGED_KINDS = ("thing", "colour", "texture", "size", "background")
"""Kinds of words that captions are changed in; positions stand in phrases that differ by more than a word."""
N_CHANGED = 4
"""Changed captions a picture."""
NORM_SCENES = 5_000
"""Scenes over which the statistics of batch norms are taken."""


def _augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Slight noise, exposure and blur, so that generated images are judged like drawn ones."""
    device, count = images.device, len(images)
    exposure = 1 + 0.1 * torch.randn(count, 1, 1, 1, generator=generator, device=device)
    noise = 0.04 * torch.randn(images.shape, generator=generator, device=device)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(count, 1, 1, 1, generator=generator, device=device)
    return (torch.lerp(images, blurred, mix) * exposure + noise).clamp(-1, 1)


class WordChanger:
    """Puts another word of its kind in place of one word of a caption: the cat becomes a dog, red becomes blue."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device) -> None:
        ids = tokenizer.get_vocab()
        first = torch.full((len(ids),), -1, device=device)
        count = torch.ones(len(ids), dtype=torch.long, device=device)
        for kind in CHANGED_KINDS:
            known = [ids[word] for word in ATTRIBUTES[kind]]  # one after another in the vocabulary
            first[known], count[known] = known[0], len(known)
        self.first, self.count = first, count

    def __call__(
        self, tokens: Integer[torch.Tensor, "captions tokens"], generator: torch.Generator
    ) -> Integer[torch.Tensor, "captions tokens"]:
        """Each caption with one word changed; one without such a word stays as it is."""
        chance = (self.first[tokens] >= 0).float() + 1e-9
        place = torch.multinomial(chance, 1, generator=generator)
        old = tokens.gather(1, place)
        first, count = self.first[old], self.count[old]
        shift = 1 + (torch.rand(old.shape, generator=generator, device=old.device) * (count - 1)).long()
        new = first + (old - first + shift) % count
        return tokens.scatter(1, place, torch.where(first >= 0, new, old))


def contrastive_loss(
    clip: CLIP, images: torch.Tensor, tokens: torch.Tensor, changed: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Symmetric cross-entropy over the batch; equal captions count as equally right.

    Each image's own caption has also to win against its `changed` ones: in a batch few captions differ in one word.
    """
    image_features = clip.encode_image(images, normalize=True).float()
    text_features = clip.encode_text(torch.cat([tokens, *changed]), normalize=True).float()
    right, *wrong = text_features.split(len(tokens))
    scale = clip.logit_scale.exp()
    logits = scale * image_features @ right.T
    beside = [scale * (image_features * other).sum(1, keepdim=True) for other in wrong]
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    unchanged = [(tokens == other).all(1, keepdim=True).float() for other in changed]
    target = torch.cat([same, *unchanged], dim=1)
    by_image = F.cross_entropy(torch.cat([logits, *beside], dim=1), target / target.sum(1, keepdim=True))
    return 0.5 * (by_image + F.cross_entropy(logits.T, same / same.sum(1, keepdim=True)))


def train_clip(bank: SceneBank, clip: CLIP, folder: Path, clock: StageClock, *, batch_size: int, seed: int) -> None:
    """Train until the clock ends, resuming from `folder`; leaves the averaged weights in `clip`."""
    device, checkpoint = bank.images.device, Checkpoint(folder)
    average = start_average(clip)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    if checkpoint.exists:
        checkpoint.load(clip, average, [optimizer], clock)
    generator, change = torch.Generator(device), WordChanger(build_tokenizer(), device)
    clip.train().to(memory_format=torch.channels_last)
    for step in clock.ticks():
        optimizer.param_groups[0]["lr"] = clock.learning_rate(PEAK_LEARNING_RATE)
        generator.manual_seed(batch_seed(seed, step))
        scene = torch.randint(len(bank.images), (batch_size,), generator=generator, device=device)
        variant = torch.randint(bank.captions.shape[1], (batch_size,), generator=generator, device=device)
        images = _augment(to_unit_range(bank.images[scene]), generator)
        tokens = bank.captions[scene, variant].long()
        changed = [change(tokens, generator) for _ in range(N_CHANGED)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = contrastive_loss(clip, images, tokens, changed)
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


def load_trained_clip(bank: SceneBank, clip: CLIP, checkpoint: Checkpoint) -> None:
    """Fills `clip` with the averaged weights, and finds the statistics of its batch norms on drawn scenes."""
    checkpoint.load_average(clip)
    generator = torch.Generator(bank.images.device).manual_seed(0)
    with torch.no_grad():
        batches = (_augment(to_unit_range(images), generator) for images in bank.images[:NORM_SCENES].split(250))
        update_bn(batches, clip.visual)
    clip.eval()


def save_clip(clip: CLIP, folder: Path) -> None:
    """Write the folder that `open_clip` loads as `local-dir:`; weights in fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": CLIP_PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in clip.state_dict().items()}
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    build_tokenizer().save_pretrained(folder)
