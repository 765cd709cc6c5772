"""A double of the `spaces` package on ZeroGPU hardware, after its release 0.51: what its `GPU` does, without a GPU.

A decorated generator runs in a process that is forked at its first call and kept. Arguments and results are pickled.
An exception leaves that process as the name of its class. A caller that closes the generator sets a flag, which is read
when the next result is there, and waits; then the process takes the next call.
"""

import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, Final

import gradio as gr

QUOTA: Final = "FLUXSAE_TEST_ZERO_GPU_SECONDS"
"""Environment variable: GPU seconds that visitors have; without it they never end."""
PATIENCE: Final = 60.0
"""Seconds without any result after which a call is given up, as no real one is."""

_fork = get_context("fork")
_workers: list["_Worker"] = []
requested: list[int] = []
"""Seconds that were asked for, call by call."""


def GPU(*, duration: Callable[..., int]) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """The decorator."""

    def decorate(task: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        idle: list[_Worker] = []

        def handler(*args: Any) -> Iterator[Any]:
            seconds = duration(*args)
            requested.append(seconds)
            left = int(os.environ.get(QUOTA, "1000000"))
            if seconds > left:
                words = f"You have exceeded your free ZeroGPU quota ({seconds}s requested vs. {left}s left). "
                raise _error("ZeroGPU quota exceeded", words)
            worker = idle.pop() if idle and idle[-1].process.is_alive() else _Worker(task)
            yield from worker.run(args)
            idle.append(worker)

        return handler

    return decorate


class _Worker:
    def __init__(self, task: Callable[..., Iterator[Any]]) -> None:
        self.task = task
        self.calls, self.results, self.stop = _fork.SimpleQueue(), _fork.Queue(), _fork.Event()
        self.process = _fork.Process(target=self._serve, args=(os.getpid(),), daemon=True)
        self.process.start()
        _workers.append(self)

    def run(self, args: tuple[Any, ...]) -> Iterator[Any]:
        self.calls.put(args)
        try:
            while (result := self.results.get(timeout=PATIENCE)) is not None:
                kind, value = result
                if kind == "fault":
                    assert self.results.get(timeout=PATIENCE) is None
                    raise _error("ZeroGPU worker error", value)
                yield value
        except GeneratorExit:
            self.stop.set()
            while self.results.get(timeout=PATIENCE) is not None:
                pass
            raise

    def _serve(self, parent: int) -> None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
        while True:
            args = self.calls.get()
            self.stop.clear()
            with ThreadPoolExecutor() as executor:
                executor.submit(contextvars.copy_context().run, self._iterate, args)
            self.results.put(None)

    def _iterate(self, args: tuple[Any, ...]) -> None:
        results = self.task(*args)
        try:
            for value in results:
                if self.stop.is_set():
                    results.close()
                    break
                self.results.put(("value", value))
        except Exception as error:
            self.results.put(("fault", type(error).__name__))


def end_workers() -> None:
    """Ends every process, since they hold what was open when they were forked, such as a browser's pipe."""
    while _workers:
        process = _workers.pop().process
        process.kill()
        process.join()


def _error(title: str, words: str) -> BaseException:
    error: BaseException = gr.Error(words, title=title, print_exception=False)
    return error


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(0)
