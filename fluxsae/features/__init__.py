"""From scored images to features that people understand: scores, statistics, selection, names, directions, cards.

`S` is the highest activation of each feature on each image.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.features.cards import FeatureCard, build_cards
    from fluxsae.features.layers import compare_layers
    from fluxsae.features.scores import ScoreAccumulator, ScoreMatrix
    from fluxsae.features.statistics import FeatureStats

__all__ = ["FeatureCard", "FeatureStats", "ScoreAccumulator", "ScoreMatrix", "build_cards", "compare_layers"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "FeatureCard": "cards",
        "FeatureStats": "statistics",
        "ScoreAccumulator": "scores",
        "ScoreMatrix": "scores",
        "build_cards": "cards",
        "compare_layers": "layers",
    },
)
