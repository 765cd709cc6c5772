"""How features are described, judged and compared: options that load nothing heavy."""

from dataclasses import dataclass

from fluxsae.errors import FluxSaeError

COUNTERPART = 0.5
"""Correlation of two columns of S from which two features count as one that lives on."""


@dataclass(frozen=True)
class AnalysisConfig:
    """How features are described."""

    n_top_images: int = 12
    """Best images listed for each feature."""
    rare_below: float = 1e-3
    """A feature that fires on a smaller share of tokens is rare (and dead when it never fires)."""
    very_common_from: float = 0.1
    """A feature that fires on at least this share of tokens is very common."""
    quantile_levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    """Quantiles of a feature's activations, where it fires."""
    n_neighbours: int = 10
    """Companions listed for each feature."""
    companion_images: int = 256
    """Best images of a feature that decide its companions."""
    family_similarity: float = 0.6
    """Features whose similarity is at least this, and that are among each other's companions, are one family."""

    def __post_init__(self) -> None:
        if not 0 < self.rare_below <= self.very_common_from <= 1:
            raise FluxSaeError(
                f"rare_below is {self.rare_below}, very_common_from {self.very_common_from}; "
                "they must be above 0, at most 1, and in this order."
            )
        if min(self.n_top_images, self.n_neighbours, self.companion_images) < 1:
            raise FluxSaeError("n_top_images, n_neighbours and companion_images must be at least 1.")
        if not all(0 <= level <= 1 for level in self.quantile_levels):
            raise FluxSaeError(f"quantile_levels are {self.quantile_levels}; they must lie between 0 and 1.")


@dataclass(frozen=True)
class SelectionConfig:
    """How features are judged."""

    top_images: int = 16
    """Images a feature is judged by: its highest scores above 0, each with another prompt."""
    min_images: int = 4
    """With fewer such images a feature gets no coherence."""
    null_draws: int = 20_000
    """Random sets of images that the coherence is compared with."""
    max_q: float = 0.05
    """Share of false discoveries allowed among the features called coherent (Benjamini & Hochberg 1995)."""
    label_images: int = 48
    """Images a label is drawn from: the top images, and further ones that reach `label_floor`."""
    label_floor: float = 0.3
    """Fraction of the feature's maximum below which an image beyond the top ones says nothing about its label."""
    seed: int = 0
    """Seed of the random sets."""

    def __post_init__(self) -> None:
        if self.min_images < 2 or self.top_images < self.min_images or self.null_draws < 100:
            raise FluxSaeError(
                f"top_images={self.top_images}, min_images={self.min_images}, null_draws={self.null_draws}; "
                "allowed: 2 <= min_images <= top_images and at least 100 null_draws"
            )
