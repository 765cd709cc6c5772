"""What the tokens of each true concept look like, and the linear edits that follow from it in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.laboratory.probes import RIDGE
from fluxsae.laboratory.truths import CONCEPTS, COVERED, Concept
from fluxsae.miniature.scenes import ATTRIBUTES
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder

LEAST_SHARE = 1e-6
"""Singular values below this share of the largest count as zero."""


def others_of(concept: Concept) -> list[int]:
    """Rows of `CONCEPTS` with the attribute's other values."""
    return [row for row, other in enumerate(CONCEPTS) if other.attribute == concept.attribute and other != concept]


@dataclass
class ConceptMoments:
    """Sums over the tokens that show each concept: normalised activations, their products, and acts."""

    sae: SparseAutoencoder
    steps: tuple[int, ...]
    """The steps at which tokens are looked at."""
    sigmas: tuple[float, ...]
    """Their noise levels."""
    count: Float[Tensor, " concepts"] = field(init=False)
    total: Float[Tensor, "concepts d"] = field(init=False)
    acts: Float[Tensor, "steps concepts features"] = field(init=False)
    product: dict[str, Float[Tensor, "d d"]] = field(init=False)
    """Of the tokens that show any value of an attribute."""

    def __post_init__(self) -> None:
        d, n_features = self.sae.config.d_model, self.sae.config.n_features
        self.count = torch.zeros(len(CONCEPTS), dtype=torch.float64)
        self.total = torch.zeros(len(CONCEPTS), d, dtype=torch.float64)
        self.acts = torch.zeros(len(self.steps), len(CONCEPTS), n_features, dtype=torch.float64)
        self.product = {name: torch.zeros(d, d, dtype=torch.float64) for name in ATTRIBUTES}

    @torch.no_grad()
    def update(self, x: Float[Tensor, "steps tokens d"], covers: Float[np.ndarray, "concepts tokens"]) -> None:
        """Adds an image whose concepts cover its tokens as given."""
        normalised = self.sae.normalise(x).double().cpu()
        member = torch.from_numpy((covers > COVERED).astype(np.float64))
        self.count += member.sum(1) * len(x)
        self.total += member @ normalised.sum(0)
        sigmas = torch.tensor([self.sae.nearest_sigma(sigma) for sigma in self.sigmas])
        self.acts += member @ self.sae.encode(x, sigma=sigmas[:, None]).double().cpu()
        for name in self.product:
            rows = [row for row, concept in enumerate(CONCEPTS) if concept.attribute == name]
            shown = normalised[:, member[rows].amax(0) > 0]
            self.product[name] += torch.einsum("std,ste->de", shown, shown)

    def is_known(self, concept: Concept) -> bool:
        """Whether tokens of the concept and of other values of its attribute were seen."""
        return bool(self.count[CONCEPTS.index(concept)] > 0) and bool(self.count[others_of(concept)].sum() > 0)

    def difference(self, concept: Concept) -> Float[Tensor, " d"]:
        """Mean of the concept's tokens minus that of the attribute's other values, normalised."""
        return self._mean(self.total, [CONCEPTS.index(concept)]) - self._mean(self.total, others_of(concept))

    def levels(self, concept: Concept) -> tuple[Float[Tensor, "steps features"], Float[Tensor, "steps features"]]:
        """Mean acts at each step on the concept's tokens, and on those of the attribute's other values."""
        return self._mean_acts([CONCEPTS.index(concept)]), self._mean_acts(others_of(concept))

    def windows(self, start: int, stop: int) -> list[tuple[int, int]]:
        """For each of the steps looked at, the steps that are nearest to it, from `start` up to `stop`."""
        ends = [(low + high) // 2 for low, high in pairwise(self.steps)]
        bounds = [max(start, min(stop, bound)) for bound in (start, *ends, stop)]
        return list(pairwise(bounds))

    def _mean_acts(self, rows: Sequence[int]) -> Float[Tensor, "steps features"]:
        return self.acts[:, rows].sum(1) / (self.count[rows].sum() / len(self.steps))

    def telling_features(self, concept: Concept, *, limit: int) -> tuple[int, ...]:
        """Features whose mean acts differ most between the concept and the attribute's other values, largest first."""
        own, others = self.levels(concept)
        gap = (own - others).mean(0).abs() * (self.sae.reference_acts.cpu() > 0)
        order = gap.argsort(descending=True, stable=True)[:limit]
        return tuple(int(feature) for feature in order if gap[feature] > 0)

    def difference_sae(self, concept: Concept) -> SparseAutoencoder:
        """The difference as a dictionary of one feature, whose reference activation is its length."""
        step = self.difference(concept)
        sae = _empty_sae(self.sae, n_features=1)
        sae.W_dec.data[0] = normalize(step.float(), dim=0)
        sae.reference_acts[0] = step.norm().float()
        of_attribute = [CONCEPTS.index(concept), *others_of(concept)]
        sae.input_mean += self._mean(self.total, of_attribute).float() * sae.input_scale
        return sae

    def replacement_sae(self, concept: Concept, *, wanted: bool) -> SparseAutoencoder:
        """Moves tokens to one mean inside the span of the attribute's mean differences: the rivals go as well.

        x' = x - P (x - target), P the orthogonal projection on the span of mean(value) - mean(all values). Where the
        concept is wanted, target is its mean; else the span is that of its difference and target the others' mean.
        """
        spread, target = self._spread(concept, wanted=wanted)
        basis = _span(spread)
        return affine_sae(basis, basis, target, like=self.sae)

    def leace_sae(self, concept: Concept, *, wanted: bool) -> SparseAutoencoder:
        """The same with the oblique projection of LEACE, the smallest change after which no linear probe tells.

        x' = x - W^-1 Q Q^T W (x - target), W = covariance^(-1/2), Q a basis of W times the mean differences
        (Belrose et al. 2023, arXiv 2306.03819, theorem 4.3; there the target is the mean of all values).
        """
        spread, target = self._spread(concept, wanted=wanted)
        rows = [row for row, other in enumerate(CONCEPTS) if other.attribute == concept.attribute]
        count = self.count[rows].sum()
        mean = self.total[rows].sum(0) / count
        covariance = self.product[concept.attribute] / count - torch.outer(mean, mean)
        covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(covariance)
        whiten = vectors * values.rsqrt() @ vectors.T
        unwhiten = vectors * values.sqrt() @ vectors.T
        basis = _span(spread @ whiten)
        return affine_sae(basis @ unwhiten, basis @ whiten, target, like=self.sae)

    def _spread(self, concept: Concept, *, wanted: bool) -> tuple[Float[Tensor, "r d"], Float[Tensor, " d"]]:
        """The mean differences that an edit acts on, and the mean that it moves tokens to."""
        if not wanted:
            return self.difference(concept)[None], self._mean(self.total, others_of(concept))
        rows = [r for r, other in enumerate(CONCEPTS) if other.attribute == concept.attribute and self.count[r] > 0]
        means = self.total[rows] / self.count[rows][:, None]
        return means - means.mean(0), self._mean(self.total, [CONCEPTS.index(concept)])

    def _mean(self, totals: Float[Tensor, "concepts n"], rows: Sequence[int]) -> Float[Tensor, " n"]:
        return totals[rows].sum(0) / self.count[rows].sum()


def affine_sae(
    writes: Float[Tensor, "r d"], reads: Float[Tensor, "r d"], target: Float[Tensor, " d"], *, like: SparseAutoencoder
) -> SparseAutoencoder:
    """A ReLU dictionary of 2 r features, of which x' = x - sum_k writes_k (reads_k . (x - target)) is scale 0.

    All in normalised units; features k and r + k write the two signs of the same direction.
    """
    sae = _empty_sae(like, n_features=2 * len(writes))
    lengths = writes.norm(dim=1, keepdim=True)
    encoder = lengths * reads
    sae.W_dec.data = torch.cat([writes / lengths, -writes / lengths]).float()
    sae.W_enc.data = torch.cat([encoder, -encoder]).float()
    sae.b_enc.data = -(sae.W_enc.double() @ target).float()
    return sae


def _empty_sae(like: SparseAutoencoder, *, n_features: int) -> SparseAutoencoder:
    config = SaeConfig(architecture="l1", d_model=like.config.d_model, n_features=n_features)
    sae = SparseAutoencoder(config, seed=None).requires_grad_(False)
    sae.input_mean.copy_(like.input_mean.cpu())
    sae.input_scale.copy_(like.input_scale.cpu())
    return sae


def _span(rows: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    """An orthonormal basis of the rows' span."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    kept: Float[Tensor, "r d"] = vectors[values > LEAST_SHARE * values[0]]
    return kept
