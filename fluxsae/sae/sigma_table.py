"""Tables over noise levels: where a noise level lies in one, and the row that belongs to it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class TablePlaces(NamedTuple):
    """Noise levels as places in a table: between row `low` and row `high`, which counts `weight`."""

    low: Int[Tensor, "*batch"]
    high: Int[Tensor, "*batch"]
    weight: Float[Tensor, "*batch"]

    def interpolate(self, table: Float[Tensor, "n_sigmas d"]) -> Float[Tensor, "*batch d"]:
        """The table's row at each noise level."""
        return torch.lerp(table[self.low], table[self.high], self.weight[..., None].to(table))

    def spread(self, rows: Float[Tensor, "batch d"], n_sigmas: int) -> Float[Tensor, "n_sigmas d"]:
        """The transpose of `interpolate`: what a gradient to the rows is to the table."""
        weight = self.weight[..., None].to(rows)
        table = rows.new_zeros(n_sigmas, rows.shape[1])
        return table.index_add_(0, self.low, rows * (1 - weight)).index_add_(0, self.high, rows * weight)


def table_places(table: Sequence[float], sigma: Tensor) -> TablePlaces:
    """Where noise levels lie in a table of rising ones; those beyond its ends are put at the ends."""
    levels, sigma = torch.tensor(table, device=sigma.device), sigma.float()
    high = torch.searchsorted(levels, sigma.contiguous()).clamp(max=len(levels) - 1)
    low = (high - 1).clamp(min=0)
    gap = (levels[high] - levels[low]).clamp(min=1e-12)
    return TablePlaces(low, high, ((sigma - levels[low]) / gap).clamp(0, 1))
