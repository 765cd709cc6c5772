"""The training loop: every architecture, any number of SAEs in one pass, stopped and continued exactly."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.checkpoints import LOG_NAME, MetricsLog, Plan, load_checkpoint, save_checkpoint
from fluxsae.sae.training.config import TrainConfig
from fluxsae.sae.training.initial import Source, initialise, resample_dead
from fluxsae.sae.training.processes import Processes
from fluxsae.sae.training.trainer import SaeTrainer

_FEWEST_STEPS = 20  # fewer say little about the data
_FAULTS = {1: "not finite", 2: "spike"}
_ASK_EVERY = 10


@dataclass(frozen=True)
class TrainResult:
    """The SAEs by name, and how far their training came."""

    saes: dict[str, SparseAutoencoder]
    step: int
    """Batches seen."""
    n_steps: int
    """Batches of the whole run."""

    @property
    def is_finished(self) -> bool:
        """False where training was stopped by a signal; started again, it continues."""
        return self.step >= self.n_steps


@dataclass
class _Run:
    trainers: dict[str, SaeTrainer]
    plan: Plan
    folder: Path | None
    processes: Processes
    tracker: Callable[[Mapping[str, Any], int], None] | None
    log: MetricsLog = field(default_factory=lambda: MetricsLog(None, step=0))
    pending: list[tuple[int, str, dict[str, Tensor]]] = field(default_factory=list)
    """Reports of steps that were not written yet: (step, SAE, report)."""

    @property
    def n_steps(self) -> int:
        return self.plan.n_steps


def train(
    saes: Mapping[str, SaeConfig],
    source: Source,
    config: TrainConfig,
    *,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    processes: Processes | None = None,
    tracker: Callable[[Mapping[str, Any], int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainResult:
    """Trains SAEs of one hook point, all in one pass over the data.

    With a `folder`, checkpoints and `metrics.jsonl` are kept there; a checkpoint that is there is continued, on a CPU
    to the same bits as an uninterrupted run. SIGTERM and SIGINT end the loop after a last checkpoint. `tracker` gets
    every line of the log with its step, `on_step` (steps done, steps in all).

    Raises:
        FluxSaeError: widths that do not fit, a checkpoint of other settings, a fault that the config stops at, or
            more than half of the batches skipped.
    """
    plan = Plan(dict(saes), config, source.n_batches, source.batch_size, source.order)
    peers = processes or Processes.current()
    trainers = _build_trainers(plan, source, device=torch.device(device), processes=peers)
    run = _Run(trainers, plan, Path(folder) if folder else None, peers, tracker if peers.rank == 0 else None)
    step = _continue(run, source)
    with _stop_signals() as stop:
        for batch in _batches(source, step, run.n_steps):
            _train_step(run, batch.to(device, non_blocking=True).float(), step)
            step += 1
            if on_step is not None:
                on_step(step, run.n_steps)
            is_stopped = _agrees_to_stop(stop, step, run.processes)
            if step % config.log_every == 0 or step == run.n_steps or is_stopped:
                _report(run, step)
                _refuse_bad_data(run, step)
            if step % config.checkpoint_every == 0 or step == run.n_steps or is_stopped:
                _save(run, step)
            if is_stopped:
                break
    return TrainResult({name: trainer.sae for name, trainer in run.trainers.items()}, step, run.n_steps)


def _build_trainers(plan: Plan, source: Source, *, device: torch.device, processes: Processes) -> dict[str, SaeTrainer]:
    trainers = {}
    for name, config in plan.saes.items():
        if config.d_model != source.d_model:
            raise FluxSaeError(
                f"SAE {name} has d_model {config.d_model}, but the activations have width {source.d_model}. "
                f"Use d_model {source.d_model}, or the activations of another hook point."
            )
        sae = SparseAutoencoder(config, seed=plan.config.seed).to(device)
        trainers[name] = SaeTrainer(sae, plan.config, n_steps=plan.n_steps, processes=processes)
    return trainers


def _continue(run: _Run, source: Source) -> int:
    """The step to begin with: the checkpoint's, or 0 after the weights were initialised from the data."""
    found = load_checkpoint(run.folder, run.plan) if run.folder else None
    if found is None:
        saes = [trainer.sae for trainer in run.trainers.values()]
        initialise(saes, source, n_rows=run.plan.config.init_rows, processes=run.processes)
    else:
        for name, trainer in run.trainers.items():
            trainer.load_state(found[1][name])
    step = found[0] if found else 0
    run.processes.wait()
    if run.folder and run.processes.rank == 0:
        run.log = MetricsLog(run.folder / LOG_NAME, step=step)
    return step


def _batches(source: Source, step: int, n_steps: int) -> Iterator[Tensor]:
    while step < n_steps:
        epoch, cursor = divmod(step, source.n_batches)
        for batch in source.batches(epoch, cursor=cursor):
            yield batch
            step += 1
            if step >= n_steps:
                return


def _train_step(run: _Run, batch: Tensor, step: int) -> None:
    config = run.plan.config
    first = next(iter(run.trainers.values())).sae
    x_tilde = first.normalise(batch)  # the SAEs of one run share their input statistics
    for name, trainer in run.trainers.items():
        run.pending.append((step, name, trainer.step(x_tilde, step)))
        if trainer.sae.config.architecture == "l1" and config.resamples_at(step, run.n_steps):
            count = resample_dead(trainer, x_tilde, step=step, processes=run.processes)
            run.log.write({"step": step + 1, "sae": name, "event": "resampled", "features": count})
    stops = config.on_nan == "stop" or config.on_spike == "stop"
    if stops and batch.device.type == "cpu":
        _stop_at_fault(run)


def _refuse_bad_data(run: _Run, step: int) -> None:
    """An SAE that missed most of its batches is an untrained one: nothing is to be made of it."""
    if step < min(_FEWEST_STEPS, run.n_steps):
        return
    for name, trainer in run.trainers.items():
        n_skipped = int(trainer.n_skipped)
        if n_skipped * 2 > step:
            raise FluxSaeError(
                f"SAE {name} skipped {n_skipped} of {step} batches: they or their gradients hold NaN or infinite "
                "numbers, or their loss was a spike. Training stopped, and no SAE was written. Collect the activations "
                "again in bfloat16 or float32 (`python -m train.verify` finds bad ones), or lower the learning rate."
            )


def _report(run: _Run, step: int) -> None:
    """Writes the last step's metrics and every fault since the last report: the only wait for the device."""
    _stop_at_fault(run)
    for at, name, report in run.pending:
        if int(report["fault"]):
            reaction = "skipped" if bool(report["is_skipped"]) else "reported"
            fault = _FAULTS[int(report["fault"])]
            _write(run, at + 1, {"sae": name, "event": fault, "reaction": reaction, "loss": float(report["loss"])})
    for name, trainer in run.trainers.items():
        report = next(report for _, sae, report in reversed(run.pending) if sae == name)
        _write(run, step, {"sae": name, **_summary(trainer, report, step, run)})
    run.pending.clear()


def _summary(trainer: SaeTrainer, report: dict[str, Tensor], step: int, run: _Run) -> dict[str, Any]:
    config, sae = run.plan.config, trainer.sae.config
    values = {name: float(value) for name, value in report.items() if name not in ("fault", "is_skipped")}
    return {
        "epoch": (step - 1) // run.plan.n_batches,
        "tokens": step * run.plan.batch_size,
        "lr": config.learning_rate(step - 1, run.n_steps, sae.n_features),
        **values,
        "dead_share": float((trainer.tokens_since_fired >= sae.dead_after_tokens).double().mean()),
        "n_skipped": int(trainer.n_skipped),
        "time": round(time.time(), 3),
    }


def _write(run: _Run, step: int, line: dict[str, Any]) -> None:
    run.log.write({"step": step, **line})
    if run.tracker is not None:
        run.tracker(line, step)


def _stop_at_fault(run: _Run) -> None:
    """Ends the run where the config says so; the last checkpoint stays, and the bad batch never reached the weights."""
    reactions = {1: run.plan.config.on_nan, 2: run.plan.config.on_spike}
    for at, name, report in run.pending:
        fault = int(report["fault"])
        if fault and reactions[fault] == "stop":
            raise FluxSaeError(
                f"SAE {name}: the loss at step {at + 1} is {float(report['loss']):g} ({_FAULTS[fault]}). Training "
                "stopped there, as configured; look at the data of that batch, lower the learning rate, or skip."
            )


def _save(run: _Run, step: int) -> None:
    if run.folder and run.processes.rank == 0:
        save_checkpoint(run.folder, run.plan, step, {name: trainer.state() for name, trainer in run.trainers.items()})
    run.processes.wait()


def _agrees_to_stop(stop: threading.Event, step: int, processes: Processes) -> bool:
    """Whether to stop here: at once alone; with others all at the same step, asked now and then."""
    if processes.world_size == 1:
        return stop.is_set()
    return step % _ASK_EVERY == 0 and bool(processes.any_(torch.tensor([stop.is_set()])))


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; elsewhere than in the main thread nothing is caught."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        stop.set()

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
