"""Measures how training is fed: what one of several processes assembles, and how long a step waits for its batch.

python -m train.benchmarks feeding

Rows of random numbers at FLUX.1-dev's width lie on disk. Each process of several is played by one process alone.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxsae.activations.mixing import mixing_buffer
from fluxsae.activations.shards import ActivationManifest, ShardFolder, ShardWriter
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.training import TrainConfig, train
from fluxsae.sae.training.checkpoints import LOG_NAME
from train.benchmarks.options import FeedingConfig

IMAGES_PER_SHARD = 8


@dataclass(frozen=True)
class Feeding:
    """The figures."""

    whole_seconds: dict[str, float]
    """By case: to assemble every batch of an epoch, alone."""
    share_seconds: dict[str, float]
    """By case: to assemble one process's part of them."""
    wait_share: float | None
    """Share of the training's time that its steps waited for their batches."""

    def lines(self) -> list[str]:
        """The figures in words."""
        lines = [
            f"{case}: all batches {whole:.3f} s, one process's part {self.share_seconds[case]:.3f} s: "
            f"{self.share_seconds[case] / whole:.3f} of it"
            for case, whole in self.whole_seconds.items()
        ]
        if self.wait_share is not None:
            lines.append(f"a step waits for its batch {100 * self.wait_share:.1f} % of the time")
        return lines


def main(config: FeedingConfig) -> Feeding:
    """Prints and returns the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_rows(Path(name) / "rows", config)
        n_bytes = 2 * config.d_model * config.tokens_per_image * config.n_images
        cases = {"data that fit into the buffer": 2 * n_bytes, "data of four buffers": n_bytes // 4}
        whole, share = {}, {}
        for case, buffer_bytes in cases.items():
            whole[case] = epoch_seconds(folder, config, buffer_bytes=buffer_bytes, world_size=1)
            share[case] = epoch_seconds(folder, config, buffer_bytes=buffer_bytes, world_size=config.world_size)
        waits = wait_share(folder, config, Path(name) / "fit", buffer_bytes=n_bytes // 4) if config.steps else None
    feeding = Feeding(whole, share, waits)
    print("\n".join(feeding.lines()))
    return feeding


def write_rows(path: Path, config: FeedingConfig) -> ShardFolder:
    """A folder of shards of random rows."""
    manifest = ActivationManifest(
        hookpoint="transformer_blocks.0.ff", d_model=config.d_model, flux_id="random", flux_revision=None,
        settings=GenerationSettings(), steps=(13,), sigmas=(0.7,), n_tokens=4096,
        tokens_per_image=config.tokens_per_image, n_images=config.n_images, images_per_shard=IMAGES_PER_SHARD,
        prompts_hash="random", seed=0, held_out_every=0,
    )  # fmt: skip
    writer, generator = ShardWriter(path, manifest), torch.Generator().manual_seed(0)
    for shard in range(manifest.n_shards):
        shape = (len(manifest.image_ids(shard)), 1, config.tokens_per_image)
        tokens = torch.randn(*shape, config.d_model, generator=generator).bfloat16()
        writer.write(shard, tokens, torch.arange(config.tokens_per_image).expand(shape))
    return ShardFolder(path)


def epoch_seconds(folder: ShardFolder, config: FeedingConfig, *, buffer_bytes: int, world_size: int) -> float:
    """Median time for one process's part of every batch of an epoch, read anew."""
    seconds = []
    for epoch in range(config.repeats):
        buffer = mixing_buffer(
            folder, batch_size=config.batch_size, buffer_bytes=buffer_bytes, rank=world_size - 1, world_size=world_size
        )
        started = time.perf_counter()
        for _ in buffer.batches(epoch):
            pass
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def wait_share(folder: ShardFolder, config: FeedingConfig, work: Path, *, buffer_bytes: int) -> float:
    """Share of a training's time that its steps waited for data, the first batch and the start-up left out."""
    sae = SaeConfig(
        architecture="topk", d_model=config.d_model, n_features=config.n_features, k=config.k, auxk_coeff=0.0
    )
    source = mixing_buffer(folder, batch_size=config.batch_size, buffer_bytes=buffer_bytes)
    loop = TrainConfig(epochs=1000, max_steps=config.steps, log_every=max(1, config.steps // 4), init_rows=2048)
    train({"topk": sae}, source, loop, folder=work)
    lines = [json.loads(line) for line in (work / LOG_NAME).read_text().splitlines()][1:]
    return statistics.fmean(line["wait_share"] for line in lines)
