"""One set of images with their activations at one hook point: several dictionaries are measured on the same ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.evaluation.stream import ImageSet, OnProgress, iter_activations
from fluxsae.flux import AnyFlux, schedule_sigmas, token_grid
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.halves import LEAST_CONFIDENCE, Halves, split_by_prompt
from fluxsae.laboratory.truths import CONCEPTS, coverage
from fluxsae.miniature.scenes import read_scene
from fluxsae.sae.model import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Truth:
    """What the images show, as read from them."""

    halves: Halves
    covers: Float[np.ndarray, "images concepts tokens"]


@dataclass(frozen=True, eq=False)
class Sample:
    """Images and what they are at one hook point."""

    prompts: tuple[str, ...]
    x: Float[Tensor, "images steps tokens d"]
    steps: tuple[int, ...]
    sigmas: Float[Tensor, " steps"]
    embeddings: Float[Tensor, "images width"] | None
    """CLIP embeddings of the images; None for a run without CLIP."""
    truth: Truth | None
    """None for a model whose images cannot be read back."""

    @torch.no_grad()
    def scores(self, sae: SparseAutoencoder) -> Float[Tensor, "images features"]:
        """S: the largest act of each feature in each image, over tokens and steps."""
        return torch.stack([sae.encode(image, sigma=self.sigmas[:, None]).amax((0, 1)) for image in self.x])


@torch.no_grad()
def gather_sample(
    pipe: AnyFlux,
    hookpoint: HookPoint,
    images: ImageSet,
    steps: Sequence[int],
    *,
    settings: GenerationSettings,
    embeddings: Float[Tensor, "images width"] | None,
    can_read: bool,
    batch_size: int = 8,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Sample:
    """Generates the images, once; without pictures where they cannot be read back.

    Images with NaN or infinite activations are left out and logged.

    Raises:
        FluxSaeError: too few images show scenes that can be read, or too many are left out.
    """
    parts, scenes, sound = [], [], list[int]()
    for batch in iter_activations(
        pipe, images, {hookpoint: steps}, settings=settings, batch_size=batch_size, with_pictures=can_read,
        on_progress=on_progress, doing=f"images for {hookpoint}", left_out=LeftOut(len(images)),
    ):  # fmt: skip
        sound += batch.rows
        parts.append(batch.tokens[hookpoint].cpu())
        scenes += [read_scene(picture) for picture in batch.pictures]
    truth = None
    if can_read:
        grid = token_grid(pipe, settings)
        halves = Halves.plan(scenes, split_by_prompt(images.prompts, seed=seed)[sound], draws=1, seed=seed)
        shown = [
            coverage(scene, grid) if scene.confidence >= LEAST_CONFIDENCE else np.zeros((len(CONCEPTS), grid.n_tokens))
            for scene in scenes
        ]
        truth = Truth(halves, np.stack(shown))
    sigmas = torch.tensor(schedule_sigmas(pipe, settings))[list(steps)]
    own = None if embeddings is None else embeddings[sound]
    return Sample(images.of(sound).prompts, torch.cat(parts), tuple(steps), sigmas, own, truth)
