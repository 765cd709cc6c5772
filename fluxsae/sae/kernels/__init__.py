"""The heavy operations of sparse autoencoders: exact top-k, sparse decode and its gradients, and which way to take.

A *pair* is one active feature of one token. Everything sparse is written with two operations on pairs: weighted sums of
rows over bags of pairs, and the inner product of two rows for each pair. Neither builds a (pairs, d_model) tensor.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from fluxsae.sae.config import Precision
from fluxsae.sae.kernels import cuda, private_torch

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
    if k == n_features:
        indices = torch.arange(n_features, device=rows.device).expand(len(rows), -1)
        values = rows
    elif cuda.can_find_topk(rows):
        values, indices = cuda.topk(rows.detach(), k)
        if rows.requires_grad:  # the kernel has no gradient: its indices choose, `gather` carries it
            values = rows.gather(1, indices)
    elif rows.dtype == torch.bfloat16 and n_features <= 1 << 16:
        indices = _topk_by_index_bits(rows, k)
        values = rows.gather(1, indices)
    else:
        values, indices = _topk_by_repair(rows, k)
    return values.reshape(*pre_acts.shape[:-1], k), indices.reshape(*pre_acts.shape[:-1], k)


def topk_acts(
    pre_acts: Float[Tensor, "*batch n_features"], k: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "*batch n_features"]:
    """The pre-activations with all but each row's k largest, and negative ones, set to 0; ties to the lower index."""
    dtype = dtype or pre_acts.dtype
    if cuda.can_find_topk(pre_acts) and not pre_acts.requires_grad:
        return cuda.topk_acts(pre_acts.reshape(-1, pre_acts.shape[-1]), k, dtype).reshape(pre_acts.shape)
    values, indices = topk(pre_acts, k)
    return torch.zeros_like(pre_acts, dtype=dtype).scatter_(-1, indices, values.relu().to(dtype))


def _topk_by_index_bits(rows: Tensor, k: int) -> Tensor:
    """The k largest where almost every boundary is a tie: the index fills the 16 bits that bfloat16 leaves free.

    Among equal entries the lower index then is the larger float32 number. Negative numbers run backwards.
    """
    bits = (rows + 0.0).view(torch.int16).to(torch.int32)  # -0 and 0 are equal, so their bits must be
    backwards = bits.bitwise_right_shift(31).bitwise_and_(0xFFFF)
    descending = 0xFFFF - torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    keys = bits.bitwise_left_shift_(16).bitwise_xor_(backwards).bitwise_xor_(descending).view(torch.float32)
    return keys.topk(k, dim=-1, sorted=False).indices


def _topk_by_repair(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k + 1 largest less the smallest; rows where that one has an equal are decided again, by index."""
    values, indices = rows.topk(k + 1, dim=-1, sorted=False)
    smallest, position = values.min(-1, keepdim=True)
    unsure = ((values == smallest).sum(-1) > 1).nonzero()[:, 0]
    # The last entry takes the place of the smallest one, whose own place is cut off.
    values = values.scatter(1, position, values[:, k:].clone())[:, :k]
    indices = indices.scatter(1, position, indices[:, k:].clone())[:, :k]
    if len(unsure):
        repaired = _topk_by_counting(rows[unsure], smallest[unsure], k)
        indices[unsure] = repaired
        values[unsure] = rows[unsure].gather(1, repaired)
    return values, indices


def _topk_by_counting(rows: Tensor, boundary: Tensor, k: int) -> Tensor:
    beats, ties = rows > boundary, rows == boundary
    kept = beats | (ties & (ties.cumsum(1) <= k - beats.sum(1, keepdim=True)))
    return kept.nonzero()[:, 1].reshape(len(rows), k)


def bag_sums(
    weights: Float[Tensor, " pairs"],
    rows: Int[Tensor, " pairs"],
    starts: Int[Tensor, " bags"],
    source: Float[Tensor, "n_rows d_model"],
) -> Float[Tensor, "bags d_model"]:
    """sum of weights[p] * source[rows[p]] over the pairs of each bag; bag b begins at pair starts[b]."""
    if cuda.usable(source):
        return cuda.bag_sums(weights, rows, starts, source)
    return embedding_bag(rows, source, starts, per_sample_weights=weights.to(source.dtype), mode="sum")


def pair_products(
    left: Float[Tensor, "n_left d_model"],
    left_rows: Int[Tensor, " pairs"],
    right: Float[Tensor, "n_right d_model"],
    right_rows: Int[Tensor, " pairs"],
) -> Float[Tensor, " pairs"]:
    """<left[left_rows[p]], right[right_rows[p]]> for each pair; quickest where the larger side's rows are sorted."""
    if cuda.usable(left):
        return cuda.pair_products(left, left_rows, right, right_rows)
    return private_torch.pair_products(left, left_rows, right, right_rows)


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
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        n_tokens, k = indices.shape
        starts = torch.arange(0, n_tokens * k, k, device=indices.device)
        return bag_sums(values.reshape(-1), indices.reshape(-1), starts, W_dec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, W_dec = ctx.saved_tensors
        (gradient,) = gradients
        gradient = gradient.contiguous()
        n_tokens, k = indices.shape
        tokens = torch.arange(n_tokens, device=indices.device).repeat_interleave(k)
        for_values = for_rows = None
        if ctx.needs_input_grad[0]:
            for_values = pair_products(gradient, tokens, W_dec, indices.reshape(-1)).reshape(n_tokens, k)
        if ctx.needs_input_grad[2]:
            pairs = PairsByFeature(tokens, indices.reshape(-1), len(W_dec))
            for_rows = pairs.feature_sums(values.reshape(-1)[pairs.order], gradient, slice(0, len(W_dec)), pairs.tokens)
        return for_values, None, for_rows


def sparse_decode(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], W_dec: Float[Tensor, "n_features d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """sum_j values[j] * W_dec[indices[j]] for each token, differentiable; no (tokens * k, d_model) tensor is built."""
    k = indices.shape[-1]
    decoded = _SparseDecode.apply(values.reshape(-1, k).to(W_dec.dtype), indices.reshape(-1, k), W_dec)
    return torch.Tensor.reshape(decoded, (*indices.shape[:-1], W_dec.shape[1]))


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
