"""The heavy operations of sparse autoencoders: exact top-k, sparse decode and its gradients, and which way to take."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def topk(
    pre_acts: Float[Tensor, "*batch n_features"], k: int
) -> tuple[Float[Tensor, "*batch k"], Int[Tensor, "*batch k"]]:
    """Values and indices of each row's k largest entries, unordered; equal entries go to the lower index."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    if k == pre_acts.shape[-1]:
        return values, indices
    smallest = values.amin(-1, keepdim=True)
    chosen_ties = (values == smallest).sum(-1)
    ties = (pre_acts == smallest).sum(-1)
    unsure = ties > chosen_ties
    if not unsure.any():
        return values, indices
    rows = pre_acts[unsure]
    is_tie = rows == smallest[unsure]
    kept = (rows > smallest[unsure]) | (is_tie & (is_tie.cumsum(-1) <= chosen_ties[unsure][:, None]))
    repaired = kept.nonzero()[:, 1].reshape(-1, k)
    indices[unsure] = repaired
    values[unsure] = rows.gather(-1, repaired)
    return values, indices


def sparse_decode(
    values: Float[Tensor, "*batch k"], indices: Int[Tensor, "*batch k"], W_dec: Float[Tensor, "n_features d_model"]
) -> Float[Tensor, "*batch d_model"]:
    """sum_j values[j] * W_dec[indices[j]] for each token; nothing of size (tokens * k, d_model) is built."""
    k = indices.shape[-1]
    bags = torch.nn.functional.embedding_bag(
        indices.reshape(-1, k), W_dec, per_sample_weights=values.reshape(-1, k).to(W_dec.dtype), mode="sum"
    )
    return bags.reshape(*indices.shape[:-1], W_dec.shape[1])


def sparse_decode_pays(k: int, n_features: int, device: torch.device) -> bool:
    """Whether gathering k decoder rows a token is faster than the dense product on this device."""
    return k * (175 if device.type == "cuda" else 15) <= n_features
