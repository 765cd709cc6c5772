"""What the steering laboratory reports: the defaults, what was tried, and every concept beside its controls."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from fluxsae.evaluation.intervals import LEVEL, Estimate
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.laboratory.config import Direction, Where
from fluxsae.laboratory.outcomes import Tally
from fluxsae.laboratory.truths import Concept
from fluxsae.steering.edits import SteeringEdit

TARGET_ATTRIBUTES: Final = ("colour", "texture", "background")
LEAST_SPECIFICITY: Final = 0.8
_PENALTY: Final = 2.0
"""Success that a setting must gain for each unit of specificity that it misses."""


@dataclass(frozen=True)
class EditSettings:
    """How a concept's features are turned in one direction, at one hook point."""

    hookpoint: HookPoint
    mode: str
    strength: float
    steps: tuple[int, int]
    where: Where = "everywhere"
    together: int = 1
    """How many of the concept's matched features are turned at once, the best first."""
    without_rivals: bool = False
    """Whether the matched features of the attribute's other values are taken away beside them (scale 0)."""

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
    features: tuple[int, ...]
    arms: dict[str, Tally]
    """feature (at the default settings), random direction, random feature, rivals alone (where they are taken away),
    difference of means, prompt."""
    curve: dict[float, Tally]
    """Strength -> the feature's tally: the dose-response curve."""

    @property
    def breaking_strength(self) -> float | None:
        """The weakest strength of the curve at which fewer than 80 % of the pictures keep all else; None if none."""
        falling = [s for s, tally in self.curve.items() if tally.specificity.value < LEAST_SPECIFICITY]
        return falling[0] if falling else None

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "concept": str(self.concept),
            "direction": self.direction,
            "features": list(self.features),
            "arms": {name: tally.to_dict() for name, tally in self.arms.items()},
            "curve": [{"strength": strength, **tally.to_dict()} for strength, tally in self.curve.items()],
            "breaking_strength": self.breaking_strength,
        }


@dataclass(frozen=True)
class TrialResult:
    """One candidate for the defaults, on the pictures for choosing.

    Means over the concepts that targets speak of and that a feature of any hook point matches, so that a hook point
    does not gain by knowing only easy ones: where it has no feature for a concept, nothing is changed there.
    """

    settings: EditSettings
    direction: Direction
    success: float
    specificity: float
    unchanged: float

    @property
    def merit(self) -> float:
        """Success, held down where specificity misses its target."""
        return self.success - _PENALTY * max(0.0, LEAST_SPECIFICITY - self.specificity)

    def to_dict(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return {**self.settings.to_dict(), "direction": self.direction, "success": self.success,
                "specificity": self.specificity, "unchanged": self.unchanged}  # fmt: skip


@dataclass(frozen=True)
class LaboratoryReport:
    """What the laboratory found."""

    defaults: dict[Direction, EditSettings]
    trials: tuple[TrialResult, ...]
    results: tuple[ConceptResult, ...]
    skipped: tuple[str, ...]
    """Concepts and directions that are not reported, each with the reason."""

    def group(self, direction: Direction, attributes: Sequence[str], arm: str) -> tuple[float, float, float] | None:
        """Mean success, specificity and share of unchanged attributes over the concepts of some attributes."""
        tallies = self._tallies(direction, attributes, arm)
        if not tallies:
            return None
        columns = [(t.success.value, t.specificity.value, t.unchanged.value) for t in tallies]
        success, specificity, unchanged = np.mean(columns, axis=0).tolist()
        return success, specificity, unchanged

    def _tallies(self, direction: Direction, attributes: Sequence[str], arm: str) -> list[Tally]:
        results = [r for r in self.results if r.direction == direction and r.concept.attribute in attributes]
        return [result.arms[arm] for result in results if arm in result.arms]

    def headline(self, direction: Direction) -> tuple[Estimate, Estimate] | None:
        """Success and specificity at the defaults over the attributes that targets speak of.

        The intervals are over pictures: Wilson's of each concept, added as independent.
        """
        tallies = self._tallies(direction, TARGET_ATTRIBUTES, "feature")
        if not tallies:
            return None
        n = [tally.n for tally in tallies]
        return _mean_share([t.success for t in tallies], n), _mean_share([t.specificity for t in tallies], n)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "defaults": {direction: chosen.to_dict() for direction, chosen in self.defaults.items()},
            "trials": [trial.to_dict() for trial in self.trials],
            "results": [result.to_dict() for result in self.results],
            "skipped": list(self.skipped),
        }


def _mean_share(parts: Sequence[Estimate], counts: Sequence[int]) -> Estimate:
    """The mean of shares of `counts` pictures; a concept at 0 or 1 is not certain, as resampling would have it."""
    from scipy.stats import binomtest

    value = float(np.mean([part.value for part in parts]))
    intervals = [
        binomtest(round(part.value * n), n).proportion_ci(LEVEL, method="wilson")
        for part, n in zip(parts, counts, strict=True)
    ]
    half = float(np.linalg.norm([(one.high - one.low) / 2 for one in intervals])) / len(parts)
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
