"""Measurements that need scenes whose truth is known: concepts, where a feature fires, steering read back.

`evaluate` measures a whole run, and includes the measurements of `fluxsae.evaluation`.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.laboratory.concepts import evaluate_concepts
    from fluxsae.laboratory.steering import run_laboratory

__all__ = ["evaluate_concepts", "run_laboratory"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "evaluate_concepts": "concepts",
        "run_laboratory": "steering",
    },
)
