"""What tests of the page's desks share: hook points of a small run, and a reading of four patches."""

import numpy as np
import torch
import whole_run
from PIL import Image

from fluxsae.features.firing import SparseMaps
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.acts import SparseActs
from fluxsae.ui.serve.reading import Reading

EARLY, LATE = whole_run.EARLY, whole_run.LATE


def maps_of(steps: tuple[int, ...], values: np.ndarray, features: np.ndarray, n_features: int) -> SparseMaps:
    """Maps of all their own steps: `features` at `values`, both (steps, tokens, width); 0 pads."""
    dense = torch.zeros(*values.shape[:2], n_features)
    dense.scatter_reduce_(2, torch.from_numpy(features).long(), torch.from_numpy(values).float(), "amax")
    acts = {step: SparseActs.from_dense(part) for step, part in zip(steps, dense, strict=True)}
    return SparseMaps.build(acts, sigmas=[0.8 - 0.1 * place for place in range(len(steps))], own_steps=steps)


def reading() -> Reading:
    """Four patches, two features, two steps: feature 1 fires at patch 0 early, feature 2 at patch 3 late."""
    values = np.array([[[2, 0], [0, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [3, 0]]], dtype=np.float32)
    indices = np.array([[[1, 0], [0, 0], [0, 0], [0, 0]], [[1, 0], [0, 0], [0, 0], [2, 0]]], dtype=np.int32)
    maps = maps_of((4, 8), values, indices, whole_run.N_FEATURES)
    picture = Image.new("RGB", (16, 16))
    return Reading("a circle", 0, GenerationSettings(height=16, width=16), picture, TokenGrid(2, 2), {LATE: maps})
