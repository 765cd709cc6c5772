"""What the concept evaluation reports: every true concept with each method's best candidate."""

from dataclasses import dataclass, field
from typing import Any

from fluxsae.evaluation.intervals import Estimate
from fluxsae.laboratory.truths import Concept

FEATURE, PROBE = "SAE feature", "linear probe"
BASELINES = ("raw channel", "PCA component", "random direction")
METHODS = (FEATURE, *BASELINES, PROBE)
"""What a report compares, in the order of its columns; the linear probe is the ceiling."""


@dataclass(frozen=True)
class MethodScore:
    """How well one method's best candidate tells a concept."""

    candidate: int
    """Feature, channel (plus d_model for its negative), component or direction, chosen on the first half."""
    auc: Estimate
    """P(an image with the concept scores higher than one without), on the second half."""
    iou: Estimate | None = None
    """Mean IoU of its token map with the true mask; None where the method has no map."""
    pointing: Estimate | None = None
    """Share of images whose highest token lies on the concept."""

    def to_dict(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        values = {name: getattr(self, name) for name in ("auc", "iou", "pointing")}
        return {"candidate": self.candidate, **{k: v.to_dict() if v else None for k, v in values.items()}}


@dataclass(frozen=True)
class ConceptScore:
    """One true concept and the methods' scores at it."""

    concept: Concept
    n_images: int
    """Images with the concept in the half that is reported."""
    methods: dict[str, MethodScore]
    label: str | None
    """Label of the best feature."""

    def to_dict(self) -> dict[str, Any]:
        """The score as plain JSON values."""
        methods = {name: score.to_dict() for name, score in self.methods.items()}
        return {**vars(self.concept), "n_images": self.n_images, "methods": methods, "label": self.label}


@dataclass(frozen=True)
class ConceptReport:
    """All concepts at one hook point, and what follows from them."""

    hookpoint: str
    steps: tuple[int, ...]
    n_images: int
    """Images whose scene was read, both halves."""
    n_unread: int
    """Images left out because the reader was not sure of them."""
    n_left_out: int
    """Images left out because their activations hold NaN or infinite numbers."""
    concepts: tuple[ConceptScore, ...]
    skipped: tuple[Concept, ...]
    """Concepts with too few images."""
    ratio: dict[str, Estimate]
    """Method -> (AUC - 0.5) over the linear probe's, averaged over things, colours, textures and backgrounds."""
    attribute_ratio: dict[str, dict[str, float]]
    """Method -> attribute -> the same ratio of one attribute."""
    probe_kind: dict[str, str]
    """Attribute -> which probe was the stronger one there and serves as the ceiling."""
    matched_share: dict[str, float]
    """Method -> share of candidates (of features: alive ones) that match a concept on both halves."""
    n_alive: int
    n_matched: int
    label_accuracy: Estimate | None
    """Share of matched features whose label names their concept; None where the run has no labels."""
    step_auc: dict[int, float]
    """Mean AUC of the best features over the headline attributes when only one step is looked at."""
    matches: dict[int, Concept] = field(default_factory=dict)
    """Matched feature -> its concept, the surest first."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            **vars(self),
            "steps": list(self.steps),
            "concepts": [score.to_dict() for score in self.concepts],
            "skipped": [str(concept) for concept in self.skipped],
            "ratio": {name: value.to_dict() for name, value in self.ratio.items()},
            "attribute_ratio": [{"method": name, **ratios} for name, ratios in self.attribute_ratio.items()],
            "label_accuracy": self.label_accuracy.to_dict() if self.label_accuracy else None,
            "step_auc": [{"step": step, "auc": auc} for step, auc in self.step_auc.items()],
            "matches": {str(feature): str(concept) for feature, concept in self.matches.items()},
        }
