"""Steering demos: pictures on which turning a feature, or swapping one for another, shows best."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.steering.demos.config import DemoConfig, SwapConfig
    from fluxsae.steering.demos.measured import (
        LIMITS_KEY,
        describe_edit,
        edit_direction,
        grid_row,
        load_limits,
        measured_sweep,
        run_origin,
    )
    from fluxsae.steering.demos.opening import opening_swap, write_opening
    from fluxsae.steering.demos.search import DemoScore, SteeringDemo, candidate_images, demo_score, find_demos
    from fluxsae.steering.demos.swap_search import Swap, find_swaps
    from fluxsae.steering.demos.swaps import (
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
    "opening_swap",
    "run_origin",
    "swap_score",
    "swap_variants",
    "try_swaps",
    "write_opening",
]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "DemoConfig": "config",
        "DemoScore": "search",
        "LIMITS_KEY": "measured",
        "SteeringDemo": "search",
        "Swap": "swap_search",
        "SwapConfig": "config",
        "SwapScore": "swaps",
        "acts_in_window": "swaps",
        "addable": "swaps",
        "candidate_images": "search",
        "demo_score": "search",
        "describe_edit": "measured",
        "edit_direction": "measured",
        "find_demos": "search",
        "find_swaps": "swap_search",
        "grid_row": "measured",
        "hot_region": "swaps",
        "load_limits": "measured",
        "measured_sweep": "measured",
        "opening_swap": "opening",
        "run_origin": "measured",
        "swap_score": "swaps",
        "swap_variants": "swaps",
        "try_swaps": "swaps",
        "write_opening": "opening",
    },
)
