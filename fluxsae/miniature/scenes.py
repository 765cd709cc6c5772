"""The miniature's world: draw scenes with exact masks, caption them, and read an image back."""

from fluxsae.miniature.captions import PLACES, SYNONYMS, caption_scene, prompted_attributes, vocabulary
from fluxsae.miniature.drawing import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    TEXTURES,
    Scene,
    SceneObject,
    is_held_out,
    object_mask,
    place_object,
    render_scene,
    sample_scene,
)
from fluxsae.miniature.reader import read_scene

__all__ = [
    "ATTRIBUTES",
    "BACKGROUNDS",
    "COLOURS",
    "IMAGE_SIZE",
    "PLACES",
    "POSITIONS",
    "SHAPES",
    "SYNONYMS",
    "TEXTURES",
    "Scene",
    "SceneObject",
    "caption_scene",
    "is_held_out",
    "object_mask",
    "place_object",
    "prompted_attributes",
    "read_scene",
    "render_scene",
    "sample_scene",
    "vocabulary",
]
