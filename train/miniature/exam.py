"""How good the miniature is: prompts it never saw, read back by the scene reader."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from fluxsae.flux import default_settings, generate
from fluxsae.miniature.reader import score_prompt
from fluxsae.miniature.scenes import ATTRIBUTES, caption_scene, read_scene, render_scene, sample_scene
from train.miniature.autoencoder import reconstruction_psnr

Tally = dict[tuple[int, str], list[bool]]
"""(objects, attribute) -> was each prompted value read back right"""


def exam_prompts(count: int, *, seed: int = 90_000) -> list[str]:
    """Prompts whose every object is a held-out combination of shape, colour and texture; half with two objects.

    Shape, colour and texture are always named; size, position and background three times out of four.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, n_objects=1 + len(prompts) % 2, held_out=True)
        prompts[caption_scene(scene, rng, always=("shape", "colour", "texture"))] = None
    return list(prompts)


def _generate_all(pipe: FluxPipeline, prompts: list[str], batch_size: int) -> list[Image.Image]:
    settings = default_settings(pipe)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        images += generate(pipe, part, seeds=list(range(start, start + len(part))), settings=settings)
        print(f"exam: {len(images)} of {len(prompts)} images", flush=True)
    return images


def take_exam(pipe: FluxPipeline, *, n_prompts: int = 500, batch_size: int = 25) -> Tally:
    """Generate one image per held-out prompt and compare what was asked with what is read."""
    prompts = exam_prompts(n_prompts)
    tally: Tally = defaultdict(list)
    for prompt, image in zip(prompts, _generate_all(pipe, prompts, batch_size), strict=True):
        n_objects = 2 if " and " in prompt else 1
        for attribute, is_right in score_prompt(prompt, read_scene(image)):
            tally[n_objects, attribute].append(is_right)
    return tally


def held_out_psnr(pipe: FluxPipeline, *, n_scenes: int = 200, seed: int = 91_000) -> float:
    """Mean reconstruction quality of whole held-out scenes by the autoencoder alone, in dB."""
    rng = np.random.default_rng(seed)
    images = np.stack([render_scene(sample_scene(rng, held_out=True)) for _ in range(n_scenes)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    device = next(pipe.vae.parameters()).device
    return float(torch.cat([reconstruction_psnr(pipe.vae, part.to(device)) for part in pixels.split(25)]).mean())


def format_tally(tally: Tally, attributes: Sequence[str] = tuple(ATTRIBUTES)) -> str:
    """A table: one row an attribute, the share read back right for one and for two objects."""

    def share(answers: list[bool]) -> str:
        return f"{np.mean(answers):7.1%} of {len(answers):4d}" if answers else "          none"

    rows = [f"{'attribute':12s}  {'one object':>15s}  {'two objects':>15s}"]
    rows += [f"{name:12s}  {share(tally[1, name]):>15s}  {share(tally[2, name]):>15s}" for name in attributes]
    both = {n: [right for (count, _), answers in tally.items() if count == n for right in answers] for n in (1, 2)}
    rows.append(f"{'all':12s}  {share(both[1]):>15s}  {share(both[2]):>15s}")
    rows.append(f"all prompted attributes of all prompts: {share(both[1] + both[2])}")
    return "\n".join(rows)


def sample_sheet(pipe: FluxPipeline, path: Path, *, n_images: int = 64, columns: int = 8) -> None:
    """A sheet of images of held-out prompts, row by row."""
    save_sheet(_generate_all(pipe, exam_prompts(n_images), 16), path, columns=columns)


def save_sheet(images: Sequence[Image.Image], path: Path, *, columns: int = 8) -> None:
    """One picture of all images, row by row; the last row has to be full."""
    pixels = [np.asarray(image) for image in images]
    rows = [np.concatenate(pixels[start : start + columns], axis=1) for start in range(0, len(pixels), columns)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)
