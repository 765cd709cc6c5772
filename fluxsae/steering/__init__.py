"""Edits of features, and what they do: applied while FLUX generates, swept over strengths, measured."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.steering.apply import steer
    from fluxsae.steering.conditions import Condition
    from fluxsae.steering.edits import SteeringEdit, with_features
    from fluxsae.steering.measurements import measure_edit
    from fluxsae.steering.sweeps import sweep

__all__ = ["Condition", "SteeringEdit", "measure_edit", "steer", "sweep", "with_features"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "Condition": "conditions",
        "SteeringEdit": "edits",
        "measure_edit": "measurements",
        "steer": "apply",
        "sweep": "sweeps",
        "with_features": "edits",
    },
)
