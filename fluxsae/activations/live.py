"""FLUX straight into training: images that are made when their rows are asked for, nothing on disk."""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from fluxsae.activations.collection import (
    SEED_BLOCK,
    CaptureRequest,
    ImagePlan,
    capture_rows,
    stream_shapes,
)
from fluxsae.activations.mixing import MixingBuffer
from fluxsae.errors import FluxSaeError
from fluxsae.flux import schedule_sigmas
from fluxsae.flux.bad_numbers import LeftOut, bad_items
from fluxsae.flux.hookpoints import HookPoint

_log = logging.getLogger(__name__)


@runtime_checkable
class Peers(Protocol):
    """The processes of a live source; `fluxsae.sae.training.Processes` is one."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def broadcast_(self, tensor: Tensor, *, source: int) -> Tensor:
        """The tensor, replaced by that of process `source`."""


class LiveImages:
    """Images that are made once for all hook points of a request, with fresh noise in every epoch.

    Batches of images are dealt to the processes in turn and their rows exchanged: every process has all rows, which do
    not depend on how many processes there are. Rows that a hook point has not asked for yet wait for it; beyond
    `waiting_bytes` the oldest are forgotten, and made again if they are asked for after all.

    An image with NaN or infinite activations is left out and logged with its step: the rows of another image of its
    shard stand in its place, at all hook points.
    """

    def __init__(
        self,
        pipe: Any,
        plan: ImagePlan,
        request: CaptureRequest,
        *,
        images_per_shard: int = 32,
        held_out_every: int = 10,
        waiting_bytes: int = 1 << 30,
        peers: Peers | None = None,
    ) -> None:
        self._pipe, self._plan, self._request, self._peers = pipe, plan, request, peers
        self._shapes = stream_shapes(pipe, request)
        every = held_out_every
        ids = [i for i in range(len(plan)) if not every or i % every != every - 1]
        self._shards = [ids[start : start + images_per_shard] for start in range(0, len(ids), images_per_shard)]
        self._waiting: OrderedDict[tuple[int, int, HookPoint], Tensor] = OrderedDict()
        self._waiting_bytes = waiting_bytes
        self._left_out: dict[int, LeftOut] = {}
        """By epoch: each makes the images anew."""

    def d_model(self, hookpoint: HookPoint) -> int:
        """Width of a hook point's rows."""
        return self._shapes[hookpoint][1]

    def n_rows(self, hookpoint: HookPoint) -> list[int]:
        """Rows of each shard; held-out images are never generated."""
        return [len(shard) * self._rows_per_image(hookpoint) for shard in self._shards]

    def image_sigmas(self, hookpoint: HookPoint) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each of a hook point's rows of an image."""
        sigmas = torch.tensor(schedule_sigmas(self._pipe, self._request.settings))[list(self._request.steps)]
        return sigmas.repeat_interleave(self._rows_per_image(hookpoint) // len(sigmas))

    def take(self, hookpoint: HookPoint, shard: int, *, epoch: int) -> BFloat16[Tensor, "rows d_model"]:
        """A hook point's rows of a shard's images.

        Raises:
            FluxSaeError: so many epochs that the seeds would leave their block, or too many images are left out.
        """
        if (epoch, shard, hookpoint) not in self._waiting:
            made = self._make(shard, epoch)
            self._waiting |= {(epoch, shard, place): rows for place, rows in made.items()}
        rows = self._waiting.pop((epoch, shard, hookpoint))
        while sum(tensor.nbytes for tensor in self._waiting.values()) > self._waiting_bytes:
            self._waiting.popitem(last=False)
        return rows

    def _rows_per_image(self, hookpoint: HookPoint) -> int:
        n_tokens, asked = self._shapes[hookpoint][0], self._request.tokens_per_image
        return len(self._request.steps) * min(n_tokens, asked or n_tokens)

    def _make(self, shard: int, epoch: int) -> dict[HookPoint, Tensor]:
        first = epoch * len(self._plan)
        if first + len(self._plan) > SEED_BLOCK:
            raise FluxSaeError(
                f"Epoch {epoch} of {len(self._plan)} images would need more than {SEED_BLOCK} seeds. Use fewer epochs."
            )
        plan, size = replace(self._plan, first_seed=self._plan.first_seed + first), self._request.batch_size
        ids = self._shards[shard]
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        rank, world_size = (self._peers.rank, self._peers.world_size) if self._peers else (0, 1)
        pieces: dict[HookPoint, list[Tensor]] = {place: [] for place in self._request.hookpoints}
        for start in range(0, len(batches), world_size):
            turn = batches[start : start + world_size]
            own = self._capture(plan, turn[rank]) if rank < len(turn) else None
            for source, images in enumerate(turn):
                for place, made in pieces.items():
                    if own is not None and source == rank:
                        rows = own[place]
                    else:
                        shape = (len(images), self._rows_per_image(place), self.d_model(place))
                        rows = torch.empty(shape, dtype=torch.bfloat16)
                    made.append(self._peers.broadcast_(rows, source=source) if self._peers else rows)
        joined = {place: torch.cat(made) for place, made in pieces.items()}
        left_out = self._left_out.setdefault(epoch, LeftOut(len(self._plan)))
        return {place: rows.flatten(0, 1) for place, rows in _without_bad(joined, ids, left_out).items()}

    def _capture(self, plan: ImagePlan, image_ids: Sequence[int]) -> dict[HookPoint, Tensor]:
        """Rows (images, rows, d_model) of each hook point; NaN where an image is to be left out."""
        bad: dict[int, str] = {}
        made = capture_rows(self._pipe, plan, image_ids, self._request, on_bad=bad.setdefault)
        rows = {place: tokens.flatten(1, 2) for place, (tokens, _) in made.items()}
        for image_id, reason in bad.items():
            _log.warning("image %d is left out. %s", image_id, reason)
            for tokens in rows.values():
                tokens[list(image_ids).index(image_id)] = torch.nan
        return rows


def _without_bad(
    rows: dict[HookPoint, Float[Tensor, "images rows d_model"]], image_ids: Sequence[int], left_out: LeftOut
) -> dict[HookPoint, Float[Tensor, "images rows d_model"]]:
    """The rows with those of sound images in place of NaN, which every process sees alike.

    Raises:
        FluxSaeError: too many images are left out.
    """
    bad = bad_items(next(iter(rows.values())))
    if not bad:
        return rows
    left_out.image_ids.update(image_ids[item] for item in bad)
    left_out.check("Each is logged above with its step.")
    sound = [item for item in range(len(image_ids)) if item not in bad]
    if not sound:
        raise FluxSaeError(f"All {len(bad)} images of a shard hold NaN or infinite numbers; try another GPU.")
    chosen = torch.tensor([sound[item % len(sound)] if item in bad else item for item in range(len(image_ids))])
    return {place: tokens[chosen] for place, tokens in rows.items()}


class LiveReader:
    """One hook point's rows straight from FLUX: a shard is generated when it is asked for."""

    reads_ahead = False

    def __init__(self, images: LiveImages, hookpoint: HookPoint) -> None:
        self._images, self._hookpoint = images, hookpoint
        self.d_model = images.d_model(hookpoint)

    def n_rows(self) -> list[int]:
        """Rows of each shard."""
        return self._images.n_rows(self._hookpoint)

    def image_sigmas(self) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each row of an image."""
        return self._images.image_sigmas(self._hookpoint)

    def rows(
        self, shards: Sequence[int], wanted: Int[Tensor, " wanted"], *, epoch: int
    ) -> BFloat16[Tensor, "wanted d_model"]:
        """Some of the rows of some shards' images, with the noise of this epoch."""
        rows = torch.empty(len(wanted), self.d_model, dtype=torch.bfloat16)
        first, place = 0, 0
        for shard in shards:
            made = self._images.take(self._hookpoint, shard, epoch=epoch)
            stop = place + int(torch.searchsorted(wanted[place:], first + len(made)))
            rows[place:stop] = made[wanted[place:stop] - first]
            first, place = first + len(made), stop
        return rows


def live_sources(
    pipe: Any,
    plan: ImagePlan,
    request: CaptureRequest,
    *,
    batch_size: int,
    seed: int = 0,
    images_per_shard: int = 32,
    held_out_every: int = 10,
    buffer_bytes: int = 1 << 30,
    peers: Peers | None = None,
) -> dict[HookPoint, MixingBuffer]:
    """Batches of every requested hook point that come from FLUX itself and never touch the disk.

    Each is used as `mixing_buffer` is. Their images are the same and made once, as long as all sources are read side by
    side; `buffer_bytes` is shared out among them. Under several processes (`peers`) each generates its share of the
    images and gets its slice of every batch.

    Raises:
        FluxSaeError: there are too few rows for a batch, or `batch_size` does not divide by the number of processes.
    """
    images = LiveImages(
        pipe, plan, request, images_per_shard=images_per_shard, held_out_every=held_out_every,
        waiting_bytes=buffer_bytes, peers=peers,
    )  # fmt: skip
    rank, world_size = (peers.rank, peers.world_size) if peers else (0, 1)
    return {
        hookpoint: MixingBuffer(
            LiveReader(images, hookpoint), batch_size=batch_size, seed=seed,
            buffer_bytes=buffer_bytes // len(request.hookpoints), rank=rank, world_size=world_size,
        )
        for hookpoint in request.hookpoints
    }  # fmt: skip
