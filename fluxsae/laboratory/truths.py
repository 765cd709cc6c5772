"""True concepts of generated images, as read from the images themselves, with their masks on the token grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.miniature.scenes import ATTRIBUTES, Scene, SceneObject, object_mask

HEADLINE_ATTRIBUTES = ("thing", "colour", "texture", "background")
"""The attributes that targets speak of; a maximum over tokens cannot show position, and hardly size."""
COVERED = 0.25
"""Share of a token's patch from which it is the concept's: thin shapes cover no patch by half."""


@dataclass(frozen=True, order=True)
class Concept:
    """One value of one attribute of a scene, for example colour red."""

    attribute: str
    value: str

    def __str__(self) -> str:
        return f"{self.attribute} {self.value}"


CONCEPTS = tuple(Concept(attribute, value) for attribute, values in ATTRIBUTES.items() for value in values)
"""Every true concept of a scene."""


def truth_table(scenes: Sequence[Scene]) -> Int[np.ndarray, "images concepts"]:
    """1 where an image shows a concept, in the order of `CONCEPTS`."""
    shown = [scene.concepts() for scene in scenes]
    return np.array([[int((c.attribute, c.value) in present) for c in CONCEPTS] for present in shown], dtype=np.int64)


def coverage(scene: Scene, grid: TokenGrid) -> Float[np.ndarray, "concepts tokens"]:
    """How much of each token's patch shows each concept, 0 to 1.

    An object's attributes lie where the object is, the background's colour where no object is.
    """
    parts = [covered_share(thing, grid) for thing in scene.objects]
    covers = np.zeros((len(CONCEPTS), grid.n_tokens))
    for row, concept in enumerate(CONCEPTS):
        if concept.attribute == "background":
            if scene.background == concept.value:
                covers[row] = 1 - np.clip(np.sum(parts, axis=0), 0, 1)
            continue
        for thing, part in zip(scene.objects, parts, strict=True):
            if getattr(thing, concept.attribute) == concept.value:
                covers[row] = np.maximum(covers[row], part)
    return covers


def covered_share(thing: SceneObject, grid: TokenGrid) -> Float[np.ndarray, " tokens"]:
    """How much of each token's patch lies inside an object, 0 to 1."""
    picture = Image.fromarray(object_mask(thing).astype(np.float32))
    small = picture.resize((grid.cols, grid.rows), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).clip(0, 1).ravel()


def attribute_mean(values: Float[np.ndarray, " concepts"], attribute: str) -> float:
    """Mean over the concepts of one attribute, NaN ones left out; NaN where none is left."""
    chosen = values[[concept.attribute == attribute for concept in CONCEPTS]]
    known = chosen[~np.isnan(chosen)]
    return float(known.mean()) if len(known) else float("nan")
