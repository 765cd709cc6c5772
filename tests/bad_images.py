"""Images whose activations turn into NaN or infinite numbers, as where float16 overflows."""

from contextlib import AbstractContextManager
from typing import Any

import torch

from fluxsae.flux import BlockCall, FluxPipeline, block_hooks
from fluxsae.flux.hookpoints import HookPoint


def spoil_second(call: BlockCall) -> torch.Tensor:
    """As a number that overflows would come out of a block: in the second image of a batch."""
    spoiled = call.tokens.clone()
    spoiled[1:2, 0, 0] = float("inf")
    return spoiled


def spoil_in(pipe: FluxPipeline, *batches: int, step: int = 1) -> AbstractContextManager[Any]:
    """The second image of these batches, counted from 0, turns bad at a step; of all batches without any."""
    seen: list[int] = []

    def spoil(call: BlockCall) -> torch.Tensor | None:
        if call.step != step:
            return None
        seen.append(call.step)
        return spoil_second(call) if not batches or len(seen) - 1 in batches else None

    return block_hooks(pipe, {HookPoint.parse("transformer_blocks.0"): spoil})
