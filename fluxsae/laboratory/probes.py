"""Linear probes on the activations: the ceiling that single features are measured against."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.laboratory.readouts import LinearReadout
from fluxsae.laboratory.truths import CONCEPTS, COVERED
from fluxsae.sae.model import SparseAutoencoder

RIDGE = 1e-3
"""Added to the covariance, as a share of its mean variance."""
STRENGTHS = (0.003, 0.03, 0.3)
"""Inverse penalties that the pooled probe chooses from, by cross-validation."""
N_FOLDS = 3
"""Parts of the first half for cross-validation."""


@dataclass
class TokenMoments:
    """Sums over tokens from which a linear discriminant of every concept follows (Fisher 1936).

    direction = (covariance + ridge)^-1 (mean of the concept's tokens - mean of the other tokens)
    """

    sae: SparseAutoencoder
    count: float = 0.0
    total: Float[Tensor, " d"] = field(init=False)
    product: Float[Tensor, "d d"] = field(init=False)
    concept_count: Float[Tensor, " concepts"] = field(init=False)
    concept_total: Float[Tensor, "concepts d"] = field(init=False)

    def __post_init__(self) -> None:
        d = self.sae.config.d_model
        self.total, self.product = torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
        self.concept_count = torch.zeros(len(CONCEPTS), dtype=torch.float64)
        self.concept_total = torch.zeros(len(CONCEPTS), d, dtype=torch.float64)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "steps tokens d"], covers: Float[np.ndarray, "concepts tokens"]) -> None:
        """Adds an image whose concepts cover its tokens as given."""
        normalised = self.sae.normalise(x).double().cpu()
        member = torch.from_numpy((covers > COVERED).astype(np.float64))
        by_token = normalised.sum(0)
        self.count += normalised.shape[0] * normalised.shape[1]
        self.total += by_token.sum(0)
        self.product += torch.einsum("std,ste->de", normalised, normalised)
        self.concept_count += member.sum(1) * len(x)
        self.concept_total += member @ by_token

    @classmethod
    def merged(cls, parts: Sequence["TokenMoments"]) -> "TokenMoments":
        """The sums over the tokens of all parts, which are of one SAE."""
        together = cls(parts[0].sae)
        for part in parts:
            together.count += part.count
            for name in ("total", "product", "concept_count", "concept_total"):
                getattr(together, name).add_(getattr(part, name))
        return together

    def readout(self) -> LinearReadout:
        """One direction a concept, in the order of `CONCEPTS`."""
        mean = self.total / self.count
        covariance = self.product / self.count - torch.outer(mean, mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        inside = self.concept_total / self.concept_count.clamp(min=1)[:, None]
        rest = (self.count - self.concept_count).clamp(min=1)[:, None]
        outside = (self.total - self.concept_total) / rest
        directions = torch.linalg.solve(covariance, (inside - outside).T).T
        return LinearReadout("token probe", normalize(directions, dim=1).float(), sae=self.sae)


class PooledProbe(NamedTuple):
    """What a probe on pooled channels gives."""

    scores: Float[np.ndarray, " reported"]
    """Its scores of images that it was not fitted on."""
    validated_auc: float
    """Its area under the ROC curve by cross-validation within the images that it was fitted on."""


def pooled_probe(
    fit_on: Float[np.ndarray, "fitted channels"],
    truth: Int[np.ndarray, " fitted"],
    report_on: Float[np.ndarray, "reported channels"],
) -> PooledProbe:
    """A logistic regression on pooled channels, its penalty chosen by cross-validation within `fit_on`."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, tol=1e-3))
    folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
    search = GridSearchCV(probe, {"logisticregression__C": list(STRENGTHS)}, cv=folds, scoring="roc_auc")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(fit_on, truth)
    return PooledProbe(search.decision_function(report_on), float(search.best_score_))
