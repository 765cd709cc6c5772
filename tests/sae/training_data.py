"""What training tests share: rows, their source, a config, and a run with activations."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fluxsae.activations.shards import ActivationManifest, ShardWriter
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.sae.config import Architecture, SaeConfig
from fluxsae.sae.training.processes import Processes

D_MODEL, N_FEATURES, K = 12, 40, 4


@dataclass
class MemorySource:
    """Rows in memory, in an order that is a pure function of (epoch, cursor); a share of each batch under torchrun."""

    rows: Tensor
    batch_size: int = 64
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    reads_ahead: bool = True
    levels: Tensor | None = None
    """The noise level of each row, for SAEs with a `sigma_table`."""

    @property
    def d_model(self) -> int:
        return self.rows.shape[1]

    @property
    def n_batches(self) -> int:
        return len(self.rows) // self.batch_size

    @property
    def order(self) -> str:
        return f"seed {self.seed}"

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        return self._dealt(self.rows, epoch, cursor)

    def sigmas(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        assert self.levels is not None, "a plain SAE asks for no noise levels"
        return self._dealt(self.levels, epoch, cursor)

    def _dealt(self, rows: Tensor, epoch: int, cursor: int) -> Iterator[Tensor]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        share = self.batch_size // self.processes.world_size
        for batch in range(cursor, self.n_batches):
            start = batch * self.batch_size + self.processes.rank * share
            yield rows[order[start : start + share]]


def sparse_rows(n_rows: int = 3200, *, d_model: int = D_MODEL, seed: int = 0) -> Tensor:
    """Sums of a few of 30 directions around a mean: what an SAE can take apart."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, d_model, generator=torch.Generator().manual_seed(99))
    is_on = torch.rand(n_rows, 30, generator=generator) < 0.08
    return (torch.rand(n_rows, 30, generator=generator) + 0.5) * is_on @ directions + 2


def sae_config(architecture: Architecture = "topk", **changes: object) -> SaeConfig:
    k = None if architecture in ("l1", "jumprelu") else K
    values = {"d_model": D_MODEL, "n_features": N_FEATURES, "k": k, "l1_coeff": 0.02, "auxk": 5} | changes
    return SaeConfig(architecture=architecture, **values)  # type: ignore[arg-type]


def write_collected_run(path: Path) -> Path:
    """A run folder with the activations of 40 images, 16 tokens each, at two steps of one hook point."""
    generation = GenerationSettings(height=64, width=64, num_inference_steps=20, max_sequence_length=32)
    manifest = ActivationManifest(
        hookpoint="transformer_blocks.3.ff", d_model=D_MODEL, flux_id="tiny", flux_revision=None, settings=generation,
        steps=(2, 6), sigmas=(0.9, 0.7), n_tokens=16, tokens_per_image=16, n_images=40, images_per_shard=20,
        prompts_hash="p", seed=0,
    )  # fmt: skip
    run = RunFolder(path)
    writer = ShardWriter(run.activations_path / manifest.hookpoint, manifest)
    for shard in range(manifest.n_shards):
        tokens = sparse_rows(20 * 2 * 16, seed=shard).reshape(20, 2, 16, D_MODEL).bfloat16()
        writer.write(shard, tokens, torch.arange(16).expand(20, 2, 16))
    run.save_info(RunInfo(flux_id="tiny", settings=generation, hookpoints=(manifest.hookpoint,)))
    return run.path
