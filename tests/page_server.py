"""The page as its visitors meet it: `python app.py` in a process of its own, on a free port."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import requests

ROOT = Path(__file__).parent.parent
START_SECONDS = 240


@dataclass(frozen=True)
class Page:
    """A served page."""

    url: str
    process: "subprocess.Popen[bytes]"
    log: Path
    seconds: float
    """From the command to the first answer."""

    def check_alive(self) -> None:
        """Raises, with what the app printed, if it has ended."""
        if (code := self.process.poll()) is not None:
            raise AssertionError(f"app.py ended with {code}:\n{self.log.read_text()[-6000:]}")


@contextmanager
def serve(**environment: str) -> Iterator[Page]:
    """Starts the app and stops it again; `environment` is added to its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkdtemp(prefix="fluxsae-page-")) / "log.txt"
    settings = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(log.parent / "files"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",
        **environment,
    }
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=ROOT, env=settings, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _wait(f"http://127.0.0.1:{port}", process, log, started)
            yield Page(f"http://127.0.0.1:{port}", process, log, time.monotonic() - started)
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path, started: float) -> None:
    while time.monotonic() - started < START_SECONDS:
        Page(url, process, log, 0.0).check_alive()
        try:
            if requests.get(f"{url}/config", timeout=10).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.2)
    raise AssertionError(f"app.py did not answer within {START_SECONDS} s:\n{log.read_text()[-3000:]}")


T = TypeVar("T")


def in_a_thread(function: Callable[..., T], *arguments: object) -> T:
    """Its result, from a thread without an event loop: the browser of the page tests runs one in their own thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()
