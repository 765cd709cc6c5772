"""Batches of FLUX's token rows, in an order that can be taken up anywhere."""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import BFloat16
from torch import Tensor

from fluxsae.activations.shards import ActivationManifest, ActivationShard, ShardFolder, ShardWriter, Split
from fluxsae.errors import FluxSaeError

__all__ = [
    "ActivationManifest",
    "ActivationShard",
    "DiskReader",
    "MixingBuffer",
    "RowReader",
    "ShardFolder",
    "ShardWriter",
    "Split",
    "mixing_buffer",
]

_FEWEST_SHUFFLE_BYTES = 1 << 20


@runtime_checkable
class RowReader(Protocol):
    """Where a mixing buffer gets its rows: shards on disk, or FLUX itself."""

    d_model: int
    reads_ahead: bool
    """Whether the next shards may be loaded in another thread while the last ones are in use."""

    def n_rows(self) -> list[int]:
        """Rows of each shard."""

    def pieces(self, shards: Sequence[int], *, epoch: int) -> Iterator[BFloat16[Tensor, "rows d_model"]]:
        """The rows of some shards one after the other, in pieces of any size; the same every time."""


class DiskReader:
    """Rows of the shards of one folder that belong to a split and to some of the captured steps."""

    reads_ahead = True

    def __init__(self, folder: ShardFolder, *, split: Split = "train", steps: Sequence[int] | None = None) -> None:
        self.folder = folder
        self.d_model = folder.manifest.d_model
        self._split: Split = split
        self._steps = _positions(folder.manifest.steps, steps)

    def n_rows(self) -> list[int]:
        """Rows of each shard that belong to the split."""
        manifest = self.folder.manifest
        rows = len(self._steps) * manifest.tokens_per_image
        return [rows * len(self._wanted(shard)) for shard in range(manifest.n_shards)]

    def pieces(self, shards: Sequence[int], *, epoch: int) -> Iterator[BFloat16[Tensor, "rows d_model"]]:
        """The rows of some shards, shard by shard, the same in every epoch."""
        for shard in shards:
            tokens = self.folder.shards[shard].tokens()[self._wanted(shard)][:, self._steps]
            yield rearrange(tokens, "images steps tokens d_model -> (images steps tokens) d_model")

    def _wanted(self, shard: int) -> list[int]:
        ids, left_out = self.folder.manifest.image_ids(shard), self.folder.shards[shard].left_out
        return [i - ids.start for i in ids if self.folder.manifest.in_split(i, self._split) and i not in left_out]


def _positions(captured: tuple[int, ...], wanted: Sequence[int] | None) -> list[int]:
    missing = sorted(set(wanted or ()) - set(captured))
    if missing:
        raise FluxSaeError(
            f"Steps {missing} were not collected; collected are {[*captured]}. Collect them, or drop them."
        )
    return [i for i, step in enumerate(captured) if wanted is None or step in wanted]


class MixingBuffer:
    """Batches of token rows; batch `cursor` of epoch `epoch` is a pure function of (seed, epoch, cursor).

    Shards are drawn in a random order into groups, and rows are shuffled within a group. Data that fits into
    `buffer_bytes` is one group, kept in memory; otherwise the next group is read while one is in use, and both fit.
    The last rows of an epoch that fill no batch are left out. Under several processes `batch_size` counts the rows of
    all of them together, and each gets its own slice of every batch.

    Raises:
        FluxSaeError: there is not one full batch, or `batch_size` does not divide by the number of processes.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        batch_size: int,
        seed: int = 0,
        buffer_bytes: int = 4 << 30,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._reader = reader
        self._shard_rows = reader.n_rows()
        self.d_model = reader.d_model
        self.batch_size = batch_size
        self.seed = seed
        self._buffer_rows = max(buffer_bytes, _FEWEST_SHUFFLE_BYTES) // (2 * reader.d_model)
        self._slice = _rank_slice(batch_size, rank, world_size)
        self._resident: Tensor | None = None
        if self.n_batches < 1:
            raise FluxSaeError(
                f"There are {self.n_rows} token rows, fewer than one batch of {batch_size}. "
                "Collect more images, keep more tokens of each, or use a smaller batch."
            )

    @property
    def n_rows(self) -> int:
        """Token rows of one epoch."""
        return sum(self._shard_rows)

    @property
    def n_batches(self) -> int:
        """Batches of one epoch."""
        return self.n_rows // self.batch_size

    @property
    def order(self) -> str:
        """What decides the order of the rows, beside epoch and cursor: the seed, and how many are mixed at once."""
        return f"seed {self.seed}, " + ("all mixed" if self._is_one_group else f"{self._group_rows} rows mixed")

    @property
    def _is_one_group(self) -> bool:
        return self.n_rows <= self._buffer_rows

    @property
    def _group_rows(self) -> int:
        # While one group is in use the next is in memory too, so each may take half of the buffer.
        return self._buffer_rows // 2 if self._reader.reads_ahead else self._buffer_rows

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[BFloat16[Tensor, "rows d_model"]]:
        return self.batches(0)

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[BFloat16[Tensor, "rows d_model"]]:
        """The batches `cursor`, `cursor` + 1, ... of an epoch, in main memory, in the dtype they are stored in."""
        skip = cursor * self.batch_size
        groups = self._groups(epoch)
        first = 0
        while first < len(groups) and skip >= self._size(groups[first]):
            skip -= self._size(groups[first])
            first += 1
        pending: list[Tensor] = []
        for position, rows in self._iter_loaded(groups, epoch, first=first):
            order = torch.randperm(len(rows), generator=self._generator(epoch, "rows", position))[skip:]
            skip = 0
            start = 0
            while len(order) - start + sum(map(len, pending)) >= self.batch_size:
                stop = start + self.batch_size - sum(map(len, pending))
                yield torch.cat([*pending, rows[order[start:stop]]])[self._slice]
                pending, start = [], stop
            pending.append(rows[order[start:]])

    def _groups(self, epoch: int) -> list[tuple[int, ...]]:
        if self._is_one_group:
            return [tuple(range(len(self._shard_rows)))]
        groups: list[list[int]] = [[]]
        room = self._group_rows
        for shard in torch.randperm(len(self._shard_rows), generator=self._generator(epoch, "shards")).tolist():
            if groups[-1] and self._shard_rows[shard] > room:
                groups.append([])
                room = self._group_rows
            groups[-1].append(shard)
            room -= self._shard_rows[shard]
        return [tuple(group) for group in groups]

    def _size(self, group: tuple[int, ...]) -> int:
        return sum(self._shard_rows[shard] for shard in group)

    def _iter_loaded(
        self, groups: list[tuple[int, ...]], epoch: int, *, first: int
    ) -> Iterator[tuple[int, BFloat16[Tensor, "rows d_model"]]]:
        """(position, rows) of the groups from `first` on, the next one read ahead where the reader allows it."""
        if not self._reader.reads_ahead:
            yield from ((position, self._read(groups[position], epoch)) for position in range(first, len(groups)))
        elif len(groups) == 1 and first == 0:
            if self._resident is None:
                self._resident = self._read(groups[0], epoch)
            yield 0, self._resident
        else:
            with ThreadPoolExecutor(max_workers=1) as pool:
                ahead = pool.submit(self._read, groups[first], epoch) if first < len(groups) else None
                for position in range(first, len(groups)):
                    assert ahead is not None
                    rows = ahead.result()
                    if position + 1 < len(groups):
                        ahead = pool.submit(self._read, groups[position + 1], epoch)
                    yield position, rows
                    del rows

    def _read(self, group: tuple[int, ...], epoch: int) -> Tensor:
        rows = torch.empty(self._size(group), self.d_model, dtype=torch.bfloat16)
        start = 0
        for piece in self._reader.pieces([shard for shard in group if self._shard_rows[shard]], epoch=epoch):
            rows[start : start + len(piece)] = piece
            start += len(piece)
        return rows

    def _generator(self, epoch: int, *purpose: str | int) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, epoch, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _rank_slice(batch_size: int, rank: int, world_size: int) -> slice:
    if batch_size < 1 or batch_size % world_size:
        raise FluxSaeError(
            f"batch_size is {batch_size}; it must be at least 1 and a multiple of the {world_size} processes, "
            "because it counts the rows of all of them together."
        )
    share = batch_size // world_size
    return slice(rank * share, (rank + 1) * share)


def mixing_buffer(
    folder: str | Path | ShardFolder,
    *,
    batch_size: int,
    seed: int = 0,
    split: Split = "train",
    steps: Sequence[int] | None = None,
    buffer_bytes: int = 4 << 30,
    rank: int = 0,
    world_size: int = 1,
) -> MixingBuffer:
    """Shuffled batches of the rows of a folder: see `MixingBuffer`.

    `steps` keeps only some of the collected steps. Every shard is checked first.

    Raises:
        FluxSaeError: a shard is missing, damaged or of another dataset; a step was not collected; too few rows.
    """
    shards = folder if isinstance(folder, ShardFolder) else ShardFolder(folder)
    shards.check_complete()
    reader = DiskReader(shards, split=split, steps=steps)
    return MixingBuffer(
        reader, batch_size=batch_size, seed=seed, buffer_bytes=buffer_bytes, rank=rank, world_size=world_size
    )
