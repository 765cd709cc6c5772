"""Makes the image tokens tell all: the single-stream blocks are given another scene's caption while training.

Left alone, so small a transformer lets its single-stream blocks look every word up again, and what an edit wrote into
the image tokens before them is overruled by the prompt. Where the words that those blocks read are not to be trusted,
the double-stream blocks must write what the picture will be into the image tokens, and the rest must believe them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SHARE = 0.8
"""Of the training examples, those whose single-stream blocks read another caption."""


def draw_order(n: int, generator: torch.Generator) -> torch.Tensor:
    """For each of `n` examples the place of the example whose caption its single-stream blocks read, (n,)."""
    device = generator.device
    others = torch.roll(torch.arange(n, device=device), 1)
    is_other = torch.rand(n, generator=generator, device=device) < SHARE
    return torch.where(is_other, others, torch.arange(n, device=device))


class Handover:
    """Hooks on a FluxTransformer2DModel; they act within `captions_of` alone.

    Both ways by which words reach a single-stream block are exchanged: the text tokens, and the pooled text in its
    modulation. Noise level and guidance stay.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._order: torch.Tensor | None = None
        self._shift: torch.Tensor | None = None
        blocks: Any = transformer
        self._handles = [
            blocks.transformer_blocks[-1].register_forward_hook(self._exchange_tokens),
            blocks.norm_out.register_forward_pre_hook(self._exchange_last),
            *(
                block.register_forward_pre_hook(self._exchange_modulation, with_kwargs=True)
                for block in blocks.single_transformer_blocks
            ),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def captions_of(self, order: torch.Tensor, pooled: torch.Tensor) -> Iterator[None]:
        """Gives example b the words of example `order[b]`; `pooled` is the text part of the modulation, (batch, d)."""
        self._order, self._shift = order, pooled[order] - pooled
        try:
            yield
        finally:
            self._order = self._shift = None

    def _exchange_tokens(self, _module: nn.Module, _args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
        if self._order is None:
            return None
        text, image = output
        return text[self._order], image

    def _exchange_modulation(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._shift is None:
            return None
        return args, kwargs | {"temb": kwargs["temb"] + self._shift}

    def _exchange_last(self, _module: nn.Module, args: tuple[torch.Tensor, torch.Tensor]) -> Any:
        if self._shift is None:
            return None
        hidden, temb = args
        return hidden, temb + self._shift
