"""Training of SAEs: one loop for every architecture."""

from fluxsae.sae.training.config import TrainConfig
from fluxsae.sae.training.held_out import HeldOut
from fluxsae.sae.training.initial import Source
from fluxsae.sae.training.loop import Task, TrainResult, train, train_together
from fluxsae.sae.training.processes import Processes

__all__ = ["HeldOut", "Processes", "Source", "Task", "TrainConfig", "TrainResult", "train", "train_together"]
