"""How far a training stage is, by steps or by the clock, and its files on disk."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from fluxsae.files import read_json, save_tensors, write_json
from fluxsae.sae.training.processes import Processes

REPORT_EVERY_SECONDS = 10.0
SAVE_EVERY_SECONDS = 60.0


@dataclass
class StageClock:
    """Counts a stage's steps; the stage ends at `steps`, or after `budget_seconds` where given (0: at once).

    The learning rate follows `progress`, so that a stage cut short by its budget still decays to zero. Of several
    processes the first one's clock counts for all.
    """

    name: str
    steps: int
    budget_seconds: float | None
    step: int = 0
    elapsed_before: float = 0.0
    pause: Path | None = None
    """While this file exists, the steps wait, and the time waited does not count."""

    def __post_init__(self) -> None:
        self._started = self._reported = self._saved = time.monotonic()
        self._agreed: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds spent in this stage, over all sessions."""
        return self.elapsed_before + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the stage that is done, 0 to 1."""
        if self._agreed is not None:
            return self._agreed
        if self.budget_seconds == 0:
            return 1.0
        by_clock = self.elapsed / self.budget_seconds if self.budget_seconds else 0.0
        return min(1.0, max(self.step / self.steps, by_clock))

    def learning_rate(self, peak: float, *, warmup: int = 300, decay: float = 0.5) -> float:
        """Linear warm-up (`warmup` steps or 5 % of the stage), a plateau, a cosine fall over the last `decay` of it."""
        fall = max(0.0, (self.progress - (1 - decay)) / decay)
        rise = min(1.0, max(self.step / warmup, self.progress / 0.05))
        return peak * rise * 0.5 * (1 + math.cos(math.pi * fall))

    def ticks(self) -> Iterator[int]:
        """The steps that are left."""
        peers = Processes.current()
        while True:
            self._agreed = None
            if peers.world_size > 1:
                self._agreed = float(peers.broadcast_(torch.tensor([self.progress]).double(), source=0))
            if self.step >= self.steps or self.progress >= 1.0:
                return
            self.step += 1
            self._wait()
            yield self.step - 1

    def _wait(self) -> None:
        began = time.monotonic()
        while Processes.current().rank == 0 and self.pause is not None and self.pause.exists():
            time.sleep(1.0)
        self.elapsed_before -= time.monotonic() - began

    def is_save_due(self) -> bool:
        """Whether the last checkpoint is old enough for another; asking counts as saving."""
        is_due = time.monotonic() - self._saved > SAVE_EVERY_SECONDS
        if is_due:
            self._saved = time.monotonic()
        return is_due

    def report(self, loss: torch.Tensor) -> None:
        """Print a line every few seconds; only then is the loss read back from the device."""
        now = time.monotonic()
        if Processes.current().rank > 0:
            return
        if now - self._reported < REPORT_EVERY_SECONDS and self.step < self.steps:
            return
        self._reported = now
        left = self.elapsed / max(self.progress, 1e-6) * (1 - self.progress)
        print(
            f"{self.name}: step {self.step:,}  loss {loss.item():.4f}  {self.elapsed:.0f} s, {left:.0f} s left",
            flush=True,
        )


class ConstantClock(StageClock):
    """Ends like any other clock, but the learning rate stays where it is after the warm-up."""

    def learning_rate(self, peak: float, *, warmup: int = 300, decay: float = 0.5) -> float:
        """Linear warm-up over `warmup` steps, then `peak`; there is no `decay`."""
        return peak * min(1.0, self.step / warmup)


class Checkpoint:
    """One stage's folder: weights, their moving average, the optimiser's moments, and where the clock stood."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether a complete checkpoint lies there; the clock is written last."""
        return (self.folder / "clock.json").is_file()

    @property
    def is_finished(self) -> bool:
        """Whether the stage ran to its end."""
        return self.exists and bool(read_json(self.folder / "clock.json")["finished"])

    def save(
        self,
        model: nn.Module,
        average: dict[str, torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        clock: StageClock,
        *,
        finished: bool,
    ) -> None:
        """Write everything that is needed to go on; the first of several processes writes, all wait for the last."""
        peers = Processes.current()
        if peers.rank == 0:
            self._write(model, average, optimizers, clock, finished=finished)
        if finished:
            peers.wait()

    def _write(
        self,
        model: nn.Module,
        average: dict[str, torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        clock: StageClock,
        *,
        finished: bool,
    ) -> None:
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        memory = {
            f"{names[parameter]}|{key}": torch.as_tensor(value)
            for optimizer in optimizers
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
        }
        save_tensors(self.folder / "weights.safetensors", dict(model.named_parameters()))
        save_tensors(self.folder / "average.safetensors", average)
        save_tensors(self.folder / "optimizers.safetensors", memory)
        record = {"step": clock.step, "elapsed": clock.elapsed, "finished": finished}
        write_json(self.folder / "clock.json", record)

    def load(
        self,
        model: nn.Module,
        average: dict[str, torch.Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        clock: StageClock,
    ) -> None:
        """Put everything back in place."""
        record = read_json(self.folder / "clock.json")
        clock.step, clock.elapsed_before = record["step"], record["elapsed"]
        _fill(model, load_file(self.folder / "weights.safetensors"))
        for name, tensor in load_file(self.folder / "average.safetensors").items():
            average[name].copy_(tensor)
        memory = load_file(self.folder / "optimizers.safetensors")
        owners = {parameter: opt for opt in optimizers for group in opt.param_groups for parameter in group["params"]}
        parameters = dict(model.named_parameters())
        for entry, value in memory.items():
            name, key = entry.split("|")
            parameter = parameters[name]
            owners[parameter].state[parameter][key] = value if key == "step" else value.to(parameter.device)

    def load_average(self, model: nn.Module) -> None:
        """Fill `model` with the moving average alone."""
        _fill(model, load_file(self.folder / "average.safetensors"))


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


def start_average(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all weights, to become their moving average."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def update_average(average: dict[str, torch.Tensor], model: nn.Module, step: int, *, decay: float = 0.9993) -> None:
    """Move the average towards the weights; faster in the beginning."""
    rate = 1 - min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), list(model.parameters()), rate)


def batch_seed(seed: int, step: int) -> int:
    """The seed of one step's batch, another in every process."""
    return seed * 1_000_003 + step + 7_919_000_011 * Processes.current().rank


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replaces every gradient by its mean over the processes of a `torchrun`."""
    peers = Processes.current()
    if peers.world_size == 1:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    mean = peers.sum_(torch.cat([gradient.flatten() for gradient in gradients])) / peers.world_size
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
