"""One dictionary for all noise levels, beside a plain SAE of all steps and one SAE a step, on the miniature.

    python -m train.benchmarks sigmas --folder sigmas

All have the same number of features and, with topk, the same L0, and see the same rows as often. Of held-out images the
FVU, and of drawn scenes the splice error and the velocity FVU, step by step.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from fluxsae.activations.mixing import mixing_buffer
from fluxsae.activations.shards import ShardFolder
from fluxsae.evaluation.flow import FlowQuality, drawn_images, evaluate_flow
from fluxsae.evaluation.intervals import Estimate, bootstrap_weights, interval
from fluxsae.evaluation.reconstruction import ImageSums
from fluxsae.flux import default_settings, load_flux
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.metrics import to_float64
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig, train
from train.benchmarks.options import SigmasConfig
from train.collect import CollectConfig
from train.collect import main as collect

PLAIN, ONE, EACH = "plain SAE", "one dictionary", "one SAE a step"


@dataclass(frozen=True)
class StepRow:
    """A contender at one step."""

    step: int
    sigma: float
    fvu: Estimate
    l0: float
    flow: FlowQuality | None


@dataclass(frozen=True)
class Contender:
    """Which SAE is used at which step."""

    name: str
    saes: Mapping[int, SparseAutoencoder]
    rows: tuple[StepRow, ...]
    mean_fvu: Float[np.ndarray, " draws"]
    """Mean over the steps, of each resample of the images."""


def main(config: SigmasConfig) -> list[Contender]:
    """Collects, trains, measures and prints."""
    with tempfile.TemporaryDirectory() as scratch:
        return _measure(config, config.folder or Path(scratch))


def _measure(config: SigmasConfig, folder: Path) -> list[Contender]:
    pipe = load_flux("miniature")
    place = HookPoint.parse(config.hookpoint)
    collect(
        CollectConfig(
            run=folder, flux="miniature", hookpoints=(str(place),), steps=config.steps, images=config.images,
            batch_size=16, seed=config.seed,
        ),
        open_flux=lambda: pipe,
    )  # fmt: skip
    shards = ShardFolder(folder / "activations" / str(place))
    contenders = [_evaluated(name, saes, shards, pipe, config) for name, saes in train_all(config, shards).items()]
    print(report_text(contenders))
    return contenders


def train_all(config: SigmasConfig, shards: ShardFolder) -> dict[str, dict[int, SparseAutoencoder]]:
    """The three contenders: their SAE of each step.

    An SAE of one step sees as many rows of that step in a batch as the others do, in as many batches.
    """
    manifest = shards.manifest
    plain = SaeConfig(
        architecture="topk", d_model=manifest.d_model, n_features=config.n_features, k=config.k,
        auxk_coeff=0.25, dead_after_tokens=100_000,
    )  # fmt: skip
    one = SaeConfig(**{**vars(plain), "sigma_table": tuple(sorted(manifest.sigmas))})
    settings = TrainConfig(lr=config.lr, warmup_steps=50, epochs=config.epochs, seed=config.seed, precision="float32")
    together = mixing_buffer(shards, batch_size=config.batch_size, seed=config.seed)
    shared = train({PLAIN: plain, ONE: one}, together, settings).saes
    of_step = {}
    for step in manifest.steps:
        source = mixing_buffer(
            shards, batch_size=config.batch_size // len(manifest.steps), seed=config.seed, steps=[step]
        )
        of_step[step] = train({EACH: plain}, source, settings).saes[EACH]
    return {**{name: dict.fromkeys(manifest.steps, sae) for name, sae in shared.items()}, EACH: of_step}


@torch.no_grad()
def _evaluated(
    name: str, saes: Mapping[int, SparseAutoencoder], shards: ShardFolder, pipe: Any, config: SigmasConfig
) -> Contender:
    manifest = shards.manifest
    sums, active = ImageSums(), []
    for _, rows, _ in shards.iter_images("held_out"):
        x, x_hat, fired = rows.float(), [], []
        for tokens, step, sigma in zip(x, manifest.steps, manifest.sigmas, strict=True):
            acts = saes[step].encode_sparse(tokens, sigma=sigma)
            x_hat.append(saes[step].decode_sparse(acts))
            fired.append(to_float64(acts.active).mean())
        sums.update(x[None], torch.stack(x_hat)[None], centre=x.mean((0, 1)))
        active.append(torch.stack(fired))
    l0 = torch.stack(active).mean(0).tolist()
    weights = bootstrap_weights(len(active), draws=config.draws, seed=config.seed)
    by_step = [sums.fvu(weights, steps=[at]) for at in range(len(manifest.steps))]
    flows = _flows(saes, HookPoint.parse(manifest.hookpoint), pipe, config)
    rows_of = tuple(
        StepRow(step, sigma, interval(fvus), active_here, flows.get(step))
        for step, sigma, fvus, active_here in zip(manifest.steps, manifest.sigmas, by_step, l0, strict=True)
    )
    return Contender(name, saes, rows_of, np.mean(by_step, axis=0))


def _flows(
    saes: Mapping[int, SparseAutoencoder], place: HookPoint, pipe: Any, config: SigmasConfig
) -> dict[int, FlowQuality]:
    if not config.flow_images:
        return {}
    images = drawn_images(pipe, config.flow_images, seed=config.seed)
    found: dict[int, FlowQuality] = {}
    for sae in {id(sae): sae for sae in saes.values()}.values():
        own = [step for step in saes if saes[step] is sae]
        settings = default_settings(pipe)
        found |= evaluate_flow(
            pipe, {place: sae}, images, {place: own}, settings=settings, batch_size=16, draws=config.draws
        )[place].by_step
    return found


def report_text(contenders: Sequence[Contender]) -> str:
    """A table for each measure: a row a step, a column a contender; then the mean over the steps."""
    measures = {
        "FVU": lambda row: row.fvu,
        "splice error": lambda row: row.flow and row.flow.splice_error,
        "velocity FVU": lambda row: row.flow and row.flow.velocity_fvu,
    }
    lines = []
    for name, of in measures.items():
        columns = [[of(row) for row in contender.rows] for contender in contenders]
        if any(value is None for value in columns[0]):
            continue
        lines += ["", f"{name:<12} {'sigma':>6} " + " ".join(f"{each.name:>22}" for each in contenders)]
        for at, row in enumerate(contenders[0].rows):
            values = " ".join(f"{column[at]!s:>22}" for column in columns)
            lines.append(f"step {row.step:<7} {row.sigma:>6.3f} {values}")
        lines.append(f"{'mean':<19} " + " ".join(f"{np.mean([v.value for v in column]):>22.4f}" for column in columns))
    plain = contenders[0].mean_fvu
    for other in contenders[1:]:
        lines.append(f"mean FVU, {other.name} / {contenders[0].name}: {interval(other.mean_fvu / plain)}")
    l0 = ", ".join(f"{each.name} {np.mean([row.l0 for row in each.rows]):.2f}" for each in contenders)
    return "\n".join([*lines, f"L0: {l0}"])
