"""Training of SAEs: one loop for every architecture."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.sae.training.config import TrainConfig
    from fluxsae.sae.training.held_out import measure_held_out
    from fluxsae.sae.training.initial import Source
    from fluxsae.sae.training.loop import TrainResult, train
    from fluxsae.sae.training.processes import Processes

__all__ = ["Processes", "Source", "TrainConfig", "TrainResult", "measure_held_out", "train"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "Processes": "processes",
        "Source": "initial",
        "TrainConfig": "config",
        "TrainResult": "loop",
        "measure_held_out": "held_out",
        "train": "loop",
    },
)
