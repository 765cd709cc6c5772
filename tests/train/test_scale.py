"""20,000 images x 12,288 features of synthetic acts: memory stays flat, time grows linearly (`-m bench`)."""

import ctypes
import gc
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fluxsae.features.analysis import describe_features
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.scores import ScoreAccumulator, ScoreMatrix, merge_score_files
from fluxsae.features.statistics import FeatureStats
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import load_tensors, save_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.runs.tables import Heatmaps
from fluxsae.sae.acts import SparseActs

pytestmark = pytest.mark.bench

N_IMAGES = int(os.environ.get("FLUXSAE_SCALE_IMAGES", "20000"))
N_FEATURES = 12_288
GRID = TokenGrid(16, 16)
K, PER_PART, BATCH, N_TOP = 16, 64, 16, 8


@dataclass
class Peak:
    """Largest memory of the process while a block ran, without the pages of files, which the system may drop."""

    anonymous: float = 0.0
    seconds: float = 0.0


@contextmanager
def measured() -> Iterator[Peak]:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not count
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak.anonymous = max(peak.anonymous, anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield peak
    finally:
        peak.seconds = time.perf_counter() - start
        stop.set()
        watcher.join()


def anonymous_memory() -> float:
    """GB of memory that belongs to the process alone."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6


def synthetic_acts(generator: torch.Generator) -> SparseActs:
    """Acts of one batch: features of very different density, each image with a few hundred of them."""
    shape = (BATCH, GRID.n_tokens, K)
    share = torch.rand(shape, generator=generator) ** 3
    offset = torch.randint(0, N_FEATURES, (BATCH, 1, 1), generator=generator)
    indices = ((share * 600).long() * 17 + offset) % N_FEATURES
    keys = (torch.arange(BATCH * GRID.n_tokens)[:, None] * N_FEATURES + indices.flatten(0, 1)).unique()
    values = torch.rand(len(keys), generator=generator) * 5
    return SparseActs(keys // N_FEATURES, keys % N_FEATURES, values, (BATCH, GRID.n_tokens, N_FEATURES))


def score_parts(folder: Path, n_images: int) -> list[Path]:
    """Scores synthetic images part by part, as `train.score` does."""
    generator = torch.Generator().manual_seed(0)
    collector = TopMapCollector(N_FEATURES, n_top=N_TOP, n_tokens=GRID.n_tokens)
    parts = []
    for first in range(0, n_images, PER_PART):
        accumulator = ScoreAccumulator(N_FEATURES, grid=GRID, steps=(0,))
        for start in range(first, min(first + PER_PART, n_images), BATCH):
            acts, ids = synthetic_acts(generator), list(range(start, start + BATCH))
            accumulator.update(ids, acts, step=0)
            collector.update(ids, acts)
            collector.complete(ids, accumulator.scores(ids))
        tensors = {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens()}
        parts.append(folder / f"part-{first:06d}.safetensors")
        stats = accumulator.stats()
        save_tensors(parts[-1], {**tensors, **stats.tensors(), **collector.pop()}, metadata=stats.metadata())
    return parts


def merge(folder: Path, parts: list[Path]) -> ScoreMatrix:
    merge_score_files(folder / "scores.safetensors", parts, steps=(0,), grid=GRID)
    stats = FeatureStats.load(parts[0])
    for part in parts[1:]:
        stats = stats.merge(FeatureStats.load(part))
    stats.save(folder / "stats.safetensors")
    matrix = ScoreMatrix.load(folder / "scores.safetensors")
    write_heatmaps(folder / "heatmaps.safetensors", parts, matrix.top(N_TOP), scale=stats.maxima, grid=GRID)
    return matrix


def run_stages(folder: Path, count: int) -> dict[str, Peak]:
    """Scores, merges and analyses `count` images; memory and time of each."""
    folder.mkdir()
    with measured() as score:
        parts = score_parts(folder, count)
    with measured() as merging:
        matrix = merge(folder, parts)
    assert (matrix.n_images, matrix.n_features) == (count, N_FEATURES)
    assert len(Heatmaps.load(folder / "heatmaps.safetensors").features) == N_FEATURES
    first = load_tensors(parts[0])["S"]
    assert all(torch.equal(matrix.image(i), first[i].half().float()) for i in range(len(first)))
    for part in parts:
        part.unlink()
    with measured() as analysis:
        describe_features(matrix, FeatureStats.load(folder / "stats.safetensors"), AnalysisConfig())
    return {"score": score, "merge": merging, "analyze": analysis}


@pytest.mark.timeout(7200)
def test_memory_is_flat_and_time_linear_in_the_number_of_images(tmp_path: Path) -> None:
    small, large = (BATCH * (n // BATCH) for n in (N_IMAGES // 4, N_IMAGES))
    run_stages(tmp_path / "warm", small // 4)  # what the libraries load and keep, before anything is measured
    counts = [small, large]
    peaks = [run_stages(tmp_path / str(count), count) for count in counts]
    rows = [(name, [stages[name] for stages in peaks]) for name in peaks[0]]
    print(f"\n{'':<10}" + "".join(f"{count:>12,} images{'':>10}" for count in counts))
    for name, peaks in rows:
        print(f"{name:<10}" + "".join(f"{p.seconds:>12.1f} s{p.anonymous:>8.2f} GB{'':>5}" for p in peaks))
    print(f"peak resident set of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    for _, (small, large) in rows:
        assert large.anonymous < small.anonymous * 1.15 + 0.1
