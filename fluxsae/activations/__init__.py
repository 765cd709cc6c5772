"""Rows of FLUX's token activations: collected from a pipeline, stored in shards, mixed into training batches."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.activations.collection import CaptureRequest, collect
    from fluxsae.activations.mixing import mixing_buffer
    from fluxsae.activations.shards import ActivationManifest

__all__ = ["ActivationManifest", "CaptureRequest", "collect", "mixing_buffer"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "ActivationManifest": "shards",
        "CaptureRequest": "collection",
        "collect": "collection",
        "mixing_buffer": "mixing",
    },
)
