"""The page of a run of FLUX.1-dev's size: how soon it opens, how many can browse while one paints, what it holds.

    python -m train.benchmarks page
    python -m train.benchmarks page --images 200 --features 256 --side 64      # tries the benchmark itself, in a minute

Run and FLUX are random numbers of the true shapes (12,288 features at two hook points, 20,000 images of 1024 px); the
FLUX is narrow, and so slow by its 4,096 tokens that a CPU takes about 10 s a picture.
"""

import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder
from train.benchmarks.options import PageConfig
from train.benchmarks.page.full_size import WORDS, build_flux, build_run
from train.benchmarks.page.visits import Visitor, post
from train.benchmarks.rehearsal.page import served

PAUSE = 2.5
"""Seconds that a visitor looks at cards before the next search."""
SEARCHES = ("", "striped", "red fox", "7", "old wooden boat", "green")


def main(config: PageConfig) -> dict[str, float]:
    """Builds what is missing, serves it, prints the table and gives its figures."""
    folder = (
        config.folder or Path(tempfile.gettempdir()) / f"fluxsae-page-{config.images}-{config.features}-{config.side}"
    )
    run, flux = RunFolder(folder / "run"), folder / "flux"
    if not run.index_path.is_file():
        settings = GenerationSettings(
            height=config.side, width=config.side, num_inference_steps=config.steps, max_sequence_length=16
        )
        build_flux(flux, settings)
        build_run(run.path, flux, settings, n_images=config.images, n_features=config.features)
    figures = measure(run, flux, visitors=config.visitors, seconds=config.seconds)
    print("\n".join(f"{name:52} {value:12,.1f}" for name, value in figures.items()))
    if not config.keep:
        shutil.rmtree(folder)
    return figures


def measure(run: RunFolder, flux: Path, *, visitors: int, seconds: float) -> dict[str, float]:
    """Name with unit -> figure."""
    figures: dict[str, float] = {}
    started = time.perf_counter()
    with served(run, flux) as (process, url):
        first = Visitor(url, process)
        figures["page opens, s from the process's start"] = time.perf_counter() - started
        figures["configuration, kB"] = len(first.config_text) / 1e3
        first.gallery("")
        figures["first click answered, s from the process's start"] = time.perf_counter() - started
        memory = psutil.Process(process.pid).memory_info
        begun = time.perf_counter()
        post(url, "heatmap", {"prompt": f"a {WORDS[0]}", "limit": 1})
        figures["first picture, FLUX's loading in it, s"] = time.perf_counter() - begun
        figures["memory before the visitors, MB"] = memory().rss / 2**20
        begun = time.perf_counter()
        post(url, "heatmap", {"prompt": "a fox", "seed": 1, "limit": 8})
        figures["a picture alone with 8 overlays, s"] = time.perf_counter() - begun
        begun = time.perf_counter()
        post(url, "heatmap", {"prompt": "a fox", "seed": 1, "limit": 8})
        figures["the same again (kept), s"] = time.perf_counter() - begun
        figures |= _browse(url, [first, *(Visitor(url, process) for _ in range(visitors - 1))], seconds)
        figures["memory after the visitors, MB"] = memory().rss / 2**20
    return figures


def _browse(url: str, visitors: Sequence[Visitor], seconds: float) -> dict[str, float]:
    """How long gallery requests take while one visitor has images made without a pause."""
    times: list[float] = []
    kept: list[float] = []
    failed: list[BaseException] = []
    stop = time.monotonic() + seconds

    def look(visitor: Visitor, place: int) -> None:
        time.sleep(PAUSE * place / len(visitors))
        turn = place
        while time.monotonic() < stop and not failed:
            begun = time.perf_counter()
            try:
                visitor.gallery(SEARCHES[turn % len(SEARCHES)])
            except (OSError, FluxSaeError, json.JSONDecodeError) as error:
                failed.append(error)
            times.append(time.perf_counter() - begun)
            turn += 1
            time.sleep(PAUSE)

    def look_again() -> None:
        while time.monotonic() < stop:
            begun = time.perf_counter()
            post(url, "heatmap", {"prompt": "a fox", "seed": 1, "limit": 1})
            kept.append(time.perf_counter() - begun)
            time.sleep(PAUSE)

    threads = [threading.Thread(target=look, args=(visitor, place)) for place, visitor in enumerate(visitors)]
    threads.append(threading.Thread(target=look_again))
    for thread in threads:
        thread.start()
    made = 0
    while time.monotonic() < stop:
        post(url, "heatmap", {"prompt": "a boat", "seed": 100 + made, "limit": 1})
        made += 1
    for thread in threads:
        thread.join()
    if failed:
        raise FluxSaeError(f"A gallery request failed: {failed[0]}")
    p95, beside = statistics.quantiles(times, n=20)[-1], f"{len(visitors)} visitors beside {made} pictures"
    return {
        f"gallery, median ms of {len(times)} requests": 1e3 * statistics.median(times),
        f"gallery, p95 ms, {beside}": 1e3 * p95,
        f"a kept reading meanwhile, worst ms of {len(kept)}": 1e3 * max(kept),
    }
