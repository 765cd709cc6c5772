"""Loss curves at equal work: ours and sparsify's (the fastest other tool), from the same weights over the same batches.

    python -m train.benchmarks quality

Both train a topk SAE with Adam at one constant learning rate, with unit decoder rows and no auxiliary loss, each in
float32 and in bfloat16. The table shows the fraction of variance unexplained of rows that neither has seen.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsae.files import write_json
from fluxsae.sae.metrics import fvu
from fluxsae.sae.model import SparseAutoencoder
from train.benchmarks.options import QualityConfig
from train.benchmarks.training import (
    WITHOUT_TRITON,
    Shape,
    Step,
    build_environment,
    build_trainer,
    in_environment,
    make_batches,
    sparsify_model,
    sparsify_step,
)

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Curve:
    """How one training went."""

    tool: str
    precision: str
    steps: list[int]
    fvu: list[float]


def main(config: QualityConfig) -> list[Curve]:
    """Trains, prints the curves side by side, and returns them."""
    if not in_environment():
        return _run_in_environment(config)
    shape = Shape(config.d_model, config.n_features, config.k, config.batch)
    *batches, held_out = make_batches(shape, torch.device("cpu"), config.steps + 1)
    curves = [
        _train(tool, precision, start(shape, precision, config.lr), batches, held_out, points=config.points)
        for tool, start in (("fluxsae", _ours), ("sparsify", _sparsify))
        for precision in PRECISIONS
    ]
    print(format_curves(shape, curves), flush=True)
    if config.output is not None:
        write_json(config.output, [asdict(curve) for curve in curves])
    return curves


@dataclass(frozen=True)
class _Contender:
    step: Step
    reconstruct: Callable[[Tensor], Tensor]


def _ours(shape: Shape, precision: str, lr: float) -> _Contender:
    trainer = build_trainer(shape, torch.device("cpu"), precision, "sparse", lr=lr)
    count = iter(range(1_000_000))
    return _Contender(lambda batch: trainer.step(batch, next(count)), lambda rows: trainer.sae(rows).x_hat)


def _sparsify(shape: Shape, precision: str, lr: float) -> _Contender:
    sae: Any = sparsify_model(shape, torch.device("cpu"))
    own: SparseAutoencoder = build_trainer(shape, torch.device("cpu"), precision, "sparse").sae
    with torch.no_grad():
        sae.encoder.weight.copy_(own.W_enc)
        sae.encoder.bias.copy_(own.b_enc)
        sae.W_dec.copy_(own.W_dec)
        sae.b_dec.copy_(own.b_dec)
    return _Contender(sparsify_step(sae, torch.device("cpu"), precision, lr=lr), lambda rows: sae(rows).sae_out)


def _train(
    tool: str, precision: str, contender: _Contender, batches: list[Tensor], held_out: Tensor, *, points: int
) -> Curve:
    every, curve = max(1, len(batches) // points), Curve(tool, precision, [], [])
    for done, batch in enumerate(batches, start=1):
        contender.step(batch)
        if done % every == 0 or done == len(batches):
            with torch.no_grad():
                curve.steps.append(done)
                curve.fvu.append(fvu(held_out, contender.reconstruct(held_out)))
    return curve


def final_ratio(curves: list[Curve]) -> float:
    """Our last FVU, at the worse of our precisions, over the other tool's best."""
    ours = max(curve.fvu[-1] for curve in curves if curve.tool == "fluxsae")
    return ours / min(curve.fvu[-1] for curve in curves if curve.tool != "fluxsae")


def format_curves(shape: Shape, curves: list[Curve]) -> str:
    """One row a point, one column a training."""
    lines = [f"FVU of unseen rows, {shape}", "step " + "".join(f"{c.tool + ' ' + c.precision:>20}" for c in curves)]
    lines += [
        f"{step:<5}" + "".join(f"{curve.fvu[i]:>20.5f}" for curve in curves) for i, step in enumerate(curves[0].steps)
    ]
    return "\n".join([*lines, f"ours at worst / theirs at best: {final_ratio(curves):.4f}"]) + "\n"


def _run_in_environment(config: QualityConfig) -> list[Curve]:
    """The same among the other tool's packages; its curves come back through a file."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "curves.json"
        command = [str(build_environment()), "-m", "train.benchmarks", "quality", "--output", str(output)]
        for name, value in asdict(config).items():
            command += ["--" + name.replace("_", "-"), str(value)] if name != "output" else []
        subprocess.run(command, check=True, env=os.environ | WITHOUT_TRITON)
        rows = json.loads(output.read_text())
    if config.output is not None:
        write_json(config.output, rows)
    return [Curve(**row) for row in rows]
