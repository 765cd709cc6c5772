"""Adam (Kingma and Ba 2015, arXiv 1412.6980) on blocks of rows, with unit rows kept unit."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.adam import adam

from fluxsae.sae.kernels import cuda


@dataclass(frozen=True)
class AdamStep:
    """What all weights of one step share."""

    count: Tensor
    """Steps counted, this one included: a float32 number on the device."""
    rate: float
    beta1: float
    beta2: float
    eps: float
    divisor: Tensor
    """What gradients are divided by, for clipping."""
    is_skipped: Tensor
    """1.0 where nothing may change, else 0.0."""


def adam_(
    weights: Float[Tensor, "..."],
    gradients: Float[Tensor, "..."],
    mean: Float[Tensor, "..."],
    square: Float[Tensor, "..."],
    *,
    step: AdamStep,
    is_unit: bool = False,
) -> None:
    """One step of Adam, in place.

    With `is_unit` each row is a direction: the gradient's part along it is removed first (what is left turns the row),
    and the row has norm 1 afterwards. `gradients` may be overwritten.
    """
    take = cuda.adam_ if cuda.serves("adam_", weights) else plain_adam_
    take(weights, gradients, mean, square, step=step, is_unit=is_unit)


def plain_adam_(
    weights: Tensor, gradients: Tensor, mean: Tensor, square: Tensor, *, step: AdamStep, is_unit: bool
) -> None:
    """`adam_` by torch's own optimiser."""
    if is_unit:
        along = torch.linalg.vecdot(gradients, weights)
        gradients.addcmul_(along[:, None], weights, value=-1)
    before = step.count - 1  # `adam` counts this step itself, once for each call
    adam(
        [weights], [gradients], [mean], [square], [], [before], fused=True, lr=step.rate, beta1=step.beta1,
        beta2=step.beta2, weight_decay=0.0, eps=step.eps, amsgrad=False, maximize=False, grad_scale=step.divisor,
        found_inf=step.is_skipped,
    )  # fmt: skip
    if is_unit:
        weights /= weights.norm(dim=1, keepdim=True).clamp(min=1e-12)
