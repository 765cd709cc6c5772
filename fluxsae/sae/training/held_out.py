"""What an SAE is worth on images it was not trained on, and the reference acts that come from them."""

from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.metrics import FiringSums, ReconstructionSums, density_histogram
from fluxsae.sae.model import SparseAutoencoder

_REFERENCE_QUANTILE = 0.99
_MAX_PAIRS = 1 << 26
_ROWS_AT_ONCE = 4096


@dataclass
class _PositiveActs:
    """Positive acts of a sample of tokens, by feature, up to a fixed number in all."""

    n_features: int
    values: list[Tensor] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)
    n_pairs: int = 0

    def update(self, acts: SparseActs) -> None:
        if self.n_pairs >= _MAX_PAIRS:
            return
        self.values.append(acts.values.cpu())
        self.features.append(acts.features.int().cpu())
        self.n_pairs += len(acts.features)

    def quantile(self, share: float) -> Float[Tensor, " n_features"]:
        """The smallest value that at least `share` of the feature's positive acts do not exceed; 0 without any."""
        result = torch.zeros(self.n_features)
        if not self.n_pairs:
            return result
        values, features = torch.cat(self.values), torch.cat(self.features).long()
        values, order = values.sort()
        features, by_feature = features[order].sort(stable=True)
        values = values[by_feature]
        counts = torch.bincount(features, minlength=self.n_features)
        last = counts.cumsum(0) - counts + (share * counts).ceil().long() - 1
        fired = counts > 0
        result[fired] = values[last[fired]].float()
        return result


class HeldOut:
    """What an SAE is worth on images that are given one by one."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self._sums = ReconstructionSums.empty(sae.config.d_model)
        self._firing = FiringSums.empty(sae.config.n_features)
        self._positive, self._n_images = _PositiveActs(sae.config.n_features), 0

    @torch.no_grad()
    def add(self, tokens: Float[Tensor, "tokens d_model"], *, sigmas: Float[Tensor, " tokens"] | None = None) -> None:
        """Counts in an image's token rows; an SAE with a `sigma_table` needs their noise levels."""
        self._n_images += 1
        levels = repeat(None) if sigmas is None else sigmas.split(_ROWS_AT_ONCE)
        own = tokens.to(self.sae.W_enc.device).float()
        for rows, level in zip(own.split(_ROWS_AT_ONCE), levels, strict=False):
            acts = self.sae.encode_sparse(rows, sigma=level)
            self._sums.update(rows, self.sae.decode_sparse(acts))
            self._firing.update(acts)
            self._positive.update(acts)

    def measure(self) -> dict[str, Any]:
        """FVU, L0, dead share and density histogram; sets the SAE's `reference_acts`.

        A feature counts as dead here when it fires on none of the tokens given, whose number is stated.

        Raises:
            FluxSaeError: no images.
        """
        if not self._n_images:
            raise FluxSaeError("There are no held-out images. Collect more images, or hold out every n-th of them.")
        with torch.no_grad():
            self.sae.reference_acts.copy_(self._positive.quantile(_REFERENCE_QUANTILE))
        return {
            "fvu": self._sums.fvu(),
            "l0": self._firing.l0(),
            "dead_share": self._firing.dead_share(),
            "density_histogram": density_histogram(self._firing.density()),
            "n_images": self._n_images,
            "n_tokens": self._firing.n_tokens,
        }
