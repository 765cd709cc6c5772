"""One pipeline serves one thread at a time: its scheduler and its hooks are state that two would mix up."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fluxsae.errors import FluxSaeError


@dataclass
class _Use:
    """Who uses a transformer: the thread, how many contexts it has open, and whether a generation is on the way."""

    thread: threading.Thread
    depth: int = 0
    is_generating: bool = False


_uses: WeakKeyDictionary[nn.Module, _Use] = WeakKeyDictionary()
# Reentrant, since a forgotten generator may be closed, and let go, at any moment of the thread that holds it.
_lock = threading.RLock()


def _forget_in_child() -> None:
    _uses.clear()  # the threads that were using a pipeline are not there
    _lock.release()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forget_in_child)


@contextmanager
def held(pipe: Any) -> Iterator[None]:
    """While open, only this thread may use the pipeline; it may open more such contexts.

    Raises:
        FluxSaeError: another thread is using it.
    """
    with _lock:
        check_thread(pipe)
        use = _uses.setdefault(pipe.transformer, _Use(threading.current_thread()))
        use.depth += 1
    try:
        yield
    finally:
        with _lock:
            use.depth -= 1
            if not use.depth:
                _uses.pop(pipe.transformer, None)


@contextmanager
def generating(pipe: Any) -> Iterator[None]:
    """As `held`, for a whole generation, inside which no other may begin: both would move the same scheduler.

    Raises:
        FluxSaeError: another thread is using the pipeline, or a generation of it is on the way.
    """
    with held(pipe):
        use = _uses[pipe.transformer]
        if use.is_generating:
            raise FluxSaeError(
                "This pipeline is in the middle of a generation, so a callback of it cannot start another: they would "
                "share one scheduler. Start it afterwards, or use a second pipeline (load_flux again)."
            )
        use.is_generating = True
        try:
            yield
        finally:
            use.is_generating = False


def check_thread(pipe: Any) -> None:
    """Raises a FluxSaeError where another thread is using the pipeline."""
    use = _uses.get(pipe.transformer)
    if use is not None and use.thread is not threading.current_thread():
        raise FluxSaeError(
            f"This pipeline is in use by the thread {use.thread.name!r}, which has a generation, capture or steer open "
            "on it. Wait until that ends, call the pipeline from that thread, or use a second pipeline."
        )
