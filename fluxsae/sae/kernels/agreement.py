"""Whether a Triton kernel says what plain torch says on a device: asked at first use, and remembered.

A compiler or a card that makes a kernel wrong costs speed then, never a result.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from fluxsae.sae.kernels import plain, private_torch
from fluxsae.sae.kernels.adam import AdamStep, plain_adam_

_log = logging.getLogger(__name__)


@functools.cache
def agrees(kernel: str, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel agrees with plain torch on rows of this type and width; where not, one line says so."""
    try:
        with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            problem = "" if CHECKS[kernel](device, dtype, width) else "it gave other numbers than plain torch"
    except Exception as error:  # whatever a compiler or a driver raises, plain torch still works
        problem = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    if problem:
        _log.warning(
            "The Triton kernel %s is not used on %s for %s rows of %d but plain torch: %s; torch %s.",
            kernel, device, str(dtype).removeprefix("torch."), width, problem, torch.__version__,
        )  # fmt: skip
    return not problem


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers with few distinct values, so that there are ties; negative ones and -0 among them."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return numbers.mul(8).round().div(8).to(device, dtype)


def _check_topk(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from fluxsae.sae.kernels import triton_kernels

    rows, k = _numbers(3, width, device=device, dtype=dtype), max(1, width // 200)
    values, indices = triton_kernels.topk(rows, k)
    same = torch.equal(indices.sort(-1).values, plain.topk(rows, k)[1].sort(-1).values)
    return same and torch.equal(values, rows.gather(1, indices).float())


def _check_topk_acts(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from fluxsae.sae.kernels import triton_kernels

    rows, k = _numbers(3, width, device=device, dtype=dtype), max(1, width // 3)  # so many that negative ones are there
    values, indices = plain.topk(rows, k)
    return torch.equal(
        triton_kernels.topk_acts(rows, k, dtype), torch.zeros_like(rows).scatter_(1, indices, values.relu())
    )


def _check_bag_sums(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from fluxsae.sae.kernels import triton_kernels

    source, weights = _numbers(50, width, device=device, dtype=dtype), _numbers(31, device=device)
    rows, starts = torch.arange(31, device=device) * 13 % 50, torch.tensor([0, 0, 1, 20, 31], device=device)
    expected = plain.bag_sums(weights, rows, starts, source.float())
    return torch.allclose(triton_kernels.bag_sums(weights, rows, starts, source), expected, rtol=1e-5, atol=1e-4)


def _check_pair_products(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from fluxsae.sae.kernels import triton_kernels

    left, right = _numbers(7, width, device=device, dtype=dtype), _numbers(1, 50, width, device=device, dtype=dtype)[0]
    pairs = torch.arange(29, device=device)
    found = triton_kernels.pair_products(left, pairs // 5, right, pairs * 13 % 50)
    expected = private_torch.plain_pair_products(left.float(), pairs // 5, right.float(), pairs * 13 % 50)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * width)


def _check_adam(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    from fluxsae.sae.kernels import triton_kernels

    number = functools.partial(torch.tensor, device=device)
    step = AdamStep(number(3.0), 0.01, 0.9, 0.999, 1e-8, number(2.0), number(0.0))
    start = torch.nn.functional.normalize(_numbers(5, width, device=device, dtype=dtype) + 0.1, dim=1)
    results = []
    for take in (triton_kernels.adam_, plain_adam_):
        for is_unit in (False, True):
            tensors = [start.clone(), _numbers(5, width, device=device), start * 0.1, start.square()]
            take(*tensors, step=step, is_unit=is_unit)
            results.append(torch.cat([tensors[0], *tensors[2:]]))
    return torch.allclose(torch.cat(results[:2]), torch.cat(results[2:]), rtol=1e-4, atol=1e-5)


CHECKS: dict[str, Callable[[torch.device, torch.dtype, int], bool]] = {
    "topk": _check_topk,
    "topk_acts": _check_topk_acts,
    "bag_sums": _check_bag_sums,
    "pair_products": _check_pair_products,
    "adam_": _check_adam,
}
"""(device, type, width of a row) -> whether the kernel of this name agrees there."""
