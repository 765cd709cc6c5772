"""The page of a run as its first visitor meets it: how soon it opens, the first click, the first image."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.runs.folder import RunFolder
from train.benchmarks.rehearsal.clock import Timing, wait_for

ROOT = Path(__file__).parents[3]
OPENS_WITHIN = 600.0


def measure_page(run: RunFolder, flux: Path) -> list[Timing]:
    """Serves the run with `python app.py` and asks for a card and for an image."""
    hookpoint = str(run.hookpoints()[-1])
    feature = CardIndex(run, hookpoint).ranked[0]
    timings = []
    started = time.perf_counter()
    with _served(run, flux) as (process, url):
        n_bytes = len(_config(process, url))
        timings.append(
            Timing("page: opens", time.perf_counter() - started, note=f"configuration {n_bytes / 1e6:.1f} MB")
        )
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "page: first click": ("feature", {"hookpoint": hookpoint, "feature": feature}),
            "page: first image": ("heatmap", {"prompt": "a red fox in the snow"}),
        }
        for name, (endpoint, arguments) in calls.items():
            started = time.perf_counter()
            _call(url, endpoint, arguments)
            timings.append(Timing(name, time.perf_counter() - started))
        process.terminate()
        _, peak = wait_for(process)
    return [*timings[:-1], Timing(timings[-1].name, timings[-1].seconds, peak)]


def _call(url: str, endpoint: str, arguments: dict[str, Any]) -> None:
    """Calls an endpoint and waits for its answer.

    Raises:
        FluxSaeError: it was refused, or failed.
    """
    body, head = json.dumps(arguments).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/gradio_api/call/v2/{endpoint}", data=body, headers=head)) as asked:
        event = json.load(asked)["event_id"]
    with urlopen(f"{url}/gradio_api/call/{endpoint}/{event}") as answer:
        lines = answer.read().decode().splitlines()
    if "event: complete" not in lines:
        raise FluxSaeError(f"/{endpoint} of the page failed: {' '.join(lines[-3:])[:300]}")


@contextmanager
def _served(run: RunFolder, flux: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "FLUXSAE_RUN": str(run.path.resolve()),
        "FLUXSAE_FLUX": str(flux.resolve()),
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    process = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _config(process: "subprocess.Popen[bytes]", url: str) -> bytes:
    """The page's configuration, once it answers.

    Raises:
        FluxSaeError: the app ends before, or takes too long.
    """
    deadline = time.monotonic() + OPENS_WITHIN
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{url}/config", timeout=60) as answer:
                config: bytes = answer.read()
                return config
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise FluxSaeError(f"app.py did not answer within {OPENS_WITHIN:.0f} s. What it printed above says why.")
