"""The heavy operations of sparse autoencoders: exact top-k, sparse decode and its gradients, and which way to take.

A *pair* is one active feature of one token. Everything sparse is written with two operations on pairs: weighted sums of
rows over bags of pairs, and the inner product of two rows for each pair. Neither builds a (pairs, d_model) tensor.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.sae.config import Precision
from fluxsae.sae.kernels import cuda, plain, private_torch

SPARSE_BELOW: dict[str, int] = {"cpu": 40, "cuda": 175}
"""Sparse products win where k * this <= n_features; measured by `python -m train.benchmarks training --calibrate`."""


def sparse_pays(k: float, n_features: int, device: torch.device) -> bool:
    """Whether gathering k rows a token is faster than a dense product on this device."""
    return k * SPARSE_BELOW.get(device.type, SPARSE_BELOW["cuda"]) <= n_features


def default_precision(device: torch.device) -> Precision:
    """The fastest precision for matrix products in training: bfloat16 where the device multiplies it natively."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_native = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return "bfloat16" if device.type == "cpu" and is_native else "float32"


def topk(
    pre_acts: Float[Tensor, "*batch n_features"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Values and indices of each row's k largest entries, unordered; equal entries go to the lower index."""
    n_features = pre_acts.shape[-1]
    rows = pre_acts.reshape(-1, n_features)
    if k < n_features and cuda.serves("topk", rows):
        values, indices = cuda.topk(rows.detach(), k)
        if rows.requires_grad:  # the kernel has no gradient: its indices choose, `gather` carries it
            values = rows.gather(1, indices)
    else:
        values, indices = plain.topk(rows, k)
    return values.reshape(*pre_acts.shape[:-1], k), indices.reshape(*pre_acts.shape[:-1], k)


def topk_acts(
    pre_acts: Float[Tensor, "*batch n_features"], k: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch n_features"]:
    """The pre-activations with all but each row's k largest, and negative ones, set to 0; ties to the lower index."""
    dtype = dtype or pre_acts.dtype
    if not pre_acts.requires_grad and cuda.serves("topk_acts", pre_acts):
        return cuda.topk_acts(pre_acts.reshape(-1, pre_acts.shape[-1]), k, dtype).reshape(pre_acts.shape)
    values, indices = topk(pre_acts, k)
    return torch.zeros_like(pre_acts, dtype=dtype).scatter_(-1, indices, values.relu().to(dtype))


def bag_sums(
    weights: Float[Tensor, " pairs"],
    rows: Int[Tensor, " pairs"],
    starts: Int[Tensor, " bags"],
    source: Float[Tensor, "n_rows d_model"],
) -> Float[Tensor, "bags d_model"]:
    """sum of weights[p] * source[rows[p]] over the pairs of each bag; bag b begins at pair starts[b]."""
    sums = cuda.bag_sums if cuda.serves("bag_sums", source) else plain.bag_sums
    return sums(weights, rows, starts, source)


def pair_products(
    left: Float[Tensor, "n_left d_model"],
    left_rows: Int[Tensor, " pairs"],
    right: Float[Tensor, "n_right d_model"],
    right_rows: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """<left[left_rows[p]], right[right_rows[p]]> for each pair; quickest where the larger side's rows are sorted."""
    products = cuda.pair_products if cuda.serves("pair_products", left) else private_torch.pair_products
    return products(left, left_rows, right, right_rows)


class PairsByFeature:
    """The pairs of a batch in the order of their features: the inverted index behind both weight gradients.

    `order` sorts anything that is kept a pair; `tokens` and `features` are sorted already; the pairs of feature f are
    starts[f] to starts[f + 1] - 1.
    """

    def __init__(self, tokens: Int[Tensor, " pairs"], features: Int[Tensor, " pairs"], n_features: int) -> None:
        self.order = features.argsort(stable=True)
        self.tokens = tokens[self.order]
        self.features = features[self.order]
        counts = torch.zeros(n_features, dtype=torch.int64, device=features.device)
        counts.scatter_add_(0, features, torch.ones_like(features))
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def feature_sums(
        self, weights: Float[Tensor, " pairs"], source: Float[Tensor, "n_rows d_model"], rows: slice, tokens: Tensor
    ) -> Float[Tensor, "chosen d_model"]:
        """For each feature of `rows`: the sum over its pairs of weight (sorted) times source row `tokens` (sorted)."""
        starts = self.starts[rows]
        if len(starts) == len(self.starts) - 1:
            return bag_sums(weights, tokens, starts, source)
        first, last = int(starts[0]), int(self.starts[rows.start + len(starts)])
        return bag_sums(weights[first:last], tokens[first:last], starts - first, source)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        tokens, features, values, W_dec, n_tokens = inputs
        ctx.save_for_backward(tokens, features, values, W_dec)
        starts = torch.searchsorted(tokens, torch.arange(n_tokens, device=tokens.device))
        return bag_sums(values, features, starts, W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tokens, features, values, W_dec = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        for_values = for_rows = None
        if ctx.needs_input_grad[2]:
            for_values = pair_products(gradient, tokens, W_dec, features)
        if ctx.needs_input_grad[3]:
            pairs = PairsByFeature(tokens, features, len(W_dec))
            for_rows = pairs.feature_sums(values[pairs.order], gradient, slice(0, len(W_dec)), pairs.tokens)
        return None, None, for_values, for_rows, None


def sparse_decode(
    tokens: Int[Tensor, " pairs"],
    features: Int[Tensor, " pairs"],
    values: Float[Tensor, " pairs"],
    W_dec: Float[Tensor, "n_features d_model"],
    *,
    n_tokens: int,
) -> Float[Tensor, "n_tokens d_model"]:
    """For each token the sum of values[p] * W_dec[features[p]] over its pairs, differentiable; `tokens` ascends."""
    decoded: Tensor = _SparseDecode.apply(tokens, features, values.to(W_dec.dtype), W_dec, n_tokens)
    return decoded


def lowered(tensor: Tensor, precision: Precision, *, buffer: Tensor | None = None) -> Tensor:
    """The tensor in the type that `precision` multiplies in; float64 stays. A buffer saves fetching new memory."""
    if precision == "float32" or tensor.dtype == torch.float64:
        return tensor
    return tensor.bfloat16() if buffer is None else buffer.copy_(tensor)


def product(a: Tensor, b: Tensor, *, is_rounded: bool = False) -> Tensor:
    """a @ b of lowered factors, summed in float32; rounded to their type where `is_rounded` or the device must."""
    if a.dtype != torch.bfloat16 or is_rounded:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()


def exact_sum_product(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """a @ b of float32 factors, multiplied in `precision`; the sums are float32 and are not rounded."""
    if precision == "float32" or a.dtype == torch.float64:
        return a @ b
    if a.is_cuda:
        return torch.mm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
    return private_torch.bfloat16_product(a, b)
