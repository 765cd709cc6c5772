"""Batches of FLUX's token rows, in an order that can be taken up anywhere."""

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from fluxsae.activations.shards import ShardFolder, Split
from fluxsae.errors import FluxSaeError

_FEWEST_SHUFFLE_BYTES = 1 << 20


@runtime_checkable
class RowReader(Protocol):
    """Where a mixing buffer gets its rows: shards on disk, or FLUX itself."""

    d_model: int
    reads_ahead: bool
    """Whether the next shards may be loaded in another thread while the last ones are in use."""

    def n_rows(self) -> list[int]:
        """Rows of each shard."""

    def image_sigmas(self) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each row of an image; shards hold whole images, with their rows in the same order."""

    def rows(
        self, shards: Sequence[int], wanted: Int[Tensor, " wanted"], *, epoch: int
    ) -> BFloat16[Tensor, "wanted d_model"]:
        """Some of the rows of some shards, the same every time.

        `wanted` counts the rows of these shards one after the other, and ascends.
        """


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

    def rows(
        self, shards: Sequence[int], wanted: Int[Tensor, " wanted"], *, epoch: int
    ) -> BFloat16[Tensor, "wanted d_model"]:
        """Some of the rows of some shards, the same in every epoch; no others are read from the disk."""
        counts = self.n_rows()
        rows = torch.empty(len(wanted), self.d_model, dtype=torch.bfloat16)
        first, place = 0, 0
        for shard in shards:
            stop = place + int(torch.searchsorted(wanted[place:], first + counts[shard]))
            if stop > place:
                stored = rearrange(self.folder.shards[shard].tokens(), "... d_model -> (...) d_model")  # not read yet
                torch.index_select(stored, 0, self._stored(shard)[wanted[place:stop] - first], out=rows[place:stop])
            first, place = first + counts[shard], stop
        return rows

    def image_sigmas(self) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each row of an image."""
        manifest = self.folder.manifest
        return torch.tensor(manifest.sigmas)[self._steps].repeat_interleave(manifest.tokens_per_image)

    def _stored(self, shard: int) -> Int[Tensor, " rows"]:
        """Which of a shard's stored rows belong to the split and the steps, in order."""
        manifest = self.folder.manifest
        shape = (len(manifest.image_ids(shard)), len(manifest.steps), manifest.tokens_per_image)
        places = torch.arange(math.prod(shape)).reshape(shape)
        return places[self._wanted(shard)][:, self._steps].flatten()

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
    all of them together; each gets its own slice of every batch, and reads and keeps no other rows.

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
        self._rank, self._share = rank, _share(batch_size, world_size)
        self._resident: Tensor | None = None
        self._made: tuple[object, tuple[Tensor, Tensor]] | None = None
        if self.n_batches < 1:
            raise FluxSaeError(
                f"There are {self.n_rows} token rows, fewer than one batch of {batch_size}. "
                "Collect more images, keep more tokens of each, or use a smaller batch."
            )

    @property
    def reads_ahead(self) -> bool:
        """Whether the next batch may be assembled in another thread while the last one is in use."""
        return self._reader.reads_ahead

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
        pending, n_pending = [], 0
        for rows, order in self._iter_loaded(epoch, cursor):
            start = 0
            while len(order) - start + n_pending >= self._share:
                stop = start + self._share - n_pending
                pending.append(rows[order[start:stop]])
                yield torch.cat(pending) if len(pending) > 1 else pending[0]
                pending, n_pending, start = [], 0, stop
            if start < len(order):
                pending.append(rows[order[start:]])
                n_pending += len(order) - start
            del rows  # before the next ones are made

    def sigmas(self, epoch: int, *, cursor: int = 0) -> Iterator[Float[Tensor, " rows"]]:
        """The noise level of each row of the batches that `batches` gives."""
        of_image, pending = self._reader.image_sigmas(), torch.empty(0)
        for _, own in self._parts(epoch, cursor):
            *whole, pending = torch.cat([pending, of_image[own % len(of_image)]]).split(self._share)
            yield from whole
            if len(pending) == self._share:
                yield pending
                pending = pending[:0]

    def _parts(self, epoch: int, cursor: int) -> Iterator[tuple[tuple[int, ...], Int[Tensor, " own"]]]:
        """Each group that has rows for this process from a batch on, and those rows in the order they are used in."""
        first, last = cursor * self.batch_size, self.n_batches * self.batch_size
        start = 0
        for position, group in enumerate(self._groups(epoch)):
            stop = start + self._size(group)
            if stop > first and start < last:
                order = torch.randperm(stop - start, generator=self._generator(epoch, "rows", position))
                places = torch.arange(max(start, first), min(stop, last))
                own = places % self.batch_size // self._share == self._rank
                yield group, order[places[own] - start]
            start = stop

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
        self, epoch: int, cursor: int
    ) -> Iterator[tuple[BFloat16[Tensor, "rows d_model"], Int[Tensor, " own"]]]:
        """(rows, their order) of the groups from a batch on, the next one read ahead where the reader allows it."""
        parts = self._parts(epoch, cursor)
        if not self._reader.reads_ahead:
            yield from (self._make(group, own, epoch) for group, own in parts)
        elif self._is_one_group and self._share == self.batch_size:
            for group, own in parts:
                if self._resident is None:
                    self._resident = self._reader.rows(group, torch.arange(self.n_rows), epoch=epoch)
                yield self._resident, own
        else:
            with ThreadPoolExecutor(max_workers=1) as pool:
                ahead = deque([pool.submit(self._load, *part, epoch) for part in islice(parts, 1)])
                while ahead:
                    loaded = ahead.popleft().result()
                    ahead += [pool.submit(self._load, *part, epoch) for part in islice(parts, 1)]
                    yield loaded
                    del loaded

    def _make(self, group: tuple[int, ...], own: Int[Tensor, " own"], epoch: int) -> tuple[Tensor, Tensor]:
        """`_load`, unless these rows were the last that were made: the first ones are looked at before training."""
        key = (epoch, group, len(own))
        if self._made is None or self._made[0] != key:
            self._made = None
            self._made = (key, self._load(group, own, epoch))
        return self._made[1]

    def _load(
        self, group: tuple[int, ...], own: Int[Tensor, " own"], epoch: int
    ) -> tuple[BFloat16[Tensor, "own d_model"], Int[Tensor, " own"]]:
        wanted, places = own.sort()
        order = torch.empty_like(places)
        order[places] = torch.arange(len(places))
        return self._reader.rows(group, wanted, epoch=epoch), order

    def _generator(self, epoch: int, *purpose: str | int) -> torch.Generator:
        digest = hashlib.sha256(repr((self.seed, epoch, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _share(batch_size: int, world_size: int) -> int:
    if batch_size < 1 or batch_size % world_size:
        raise FluxSaeError(
            f"batch_size is {batch_size}; it must be at least 1 and a multiple of the {world_size} processes, "
            "because it counts the rows of all of them together."
        )
    return batch_size // world_size


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
