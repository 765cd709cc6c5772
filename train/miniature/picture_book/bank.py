"""The training scenes of the picture book, with captions of every kind."""

import numpy as np

from train.miniature.bank import CAPTIONS_PER_SCENE, PAIRS, Chunk, ChunkTask
from train.miniature.picture_book.captions import caption_scene
from train.miniature.picture_book.drawing import Scene, render_scene, sample_scene

COMPLETE_CAPTIONS = 0.55
"""Share of captions that leave nothing out."""
BARE_CAPTIONS = 0.12
"""Share of captions that name things and nothing else, as first prompts do."""
TERSE_CAPTIONS = 0.1
"""Share of captions without articles."""


def _training_caption(scene: Scene, rng: np.random.Generator) -> str:
    kind, terse = rng.random(), bool(rng.random() < TERSE_CAPTIONS)
    if kind < BARE_CAPTIONS:
        return caption_scene(scene, rng, keep=0.0, always=("thing",), terse=terse)
    keep = 1.0 if kind < BARE_CAPTIONS + COMPLETE_CAPTIONS else rng.uniform(0.3, 1.0)
    return caption_scene(scene, rng, keep=keep, always=("thing",) if rng.random() < 0.5 else (), terse=terse)


def draw_chunk(task: ChunkTask) -> Chunk:
    """Images, captions and centres of one chunk of training scenes."""
    seed, chunk, count = task
    rng = np.random.default_rng([seed, chunk])
    scenes = [sample_scene(rng, n_objects=1 + int(rng.random() < PAIRS)) for _ in range(count)]
    captions = [_training_caption(scene, rng) for scene in scenes for _ in range(CAPTIONS_PER_SCENE)]
    centres = np.array([[(thing.x, thing.y) for thing in (scene.objects * 2)[:2]] for scene in scenes])
    return np.stack([render_scene(scene) for scene in scenes]), captions, centres
