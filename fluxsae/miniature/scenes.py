"""The miniature's world, a picture book: draw scenes with exact masks, caption them, and read an image back."""

from fluxsae.miniature.captions import PHRASES, SYNONYMS, caption_scene, check_prompt, prompted_attributes, vocabulary
from fluxsae.miniature.drawing import (
    ATTRIBUTES,
    COLOURS,
    OF_OBJECTS,
    POSITIONS,
    TEXTURES,
    Scene,
    SceneObject,
    is_held_out,
    object_mask,
    part_mask,
    place_object,
    render_scene,
    sample_scene,
)
from fluxsae.miniature.grounds import GROUNDS, IMAGE_SIZE
from fluxsae.miniature.outlines import THINGS
from fluxsae.miniature.reader import read_scene

__all__ = [
    "ATTRIBUTES",
    "COLOURS",
    "GROUNDS",
    "IMAGE_SIZE",
    "OF_OBJECTS",
    "PHRASES",
    "POSITIONS",
    "SYNONYMS",
    "TEXTURES",
    "THINGS",
    "Scene",
    "SceneObject",
    "caption_scene",
    "check_prompt",
    "is_held_out",
    "object_mask",
    "part_mask",
    "place_object",
    "prompted_attributes",
    "read_scene",
    "render_scene",
    "sample_scene",
    "vocabulary",
]
