"""Sparse acts: what fires on which token, and how many tokens are encoded at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.flux.presets import measure_machine

CHUNK_BYTES = 1 << 28
"""Pre-activations held at a time at most: larger chunks are no faster, on CPU or GPU."""
_SHARE_OF_FREE = 8


@dataclass(frozen=True, eq=False)
class SparseActs:
    """The acts above 0 as (token, feature, value) triples in the order of their tokens.

    A token costs its own entries only. `shape` is that of the dense acts; tokens are counted in row-major order.
    """

    tokens: Int[Tensor, " entries"]
    features: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    shape: tuple[int, ...]

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "*batch n_features"]) -> Self:
        """The entries of dense acts that are above 0."""
        rows = acts.reshape(-1, acts.shape[-1])
        tokens, features = (rows > 0).nonzero(as_tuple=True)
        return cls(tokens, features, rows[tokens, features], tuple(acts.shape))

    @classmethod
    def joined(cls, parts: Sequence["SparseActs"], shape: tuple[int, ...]) -> Self:
        """The parts that follow one another in acts of this shape."""
        tokens, start = [], 0
        for part in parts:
            tokens.append(part.tokens + start)
            start += part.n_tokens
        features, values = ([getattr(part, name) for part in parts] for name in ("features", "values"))
        return cls(torch.cat(tokens), torch.cat(features), torch.cat(values), shape)

    @property
    def n_tokens(self) -> int:
        """Number of tokens, those on which nothing fires included."""
        n_tokens = 1
        for size in self.shape[:-1]:
            n_tokens *= size
        return n_tokens

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.shape[-1]

    @property
    def active(self) -> Int[Tensor, "*batch"]:
        """How many features fire on each token."""
        return torch.bincount(self.tokens, minlength=self.n_tokens).reshape(self.shape[:-1])

    def split(self, n_tokens: int) -> Iterator["SparseActs"]:
        """The acts of every `n_tokens` tokens in turn, of shape (tokens, n_features)."""
        starts = range(0, self.n_tokens, n_tokens)
        edges = torch.tensor([*starts, self.n_tokens], device=self.tokens.device)
        cuts = torch.searchsorted(self.tokens, edges).tolist()
        for start, low, high in zip(starts, cuts, cuts[1:], strict=False):
            size = min(n_tokens, self.n_tokens - start)
            part = slice(low, high)
            yield SparseActs(self.tokens[part] - start, self.features[part], self.values[part], (size, self.n_features))

    def images(self, places: Sequence[int]) -> "SparseActs":
        """The acts of some of the images, in this order: of shape (places, tokens, n_features)."""
        n_tokens = self.shape[1]
        parts = list(self.split(n_tokens))
        return SparseActs.joined([parts[place] for place in places], (len(places), n_tokens, self.n_features))

    def dense(self) -> Float[Tensor, "*batch n_features"]:
        """The acts of all features, zeros included."""
        rows = self.values.new_zeros(self.n_tokens, self.n_features)
        return rows.index_put((self.tokens, self.features), self.values).reshape(self.shape)


def tokens_at_once(n_features: int, device: torch.device, *, free_bytes: int | None = None) -> int:
    """How many tokens are encoded at a time: a power of two, so that rounding seldom depends on the free memory."""
    room = min(CHUNK_BYTES, (_free_bytes(device) if free_bytes is None else free_bytes) // _SHARE_OF_FREE)
    return 1 << (max(1, room // (4 * n_features)).bit_length() - 1)


def _free_bytes(device: torch.device) -> int:
    free = measure_machine(device).free
    if device.type == "cuda":  # what torch keeps for itself is free for us
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free
