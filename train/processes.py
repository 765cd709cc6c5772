"""The processes of a `torchrun`; without it, the one there is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxsae.sae.training.processes import Processes


_PATIENCE = timedelta(days=7)  # one process may generate for hours while the others wait


@contextmanager
def processes() -> Iterator[Processes]:
    """This process among its peers, connected for as long as the block runs."""
    import torch
    import torch.distributed as dist

    from fluxsae.sae.training.processes import Processes

    if "RANK" not in os.environ or dist.is_initialized():
        yield Processes.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # gloo beside nccl, because what waits here are files, not tensors.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Processes.current()
    finally:
        dist.destroy_process_group()
