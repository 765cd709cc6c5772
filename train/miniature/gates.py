"""Balances the gates of the trained miniature: what a hook point shows is then what the picture feels.

A FLUX block multiplies what its attention and feed-forward layers give by a gate, channel by channel. Only the product
matters, so training leaves some channels loud before a gate that all but closes on them: noise to whoever reads the
layer's output. Here each such channel is turned down and its gate up by the same power of two, until gates are about 1
in the mean. No product changes, so no picture does.
"""

from collections.abc import Iterator

import torch
from torch import nn

from train.miniature.flow import predict_velocity
from train.miniature.models import LATENT_CHANNELS

GUIDANCE = 3.5
LARGEST = 2.0**10
"""No channel is rescaled by more: one that is shut for good would become infinite."""
LEVELS = torch.linspace(0.05, 1.0, 20)
"""Noise levels over which a gate is averaged."""


_GATED = {
    "transformer_blocks": (
        ("norm1", "attn.to_out.0", 2),
        ("norm1", "ff.net.2", 5),
        ("norm1_context", "attn.to_add_out", 2),
        ("norm1_context", "ff_context.net.2", 5),
    ),
    "single_transformer_blocks": (("norm", "proj_out", 2),),
}
"""Blocks -> (norm that makes the gate, layer that is gated, which chunk of the norm's output the gate is)."""


def gated_layers(transformer: nn.Module) -> Iterator[tuple[nn.Linear, nn.Linear, int]]:
    """(layer, the linear layer that makes its gate, which of its chunks the gate is) of every block."""
    for stack, gated in _GATED.items():
        for block in transformer.get_submodule(stack).children():
            for norm, path, chunk in gated:
                layer, maker = block.get_submodule(path), block.get_submodule(f"{norm}.linear")
                assert isinstance(layer, nn.Linear)
                assert isinstance(maker, nn.Linear)
                yield layer, maker, chunk


@torch.no_grad()
def balance_gates(generator: nn.ModuleDict, tokens: torch.Tensor) -> None:
    """Rescales every gated channel in place; gates are averaged over some captions' `tokens` (n, text tokens)."""
    sizes = _mean_gates(generator, tokens)
    for (layer, maker, chunk), size in zip(gated_layers(generator["transformer"]), sizes, strict=True):
        factor = torch.exp2(torch.log2(size.clamp(1 / LARGEST, LARGEST)).round())
        rows = slice(chunk * len(size), (chunk + 1) * len(size))
        for part in (layer.weight, layer.bias):
            part.mul_(factor.reshape(-1, *[1] * (part.ndim - 1)))
        for part in (maker.weight, maker.bias):
            part[rows].div_(factor.reshape(-1, *[1] * (part.ndim - 1)))


def _mean_gates(generator: nn.ModuleDict, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The mean absolute gate of every channel of each gated layer."""
    layers = list(gated_layers(generator["transformer"]))
    totals = [torch.zeros(layer.out_features, device=layer.weight.device) for layer, _, _ in layers]
    n_seen = len(tokens) * len(LEVELS)

    def add(place: int, chunk: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, __: tuple[torch.Tensor, ...], made: torch.Tensor) -> None:
            width = len(totals[place])
            totals[place] += made[:, chunk * width : (chunk + 1) * width].abs().sum(dim=0)

        return layers[place][1].register_forward_hook(hook)

    handles = [add(place, chunk) for place, (_, _, chunk) in enumerate(layers)]
    try:
        for level in LEVELS.tolist():
            noise = torch.zeros(len(tokens), 64, 4 * LATENT_CHANNELS, device=tokens.device)
            filled = torch.full((len(tokens),), level, device=tokens.device)
            predict_velocity(generator, noise, filled, tokens, torch.full_like(filled, GUIDANCE))
    finally:
        for handle in handles:
            handle.remove()
    return [total / n_seen for total in totals]
