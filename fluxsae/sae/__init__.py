"""Sparse autoencoders: the model, its strict files, its metrics, its training and the kernels it runs on.

`interop` reads and writes the files of other tools. A new architecture is a name and a line of `KINDS` in `config`, its
activation in `model`, its selection, penalty and gradient in `training/gradients`, and its names in `interop`.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.sae.config import SaeConfig, TrainedOn
    from fluxsae.sae.model import SaeOutput, SparseAutoencoder

__all__ = ["SaeConfig", "SaeOutput", "SparseAutoencoder", "TrainedOn"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "SaeConfig": "config",
        "SaeOutput": "model",
        "SparseAutoencoder": "model",
        "TrainedOn": "config",
    },
)
