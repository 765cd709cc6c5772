"""Batches on the device, the next one on its way while the last one is in use."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from fluxsae.sae.training.initial import Source


class Batch(NamedTuple):
    """Token rows, and their noise levels where somebody asked for them."""

    rows: Tensor
    sigmas: Tensor | None


class _Sent(NamedTuple):
    batch: Batch
    arrived: torch.cuda.Event | None
    """On CUDA: when the batch is there."""


def feed(
    source: Source, step: int, n_steps: int, *, device: torch.device, with_sigmas: bool = False
) -> Generator[Batch, None, None]:
    """The batches of steps `step` to `n_steps` - 1 in float32 on the device; close it when it is no longer used.

    One batch ahead is assembled, pinned and sent in another thread, on CUDA beside the work of the step.
    """
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    sent = (_send(batch, device, stream) for batch in _batches(source, step, n_steps, with_sigmas))
    for batch, arrived in _one_ahead(sent) if source.reads_ahead else sent:
        if arrived is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(arrived)
            for tensor in batch:
                if tensor is not None:
                    tensor.record_stream(current)
        yield batch


def _batches(source: Source, step: int, n_steps: int, with_sigmas: bool) -> Iterator[Batch]:
    while step < n_steps:
        epoch, cursor = divmod(step, source.n_batches)
        levels = source.sigmas(epoch, cursor=cursor) if with_sigmas else repeat(None)
        for rows, sigmas in zip(source.batches(epoch, cursor=cursor), levels, strict=False):
            yield Batch(rows, sigmas)
            step += 1
            if step >= n_steps:
                return


def _send(batch: Batch, device: torch.device, stream: "torch.cuda.Stream | None") -> _Sent:
    if stream is None:
        levels = None if batch.sigmas is None else batch.sigmas.to(device).float()
        return _Sent(Batch(batch.rows.to(device).float(), levels), None)
    with torch.cuda.stream(stream):  # the stream knows its device; a new thread would take the first
        rows = batch.rows.pin_memory().to(stream.device, non_blocking=True).float()
        levels = batch.sigmas
        if levels is not None:
            levels = levels.pin_memory().to(stream.device, non_blocking=True).float()
        return _Sent(Batch(rows, levels), stream.record_event())


def _one_ahead(batches: Iterator[_Sent]) -> Iterator[_Sent]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch
