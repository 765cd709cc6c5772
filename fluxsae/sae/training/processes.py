"""Sums over the processes of a `torchrun`; with one process they change nothing."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that train together; each holds its share of every batch and the same weights."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """The initialised process group's, or the one process there is."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum_(self, tensor: Tensor) -> Tensor:
        """The tensor, replaced by its sum over all processes."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_(self, flags: Tensor) -> Tensor:
        """Whether each flag is set in any process."""
        if self.world_size > 1:
            counts = flags.to(torch.int32)
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
            return counts > 0
        return flags

    def broadcast_(self, tensor: Tensor, *, source: int) -> Tensor:
        """The tensor (contiguous, in main memory), replaced by that of process `source`."""
        if self.world_size > 1:
            dist.broadcast(tensor.view(torch.uint8), src=source)  # bytes: gloo does not know every type
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Equal-shaped tensors of all processes, one after the other along the first axis."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world_size > 1:
            dist.barrier()
