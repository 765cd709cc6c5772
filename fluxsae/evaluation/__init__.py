"""Measurements that work on any FLUX: reconstruction, transfer to other steps and sizes, flow loss, intervals."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.evaluation.flow import evaluate_flow
    from fluxsae.evaluation.reconstruction import evaluate_reconstruction, transfer_table

__all__ = ["evaluate_flow", "evaluate_reconstruction", "transfer_table"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "evaluate_flow": "flow",
        "evaluate_reconstruction": "reconstruction",
        "transfer_table": "reconstruction",
    },
)
