"""The handover stage of the miniature's training: single-stream blocks read other captions, nothing else changes."""

from typing import Any

import pytest
import torch
from torch import nn

from train.miniature.flow import pack, predict_velocity
from train.miniature.handover import SHARE, Handover, draw_order
from train.miniature.models import LATENT_CHANNELS, build_generator, build_tokenizer, tokenize

PROMPTS = ["a large red circle", "a small blue star on a black background", "two green rings"]


@pytest.fixture(scope="module")
def generator() -> nn.ModuleDict:
    torch.manual_seed(0)
    return build_generator().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {
        "noisy": pack(torch.randn(len(PROMPTS), LATENT_CHANNELS, 8, 8, generator=draws)),
        "time": torch.tensor([0.9, 0.5, 0.2]),
        "tokens": tokenize(build_tokenizer(), PROMPTS).long(),
        "guidance": torch.tensor([1.0, 2.0, 3.0]),
    }


@torch.no_grad()
def test_the_own_captions_change_nothing_and_others_do(
    generator: nn.ModuleDict, inputs: dict[str, torch.Tensor]
) -> None:
    plain = predict_velocity(generator, **inputs)
    handover = Handover(generator["transformer"])
    own = predict_velocity(generator, **inputs, handover=handover, order=torch.arange(3))
    others = predict_velocity(generator, **inputs, handover=handover, order=torch.tensor([1, 0, 2]))
    outside = predict_velocity(generator, **inputs)
    handover.remove()
    assert torch.equal(own, plain)
    assert torch.equal(outside, plain)
    assert not torch.allclose(others[:2], plain[:2])
    torch.testing.assert_close(others[2], plain[2])


@torch.no_grad()
def test_only_the_words_of_the_single_stream_blocks_are_exchanged(
    generator: nn.ModuleDict, inputs: dict[str, torch.Tensor]
) -> None:
    """They get the other example's text tokens and pooled text, and keep their own image tokens and noise level."""
    handover = Handover(generator["transformer"])
    block = generator["transformer"].single_transformer_blocks[0]
    seen: list[dict[str, torch.Tensor]] = []

    def note(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append({name: kwargs[name].clone() for name in ("hidden_states", "encoder_hidden_states", "temb")})

    hook = block.register_forward_pre_hook(note, with_kwargs=True)
    order = torch.tensor([1, 2, 0])
    predict_velocity(generator, **inputs)
    predict_velocity(generator, **inputs, handover=handover, order=order)
    predict_velocity(generator, **(inputs | {"tokens": inputs["tokens"][order]}))
    hook.remove()
    handover.remove()
    own, mixed, exchanged = seen
    assert torch.equal(mixed["hidden_states"], own["hidden_states"])
    assert torch.equal(mixed["encoder_hidden_states"], own["encoder_hidden_states"][order])
    torch.testing.assert_close(mixed["temb"], exchanged["temb"])
    assert not torch.allclose(mixed["temb"], own["temb"])


def test_hooks_are_gone_after_removal_and_idle_after_a_fault(
    generator: nn.ModuleDict, inputs: dict[str, torch.Tensor]
) -> None:
    transformer = generator["transformer"]
    handover = Handover(transformer)
    with pytest.raises(IndexError), torch.no_grad():
        predict_velocity(generator, **inputs, handover=handover, order=torch.tensor([0, 1, 9]))
    with torch.no_grad():
        after_fault = predict_velocity(generator, **inputs)
    handover.remove()
    with torch.no_grad():
        assert torch.equal(after_fault, predict_velocity(generator, **inputs))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_most_examples_read_another_caption() -> None:
    order = draw_order(4000, torch.Generator().manual_seed(2))
    share = float((order != torch.arange(4000)).float().mean())
    assert abs(share - SHARE) < 0.03
    assert torch.equal(order, draw_order(4000, torch.Generator().manual_seed(2)))
