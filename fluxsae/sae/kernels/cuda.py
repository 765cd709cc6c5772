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
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def serves(kernel: str, tensor: Tensor) -> bool:
    """Whether a kernel is used for this tensor: on CUDA, of a type and width it is made for, where it was found right.

    It is compared with plain torch at first use on a device (see `agreement`).
    """
    if not (tensor.is_cuda and tensor.dtype in _TYPES and _has_triton() and _fits(kernel, tensor)):
        return False
    from fluxsae.sae.kernels.agreement import agrees

    return agrees(kernel, tensor.device, tensor.dtype, tensor.shape[-1])


def _fits(kernel: str, tensor: Tensor) -> bool:
    """Whether a row fits into the registers of one block of threads, where the kernel needs that."""
    if kernel == "adam_":
        return tensor.ndim == 2 and tensor.dtype == torch.float32 and tensor.shape[1] <= _MAX_ADAM_COLUMNS
    return not kernel.startswith("topk") or tensor.shape[-1] <= _MAX_TOPK_FEATURES


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
        adam_(weights, gradients, mean, square, step=step, is_unit=is_unit)
