"""The page of a run as its first visitor meets it: how soon it opens, the first click, the first image."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxsae.features.cards import CardIndex
from fluxsae.runs.folder import RunFolder
from train.benchmarks.page.visits import config_text, post
from train.benchmarks.rehearsal.clock import Timing, wait_for

ROOT = Path(__file__).parents[3]


def measure_page(run: RunFolder, flux: Path) -> list[Timing]:
    """Serves the run with `python app.py` and asks for a card and for an image."""
    hookpoint = str(run.hookpoints()[-1])
    feature = CardIndex(run, hookpoint).ranked[0]
    timings = []
    started = time.perf_counter()
    with served(run, flux) as (process, url):
        n_bytes = len(config_text(url, process))
        timings.append(
            Timing("page: opens", time.perf_counter() - started, note=f"configuration {n_bytes / 1e6:.1f} MB")
        )
        calls: dict[str, tuple[str, dict[str, Any]]] = {
            "page: first click": ("feature", {"hookpoint": hookpoint, "feature": feature}),
            "page: first image": ("heatmap", {"prompt": "a red fox in the snow"}),
        }
        for name, (endpoint, arguments) in calls.items():
            started = time.perf_counter()
            post(url, endpoint, arguments)
            timings.append(Timing(name, time.perf_counter() - started))
        process.terminate()
        _, peak = wait_for(process)
    return [*timings[:-1], Timing(timings[-1].name, timings[-1].seconds, peak)]


@contextmanager
def served(run: RunFolder, flux: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """`python app.py` of a run and a FLUX: the process and its address."""
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
