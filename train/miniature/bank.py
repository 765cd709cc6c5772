"""A bank of drawn scenes with captions, held in memory for training."""

import multiprocessing
from dataclasses import dataclass

import numpy as np
import torch

from fluxsae.miniature.captions import caption_scene
from fluxsae.miniature.drawing import Scene, render_scene, sample_scene
from train.miniature.models import build_tokenizer, tokenize

CAPTIONS_PER_SCENE = 6
CHUNK = 500
PAIRS = 0.6
"""Share of scenes with two objects: which words belong together is the hardest to learn."""
COMPLETE_CAPTIONS = 0.35
"""Share of captions that leave nothing out."""
BARE_CAPTIONS = 0.2
"""Share of captions that name things and nothing else, as first prompts do."""
TERSE_CAPTIONS = 0.1
"""Share of captions without articles."""


@dataclass(frozen=True)
class SceneBank:
    """Scenes as pixels and token ids, on one device."""

    images: torch.Tensor
    """(scenes, 3, 128, 128), uint8"""
    captions: torch.Tensor
    """(scenes, captions a scene, text tokens), uint8"""
    centres: torch.Tensor
    """(scenes, 2 objects, x and y), in pixels; a lone object is listed twice"""


def _training_caption(scene: Scene, rng: np.random.Generator) -> str:
    kind, terse = rng.random(), bool(rng.random() < TERSE_CAPTIONS)
    if kind < BARE_CAPTIONS:
        return caption_scene(scene, rng, keep=0.0, always=("thing",), terse=terse)
    keep = 1.0 if kind < BARE_CAPTIONS + COMPLETE_CAPTIONS else rng.uniform(0.1, 0.9)
    return caption_scene(scene, rng, keep=keep, always=("thing",) if rng.random() < 0.5 else (), terse=terse)


ChunkTask = tuple[int, int, int]
"""Seed, number of the chunk, scenes in it."""
Chunk = tuple[np.ndarray, list[str], np.ndarray]
"""Images, the captions of all scenes one after another, centres."""


def _draw_chunk(task: ChunkTask) -> Chunk:
    """Images, captions and centres of one chunk of training scenes."""
    seed, chunk, count = task
    rng = np.random.default_rng([seed, chunk])
    scenes = [sample_scene(rng, n_objects=1 + int(rng.random() < PAIRS)) for _ in range(count)]
    captions = [_training_caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    centres = np.array([[(thing.x, thing.y) for thing in (scene.objects * 2)[:2]] for scene in scenes])
    return np.stack([render_scene(scene) for scene in scenes]), captions, centres


def draw_bank(n_scenes: int, *, seed: int, device: torch.device, workers: int) -> SceneBank:
    """`n_scenes` training scenes; the same for the same seed, whatever the number of worker processes."""
    tasks = [(seed, chunk, min(CHUNK, n_scenes - chunk * CHUNK)) for chunk in range((n_scenes + CHUNK - 1) // CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = pool.map(_draw_chunk, tasks, chunksize=1)
    tokens = tokenize(build_tokenizer(), [caption for _, captions, _ in parts for caption in captions])
    images = torch.from_numpy(np.concatenate([images for images, _, _ in parts])).permute(0, 3, 1, 2).contiguous()
    return SceneBank(
        images=images.to(device),
        captions=tokens.reshape(n_scenes, CAPTIONS_PER_SCENE, -1).to(device),
        centres=torch.from_numpy(np.concatenate([centres for _, _, centres in parts])).float().to(device),
    )


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as floats in [-1, 1]."""
    return images.float() / 127.5 - 1.0
