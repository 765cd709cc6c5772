"""Faults that a user can mend."""

from typing import Final

MAKERS: Final = {
    "collect": "fluxsae.activations.collect",
    "fit": "fluxsae.sae.training.train",
    "score": "fluxsae.features.scoring.score_images",
    "analyze": "fluxsae.features.analysis.describe_features",
    "embed": "fluxsae.pictures.perceptual.load_embedder",
    "directions": "fluxsae.features.directions.feature_map",
    "compare_layers": "fluxsae.features.layers.compare_layers",
    "render": "fluxsae.pictures.heatmaps.contact_sheet",
    "find_demos": "fluxsae.steering.demos.find_demos",
    "verify": "fluxsae.publishing.verify.verify_run",
}
"""Script of a checkout -> the call of the library that does its work."""


def maker(script: str) -> str:
    """What does a script's work, for a message: the library's call first, since the wheel holds no scripts."""
    return f"`{MAKERS[script]}`, or `python -m train.{script}` in a checkout"


class FluxSaeError(ValueError):
    """What was given, what is allowed and what to do, in words that may be shown to a user as they are."""


def check_positive(config: object, *names: str) -> None:
    """Refuses a config whose counts of these names are not all at least 1.

    Raises:
        FluxSaeError: one is below 1.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise FluxSaeError(f"{name} is {getattr(config, name)}; it must be at least 1.")
