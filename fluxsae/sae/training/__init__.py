"""Training of SAEs: one loop for every architecture."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.sae.training.config import TrainConfig
    from fluxsae.sae.training.held_out import HeldOut
    from fluxsae.sae.training.initial import Source
    from fluxsae.sae.training.loop import Task, TrainResult, train, train_together
    from fluxsae.sae.training.processes import Processes

__all__ = ["HeldOut", "Processes", "Source", "Task", "TrainConfig", "TrainResult", "train", "train_together"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "HeldOut": "held_out",
        "Processes": "processes",
        "Source": "initial",
        "Task": "loop",
        "TrainConfig": "config",
        "TrainResult": "loop",
        "train": "loop",
        "train_together": "loop",
    },
)
