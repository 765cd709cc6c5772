"""The one lane that FLUX works in: a request at a time, step by step, and free again within a step of a cancel."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")


class OnStep(Protocol):
    """Called after each step, counted from 0; it may raise to cancel. `view` is what there is to see by then."""

    def __call__(self, step: int, n_steps: int, view: Any = None) -> None:
        """One more step of `n_steps` is done."""
        ...


class Job(Protocol):
    """Work for FLUX as plain data, so that it can be sent to another process."""

    def n_passes(self, bench: Any) -> int:
        """Passes of the transformer over one image that it needs at most."""
        ...

    @property
    def n_pictures(self) -> int:
        """Pictures that it makes at most."""
        ...

    def run(self, bench: Any, on_step: OnStep) -> Any:
        """Does the work, calling `on_step(step, n_steps)` after each step; the call may raise to cancel."""
        ...


@dataclass(frozen=True)
class StepDone:
    """One denoising step is done: `step` of `n_steps`, counted from 1."""

    step: int
    n_steps: int
    view: Any = None
    """What there is to see by then, for those who show it."""


@dataclass(frozen=True)
class Done(Generic[T]):
    """The work's result."""

    value: T


class Cancelled(BaseException):
    """Ends a generation whose visitor has left; never an error (hence no `Exception`)."""


class FluxLane:
    """Runs jobs on one long-lived thread, so that requests never share the model and never mix.

    The thread outlives requests: a new thread a request would give every one its own pool of compute threads.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flux")
        self.stream_job: Callable[[Job], Iterator[Any]] | None = None
        """Set where jobs run in another process (ZeroGPU)."""

    def stream(self, job: Job, bench: Any) -> Iterator[StepDone | Done[Any]]:
        """Yields a `StepDone` after each step and then the `Done` result of the job.

        Closing the iterator cancels the job at its next step; the lane serves the next request once it has ended.
        """
        if self.stream_job is not None:
            yield from self.stream_job(job)
            return
        yield from in_executor(self._executor, lambda on_step: job.run(bench, on_step))

    def call(self, work: Callable[[], T]) -> T:
        """The result of work that has no steps, done in the lane."""
        return self._executor.submit(work).result()


def in_executor(executor: ThreadPoolExecutor, work: Callable[[OnStep], T]) -> Iterator[StepDone | Done[T]]:
    """Runs `work(on_step)` on another thread and yields its steps and result; closing it cancels at the next step."""
    events: queue.SimpleQueue[StepDone | Done[T] | BaseException] = queue.SimpleQueue()
    cancelled = threading.Event()

    def on_step(step: int, n_steps: int, view: Any = None) -> None:
        if cancelled.is_set():
            raise Cancelled
        events.put(StepDone(step + 1, n_steps, view))

    def run() -> None:
        if cancelled.is_set():
            return
        try:
            events.put(Done(work(on_step)))
        except BaseException as error:  # handed to whoever waits; the lane itself must go on
            events.put(error)

    executor.submit(run)
    try:
        while not isinstance(event := events.get(), Done):
            if isinstance(event, BaseException):
                raise event
            yield event
        yield event
    finally:
        cancelled.set()
