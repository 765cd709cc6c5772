"""The reference of the kernels in plain torch, which runs on every device."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def topk(rows: Float[Tensor, "rows n_features"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Values and indices of each row's k largest entries, unordered; equal entries go to the lower index."""
    n_features = rows.shape[1]
    if k == n_features:
        return rows, torch.arange(n_features, device=rows.device).expand(len(rows), -1)
    if rows.dtype == torch.bfloat16 and n_features <= 1 << 16:
        indices = _topk_by_index_bits(rows, k)
        return rows.gather(1, indices), indices
    return topk_by_repair(rows, k)


def _topk_by_index_bits(rows: Tensor, k: int) -> Tensor:
    """The k largest where almost every boundary is a tie: the index fills the 16 bits that bfloat16 leaves free.

    Among equal entries the lower index then is the larger float32 number. Negative numbers run backwards.
    """
    bits = (rows + 0.0).view(torch.int16).to(torch.int32)  # -0 and 0 are equal, so their bits must be
    backwards = bits.bitwise_right_shift(31).bitwise_and_(0xFFFF)
    descending = 0xFFFF - torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    keys = bits.bitwise_left_shift_(16).bitwise_xor_(backwards).bitwise_xor_(descending).view(torch.float32)
    return keys.topk(k, dim=-1, sorted=False).indices


def topk_by_repair(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
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
    """See `fluxsae.sae.kernels.bag_sums`."""
    return embedding_bag(rows, source, starts, per_sample_weights=weights.to(source.dtype), mode="sum")
