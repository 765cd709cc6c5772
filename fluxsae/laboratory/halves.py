"""The two halves of the images: choices are made on the first and reported on the second."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.intervals import bootstrap_weights, weighted_auc
from fluxsae.laboratory.truths import CONCEPTS, truth_table
from fluxsae.miniature.scenes import Scene

LEAST_CONFIDENCE = 0.05
"""Images that the reader is less sure of have no known truth and are left out."""
LEAST_IMAGES = 5
"""A concept needs this many images with it and without it in each half."""


def split_by_prompt(prompts: Sequence[str], *, seed: int = 0) -> Bool[np.ndarray, " images"]:
    """Which images are in the first half, where choices are made; images of one prompt stay together."""
    distinct = sorted(set(prompts))
    first = set(np.random.default_rng(seed).permutation(distinct)[: (len(distinct) + 1) // 2].tolist())
    return np.array([prompt in first for prompt in prompts], dtype=bool)


def fold_by_prompt(
    prompts: Sequence[str], is_first: Bool[np.ndarray, " images"], *, n: int, seed: int = 0
) -> Int[np.ndarray, " images"]:
    """A number below `n` for each image of the first half, one for all images of a prompt; -1 in the second half."""
    distinct = sorted({prompt for prompt, first in zip(prompts, is_first, strict=True) if first})
    fold = {prompt: place % n for place, prompt in enumerate(np.random.default_rng(seed).permutation(distinct))}
    return np.array([fold[prompt] if first else -1 for prompt, first in zip(prompts, is_first, strict=True)])


@dataclass(frozen=True, eq=False)
class Halves:
    """The two halves, what is true in them, and how the second is resampled."""

    truth: Int[np.ndarray, "images concepts"]
    """1 where an image shows a concept."""
    first: Int[np.ndarray, " first"]
    """The images of the first half whose scene was read."""
    second: Int[np.ndarray, " reported"]
    usable: Bool[np.ndarray, " concepts"]
    """Concepts with enough images in both halves."""
    weights: Float[np.ndarray, "draws reported"]
    """Resamples of the second half."""

    @classmethod
    def plan(cls, scenes: Sequence[Scene], is_first: Bool[np.ndarray, " images"], *, draws: int, seed: int) -> "Halves":
        """The halves of images that show `scenes`; unread ones are in neither.

        Raises:
            FluxSaeError: too few images for any concept.
        """
        is_read = np.array([scene.confidence >= LEAST_CONFIDENCE for scene in scenes])
        truth = truth_table(scenes)
        first, second = np.flatnonzero(is_first & is_read), np.flatnonzero(~is_first & is_read)
        usable = np.ones(len(CONCEPTS), dtype=bool)
        for half in (first, second):
            positives = truth[half].sum(axis=0)
            usable &= (positives >= LEAST_IMAGES) & (len(half) - positives >= LEAST_IMAGES)
        if not usable.any():
            raise FluxSaeError(
                f"Of {len(scenes)} images {is_read.sum()} show scenes that can be read, too few for any concept. "
                "Concepts are known for the miniature's scenes only; give more images, or another evaluation."
            )
        return cls(truth, first, second, usable, bootstrap_weights(len(second), draws=draws, seed=seed))

    def auc_draws(self, scores: Float[np.ndarray, " images"], concept: int) -> Float[np.ndarray, " draws"]:
        """AUC of one score of each image on the second half, for the sample and each resample."""
        return weighted_auc(scores[self.second], self.truth[self.second, concept], self.weights)

    def over_concepts(
        self, draws_of: Callable[[int], Float[np.ndarray, " draws"]]
    ) -> Float[np.ndarray, "concepts draws"]:
        """A statistic of every usable concept; NaN rows for the others."""
        values = np.full((len(CONCEPTS), len(self.weights)), np.nan)
        for concept in np.flatnonzero(self.usable):
            values[concept] = draws_of(int(concept))
        return values
