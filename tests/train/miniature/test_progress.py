"""Checkpoints of the miniature's training."""

from pathlib import Path

import torch

from train.miniature.progress import Checkpoint, StageClock, start_average


def trained(seed: int) -> tuple[torch.nn.Linear, torch.optim.Adam]:
    """A layer after one step, and what moved it."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    checkpoint = Checkpoint(tmp_path / "stage")
    assert not checkpoint.exists
    clock = StageClock("stage", 10, None, step=4)
    checkpoint.save(model, start_average(model), [optimizer], clock, finished=True)
    other, its_optimizer = trained(1)
    its_average, its_clock = start_average(other), StageClock("stage", 10, None)
    checkpoint.load(other, its_average, [its_optimizer], its_clock)
    assert checkpoint.is_finished
    assert its_clock.step == 4
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.equal(mine, its_average[name])
        assert all(torch.equal(value, its_optimizer.state[theirs][key]) for key, value in optimizer.state[mine].items())
    assert not [path for path in checkpoint.folder.iterdir() if path.name.startswith(".")]
