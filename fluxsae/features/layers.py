"""Two layers compared by what their features do: columns of S matched one to one, whatever the size of the layers."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError, maker

COUNTERPART = 0.5
"""Correlation of two columns of S from which two features count as one that lives on."""
CANDIDATES = 64
"""Best counterparts of each feature among which pairs are sought."""
_ROWS, _COLUMNS = 4096, 1024
"""Features of either layer whose columns are in memory at a time."""


@dataclass(frozen=True)
class LayerComparison:
    """Two dictionaries over the same images, matched one to one by how alike their columns of S are."""

    pairs: Int[np.ndarray, "pairs 2"]
    """(feature of the first, feature of the second), the best match first."""
    correlations: Float[np.ndarray, " pairs"]
    """Pearson correlation of the two columns of S."""
    only_first: Int[np.ndarray, " only_first"]
    """Alive features of the first without a counterpart, i.e. no column of the second correlates above the bound."""
    only_second: Int[np.ndarray, " only_second"]
    best_first: Float[np.ndarray, " first"]
    """For each feature of the first the highest correlation with any of the second; NaN where it is not alive."""
    best_second: Float[np.ndarray, " second"]
    null_correlation: float
    """Mean matched correlation when the images of one side are shuffled: what a match is worth by chance."""
    counterpart: float = COUNTERPART
    """The bound: a correlation from which two features count as each other's counterpart."""

    def tensors(self) -> dict[str, Tensor]:
        """The comparison as the tensors of a file."""
        values = {field.name: np.atleast_1d(getattr(self, field.name)) for field in fields(self)}
        return {
            name: torch.from_numpy(value.astype(np.int32 if value.dtype.kind == "i" else np.float32))
            for name, value in values.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The comparison from the tensors of a file.

        Raises:
            FluxSaeError: tensors are missing.
        """
        missing = [field.name for field in fields(cls) if field.name not in tensors and field.default is MISSING]
        if missing:
            raise FluxSaeError(
                f"The layer comparison lacks {', '.join(missing)}. Make it again: {maker('compare_layers')}."
            )
        values: dict[str, Any] = {
            field.name: tensors[field.name].numpy() for field in fields(cls) if field.name in tensors
        }
        for name in {"null_correlation", "counterpart"} & set(values):
            values[name] = float(values[name][0])
        return cls(**values)


def compare_layers(
    first: Float[Tensor, "images first"],
    second: Float[Tensor, "others second"],
    *,
    counterpart: float = COUNTERPART,
    min_images: int = 5,
    seed: int = 0,
) -> LayerComparison:
    """Features of two SAEs matched by their columns of S over the same images, never by equal index.

    The pairs maximise the summed correlation (assignment problem) among those that are one of either feature's
    `CANDIDATES` best and correlate above 0. A feature takes part when it fires on at least `min_images` images; one
    without any correlation above `counterpart` on the other side is what its layer alone has. Chance is measured on
    at most 4,096 features of the first layer. Columns are read and correlated in blocks.

    Raises:
        FluxSaeError: the two matrices are of different images, or nothing fires often enough.
    """
    if first.shape[0] != second.shape[0]:
        raise FluxSaeError(
            f"scores of {first.shape[0]} and of {second.shape[0]} images were given; "
            "layers are compared on the same images"
        )
    alive_first, alive_second = _alive(first, min_images), _alive(second, min_images)
    if not len(alive_first) or not len(alive_second):
        raise FluxSaeError(
            f"no feature fires on {min_images} images on both sides; score more images or lower min_images"
        )
    left, right = _Columns(first, alive_first), _Columns(second, alive_second)
    pairs, values, best_first, best_second = _match(left, right)
    _, chance, _, _ = _match(left.shuffled(seed), right)
    first_ids, second_ids = alive_first.numpy(), alive_second.numpy()
    return LayerComparison(
        pairs=np.stack([first_ids[pairs[:, 0]], second_ids[pairs[:, 1]]], axis=1),
        correlations=values,
        only_first=first_ids[best_first < counterpart],
        only_second=second_ids[best_second < counterpart],
        best_first=_spread(best_first, first_ids, first.shape[1]),
        best_second=_spread(best_second, second_ids, second.shape[1]),
        null_correlation=float(chance.mean()) if len(chance) else 0.0,
        counterpart=counterpart,
    )


def _alive(scores: Tensor, min_images: int) -> Tensor:
    counts = [(block > 0).sum(dim=0) for block in scores.split(_COLUMNS, dim=1)]
    return (torch.cat(counts) >= min_images).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class _Columns:
    """The chosen columns of S, standardised as they are read."""

    scores: Tensor
    chosen: Tensor
    order: Tensor | None = None
    """The images in another order, where the columns are to say nothing."""

    def shuffled(self, seed: int) -> "_Columns":
        """The images shuffled, and of many features a sample."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(self.scores.shape[0], generator=generator)
        sample = torch.randperm(len(self.chosen), generator=generator)[:_ROWS].sort().values
        return _Columns(self.scores, self.chosen[sample], order)

    def blocks(self, size: int) -> Iterator[tuple[slice, Float[Tensor, "images block"]]]:
        """Where a block of columns stands, and the block."""
        start = 0
        for part in self.chosen.split(size):
            block = torch.cat([_standardised(self.scores[:, piece]) for piece in part.split(_COLUMNS)], dim=1)
            yield slice(start, start + len(part)), block if self.order is None else block[self.order]
            start += len(part)


def _standardised(columns: Tensor) -> Tensor:
    exact = columns.double()
    return normalize(exact - exact.mean(dim=0), dim=0).float()


def _match(left: _Columns, right: _Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Matched (left, right) pairs and their correlations, the best first; and the best correlation of each column."""
    for_left, for_right = _Best.empty(len(left.chosen)), _Best.empty(len(right.chosen))
    for rows, left_block in left.blocks(_ROWS):
        for columns, right_block in right.blocks(_COLUMNS):
            correlations = left_block.T @ right_block
            for_left.update(rows, correlations, first_id=columns.start)
            for_right.update(columns, correlations.T, first_id=rows.start)
    pairs, values = _assign(for_left, for_right)
    return pairs, values, for_left.values[:, 0].numpy(), for_right.values[:, 0].numpy()


@dataclass(frozen=True, eq=False)
class _Best:
    """The highest correlations of each column so far, best first, and with whom; -inf and -1 where there are fewer."""

    values: Float[Tensor, "features candidates"]
    ids: Int[Tensor, "features candidates"]

    @classmethod
    def empty(cls, n_features: int) -> "_Best":
        return cls(torch.full((n_features, CANDIDATES), -torch.inf), torch.full((n_features, CANDIDATES), -1))

    def update(self, rows: slice, correlations: Float[Tensor, "rows others"], *, first_id: int) -> None:
        """Takes the correlations of some columns with the others from `first_id` on."""
        values = torch.cat([self.values[rows], correlations], dim=1)
        best = values.topk(CANDIDATES, dim=1)
        kept = self.ids[rows].gather(1, best.indices.clamp(max=CANDIDATES - 1))
        self.ids[rows] = torch.where(best.indices < CANDIDATES, kept, best.indices - CANDIDATES + first_id)
        self.values[rows] = best.values

    def edges(self) -> tuple[Tensor, Tensor, Tensor]:
        """(column, other, correlation) of every candidate that correlates above 0."""
        rows, places = (self.values > 0).nonzero(as_tuple=True)
        return rows, self.ids[rows, places], self.values[rows, places]


def _assign(for_left: _Best, for_right: _Best) -> tuple[np.ndarray, np.ndarray]:
    """The assignment of the highest sum among the candidates of either side, the best pair first."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n_left, n_right = len(for_left.values), len(for_right.values)
    left, right, values = for_left.edges()
    others, own, more = for_right.edges()
    keys = torch.cat([left * n_right + right, own * n_right + others])
    keys, place = keys.unique(return_inverse=True)
    found = torch.zeros(len(keys)).scatter_(0, place, torch.cat([values, more])).double()
    # Each left feature may also take an empty place of its own, which is worth nothing. Weights must not be 0.
    empty = torch.arange(n_left)
    rows, columns = torch.cat([keys // n_right, empty]), torch.cat([keys % n_right, n_right + empty])
    costs = torch.cat([2.0 - found, torch.full((n_left,), 2.0, dtype=torch.float64)])
    graph = csr_array((costs.numpy(), (rows.numpy(), columns.numpy())), shape=(n_left, n_right + n_left))
    rows, columns = min_weight_full_bipartite_matching(graph)
    paired = columns < n_right
    pairs = np.stack([rows[paired], columns[paired]], axis=1)
    matched = found[torch.searchsorted(keys, torch.from_numpy(pairs[:, 0] * n_right + pairs[:, 1]).long())].float()
    order = np.argsort(-matched.numpy(), kind="stable")
    return pairs[order], matched.numpy()[order]


def _spread(values: np.ndarray, places: np.ndarray, size: int) -> Float[np.ndarray, " size"]:
    spread = np.full(size, np.nan, dtype=np.float32)
    spread[places] = values
    return spread
