"""Measures the peak memory of scoring, edits, comparison and selection on synthetic acts, each in a fresh process.

    python -m train.benchmarks memory
    python -m train.benchmarks memory --only record-49152

Peak resident memory less that after loading. The sizes are FLUX.1-dev's at 1024 x 1024 pixels: 4,096 tokens of width
3,072. All of it takes an hour on two cores, most of it for `compare`.
"""

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError
from fluxsae.features.layers import compare_layers
from fluxsae.features.scores import ScoreAccumulator, ScoreMatrix, TopImages
from fluxsae.features.selection import feature_coherence
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import mapped_tensors, release_pages, save_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.sae.config import Architecture, SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.measurements import TokenLimits
from train.benchmarks.options import MemoryConfig

Work = Callable[[], str]
"""Does what is measured; a remark for the table."""
GRID, K, N_TOP, HOOKPOINTS = TokenGrid(64, 64), 64, 12, 2


def main(config: MemoryConfig) -> None:
    """Prints one line a measurement: peak memory, bound, seconds."""
    if config.only is not None:
        print(measure(config.only, config))
        return
    for name in CASES:
        given = {key: value for key, value in vars(config).items() if key != "only" and value is not None}
        options = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
        command = [sys.executable, "-m", "train.benchmarks", "memory", f"--only={name}", *options]
        print(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout, end="", flush=True)


def measure(name: str, config: MemoryConfig) -> str:
    """One measurement in words.

    Raises:
        FluxSaeError: there is no such measurement.
    """
    if name not in CASES:
        raise FluxSaeError(f"There is no measurement {name!r}; there are {', '.join(CASES)}.")
    load, bound = CASES[name]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        work = load(config, Path(folder))
        before, start = _reset_peak(), time.perf_counter()
        remark = work()
        seconds, peak = time.perf_counter() - start, _peak_bytes() - before
    return f"{name:<16} peak {peak / 1e9:6.2f} GB   {bound:<32} {seconds:6.0f} s   {remark}".rstrip()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _reset_peak() -> int:
    """The peak so far; on Linux first set back to what is resident now, so that loading hides nothing."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _peak_bytes()


def _sae(config: MemoryConfig, n_features: int, architecture: Architecture = "topk") -> SparseAutoencoder:
    sae = SparseAutoencoder(
        SaeConfig(architecture=architecture, d_model=config.d_model, n_features=n_features, k=K), seed=None
    )
    generator = torch.Generator().manual_seed(0)
    for own, other in zip(sae.W_dec.split(1024), sae.W_enc.split(1024), strict=True):
        own.copy_(normalize(torch.randn(own.shape, generator=generator), dim=1))
        other.copy_(own)
    if architecture == "batchtopk":
        # pre-activations are normal: about K of them lie above this
        sae.threshold.copy_(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - K / n_features)))
    return sae


def _tokens(config: MemoryConfig, n_images: int, n_tokens: int = GRID.n_tokens) -> Float[Tensor, "images tokens d"]:
    generator = torch.Generator().manual_seed(1)
    shape = (n_images, n_tokens, config.d_model)
    tokens = torch.empty(shape, dtype=torch.bfloat16)
    for image in tokens:
        image.copy_(torch.randn(shape[1:], generator=generator))
    return tokens


def _scoring(config: MemoryConfig, folder: Path) -> Work:
    """8 images, 5 steps, 2 hook points, 12,288 features: what `train.score` does with a batch, FLUX left out."""
    ids = list(range(config.images or 8))
    sae, tokens = _sae(config, 12_288), _tokens(config, len(ids))
    n_features = sae.config.n_features

    def work() -> str:
        places = range(HOOKPOINTS)
        part, batch = (
            [ScoreAccumulator(n_features, grid=GRID, steps=range(config.steps)) for _ in places] for _ in range(2)
        )
        collectors = [TopMapCollector(n_features, n_top=N_TOP, n_tokens=GRID.n_tokens) for _ in places]
        for step in range(config.steps):
            for place in places:
                acts = sae.encode_sparse(tokens)
                batch[place].update(ids, acts, step=step)
                collectors[place].update(ids, acts)
        for accumulator, other, collector in zip(part, batch, collectors, strict=True):
            collector.complete(ids, other.scores(ids))
            accumulator.merge(other).stats()
            collector.pop()
        return ""

    return work


def _busy(architecture: Architecture) -> Callable[[MemoryConfig, Path], Work]:
    """One token of 8,192 scaled by 50, so that nearly half of all features fire on it."""

    def load(config: MemoryConfig, folder: Path) -> Work:
        sae, tokens = _sae(config, 12_288, architecture), _tokens(config, 2)
        tokens[0, 0] *= 50

        def work() -> str:
            acts = sae.encode_sparse(tokens)
            return f"{int(acts.active.max())} features on the busiest token, {acts.active.double().mean():.0f} on all"

        return work

    return load


def _recording(n_features: int, n_images: int) -> Callable[[MemoryConfig, Path], Work]:
    """Which tokens of a batch of edited images lie outside the limits of clean ones: the large part of a recording."""

    def load(config: MemoryConfig, folder: Path) -> Work:
        sae, tokens = _sae(config, n_features), _tokens(config, config.images or n_images)
        limits = TokenLimits((0.5,), (0.0,), (1e9,), (1e9,))
        return lambda: f"{int(limits.is_outside(tokens, sae, sigma=0.5).sum())} tokens outside"

    return load


def _heatmaps(config: MemoryConfig, folder: Path) -> Work:
    """12 top images of each of 12,288 features at 4,096 tokens, each map firing on 200 neighbouring tokens."""
    n_features, n_active = 12_288, 200
    generator = torch.Generator().manual_seed(0)
    for image in range(N_TOP):
        features = torch.arange(n_features).repeat_interleave(n_active)
        starts = torch.randint(GRID.n_tokens - 2 * n_active, (n_features, 1), generator=generator)
        tokens = (starts + 2 * torch.arange(n_active)).flatten()
        entries = {"map_feature": features.int(), "map_token": tokens.int()}
        entries |= {"map_image": torch.full_like(entries["map_token"], image), "map_value": torch.rand(len(tokens))}
        save_tensors(folder / f"part-{image}", entries)
    scores = torch.rand(N_TOP, n_features, generator=generator)
    parts = [folder / f"part-{image}" for image in range(N_TOP)]

    def work() -> str:
        top = TopImages.empty(n_features, N_TOP).updated(torch.arange(N_TOP), scores)
        write_heatmaps(folder / "h", parts, top, scale=torch.ones(n_features), grid=GRID)
        return f"{(folder / 'h').stat().st_size / 1e6:.0f} MB on disk, bound 100 MB"

    return work


def _stored_scores(config: MemoryConfig, path: Path, *, seed: int) -> ScoreMatrix:
    """S on disk: a feature fires on 1 to 20 % of the images, and more where the images' topic is its own."""
    rng = np.random.default_rng(0)
    topics = rng.integers(200, size=config.score_images)
    rng = np.random.default_rng(seed)
    shape = (config.score_images, config.score_features)
    own, density = rng.integers(200, size=shape[1]), rng.uniform(0.01, 0.2, size=shape[1])
    shapes = {"S": ("F16", shape), "argmax_token": ("U16", shape)}
    with mapped_tensors(path, shapes, metadata={"steps": "0", "rows": "64", "cols": "64"}) as arrays:
        for start in range(0, shape[0], 500):
            rows = slice(start, start + 500)
            values = rng.random((len(topics[rows]), shape[1]), dtype=np.float32)
            fires = values < density + 0.5 * (topics[rows, None] == own)
            arrays["S"][rows] = np.where(fires, 0.1 + values * 3, 0)
            release_pages(arrays["S"])
    return ScoreMatrix.load(path)


def _selection(config: MemoryConfig, folder: Path) -> Work:
    """Coherence against chance of every feature: the part of `train.select` that reads all of S at once."""
    scores = _stored_scores(config, folder / "s", seed=1)
    embeddings = normalize(torch.randn(scores.n_images, 512, generator=torch.Generator().manual_seed(0)), dim=1)
    prompts = [f"prompt {i}" for i in range(scores.n_images)]
    return lambda: f"{int((feature_coherence(scores.stored(), embeddings, prompts).n_images > 0).sum())} features"


def _comparison(config: MemoryConfig, folder: Path) -> Work:
    first, second = (_stored_scores(config, folder / str(seed), seed=seed) for seed in (1, 2))

    def work() -> str:
        found = compare_layers(first.stored(), second.stored())
        return f"{len(found.pairs)} pairs, correlation {found.correlations.mean():.3f}"

    return work


CASES: dict[str, tuple[Callable[[MemoryConfig, Path], Work], str]] = {
    "scoring": (_scoring, "at most 2 GB"),
    "topk": (_busy("topk"), ""),
    "batchtopk": (_busy("batchtopk"), "at most 1.2 times topk"),
    "record-12288": (_recording(12_288, 32), "at most 2 GB"),
    "record-49152": (_recording(49_152, 32), "at most 2 GB"),
    "limits-49152": (_recording(49_152, 16), "at most 2 GB"),
    "heatmaps": (_heatmaps, "at most 2 GB"),
    "select": (_selection, "at most 6 GB"),
    "compare": (_comparison, "at most 6 GB"),
}
"""What loads each measurement, and its bound."""
