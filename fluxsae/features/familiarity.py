"""Whether a picture is like what a run's SAE was made for: its FVU beside that of the run's own images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.sae.acts import SparseActs
from fluxsae.sae.model import SparseAutoencoder

QUANTILE = 0.99
_METRIC = "image_fvu"


@dataclass(frozen=True)
class Familiarity:
    """One picture's FVU at a step, and what is usual there."""

    fvu: float
    """sum ||x - x_hat||^2 / sum ||x - input_mean||^2 over the picture's tokens: 0 is perfect."""
    limit: float
    """The 99th percentile over the run's own images."""
    median: float
    n_images: int
    """Images of the run that the percentiles were measured on."""

    @property
    def is_unlike(self) -> bool:
        """Whether the SAE describes the picture worse than 99 of 100 of the run's own: its names are then not sure."""
        return self.fvu > self.limit

    def sentence(self) -> str:
        """For people: how it compares, and what that means."""
        beside = f"FVU {self.fvu:.3f}; the run's own {self.n_images} images: median {self.median:.3f}, 99 % below "
        if self.is_unlike:
            return f"This picture is unlike the images of this run ({beside}{self.limit:.3f}). Its names are not sure."
        return f"This picture is like the images of this run ({beside}{self.limit:.3f})."


@torch.no_grad()
def image_fvu(
    sae: SparseAutoencoder,
    tokens: Float[Tensor, "images tokens d_model"],
    acts: SparseActs | None = None,
    *,
    sigma: float | None = None,
) -> Float[Tensor, " images"]:
    """The FVU of each image about the SAE's input mean, so that images are comparable; `acts` saves the encoding."""
    tokens = tokens.detach().to(sae.W_enc.device)
    x_hat = sae.reconstruct(tokens, sigma=sigma) if acts is None else sae.decode_sparse(acts)
    ratios = []
    for x, own in zip(tokens, x_hat, strict=True):  # image by image, since a batch of tokens is large
        error, variance = ((x.float() - other).square().sum(dtype=torch.float64) for other in (own, sae.input_mean))
        ratios.append(error / variance.clamp(min=1e-300))
    return torch.stack(ratios).float().cpu()


def summarise_fvu(fvus: Float[Tensor, "images steps"], steps: tuple[int, ...]) -> dict[str, Any]:
    """The run's record of its own images' FVU at each step, for metrics.json."""
    median, limit = np.quantile(fvus.double().numpy(), (0.5, QUANTILE), axis=0)
    usual = [{"median": float(m), "p99": float(p)} for m, p in zip(median, limit, strict=True)]
    return {_METRIC: {"n_images": len(fvus), "by_step": dict(zip(map(str, steps), usual, strict=True))}}


def familiarity(
    metrics: Mapping[str, Any],
    sae: SparseAutoencoder,
    tokens: Float[Tensor, "images tokens d_model"],
    *,
    step: int,
    sigma: float | None = None,
) -> list[Familiarity] | None:
    """Each picture beside the run's own images at `step`; None where the run was not scored there.

    `metrics` are those of the SAE in the run: `run.load_metrics(hookpoint)`. `sigma` is the step's noise level, which
    an SAE with a `sigma_table` needs.
    """
    known = metrics.get(_METRIC, {})
    usual = known.get("by_step", {}).get(str(step))
    if usual is None:
        return None
    fvus = image_fvu(sae, tokens, sigma=sigma).tolist()
    return [Familiarity(fvu, usual["p99"], usual["median"], known["n_images"]) for fvu in fvus]
