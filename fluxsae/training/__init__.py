"""Training of SAEs: one loop for every architecture."""

from fluxsae.training.config import TrainConfig
from fluxsae.training.held_out import measure_held_out
from fluxsae.training.initial import Source
from fluxsae.training.loop import TrainResult, train
from fluxsae.training.processes import Processes

__all__ = ["Processes", "Source", "TrainConfig", "TrainResult", "measure_held_out", "train"]
