"""When the Triton kernels serve; `triton_kernels` is imported on first use on a CUDA device only.

Triton launches on the current device, so each launch makes its tensor's device the current one.
"""

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fluxsae.sae.kernels.adam import AdamStep

_MAX_TOPK_FEATURES = 65_536
_MAX_ADAM_COLUMNS = 16_384


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(tensor: Tensor) -> bool:
    """Whether the kernels serve this tensor: on CUDA, with Triton installed, in a type they add up in float32."""
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and _has_triton()


def can_find_topk(rows: Tensor) -> bool:
    """Whether a row fits into the registers of one block of threads."""
    return usable(rows) and rows.shape[-1] <= _MAX_TOPK_FEATURES


def can_take_adam(weights: Tensor) -> bool:
    """Whether Adam's kernel serves: a float32 matrix with rows that fit into one block of threads."""
    is_matrix = weights.ndim == 2 and weights.dtype == torch.float32
    return is_matrix and usable(weights) and weights.shape[1] <= _MAX_ADAM_COLUMNS


def topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of each row's k largest entries; equal entries go to the lower index."""
    from fluxsae.sae.kernels.triton_kernels import topk

    with torch.cuda.device(rows.device):
        return topk(rows, k)


def topk_acts(rows: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """See `fluxsae.sae.kernels.topk_acts`."""
    from fluxsae.sae.kernels.triton_kernels import topk_acts

    with torch.cuda.device(rows.device):
        return topk_acts(rows, k, dtype)


def bag_sums(weights: Tensor, rows: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """See `fluxsae.sae.kernels.bag_sums`."""
    from fluxsae.sae.kernels.triton_kernels import bag_sums

    with torch.cuda.device(source.device):
        return bag_sums(weights, rows, starts, source)


def pair_products(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor) -> Tensor:
    """See `fluxsae.sae.kernels.pair_products`."""
    from fluxsae.sae.kernels.triton_kernels import pair_products

    with torch.cuda.device(left.device):
        return pair_products(left, left_rows, right, right_rows)


def adam_(weights: Tensor, gradients: Tensor, mean: Tensor, square: Tensor, *, step: "AdamStep", is_unit: bool) -> None:
    """See `fluxsae.sae.kernels.adam.adam_`."""
    from fluxsae.sae.kernels.triton_kernels import adam_

    with torch.cuda.device(weights.device):
        adam_(
            weights, gradients, mean, square, step=step.count, rate=step.rate, betas=(step.beta1, step.beta2),
            eps=step.eps, divisor=step.divisor, is_skipped=step.is_skipped, is_unit=is_unit,
        )  # fmt: skip
