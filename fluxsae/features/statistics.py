"""Sums over all tokens of every feature: streaming, mergeable, and what can be read off them."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.files import load_tensors, read_header, save_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.sae.metrics import to_float64

HISTOGRAM_EDGES: tuple[float, ...] = tuple(2.0 ** (i / 4) for i in range(-32, 33))
"""Bin edges of activation histograms: 4 bins an octave from 2^-8 to 2^8, the outer bins open."""
PLACE_SIDE = 8
"""Rows and columns of the coarse grid on which it is summed up where a feature fires."""

_N_BINS = len(HISTOGRAM_EDGES) - 1


@dataclass(eq=False)
class FeatureStats:
    """Sums over all tokens of all images and captured steps; two stats of different tokens merge exactly."""

    steps: tuple[int, ...]
    step_tokens: Int[Tensor, " steps"]
    """Tokens seen at each step."""
    n_images: int
    counts: Int[Tensor, " features"]
    """Tokens with acts > 0."""
    image_counts: Int[Tensor, " features"]
    """Images with S > 0; known when an image is complete, so only in the stats of `ScoreAccumulator.stats`."""
    sums: Float[Tensor, " features"]
    square_sums: Float[Tensor, " features"]
    maxima: Float[Tensor, " features"]
    step_sums: Float[Tensor, "steps features"]
    histogram: Int[Tensor, "features bins"]
    """Tokens by activation, in the bins of `HISTOGRAM_EDGES`."""
    places: Float[Tensor, "features cells"]
    """Sum of acts by cell of the coarse grid of `PLACE_SIDE` x `PLACE_SIDE` (fewer on smaller grids)."""

    @classmethod
    def empty(cls, n_features: int, *, steps: Sequence[int], n_cells: int = PLACE_SIDE**2) -> "FeatureStats":
        """No tokens yet."""
        whole = functools.partial(torch.zeros, dtype=torch.int64)
        real = functools.partial(torch.zeros, dtype=torch.float64)
        return cls(
            steps=tuple(steps),
            step_tokens=whole(len(steps)),
            n_images=0,
            counts=whole(n_features),
            image_counts=whole(n_features),
            sums=real(n_features),
            square_sums=real(n_features),
            maxima=torch.zeros(n_features),
            step_sums=real(len(steps), n_features),
            histogram=whole(n_features, _N_BINS),
            places=real(n_features, n_cells),
        )

    @property
    def n_tokens(self) -> int:
        """Tokens seen, over all steps."""
        return int(self.step_tokens.sum())

    @property
    def density(self) -> Float[Tensor, " features"]:
        """Share of tokens with acts > 0."""
        return self.counts.double() / max(1, self.n_tokens)

    @property
    def mean_act(self) -> Float[Tensor, " features"]:
        """Mean of the acts > 0; 0 for a dead feature."""
        return self.sums / self.counts.clamp(min=1)

    @property
    def step_profile(self) -> Float[Tensor, "steps features"]:
        """Mean act per token at each step."""
        return self.step_sums / self.step_tokens.clamp(min=1)[:, None]

    def quantiles(self, levels: Sequence[float]) -> Float[Tensor, "features levels"]:
        """Quantiles of the acts > 0, log-linear inside a bin, never above the maximum; 0 for a dead feature."""
        edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64).log2()
        cumulative = self.histogram.cumsum(1).double()
        wanted = torch.tensor(levels, dtype=torch.float64)[None] * cumulative[:, -1:]
        bins = torch.searchsorted(cumulative, wanted.contiguous()).clamp(max=_N_BINS - 1)
        inside = self.histogram.gather(1, bins).double()
        before = cumulative.gather(1, bins) - inside
        share = ((wanted - before) / inside.clamp(min=1)).clamp(0, 1)
        values = 2.0 ** (edges[bins] + share * (edges[bins + 1] - edges[bins]))
        return values.minimum(self.maxima.double()[:, None]).where(self.counts[:, None] > 0, 0.0)

    @property
    def spatial_spread(self) -> Float[Tensor, " features"]:
        """Entropy of `places` as a share of the uniform one: 0 in one place (or dead), 1 everywhere alike."""
        shares = self.places / self.places.sum(1, keepdim=True).clamp(min=1e-300)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum(1)
        return entropy / float(np.log(max(2, shares.shape[1])))

    def add(self, step: int, features: Tensor, values: Tensor, cells: Tensor, *, n_tokens: int) -> None:
        """Adds the active (feature, value, cell) triples of `n_tokens` tokens at one step."""
        if step not in self.steps:
            raise FluxSaeError(f"Step {step} is not among the captured steps {[*self.steps]}.")
        position, n_features = self.steps.index(step), len(self.counts)
        exact = to_float64(values)
        zeros = torch.zeros(n_features, dtype=torch.float64, device=exact.device)
        sums = zeros.index_add_(0, features.to(exact.device), exact).cpu()
        self.step_tokens[position] += n_tokens
        self.step_sums[position] += sums
        self.sums += sums
        self.counts += torch.bincount(features, minlength=n_features).cpu()
        self.square_sums.index_add_(0, features.cpu(), exact.square().cpu())
        self.maxima.scatter_reduce_(0, features.cpu(), values.float().cpu(), "amax")
        edges = torch.tensor(HISTOGRAM_EDGES[1:-1], device=values.device)
        bins = features * _N_BINS + torch.bucketize(values.float(), edges, right=True)
        self.histogram += torch.bincount(bins, minlength=self.histogram.numel()).cpu().view_as(self.histogram)
        self.places.view(-1).index_add_(0, (features * self.places.shape[1] + cells).cpu(), exact.cpu())

    def merge(self, other: "FeatureStats") -> "FeatureStats":
        """The stats of both sets of tokens.

        Raises:
            FluxSaeError: of other features or steps.
        """
        if self.steps != other.steps or self.places.shape != other.places.shape:
            raise FluxSaeError(
                f"Cannot merge stats of {len(self.counts)} features at steps {[*self.steps]} with stats of "
                f"{len(other.counts)} features at steps {[*other.steps]}."
            )
        merged = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("steps", "maxima")
        }
        return FeatureStats(steps=self.steps, maxima=self.maxima.maximum(other.maxima), **merged)

    def save(self, path: str | Path) -> None:
        """Writes `stats.safetensors`, whole or absent."""
        save_tensors(path, self.tensors(), metadata=self.metadata())

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStats":
        """The stats of a file.

        Raises:
            FluxSaeError: missing, cut off, or not a stats file.
        """
        metadata = read_header(path).metadata
        return cls.from_tensors(load_tensors(path), metadata, name=str(path))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict[str, str], *, name: str) -> "FeatureStats":
        """The stats whose tensors and metadata `save` wrote into the file called `name`."""
        expected = {f.name for f in fields(cls)} - {"steps", "n_images"}
        if not expected <= set(tensors) or not {"steps", "n_images"} <= set(metadata):
            raise FluxSaeError(f"{name} lacks {sorted(expected - set(tensors))}. Score the images again.")
        steps = tuple(int(step) for step in metadata["steps"].split(","))
        return cls(steps=steps, n_images=int(metadata["n_images"]), **{name: tensors[name] for name in expected})

    def metadata(self) -> dict[str, str]:
        """What is not a tensor, as text."""
        return {"steps": ",".join(map(str, self.steps)), "n_images": str(self.n_images)}

    def tensors(self) -> dict[str, Tensor]:
        """The sums by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("steps", "n_images")}


def coarse_cells(grid: TokenGrid) -> Int[Tensor, " tokens"]:
    """The cell of the coarse grid in which each token lies."""
    rows, cols = min(grid.rows, PLACE_SIDE), min(grid.cols, PLACE_SIDE)
    row_cells = torch.arange(grid.rows) * rows // grid.rows
    col_cells = torch.arange(grid.cols) * cols // grid.cols
    return (row_cells[:, None] * cols + col_cells[None]).reshape(-1)
