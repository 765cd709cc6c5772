"""The training loop: every architecture, any number of SAEs in one pass, stopped and continued exactly."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from fluxsae.errors import FluxSaeError, maker
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.checkpoints import LOG_NAME, MetricsLog, Plan, load_checkpoint, save_checkpoint
from fluxsae.sae.training.config import TrainConfig
from fluxsae.sae.training.feed import Batch, feed
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


@dataclass(frozen=True)
class Task:
    """SAEs of one hook point, and what they are trained on."""

    saes: Mapping[str, SaeConfig]
    source: Source
    folder: Path | None = None
    """Where checkpoints and metrics.jsonl are kept; None keeps none."""
    tracker: Callable[[Mapping[str, Any], int], None] | None = None
    """Gets every line of the log with its step."""


@dataclass
class _Run:
    trainers: dict[str, SaeTrainer]
    plan: Plan
    folder: Path | None
    processes: Processes
    tracker: Callable[[Mapping[str, Any], int], None] | None
    step: int = 0
    """Batches seen."""
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))
    log: MetricsLog = field(default_factory=lambda: MetricsLog(None, step=0))
    pending: list[tuple[int, str, dict[str, Tensor]]] = field(default_factory=list)
    """Reports of steps that were not written yet: (step, SAE, report)."""
    saved_at: float = field(default_factory=time.monotonic)
    reported_at: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    """Seconds since the last report in which a step waited for its batch."""

    @property
    def n_steps(self) -> int:
        return self.plan.n_steps

    @property
    def is_finished(self) -> bool:
        return self.step >= self.n_steps

    def result(self) -> TrainResult:
        return TrainResult({name: trainer.sae for name, trainer in self.trainers.items()}, self.step, self.n_steps)


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
    """Trains SAEs of one hook point, all in one pass over the data: see `train_together`."""
    task = Task(saes, source, Path(folder) if folder else None, tracker)
    return train_together([task], config, device=device, processes=processes, on_step=on_step)[0]


def train_together(
    tasks: Sequence[Task],
    config: TrainConfig,
    *,
    device: str | torch.device = "cpu",
    processes: Processes | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> list[TrainResult]:
    """Trains the SAEs of several hook points side by side, as sources want it that make their rows together.

    The next batch is assembled and sent to the device while a step runs, where the source allows it. With a `folder`,
    checkpoints and `metrics.jsonl` are kept there; a checkpoint that is there is continued, on a CPU to the same bits
    as an uninterrupted run. SIGTERM and SIGINT end the loop after a last checkpoint. `on_step` gets (steps done, steps
    in all).

    Raises:
        FluxSaeError: widths that do not fit, a checkpoint of other settings, a fault that the config stops at, or
            more than half of the batches skipped.
    """
    peers, place = processes or Processes.current(), torch.device(device)
    runs = [_begin(task, config, place, peers) for task in tasks]
    n_steps = sum(run.n_steps for run in runs)
    with _stop_signals() as stop, ExitStack() as stack:
        for run, task in zip(runs, tasks, strict=True):
            with_sigmas = any(sae.is_sigma_conditioned for sae in task.saes.values())
            batches = feed(task.source, run.step, run.n_steps, device=place, with_sigmas=with_sigmas)
            run.batches = stack.enter_context(closing(batches))
        while not all(run.is_finished for run in runs):
            run = min(runs, key=lambda run: run.step / run.n_steps)
            _advance(run)
            done = sum(run.step for run in runs)
            if on_step is not None:
                on_step(done, n_steps)
            if run.step % config.log_every == 0 or run.is_finished:
                _report(run)
                if run.is_finished or _is_due(run):
                    _save(run)
            if _agrees_to_stop(stop, done, peers):
                for unfinished in runs:
                    _report(unfinished)
                    _save(unfinished)
                break
    return [run.result() for run in runs]


def _begin(task: Task, config: TrainConfig, device: torch.device, processes: Processes) -> _Run:
    """The training from its checkpoint, or from weights that were initialised from the data."""
    source = task.source
    plan = Plan(dict(task.saes), config, source.n_batches, source.batch_size, source.order)
    trainers = _build_trainers(plan, source, device=device, processes=processes)
    run = _Run(trainers, plan, task.folder, processes, task.tracker if processes.rank == 0 else None)
    run.step = _continue(run, source)
    run.saved_at = run.reported_at = time.monotonic()
    return run


def _advance(run: _Run) -> None:
    started = time.monotonic()
    batch = next(run.batches)
    run.waited += time.monotonic() - started
    _train_step(run, batch, run.step)
    run.step += 1


def _is_due(run: _Run) -> bool:
    """Whether it is time for a checkpoint, for all processes if it is for one."""
    is_due = time.monotonic() - run.saved_at >= 60 * run.plan.config.checkpoint_minutes
    return bool(run.processes.any_(torch.tensor([is_due])))


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


def _train_step(run: _Run, batch: Batch, step: int) -> None:
    config = run.plan.config
    first = next(iter(run.trainers.values())).sae
    x_tilde = first.normalise(batch.rows)  # the SAEs of one run share their input statistics
    for name, trainer in run.trainers.items():
        run.pending.append((step, name, trainer.step(x_tilde, step, sigmas=batch.sigmas)))
        if trainer.sae.config.architecture == "l1" and config.resamples_at(step, run.n_steps):
            count = resample_dead(trainer, x_tilde, step=step, processes=run.processes, sigmas=batch.sigmas)
            run.log.write({"step": step + 1, "sae": name, "event": "resampled", "features": count})
    stops = config.on_nan == "stop" or config.on_spike == "stop"
    if stops and batch.rows.device.type == "cpu":
        _stop_at_fault(run)


def _refuse_bad_data(run: _Run) -> None:
    """An SAE that missed most of its batches is an untrained one: nothing is to be made of it."""
    step = run.step
    if step < min(_FEWEST_STEPS, run.n_steps):
        return
    for name, trainer in run.trainers.items():
        n_skipped = int(trainer.n_skipped)
        if n_skipped * 2 > step:
            raise FluxSaeError(
                f"SAE {name} skipped {n_skipped} of {step} batches: they or their gradients hold NaN or infinite "
                "numbers, or their loss was a spike. Training stopped, and no SAE was written. Collect the activations "
                f"again in bfloat16 or float32, or lower the learning rate. Bad shards are found by {maker('verify')}."
            )


def _report(run: _Run) -> None:
    """Writes the last step's metrics and every fault since the last report: the only wait for the device."""
    if not run.pending:
        return
    _stop_at_fault(run)
    for at, name, report in run.pending:
        if int(report["fault"]):
            reaction = "skipped" if bool(report["is_skipped"]) else "reported"
            fault = _FAULTS[int(report["fault"])]
            _write(run, at + 1, {"sae": name, "event": fault, "reaction": reaction, "loss": float(report["loss"])})
    for name, trainer in run.trainers.items():
        report = next(report for _, sae, report in reversed(run.pending) if sae == name)
        _write(run, run.step, {"sae": name, **_summary(trainer, report, run)})
    run.pending.clear()
    run.waited, run.reported_at = 0.0, time.monotonic()
    _refuse_bad_data(run)


def _summary(trainer: SaeTrainer, report: dict[str, Tensor], run: _Run) -> dict[str, Any]:
    config, sae, step = run.plan.config, trainer.sae.config, run.step
    values = {name: float(value) for name, value in report.items() if name not in ("fault", "is_skipped")}
    return {
        "epoch": (step - 1) // run.plan.n_batches,
        "tokens": step * run.plan.batch_size,
        "lr": config.learning_rate(step - 1, run.n_steps, sae.n_features),
        **values,
        "dead_share": float((trainer.tokens_since_fired >= sae.dead_after_tokens).double().mean()),
        "n_skipped": int(trainer.n_skipped),
        "wait_share": round(run.waited / max(time.monotonic() - run.reported_at, 1e-9), 4),
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


def _save(run: _Run) -> None:
    if run.folder and run.processes.rank == 0:
        states = {name: trainer.state() for name, trainer in run.trainers.items()}
        save_checkpoint(run.folder, run.plan, run.step, states)
    run.processes.wait()
    run.saved_at = time.monotonic()


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
