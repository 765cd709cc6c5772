"""How good the miniature is: prompts it never saw, read back by the reader, and sheets to look at."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image

from fluxsae.features.vocabulary import in_place
from fluxsae.miniature.captions import caption_scene, prompted_attributes
from fluxsae.miniature.drawing import ATTRIBUTES, render_scene, sample_scene
from fluxsae.miniature.reader import read_scene, score_prompt
from fluxsae.pictures.perceptual import ImageEmbedder
from train.miniature.autoencoder import reconstruction_psnr
from train.miniature.contrast import CHANGED_KINDS
from train.miniature.models import SETTINGS, TEXT_TOKENS

Tally = dict[tuple[int, str], list[bool]]
"""(objects, attribute) -> was each prompted value read back right"""
EXAMINED = ("number", "thing", "colour", "texture", "size", "position", "background")
FIRST_PROMPTS = (
    "a cat",
    "two red fish in the sea",
    "a house at night",
    "a small dog and a big tree",
    "a yellow bird",
    "a blue car",
    "a boat on the sea",
    "a red flower in a meadow",
    "a star",
    "an apple",
)
"""What people type first."""
Paint = Callable[[list[str], list[int]], list[Image.Image]]
"""Prompts and seeds -> one image each."""


def exam_prompts(count: int, *, seed: int = 90_000) -> list[str]:
    """Prompts whose every object is a held-out combination of thing, colour and texture; half with two objects.

    Thing, colour and texture are always named; size, position and background three times out of four.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, n_objects=1 + len(prompts) % 2, held_out=True)
        prompts[caption_scene(scene, rng, always=("thing", "colour", "texture"))] = None
    return list(prompts)


def painter(pipe: FluxPipeline, *, true_guidance: float | None = None, batch_size: int = 25) -> Paint:
    """Paints in batches with the pipeline's own settings.

    `true_guidance` is for weights whose guidance is not yet distilled: every step then also asks for the empty prompt.
    """
    guidance: dict[str, object] = {"guidance_scale": SETTINGS.guidance_scale}
    if true_guidance is not None:
        guidance = {"guidance_scale": 1.0, "true_cfg_scale": true_guidance}

    def paint(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        images: list[Image.Image] = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            images += pipe(
                prompt=part,
                negative_prompt=None if true_guidance is None else [""] * len(part),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]],
                height=SETTINGS.height,
                width=SETTINGS.width,
                num_inference_steps=SETTINGS.num_inference_steps,
                max_sequence_length=TEXT_TOKENS,
                **guidance,
            ).images
            print(f"painted {len(images)} of {len(prompts)}", flush=True)
        return images

    pipe.set_progress_bar_config(disable=True)
    return paint


def take_exam(paint: Paint, *, n_prompts: int = 500) -> Tally:
    """One image for each held-out prompt: what was asked against what is read."""
    prompts = exam_prompts(n_prompts)
    tally: Tally = defaultdict(list)
    for prompt, image in zip(prompts, paint(prompts, list(range(n_prompts))), strict=True):
        n_objects = len(prompted_attributes(prompt)[0])
        for attribute, is_right in score_prompt(prompt, read_scene(image)):
            tally[n_objects, attribute].append(is_right)
    return tally


def reading_shares(embedder: ImageEmbedder, *, n_scenes: int = 300, seed: int = 92_000) -> dict[str, float]:
    """Kind of word -> share of held-out drawn scenes in which the true caption beats all with another word there.

    Each scene counts once a kind, by a word of its caption that is there once; half of them hold two things.
    """
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, n_objects=1 + at % 2, held_out=True) for at in range(n_scenes)]
    pictures = embedder.embed_images([Image.fromarray(render_scene(scene)) for scene in scenes])
    read: dict[str, list[bool]] = {kind: [] for kind in CHANGED_KINDS}
    for scene, picture in zip(scenes, pictures, strict=True):
        caption = caption_scene(scene, rng, keep=1.0)
        words = caption.split()
        for kind, found in read.items():
            own = next((word for word in ATTRIBUTES[kind] if words.count(word) == 1), None)
            if own is not None:
                others = [word for word in ATTRIBUTES[kind] if word not in words]
                texts = embedder.embed_texts([caption, *(in_place(caption, own, word) for word in others)])
                found.append(int((texts @ picture).argmax()) == 0)
    return {kind: float(np.mean(found)) for kind, found in read.items()}


def held_out_psnr(autoencoder: AutoencoderTiny, *, n_scenes: int = 200, seed: int = 91_000) -> torch.Tensor:
    """Reconstruction quality of whole held-out scenes by the autoencoder alone, in dB, one figure a scene."""
    rng = np.random.default_rng(seed)
    images = np.stack([render_scene(sample_scene(rng, held_out=True)) for _ in range(n_scenes)])
    parts = torch.from_numpy(images).permute(0, 3, 1, 2).split(25)
    return torch.cat([reconstruction_psnr(autoencoder, part.to(autoencoder.device)) for part in parts])


def format_tally(tally: Tally) -> str:
    """A table: one row an attribute, the share read back right for one and for two objects."""

    def share(answers: list[bool]) -> str:
        return f"{np.mean(answers):7.1%} of {len(answers):4d}" if answers else "          none"

    rows = [f"{'attribute':12s}  {'one object':>15s}  {'two objects':>15s}"]
    rows += [f"{name:12s}  {share(tally[1, name]):>15s}  {share(tally[2, name]):>15s}" for name in EXAMINED]
    both = {n: [right for (count, _), answers in tally.items() if count == n for right in answers] for n in (1, 2)}
    rows.append(f"{'all':12s}  {share(both[1]):>15s}  {share(both[2]):>15s}")
    rows.append(f"all prompted attributes of all prompts: {share(both[1] + both[2])}")
    return "\n".join(rows)


def save_sheets(paint: Paint, path: Path) -> None:
    """A sheet of 64 exam prompts, and beside it (`-first`) one of people's first prompts, seeds 0 to 4 each."""
    _save_sheet(paint(exam_prompts(64), list(range(64))), path, columns=8)
    first = [prompt for prompt in FIRST_PROMPTS for _ in range(5)]
    _save_sheet(paint(first, [*range(5)] * len(FIRST_PROMPTS)), path.with_stem(f"{path.stem}-first"), columns=10)


def _save_sheet(images: Sequence[Image.Image], path: Path, *, columns: int) -> None:
    """One picture of all images, row by row; the last row has to be full."""
    pixels = [np.asarray(image) for image in images]
    rows = [np.concatenate(pixels[start : start + columns], axis=1) for start in range(0, len(pixels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)
