"""How much is measured: options that load nothing heavy."""

from dataclasses import dataclass, field
from typing import Final, Literal

from fluxsae.errors import FluxSaeError, check_positive

Direction = Literal["amplify", "suppress"]

DIRECTIONS: Final[tuple[Direction, ...]] = ("amplify", "suppress")

Where = Literal["everywhere", "painted"]
"""Whether an edit acts on the whole picture, or where the attribute lies in the unedited one: what a person who
steers would paint, the object for its attributes, all else for the background."""


@dataclass(frozen=True, kw_only=True)
class LaboratoryConfig:
    """How much is tried."""

    n_select: int = 6
    """Pictures a concept and direction on which hook point, mode, strength, window and feature are chosen."""
    n_report: int = 12
    """Further pictures a concept and direction on which the chosen settings are reported."""
    add: tuple[float, ...] = (0.25, 0.35, -0.5)
    """Strengths of mode add that are tried: above 0 to turn a feature up, below to turn it down."""
    clamp: tuple[float, ...] = (-0.25,)
    """Strengths of mode clamp that are tried: above 0 to turn a feature up, below to turn it down."""
    scale: tuple[float, ...] = (-1.0,)
    """Strengths of mode scale that are tried to turn a feature down."""
    project_out: tuple[float, ...] = ()
    """Strengths of mode project_out that are tried to turn a feature down."""
    starts: tuple[float, ...] = (0.2,)
    """Where windows start, as fractions of the schedule."""
    stop: float = 1.0
    """Where they end."""
    where: tuple[Where, ...] = ("everywhere", "painted")
    """Whether edits act on the whole picture, or where the attribute lies in the unedited one."""
    n_features: int = 1
    """Matched features of a concept that are tried alone, the best by AUC first."""
    together: tuple[int, ...] = (1, 4)
    """How many matched features of a concept are turned at once at most, the best by AUC first; 1 tries each alone."""
    without_rivals: tuple[bool, ...] = (False, True)
    """Whether, to turn a feature up, the matched features of the attribute's other values are taken away (scale 0)."""
    n_rivals: int = 3
    """Matched features of each other value that are taken away, the best by AUC first."""
    named: float = 1.0
    """Share of the attributes an edit is not about that its prompt names; what is left open may be drawn either way."""
    n_moment_images: int = 96
    """Pictures from which the difference-of-means directions come."""
    curve: tuple[float, ...] = (0.5, 2.0)
    """Multiples of the chosen strength's distance from no change, beside 1, on the dose-response curve."""
    batch_size: int = 64
    """Pictures generated together."""
    readers: int = 0
    """Processes that read pictures back; 0 reads in this one."""
    seed: int = 0
    """Decides subjects and control directions."""

    def __post_init__(self) -> None:
        check_positive(self, "n_select", "n_report", "n_features", "n_rivals", "n_moment_images", "batch_size")
        if not self.starts or not all(0 <= start < self.stop <= 1 for start in self.starts):
            raise FluxSaeError(
                f"starts is {self.starts} and stop {self.stop}; they are fractions of the schedule: "
                "at least one start, each at least 0 and below stop, and stop at most 1."
            )
        if not 0 <= self.named <= 1:
            raise FluxSaeError(f"named is {self.named}; it is a share of the attributes, from 0 to 1.")
        if not self.where or not self.without_rivals:
            raise FluxSaeError("where or without_rivals is empty; name at least one way of each.")
        if not self.together or min(self.together) < 1:
            raise FluxSaeError(f"together is {self.together}; give numbers of features, each at least 1.")
        for direction in DIRECTIONS:
            if not self.modes(direction):
                raise FluxSaeError(
                    f"No strength is left to {direction} with; give one of add, clamp, scale, project_out."
                )

    @property
    def n_candidates(self) -> int:
        """Matched features of a concept that any of the ways needs."""
        return max(self.n_features, self.n_rivals, *self.together)

    def modes(self, direction: Direction) -> list[tuple[str, float]]:
        """(mode, strength) pairs that are tried in one direction."""
        signed = [(name, strength) for name in ("add", "clamp") for strength in getattr(self, name)]
        if direction == "amplify":
            return [(name, strength) for name, strength in signed if strength > 0]
        down = [(name, strength) for name in ("scale", "project_out") for strength in getattr(self, name)]
        return down + [(name, strength) for name, strength in signed if strength < 0]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is measured, and how sure."""

    n_images: int = 256
    """Fresh images for the reconstruction; the concepts look at the run's own images, at most three times as many."""
    n_flow_images: int = 64
    """Images for the flow loss: drawn scenes for the miniature, else the model's own samples."""
    n_transfer_images: int = 8
    """Images for each size of the transfer table."""
    batch_size: int = 8
    """Images generated together."""
    draws: int = 500
    """Resamples of the images behind each interval."""
    seed: int = 0
    """Decides noise, halves, random directions and resamples."""
    steps: tuple[int, ...] = ()
    """Steps to look at; left out, those that each SAE was trained on (for the concepts: that S was scored at)."""
    laboratory: LaboratoryConfig = field(default_factory=LaboratoryConfig)
    """How much the steering laboratory tries."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Sizes (height, width) of the transfer table, pixels; left out, a smaller one, the trained one and a wider one."""

    def __post_init__(self) -> None:
        check_positive(self, "n_images", "n_flow_images", "n_transfer_images", "batch_size", "draws")
