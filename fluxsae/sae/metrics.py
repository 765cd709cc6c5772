"""Pure tensor functions that say how good a sparse autoencoder is, and the sums they stream from."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.acts import SparseActs

DENSITY_EDGES: tuple[float, ...] = tuple(10.0**exponent for exponent in range(-7, 1))
"""Decades of activation density, from one token in ten million to every token: the histogram's bin edges."""


def to_float64(values: Tensor) -> Tensor:
    """The values in float64, where they are if the device has that type; Apple's MPS has not."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def fvu(x: Float[Tensor, "*batch d_model"], x_hat: Float[Tensor, "*batch d_model"]) -> float:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2, the mean taken per dimension.

    0 is a perfect reconstruction, 1 is as good as the mean. Over several batches use `ReconstructionSums`.

    Raises:
        FluxSaeError: the shapes differ, or `x` does not vary.
    """
    sums = ReconstructionSums.empty(x.shape[-1])
    sums.update(x, x_hat)
    return sums.fvu()


def l0(acts: Float[Tensor, "*batch n_features"]) -> float:
    """Mean number of features that fire on a token."""
    return float(to_float64((acts > 0).sum(-1)).mean())


def density(acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, " n_features"]:
    """P(acts > 0) of each feature, over all leading dimensions."""
    return to_float64((acts > 0).reshape(-1, acts.shape[-1])).mean(0).float()


def density_histogram(densities: Float[Tensor, " n_features"]) -> dict[str, list[float] | list[int] | int]:
    """How many features have a density in each decade: `edges`, one `counts` entry between two, `silent` for 0."""
    edges = torch.tensor(DENSITY_EDGES, dtype=torch.float64)
    firing = densities[densities > 0].double().cpu()
    bins = torch.bucketize(firing, edges[1:-1], right=True)
    counts = torch.bincount(bins, minlength=len(DENSITY_EDGES) - 1)
    return {
        "edges": list(DENSITY_EDGES),
        "counts": [int(count) for count in counts],
        "silent": int((densities <= 0).sum()),
    }


@dataclass
class ReconstructionSums:
    """Streaming sums behind FVU; two halves merged equal one pass (to 1e-12: everything is float64).

    The variance is summed around each part's own mean and merged by Chan's formula: a large mean costs no digits.
    """

    n_tokens: int
    squared_error: float
    mean: Float[Tensor, " d_model"]
    squared_deviation: float

    @classmethod
    def empty(cls, d_model: int) -> "ReconstructionSums":
        """Sums over no tokens."""
        return cls(0, 0.0, torch.zeros(d_model, dtype=torch.float64), 0.0)

    def update(self, x: Float[Tensor, "*batch d_model"], x_hat: Float[Tensor, "*batch d_model"]) -> None:
        """Add some tokens and their reconstructions."""
        if x.shape != x_hat.shape:
            raise FluxSaeError(f"x has shape {tuple(x.shape)} and x_hat {tuple(x_hat.shape)}; they must be equal.")
        tokens = to_float64(rearrange(x.detach(), "... d -> (...) d"))
        error = tokens - to_float64(rearrange(x_hat.detach(), "... d -> (...) d"))
        mean = tokens.mean(0)
        part = ReconstructionSums(
            len(tokens), float(error.square().sum()), mean.cpu(), float((tokens - mean).square().sum())
        )
        self.merge(part)

    def merge(self, other: "ReconstructionSums") -> None:
        """Add another part of the same set."""
        total = self.n_tokens + other.n_tokens
        if other.n_tokens == 0:
            return
        shift = other.mean - self.mean
        self.squared_deviation += other.squared_deviation
        self.squared_deviation += float(shift.square().sum()) * self.n_tokens * other.n_tokens / total
        self.mean = self.mean + shift * (other.n_tokens / total)
        self.squared_error += other.squared_error
        self.n_tokens = total

    def fvu(self) -> float:
        """The fraction of variance unexplained so far.

        Raises:
            FluxSaeError: no tokens, or tokens that do not vary.
        """
        if self.squared_deviation <= 0:
            raise FluxSaeError(f"FVU needs tokens that vary; the {self.n_tokens} given do not. Give more tokens.")
        return self.squared_error / self.squared_deviation


@dataclass
class FiringSums:
    """Streaming counts of which features fire; two halves merged equal one pass exactly."""

    n_tokens: int
    fired: Int[Tensor, " n_features"]

    @classmethod
    def empty(cls, n_features: int) -> "FiringSums":
        """Counts over no tokens."""
        return cls(0, torch.zeros(n_features, dtype=torch.int64))

    def update(self, acts: SparseActs) -> None:
        """Add the acts of some tokens."""
        self.fired += torch.bincount(acts.features, minlength=len(self.fired)).cpu()
        self.n_tokens += acts.n_tokens

    def merge(self, other: "FiringSums") -> None:
        """Add another part of the same set."""
        self.fired = self.fired + other.fired
        self.n_tokens += other.n_tokens

    def density(self) -> Float[Tensor, " n_features"]:
        """P(acts > 0) of each feature so far."""
        return (self.fired.double() / max(self.n_tokens, 1)).float()

    def l0(self) -> float:
        """Mean number of features that fire on a token so far."""
        return float(self.fired.sum()) / max(self.n_tokens, 1)

    def dead_share(self) -> float:
        """Share of features that fired on none of the tokens so far."""
        return float((self.fired == 0).double().mean())
