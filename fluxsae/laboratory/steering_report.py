"""What the steering laboratory reports: what was tried, and every concept beside its controls and rivals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from fluxsae.evaluation.intervals import Estimate, interval, two_level_draws
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.laboratory.config import TARGET_ATTRIBUTES, Direction, Method, Where
from fluxsae.laboratory.outcomes import Tally
from fluxsae.laboratory.swaps import SwapResult
from fluxsae.laboratory.truths import Concept
from fluxsae.steering.edits import SteeringEdit

LEAST_KEPT: Final = 0.8
_DRAWS: Final = 2000


@dataclass(frozen=True)
class EditSettings:
    """How a concept's features are turned in one direction, at one hook point."""

    hookpoint: HookPoint
    mode: str
    """A mode of an edit; profile: each feature is set to its mean act where the concept is shown; swap: another value
    of the attribute is turned up, the one that comes best at strength 1, the second best at 2."""
    strength: float
    steps: tuple[int, int]
    where: Where = "everywhere"
    together: int = 1
    """How many of the concept's features are turned at once, the best first."""
    without_rivals: bool = False
    """Whether the matched features of the attribute's other values are taken away beside them (scale 0)."""
    method: Method = "features"

    def edits(
        self, features: Sequence[int], rivals: Sequence[int], *, strength: float | None = None
    ) -> tuple[SteeringEdit, ...]:
        """The edits of features, at these settings or at another strength; a picture's own region is added later."""
        chosen = self.strength if strength is None else strength
        turned = [SteeringEdit(self.hookpoint, f, self.mode, chosen, steps=self.steps) for f in features]
        taken = rivals if self.without_rivals else ()
        return (*turned, *(SteeringEdit(self.hookpoint, f, "scale", 0.0, steps=self.steps) for f in taken))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "hookpoint": str(self.hookpoint), "steps": list(self.steps)}


@dataclass(frozen=True)
class ConceptResult:
    """One concept in one direction."""

    concept: Concept
    direction: Direction
    settings: dict[Method, EditSettings]
    """Chosen for each method on other pictures; a method without any could not be tried."""
    features: tuple[int, ...]
    arms: dict[str, Tally]
    """The methods, random direction, random feature, rivals alone (where they are taken away), another prompt."""
    curve: dict[float, Tally]
    """Strength -> the features' tally: the dose-response curve."""

    @property
    def breaking_strength(self) -> float | None:
        """The weakest strength of the curve at which fewer than 80 % of the pictures keep all else; None if none."""
        falling = [strength for strength, tally in self.curve.items() if tally.keeps_others < LEAST_KEPT]
        return falling[0] if falling else None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "concept": str(self.concept),
            "direction": self.direction,
            "settings": {method: chosen.to_dict() for method, chosen in self.settings.items()},
            "features": list(self.features),
            "arms": {name: tally.to_dict() for name, tally in self.arms.items()},
            "curve": [{"strength": strength, **tally.to_dict()} for strength, tally in self.curve.items()],
            "breaking_strength": self.breaking_strength,
        }


@dataclass(frozen=True)
class TrialResult:
    """One candidate on the pictures for choosing: means over the concepts.

    A hook point does not gain by knowing only easy concepts: where it has no feature for one, that one fails.
    """

    settings: EditSettings
    direction: Direction
    success: float
    specificity: float
    both: float

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {**self.settings.to_dict(), "direction": self.direction, "success": self.success,
                "specificity": self.specificity, "both": self.both}  # fmt: skip


@dataclass(frozen=True)
class LaboratoryReport:
    """What the laboratory found."""

    trials: tuple[TrialResult, ...]
    results: tuple[ConceptResult, ...]
    swaps: tuple[SwapResult, ...] = ()

    def rate(
        self, direction: Direction, arm: str, rate: str, *, attributes: Sequence[str] = TARGET_ATTRIBUTES
    ) -> Estimate | None:
        """A rate of one arm over the concepts of some attributes, its interval over concepts and pictures."""
        results = [r for r in self.results if r.direction == direction and r.concept.attribute in attributes]
        return pooled_rate([result.arms[arm] for result in results if arm in result.arms], rate)

    def swap_rate(self, attribute: str, arm: str, rate: str) -> Estimate | None:
        """A rate of swaps over the new values of an attribute, its interval over values and pictures."""
        results = [swap for swap in self.swaps if swap.concept.attribute == attribute]
        return pooled_rate([result.arms[arm] for result in results if arm in result.arms], rate)

    def arms(self, direction: Direction) -> list[str]:
        """All arms of a direction, in the order of their first report."""
        return list(dict.fromkeys(arm for r in self.results if r.direction == direction for arm in r.arms))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "trials": [trial.to_dict() for trial in self.trials],
            "results": [result.to_dict() for result in self.results],
            "swaps": [swap.to_dict() for swap in self.swaps],
        }


def pooled_rate(tallies: Sequence[Tally], rate: str) -> Estimate | None:
    """The mean of the concepts' rates; the interval resamples concepts, and the pictures of each."""
    groups = [tally.values(rate) for tally in tallies if tally.n]
    return interval(two_level_draws(groups, draws=_DRAWS, seed=0)) if groups else None


def mean_rate(tallies: Sequence[Tally], rate: str) -> float:
    """The mean of the concepts' rates."""
    return float(np.mean([tally.values(rate).mean() for tally in tallies if tally.n]))
