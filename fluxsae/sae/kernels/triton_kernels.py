# ruff: noqa: PLR0917 (a kernel takes its tensors one by one)
"""Triton kernels; this module is imported on first use on a CUDA device and compiled there."""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from fluxsae.sae.kernels.adam import AdamStep


@triton.jit  # type: ignore[untyped-decorator]
def _bag_sums(
    weights: Any, rows: Any, starts: Any, source: Any, out: Any, n_bags: Any, n_pairs: Any, d_model: Any,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    bag = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d_model
    first = tl.load(starts + bag)
    last = tl.load(starts + bag + 1, mask=bag + 1 < n_bags, other=n_pairs)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(first, last, PAIRS):
        pairs = start + tl.arange(0, PAIRS)
        here = pairs < last
        weight = tl.load(weights + pairs, mask=here, other=0.0).to(tl.float32)
        row = tl.load(rows + pairs, mask=here, other=0).to(tl.int64)
        places = source + row[:, None] * d_model + columns[None, :]
        tile = tl.load(places, mask=here[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * tile, axis=0)
    tl.store(out + bag.to(tl.int64) * d_model + columns, total, mask=inside)


def bag_sums(weights: Tensor, rows: Tensor, starts: Tensor, source: Tensor) -> Tensor:
    """See `fluxsae.sae.kernels.bag_sums`; the sums are float32."""
    source = source.contiguous()
    n_bags, d_model = len(starts), source.shape[1]
    out = torch.empty(n_bags, d_model, device=source.device, dtype=torch.float32)
    if n_bags:
        columns = min(512, triton.next_power_of_2(d_model))
        _bag_sums[(n_bags, triton.cdiv(d_model, columns))](
            weights.contiguous(), rows.contiguous(), starts.contiguous(), source, out, n_bags, len(rows), d_model,
            PAIRS=8, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _pair_products(
    left: Any, left_rows: Any, right: Any, right_rows: Any, out: Any, n_pairs: Any, d_model: Any,
    PAIRS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    here = pairs < n_pairs
    left_row = tl.load(left_rows + pairs, mask=here, other=0).to(tl.int64)
    right_row = tl.load(right_rows + pairs, mask=here, other=0).to(tl.int64)
    total = tl.zeros([PAIRS, COLUMNS], dtype=tl.float32)
    for start in range(0, d_model, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = here[:, None] & (columns < d_model)[None, :]
        a = tl.load(left + left_row[:, None] * d_model + columns[None, :], mask=inside, other=0.0)
        b = tl.load(right + right_row[:, None] * d_model + columns[None, :], mask=inside, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    tl.store(out + pairs, tl.sum(total, axis=1), mask=here)


def pair_products(left: Tensor, left_rows: Tensor, right: Tensor, right_rows: Tensor) -> Tensor:
    """See `fluxsae.sae.kernels.pair_products`; the products are float32."""
    n_pairs, d_model = len(left_rows), left.shape[1]
    out = torch.empty(n_pairs, device=left.device, dtype=torch.float32)
    if n_pairs:
        pairs = 8
        _pair_products[(triton.cdiv(n_pairs, pairs),)](
            left.contiguous(), left_rows.contiguous(), right.contiguous(), right_rows.contiguous(), out, n_pairs,
            d_model, PAIRS=pairs, COLUMNS=min(256, triton.next_power_of_2(d_model)), num_warps=4,
        )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _topk(
    pre_acts: Any, values: Any, indices: Any, acts: Any, n_features: Any, k: Any,
    FEATURES: tl.constexpr, DENSE: tl.constexpr,
) -> None:  # fmt: skip
    """Finds the k-th largest entry bit by bit, then keeps what beats it and the first of what equals it."""
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, FEATURES)
    inside = features < n_features
    value = tl.load(pre_acts + row * n_features + features, mask=inside, other=-float("inf")).to(tl.float32)
    value += 0.0  # -0 and 0 are equal, so their bits must be
    bits = value.to(tl.int32, bitcast=True)
    # The bits of a float in the order of its value: negative numbers run backwards.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(inside, key, -2147483648)
    boundary = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= k, 0, -2147483648)
    for step in range(31):
        candidate = boundary + (1 << (30 - step))
        enough = tl.sum((key >= candidate).to(tl.int32), axis=0) >= k
        boundary = tl.where(enough, candidate, boundary)
    beats = key > boundary
    ties = (key == boundary) & inside
    room = k - tl.sum(beats.to(tl.int32), axis=0)
    kept = beats | (ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= room))
    if DENSE:
        act = tl.where(kept & (value > 0), value, 0.0)
        tl.store(acts + row * n_features + features, act.to(acts.dtype.element_ty), mask=inside)
    else:
        place = row * k + tl.cumsum(kept.to(tl.int32), axis=0) - 1
        tl.store(values + place, value, mask=kept)
        tl.store(indices + place, features.to(tl.int64), mask=kept)


def topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (float32) and indices of each row's k largest entries in the order of their indices."""
    n_rows, n_features = rows.shape
    values = torch.empty(n_rows, k, device=rows.device, dtype=torch.float32)
    indices = torch.empty(n_rows, k, device=rows.device, dtype=torch.int64)
    if n_rows:
        width = triton.next_power_of_2(n_features)
        _topk[(n_rows,)](
            rows.contiguous(), values, indices, values, n_features, k, FEATURES=width, DENSE=False,
            num_warps=_topk_warps(width),
        )  # fmt: skip
    return values, indices


def topk_acts(rows: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """Each row with all but its k largest entries, and negative ones, set to 0."""
    n_rows, n_features = rows.shape
    acts = torch.empty(n_rows, n_features, device=rows.device, dtype=dtype)
    if n_rows:
        width = triton.next_power_of_2(n_features)
        _topk[(n_rows,)](
            rows.contiguous(), acts, acts, acts, n_features, k, FEATURES=width, DENSE=True,
            num_warps=_topk_warps(width),
        )  # fmt: skip
    return acts


def _topk_warps(width: int) -> int:
    """64 entries a thread at most."""
    return max(4, min(32, width // 2048))


@triton.jit  # type: ignore[untyped-decorator]
def _adam(
    weights: Any, gradients: Any, means: Any, squares: Any, step: Any, divisor: Any, is_skipped: Any,
    rate: Any, beta1: Any, beta2: Any, log2_beta1: Any, log2_beta2: Any, eps: Any, d_model: Any,
    COLUMNS: tl.constexpr, UNIT: tl.constexpr,
) -> None:  # fmt: skip
    columns = tl.arange(0, COLUMNS)
    places = tl.program_id(0).to(tl.int64) * d_model + columns
    inside = columns < tl.where(tl.load(is_skipped) < 0.5, d_model, 0)
    weight = tl.load(weights + places, mask=inside, other=0.0)
    gradient = tl.load(gradients + places, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor)
    if UNIT:
        gradient -= tl.sum(gradient * weight, axis=0) * weight
    mean = beta1 * tl.load(means + places, mask=inside, other=0.0) + (1 - beta1) * gradient
    square = beta2 * tl.load(squares + places, mask=inside, other=0.0) + (1 - beta2) * gradient * gradient
    count = tl.load(step)
    size = mean / (1 - tl.exp2(count * log2_beta1))
    weight -= rate * size / (tl.sqrt(square / (1 - tl.exp2(count * log2_beta2))) + eps)
    if UNIT:
        weight /= tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
    tl.store(means + places, mean, mask=inside)
    tl.store(squares + places, square, mask=inside)
    tl.store(weights + places, weight, mask=inside)


def adam_(weights: Tensor, gradients: Tensor, mean: Tensor, square: Tensor, *, step: "AdamStep", is_unit: bool) -> None:
    """Adam on the rows of a matrix in one pass over the memory; see `fluxsae.sae.kernels.adam.adam_`."""
    n_rows, d_model = weights.shape
    betas = (step.beta1, step.beta2)
    log2 = [float(torch.log2(torch.tensor(beta, dtype=torch.float64))) for beta in betas]
    _adam[(n_rows,)](
        weights, gradients.contiguous(), mean, square, step.count, step.divisor, step.is_skipped, step.rate, *betas,
        *log2, step.eps, d_model, COLUMNS=triton.next_power_of_2(d_model), UNIT=is_unit, num_warps=8,
    )  # fmt: skip
