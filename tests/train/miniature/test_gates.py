"""Balanced gates: no velocity changes by a bit, and every gate is about 1 in the mean."""

import pytest
import torch
from torch import nn

from train.miniature.flow import pack, predict_velocity
from train.miniature.gates import LEVELS, balance_gates, gated_layers
from train.miniature.models import LATENT_CHANNELS, build_generator, build_tokenizer, tokenize

PROMPTS = ["a large red circle", "a small blue star on a black background", "two green rings"]


@pytest.fixture
def generator() -> nn.ModuleDict:
    torch.manual_seed(0)
    made = build_generator().eval()
    for layer, maker, _ in gated_layers(made["transformer"]):  # fresh gates are all alike
        nn.init.normal_(layer.bias)
        maker.weight.data *= torch.exp(3 * torch.rand(len(maker.weight), 1))
    return made


def _tokens() -> torch.Tensor:
    return tokenize(build_tokenizer(), PROMPTS).long()


def _velocity(generator: nn.ModuleDict) -> torch.Tensor:
    noisy = pack(torch.randn(len(PROMPTS), LATENT_CHANNELS, 16, 16, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        return predict_velocity(generator, noisy, torch.tensor([0.9, 0.5, 0.2]), _tokens(), torch.full((3,), 3.5))


def _mean_gates(generator: nn.ModuleDict) -> torch.Tensor:
    """Mean absolute gates of all layers, (layers, width), seen from outside."""
    made: dict[int, list[torch.Tensor]] = {}
    layers = list(gated_layers(generator["transformer"]))
    handles = [
        maker.register_forward_hook(
            lambda _, __, out, place=place, chunk=chunk, width=layer.out_features: made.setdefault(place, []).append(
                out[:, chunk * width : (chunk + 1) * width].abs()
            )
        )
        for place, (layer, maker, chunk) in enumerate(layers)
    ]
    noisy = torch.zeros(len(PROMPTS), 64, 4 * LATENT_CHANNELS)
    with torch.no_grad():
        for level in LEVELS.tolist():
            predict_velocity(generator, noisy, torch.full((3,), level), _tokens(), torch.full((3,), 3.5))
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(made[place]).mean(dim=0) for place in range(len(layers))])


def test_gates_become_about_one_and_no_velocity_changes(generator: nn.ModuleDict) -> None:
    plain, before = _velocity(generator), _mean_gates(generator)
    balance_gates(generator, _tokens())
    after = _mean_gates(generator)
    assert torch.equal(_velocity(generator), plain)
    assert before.min() < 0.5 < 2**0.5 < before.max()
    assert len(after) == 4 * 4 + 4
    assert after.min() >= 2**-0.5 * 0.999
    assert after.max() <= 2**0.5 * 1.001


def test_balancing_twice_changes_nothing_more(generator: nn.ModuleDict) -> None:
    balance_gates(generator, _tokens())
    once = {name: value.clone() for name, value in generator["transformer"].state_dict().items()}
    balance_gates(generator, _tokens())
    again = generator["transformer"].state_dict()
    assert all(torch.equal(value, again[name]) for name, value in once.items())
