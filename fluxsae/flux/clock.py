"""The step clock: at which step of the full schedule the transformer is, whoever calls it."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fluxsae.errors import FluxSaeError
from fluxsae.flux.compiled import refuse_whole_compile
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.schedules import Schedule, refuse_repeats
from fluxsae.flux.sharing import check_thread, held


@runtime_checkable
class FluxLike(Protocol):
    """What hooks need of a pipeline: a transformer of one of FLUX's families, and its scheduler."""

    transformer: nn.Module
    scheduler: Any


@dataclass(frozen=True, eq=False)
class TransformerCall:
    """One forward pass of the transformer, known before its first block runs."""

    step: int
    sigma: float
    sigmas: tuple[float, ...]
    is_conditional: bool
    run: int
    """Counts the runs that the clock has seen; a run that goes on after a nested one keeps its number."""
    is_first_of_run: bool
    n_text: int
    grid: TokenGrid
    """Of the image that is made: tokens of reference images (FLUX.1 Kontext) come behind its own and do not count."""
    inputs: dict[str, Any]


@dataclass(eq=False)
class _Run:
    """A run that the clock has seen."""

    number: int
    grid: TokenGrid
    last_step: int | None = None


class _StepClock:
    """Reads the step from the transformer's own `timestep` argument, never from a count of calls.

    The schedule is cast exactly as FluxPipeline casts it (to the latents' dtype, then divided by 1000). Steps whose
    timesteps are then equal (28 steps in bfloat16 at 1792 px have some) are told apart by the scheduler's own step
    index. The first call at a step is the conditional pass. Every run sets new timesteps, a new tensor, which tells
    runs apart, also where one is nested in another.
    """

    def __init__(self, pipe: FluxLike) -> None:
        self._pipe = pipe
        self._signature = inspect.signature(pipe.transformer.forward)
        self._schedule: Schedule | None = None
        self._sigmas: tuple[float, ...] = ()
        # Keyed by the schedule's tensor, and gone with it.
        self._runs = WeakTensorKeyDictionary()
        self._numbers = itertools.count()
        self.now: TransformerCall | None = None

    def tick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TransformerCall:
        inputs = self._signature.bind(*args, **kwargs).arguments
        timestep = inputs["timestep"]
        self._take_schedule(timestep.dtype)
        assert self._schedule is not None
        is_first = self._schedule.timesteps not in self._runs
        if is_first:
            self._runs[self._schedule.timesteps] = _Run(next(self._numbers), _find_grid(inputs))
        run: _Run = self._runs[self._schedule.timesteps]
        step = self._find_step(timestep)
        self.now = TransformerCall(
            step=step,
            sigma=self._sigmas[step],
            sigmas=self._sigmas,
            is_conditional=step != run.last_step,
            run=run.number,
            is_first_of_run=is_first,
            n_text=inputs["encoder_hidden_states"].shape[1],
            grid=run.grid,
            inputs=dict(inputs),
        )
        run.last_step = step
        return self.now

    def _take_schedule(self, dtype: torch.dtype) -> None:
        schedule = getattr(self._pipe, "_full_schedule", None)
        if schedule is None:
            scheduler = self._pipe.scheduler
            schedule = Schedule(scheduler.timesteps, scheduler.sigmas[: len(scheduler.timesteps)])
        if self._schedule is not None and self._schedule.timesteps is schedule.timesteps:
            self._schedule = schedule  # another step of it, perhaps
            return
        refuse_repeats(schedule, self._pipe.scheduler)
        if _scheduler_step(self._pipe.scheduler, schedule) is None:
            _refuse_duplicates(schedule.timesteps, dtype)
        self._schedule = schedule
        self._sigmas = tuple(schedule.sigmas.tolist())

    def _find_step(self, timestep: Tensor) -> int:
        assert self._schedule is not None
        cast = self._schedule.timesteps.to(timestep.device).to(timestep.dtype) / 1000
        steps = (cast[:, None] == timestep.reshape(1, -1)).all(dim=1).nonzero().flatten().tolist()
        if not steps:
            raise FluxSaeError(
                f"The transformer was called at timestep {timestep.flatten()[0].item() * 1000:g}, which is not a step "
                f"of the schedule of {len(self._sigmas)}. Hooks follow FluxPipeline's own loop: call the pipeline, or "
                "fluxsae.flux.velocity for a single step."
            )
        if len(steps) == 1:
            return int(steps[0])
        step = _scheduler_step(self._pipe.scheduler, self._schedule)
        if step not in steps:
            _refuse_duplicates(self._schedule.timesteps, timestep.dtype)
        assert step is not None
        return step


def _find_grid(inputs: Mapping[str, Any]) -> TokenGrid:
    ids = inputs.get("img_ids")
    if ids is None:  # the transformer called by hand
        return TokenGrid(1, inputs["hidden_states"].shape[1])
    ids = ids.reshape(-1, ids.shape[-1])
    rows, cols = (int(last) + 1 for last in ids[ids[:, 0] == 0][:, 1:3].amax(dim=0))
    return TokenGrid(rows, cols)


def _scheduler_step(scheduler: Any, schedule: Schedule) -> int | None:
    """The step of the full schedule that the scheduler is at, or None where it does not say."""
    if schedule.step is not None:
        return schedule.step
    index = getattr(scheduler, "step_index", None)
    if index is None:  # as before a run's first step, when the pipeline has set where it begins
        index = getattr(scheduler, "begin_index", None)
    # The scheduler of a generation taken up midway holds only the tail of the schedule.
    return None if index is None else int(index) + len(schedule.timesteps) - len(scheduler.timesteps)


def _refuse_duplicates(timesteps: Tensor, dtype: torch.dtype) -> None:
    n_distinct = len((timesteps.to(dtype) / 1000).unique())
    if n_distinct < len(timesteps):
        name = str(dtype).removeprefix("torch.")
        raise FluxSaeError(
            f"A schedule of {len(timesteps)} steps has only {n_distinct} distinct timesteps in {name}, so the steps "
            "cannot be told apart, and the scheduler does not say which it is at. Call FluxPipeline itself, which has "
            f"its scheduler count; or use fewer steps (at most {n_distinct} is safe to try), or load FLUX in float32."
        )


@contextmanager
def step_clock(
    pipe: FluxLike, on_call: Callable[[TransformerCall], None] | None = None
) -> Iterator[Callable[[], TransformerCall]]:
    """A function that gives the transformer's current call; `on_call` sees each one before its first block runs."""
    refuse_whole_compile(pipe.transformer)
    clock = _StepClock(pipe)

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_thread(pipe)
        call = clock.tick(args, kwargs)
        if on_call is not None:
            on_call(call)

    def now() -> TransformerCall:
        assert clock.now is not None
        return clock.now

    with held(pipe):
        handle = pipe.transformer.register_forward_pre_hook(before_forward, with_kwargs=True)
        try:
            yield now
        finally:
            handle.remove()
