"""The one lane that FLUX works in: a request at a time, step by step, and free again within a step of a cancel."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from fluxsae.errors import FluxSaeError

T = TypeVar("T")
MAX_WAITING: Final = 256
"""Requests that wait for FLUX at most, of all visitors together."""


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
class Waiting:
    """The work is not begun: `ahead` others come first, or FLUX is still being loaded."""

    ahead: int
    is_loading: bool = False


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


class Mail:
    """What a job tells whoever asked for it: from the lane's thread to any other, or to an event loop."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], Any] | None = None

    def put(self, item: Any) -> None:
        """Tells something."""
        with self._changed:
            self._items.append(item)
            self._changed.notify()
            wake, self._wake = self._wake, None
        if wake is not None:
            wake()

    def get(self) -> Any:
        """What was told first, once there is something."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            return self._items.popleft()

    def is_empty(self) -> bool:
        """Whether `get` would wait."""
        return not self._items

    async def arrived(self, seconds: float) -> bool:
        """Whether something is told within some seconds; takes no thread meanwhile."""
        loop, found = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            if self._items:
                return True
            self._wake = lambda: loop.call_soon_threadsafe(found.set)
        try:
            await asyncio.wait_for(found.wait(), seconds)
        except TimeoutError:
            return False
        return True


@dataclass(frozen=True)
class Pending:
    """Nothing to tell yet. Who goes on at once waits on its thread; the page waits for `mail` first, on no thread."""

    mail: Mail


Event = Waiting | StepDone | Done[T] | Pending


class FluxLane:
    """Runs jobs on one long-lived thread, so that requests never share the model and never mix.

    The thread outlives requests: a new thread a request would give every one its own pool of compute threads.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flux")
        self._line: list[Mail] = []
        """Those whose jobs are not done, in the order of their turn."""
        self._lock = threading.Lock()
        self._n_loading = 0
        self.stream_job: Callable[[Job, Any], Iterator[Any]] | None = None
        """Set where jobs run in another process (ZeroGPU)."""

    def stream(self, job: Job, bench: Any) -> Generator[Event[Any], None, None]:
        """Tells how many are before it, then each step, and then the result of the job.

        Closing the iterator cancels the job: at once if it waits, else at its next step.

        Raises:
            FluxSaeError: too many wait.
        """
        if self.stream_job is not None:
            yield from self.stream_job(job, bench)
            return
        mail, cancelled = Mail(), threading.Event()
        self._join(mail)

        def on_step(step: int, n_steps: int, view: Any = None) -> None:
            if cancelled.is_set():
                raise Cancelled
            mail.put(StepDone(step + 1, n_steps, view))

        def run() -> None:
            if cancelled.is_set():
                return
            try:
                mail.put(Done(job.run(bench, on_step)))
            except BaseException as error:  # handed to whoever waits; the lane itself must go on
                mail.put(error)
            finally:
                self._leave(mail)

        turn = self._executor.submit(run)
        try:
            while True:
                if mail.is_empty():
                    yield Pending(mail)
                event = mail.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            cancelled.set()
            if turn.cancel():
                self._leave(mail)

    def call(self, work: Callable[[], T]) -> T:
        """The result of loading something, done in the lane; who comes meanwhile is told that FLUX is being loaded."""
        self._loading(1)
        try:
            return self._executor.submit(work).result()
        finally:
            self._loading(-1)

    def close(self) -> None:
        """Takes no more work, and returns when the job under way has stopped."""
        self._executor.shutdown()

    def _loading(self, change: int) -> None:
        with self._lock:
            self._n_loading += change
            self._tell_places()

    def _join(self, mail: Mail) -> None:
        with self._lock:
            if len(self._line) >= MAX_WAITING:
                raise FluxSaeError(
                    f"{len(self._line)} requests wait for FLUX. Try again in a minute; browsing goes on."
                )
            self._line.append(mail)
            if len(self._line) > 1 or self._n_loading:
                mail.put(Waiting(len(self._line) - 1, self._n_loading > 0))

    def _leave(self, mail: Mail) -> None:
        with self._lock:
            if mail in self._line:
                self._line.remove(mail)
            self._tell_places()

    def _tell_places(self) -> None:
        for place, mail in enumerate(self._line):
            if place or self._n_loading:
                mail.put(Waiting(place, self._n_loading > 0))
