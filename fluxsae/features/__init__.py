"""From scored images to features that people understand: scores, statistics, selection, names, directions, cards.

`S` is the highest activation of each feature on each image.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.features.cards import CardIndex, FeatureCard
    from fluxsae.features.layers import compare_layers
    from fluxsae.features.scores import ScoreAccumulator, ScoreMatrix
    from fluxsae.features.statistics import FeatureStats

__all__ = ["CardIndex", "FeatureCard", "FeatureStats", "ScoreAccumulator", "ScoreMatrix", "compare_layers"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "CardIndex": "cards",
        "FeatureCard": "cards",
        "FeatureStats": "statistics",
        "ScoreAccumulator": "scores",
        "ScoreMatrix": "scores",
        "compare_layers": "layers",
    },
)
