"""When the Triton kernels serve; `fluxsae.kernels.triton_kernels` is imported on first use on a CUDA device only."""

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def usable(tensor: Tensor) -> bool:
    """Whether the kernels serve this tensor: on CUDA, with Triton installed, in a type they add up in float32."""
    return tensor.is_cuda and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and _has_triton()


def topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of each row's k largest entries; equal entries go to the lower index."""
    from fluxsae.kernels.triton_kernels import topk

    return topk(rows, k)


def bag_sums(weights: Tensor, rows: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """See `fluxsae.kernels.bag_sums`."""
    from fluxsae.kernels.triton_kernels import bag_sums

    return bag_sums(weights, rows, starts, source)


def pair_products(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor) -> Tensor:
    """See `fluxsae.kernels.pair_products`."""
    from fluxsae.kernels.triton_kernels import pair_products

    return pair_products(left, left_rows, right, right_rows)
