"""What an SAE is worth on images it was not trained on, and the reference acts that come from them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
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


def measure_held_out(sae: SparseAutoencoder, images: Iterable[Float[Tensor, "tokens d_model"]]) -> dict[str, Any]:
    """FVU, L0, dead share and density histogram on the token rows of held-out images; sets `reference_acts` from them.

    A feature counts as dead here when it fires on none of the tokens given, whose number is stated.

    Raises:
        FluxSaeError: no images.
    """
    config, device = sae.config, sae.W_enc.device
    sums, firing = ReconstructionSums.empty(config.d_model), FiringSums.empty(config.n_features)
    positive, n_images = _PositiveActs(config.n_features), 0
    with torch.no_grad():
        for tokens in images:
            n_images += 1
            for rows in tokens.to(device).float().split(_ROWS_AT_ONCE):
                acts = sae.encode_sparse(rows)
                sums.update(rows, sae.decode_sparse(acts))
                firing.update(acts)
                positive.update(acts)
        if not n_images:
            raise FluxSaeError("There are no held-out images. Collect more images, or hold out every n-th of them.")
        sae.reference_acts.copy_(positive.quantile(_REFERENCE_QUANTILE))
    return {
        "fvu": sums.fvu(),
        "l0": firing.l0(),
        "dead_share": firing.dead_share(),
        "density_histogram": density_histogram(firing.density()),
        "n_images": n_images,
        "n_tokens": firing.n_tokens,
    }
