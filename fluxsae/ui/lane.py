"""The one lane that FLUX works in: a request at a time, step by step, and free again within a step of a cancel."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class StepDone:
    """One denoising step is done: `step` of `n_steps`, counted from 1."""

    step: int
    n_steps: int


@dataclass(frozen=True)
class Done(Generic[T]):
    """The work's result."""

    value: T


class Cancelled(BaseException):
    """Ends a generation whose visitor has left; never an error (hence no `Exception`)."""


class FluxLane:
    """Runs work on one long-lived thread, so that requests never share the model and never mix.

    The thread outlives requests: a new thread a request would give every one its own pool of compute threads.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flux")
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def n_waiting(self) -> int:
        """Requests in the lane, the running one included."""
        return self._waiting

    def stream(self, work: Callable[[OnStep], T]) -> Iterator[StepDone | Done[T]]:
        """Yields a `StepDone` after each step and then the `Done` result of `work(on_step)`.

        Closing the iterator cancels the work at its next step; the lane serves the next request once it has ended.
        """
        events: queue.SimpleQueue[StepDone | Done[T] | BaseException] = queue.SimpleQueue()
        cancelled = threading.Event()

        def on_step(step: int, n_steps: int) -> None:
            if cancelled.is_set():
                raise Cancelled
            events.put(StepDone(step + 1, n_steps))

        self._submit(lambda: _run(work, on_step, events, cancelled))
        try:
            while not isinstance(event := events.get(), Done):
                if isinstance(event, BaseException):
                    raise event
                yield event
            yield event
        finally:
            cancelled.set()

    def call(self, work: Callable[[], T]) -> T:
        """The result of work that has no steps, done in the lane."""
        for event in self.stream(lambda on_step: work()):
            if isinstance(event, Done):
                return event.value
        raise AssertionError("the lane ended without a result")

    def _submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._waiting += 1
        self._executor.submit(job).add_done_callback(self._leave)

    def _leave(self, _: Any) -> None:
        with self._lock:
            self._waiting -= 1


def _run(
    work: Callable[[OnStep], T],
    on_step: OnStep,
    events: "queue.SimpleQueue[StepDone | Done[T] | BaseException]",
    cancelled: threading.Event,
) -> None:
    if cancelled.is_set():
        return
    try:
        events.put(Done(work(on_step)))
    except BaseException as error:  # handed to whoever waits; the lane itself must go on
        events.put(error)
