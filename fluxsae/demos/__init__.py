"""Steering demos: pictures on which turning a feature, or swapping one for another, shows best."""

from fluxsae.demos.measured import (
    LIMITS_KEY,
    describe_edit,
    edit_direction,
    grid_row,
    load_limits,
    measured_sweep,
    run_origin,
)
from fluxsae.demos.search import (
    DemoConfig,
    DemoScore,
    SteeringDemo,
    candidate_images,
    demo_score,
    find_demos,
)

__all__ = [
    "LIMITS_KEY",
    "DemoConfig",
    "DemoScore",
    "SteeringDemo",
    "candidate_images",
    "demo_score",
    "describe_edit",
    "edit_direction",
    "find_demos",
    "grid_row",
    "load_limits",
    "measured_sweep",
    "run_origin",
]
