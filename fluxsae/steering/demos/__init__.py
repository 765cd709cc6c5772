"""Steering demos: pictures on which turning a feature, or swapping one for another, shows best."""

from fluxsae.steering.demos.measured import (
    LIMITS_KEY,
    describe_edit,
    edit_direction,
    grid_row,
    load_limits,
    measured_sweep,
    run_origin,
)
from fluxsae.steering.demos.search import (
    DemoConfig,
    DemoScore,
    SteeringDemo,
    candidate_images,
    demo_score,
    find_demos,
)
from fluxsae.steering.demos.swap_search import Swap, find_swaps
from fluxsae.steering.demos.swaps import (
    SwapConfig,
    SwapScore,
    acts_in_window,
    addable,
    hot_region,
    swap_score,
    swap_variants,
    try_swaps,
)

__all__ = [
    "LIMITS_KEY",
    "DemoConfig",
    "DemoScore",
    "SteeringDemo",
    "Swap",
    "SwapConfig",
    "SwapScore",
    "acts_in_window",
    "addable",
    "candidate_images",
    "demo_score",
    "describe_edit",
    "edit_direction",
    "find_demos",
    "find_swaps",
    "grid_row",
    "hot_region",
    "load_limits",
    "measured_sweep",
    "run_origin",
    "swap_score",
    "swap_variants",
    "try_swaps",
]
