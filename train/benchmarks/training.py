"""Measures a training step: ours against other tools at equal work, and against what the machine can multiply.

    python -m train.benchmarks training                                    # every tool; builds its environment first
    python -m train.benchmarks training --ours-only --device cuda --budget-seconds 240
    python -m train.benchmarks training --calibrate                        # where sparse products win on this machine

Equal work is a topk SAE, fused Adam, unit decoder rows with the parallel gradient removed, no auxiliary loss and no
clipping, on the same batches. Every tool runs in float32 and in bfloat16 and counts with its faster one. The order of
the tools turns from one repetition to the next.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxsae.files import write_json
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.kernels import sparse_pays
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.config import TrainConfig
from fluxsae.sae.training.trainer import SaeTrainer
from train.benchmarks.options import TrainingConfig

PEERS = ("sparsify", "sae-lens", "overcomplete", "dictionary-learning")
ENVIRONMENT = Path("build/bench")
WITHOUT_TRITON = {"SPARSIFY_DISABLE_TRITON": "1"}
"""sparsify chooses its kernels at import, and its Triton kernels need a GPU."""
REQUIREMENTS = ("eai-sparsify==1.3.3", "sae-lens==6.54.12", "overcomplete==0.3.0", "dictionary-learning==0.1.0")

Step = Callable[[Tensor], object]
_LR = 1e-4


@dataclass(frozen=True)
class Shape:
    """One row of the table."""

    d_model: int
    n_features: int
    k: int
    batch: int

    @property
    def dense_flops(self) -> float:
        """Floating-point operations of a step whose five products are all dense."""
        return 10.0 * self.d_model * self.n_features * self.batch

    def __str__(self) -> str:
        return f"({self.d_model}, {self.n_features}, k={self.k}, batch {self.batch})"


CPU_SHAPES = (Shape(768, 3072, 32, 1024), Shape(3072, 12_288, 64, 512), Shape(3072, 12_288, 1200, 256))
CUDA_SHAPES = tuple(Shape(3072, 12_288, k, batch) for batch in (4096, 16_384) for k in (64, 1200))


@dataclass
class Measurement:
    """One tool at one shape in one precision."""

    tool: str
    precision: str
    shape: Shape
    milliseconds: list[float]
    peak_megabytes: float | None = None
    ceiling_share: float | None = None
    """Operations of the dense step over time, as a share of the measured ceiling."""

    @property
    def median(self) -> float:
        """Milliseconds a step."""
        return statistics.median(self.milliseconds)


def main(config: TrainingConfig) -> list[Measurement]:
    """Measures, prints a table a shape, and returns the measurements."""
    if config.calibrate:
        calibrate(config)
        return []
    if not config.ours_only and not in_environment():
        return _run_in_environment(config)
    shapes = CUDA_SHAPES if config.device == "cuda" else CPU_SHAPES
    shapes = tuple(shape for i, shape in enumerate(shapes) if not config.only or i in config.only)
    if config.memory_of is not None:
        _print_memory(config, shapes[0])
        return []
    difference = check_paths(torch.device(config.device))
    print(f"Largest difference between weights after three steps, every path against the dense one: {difference:.1e}")
    started, results = time.perf_counter(), []
    for shape in shapes:
        if time.perf_counter() - started > config.budget_seconds:
            print(f"{shape}: left out, the budget of {config.budget_seconds:.0f} s is spent")
            continue
        measured = measure_shape(shape, config)
        print(format_table(shape, measured), flush=True)
        results += measured
    if config.output is not None:
        write_json(config.output, [asdict(measurement) for measurement in results])
    return results


def measure_shape(shape: Shape, config: TrainingConfig) -> list[Measurement]:
    """Every tool in both precisions at one shape, in turning order."""
    device = torch.device(config.device)
    tools = ("fluxsae",) if config.ours_only else ("fluxsae", *PEERS)
    ceilings = {precision: ceiling(shape, device, precision) for precision in ("float32", "bfloat16")}
    for precision, rate in ceilings.items():
        print(f"{shape} {precision} products: {rate / 1e12:.3f} TFLOP/s", flush=True)
    steps: dict[tuple[str, str], Step] = {}
    for tool in tools:
        for precision in ("float32", "bfloat16"):
            steps[tool, precision] = build(tool, shape, device, precision)
    batches = make_batches(shape, device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for step in steps.values():
        _timed(step, batches, 2 if device.type == "cpu" else 5, device)
    order = list(steps)
    for repetition in range(config.repetitions):
        for key in order[repetition % len(order) :] + order[: repetition % len(order)]:
            times[key].append(_timed(steps[key], batches, config.steps * (10 if device.type == "cuda" else 1), device))
    return [
        Measurement(tool, precision, shape, times[tool, precision], _peak(config, shape, tool, precision),
                    shape.dense_flops / (statistics.median(times[tool, precision]) / 1e3) / ceilings["bfloat16"])
        for tool, precision in steps
    ]  # fmt: skip


def _timed(step: Step, batches: list[Tensor], n_steps: int, device: torch.device) -> float:
    """Milliseconds a step."""
    _synchronise(device)
    start = time.perf_counter()
    for i in range(n_steps):
        step(batches[i % len(batches)])
    _synchronise(device)
    return (time.perf_counter() - start) * 1e3 / n_steps


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def make_batches(shape: Shape, device: torch.device, count: int = 4) -> list[Tensor]:
    """Sums of a few of 512 directions, so that features differ in use as real ones do."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(512, shape.d_model, generator=generator)
    weights = [torch.rand(shape.batch, 512, generator=generator).pow(8) for _ in range(count)]
    rows = [w @ directions + 0.1 * torch.randn(shape.batch, shape.d_model, generator=generator) for w in weights]
    return [(row / row.square().mean().sqrt()).to(device) for row in rows]


def ceiling(shape: Shape, device: torch.device, precision: str) -> float:
    """The most operations a second that a product of this shape reaches here."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a = torch.randn(shape.batch, shape.d_model, device=device, dtype=dtype)
    b = torch.randn(shape.d_model, shape.n_features, device=device, dtype=dtype)
    out = torch.empty(shape.batch, shape.n_features, device=device, dtype=dtype)
    n_products = 20 if device.type == "cuda" else 1

    def multiply(batch: Tensor) -> None:
        for _ in range(n_products):
            torch.mm(a, b, out=out)

    _timed(multiply, [a], 2, device)
    best = min(_timed(multiply, [a], 1, device) for _ in range(5))
    return 2.0 * shape.batch * shape.d_model * shape.n_features * n_products / (best / 1e3)


# The contenders


def build(tool: str, shape: Shape, device: torch.device, precision: str) -> Step:
    """One training step of a tool, ready to be called with a batch."""
    builders = {
        "fluxsae": _fluxsae, "sparsify": _sparsify, "sae-lens": _sae_lens, "overcomplete": _overcomplete,
        "dictionary-learning": _dictionary_learning,
    }  # fmt: skip
    return builders[tool](shape, device, precision)


def _fluxsae(shape: Shape, device: torch.device, precision: str) -> Step:
    return _ours(shape, device, precision, "auto")


def _ours(shape: Shape, device: torch.device, precision: str, products: str) -> Step:
    trainer = build_trainer(shape, device, precision, products)
    count = iter(range(1_000_000))
    return lambda batch: trainer.step(batch, next(count))


def build_trainer(shape: Shape, device: torch.device, precision: str, products: str, *, lr: float = _LR) -> SaeTrainer:
    """Our SAE in training, at a constant learning rate."""
    config = SaeConfig(
        architecture="topk", d_model=shape.d_model, n_features=shape.n_features, k=shape.k, auxk_coeff=0.0
    )
    loop = TrainConfig(
        lr=lr,
        warmup_steps=0,
        decay_fraction=0.0,
        grad_clip=None,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        products="dense" if products == "dense" else "sparse" if products == "sparse" else "auto",
    )
    return SaeTrainer(SparseAutoencoder(config).to(device), loop, n_steps=1_000_000)


def _autocast(device: torch.device, precision: str) -> Any:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def _sparsify(shape: Shape, device: torch.device, precision: str) -> Step:
    return sparsify_step(sparsify_model(shape, device), device, precision)


def sparsify_model(shape: Shape, device: torch.device) -> Any:
    """sparsify's SAE, of its own first weights."""
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    return SparseCoder(shape.d_model, SparseCoderConfig(num_latents=shape.n_features, k=shape.k), device=device)


def sparsify_step(sae: Any, device: torch.device, precision: str, *, lr: float = _LR) -> Step:
    """One training step of sparsify's SAE."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=lr, fused=True)

    def step(batch: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(device, precision):
            loss = sae(batch).fvu
        loss.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        sae.set_decoder_norm_to_unit_norm()

    return step


def _sae_lens(shape: Shape, device: torch.device, precision: str) -> Step:
    from sae_lens.saes.sae import TrainStepInput  # type: ignore[import-not-found]
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # type: ignore[import-not-found]

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shape.d_model, d_sae=shape.n_features, k=shape.k, device=str(device), aux_loss_coefficient=0.0
        )
    ).to(device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=_LR, fused=True)

    def step(batch: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(device, precision):
            loss = sae.training_forward_pass(
                TrainStepInput(
                    sae_in=batch, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
                )
            ).loss
        loss.backward()
        _remove_parallel(sae.W_dec)
        optimiser.step()
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)

    return step


def _overcomplete(shape: Shape, device: torch.device, precision: str) -> Step:
    import matplotlib

    if not hasattr(matplotlib.cm, "get_cmap"):  # overcomplete 0.3 asks for it by the name it had before matplotlib 3.9
        setattr(matplotlib.cm, "get_cmap", matplotlib.colormaps.get_cmap)  # noqa: B010 - mypy knows that it is gone
    from overcomplete.sae import TopKSAE  # type: ignore[import-not-found]

    sae = TopKSAE(shape.d_model, nb_concepts=shape.n_features, top_k=shape.k, device=str(device))
    optimiser = torch.optim.Adam(sae.parameters(), lr=_LR, fused=True)

    def step(batch: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(device, precision):
            _, _, x_hat = sae(batch)
            loss = (x_hat - batch).square().mean()
        loss.backward()
        optimiser.step()  # its dictionary normalises itself in every forward pass

    return step


def _dictionary_learning(shape: Shape, device: torch.device, precision: str) -> Step:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK  # type: ignore[import-not-found]

    sae = AutoEncoderTopK(shape.d_model, shape.n_features, shape.k).to(device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=_LR, fused=True)

    def step(batch: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        with _autocast(device, precision):
            loss = (sae(batch) - batch).square().sum(-1).mean()
        loss.backward()
        _remove_parallel(sae.decoder.weight, dim=0)
        optimiser.step()
        with torch.no_grad():
            sae.decoder.weight /= sae.decoder.weight.norm(dim=0, keepdim=True)

    return step


@torch.no_grad()
def _remove_parallel(weights: Tensor, *, dim: int = 1) -> None:
    assert weights.grad is not None
    weights.grad -= (weights.grad * weights).sum(dim, keepdim=True) * weights


# Memory, environment, output


def _peak(config: TrainingConfig, shape: Shape, tool: str, precision: str) -> float | None:
    """Peak memory of three steps of a tool alone in a process, MB; the libraries themselves included on a CPU."""
    shapes = CUDA_SHAPES if config.device == "cuda" else CPU_SHAPES
    command = [sys.executable, "-m", "train.benchmarks", "training", "--device", config.device]
    command += ["--memory-of", f"{tool}:{precision}", "--only", str(shapes.index(shape))]
    done = subprocess.run([*command, "--ours-only"], capture_output=True, text=True, check=False)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _print_memory(config: TrainingConfig, shape: Shape) -> None:
    tool, _, precision = str(config.memory_of).partition(":")
    device = torch.device(config.device)
    step = build(tool, shape, device, precision)
    for batch in make_batches(shape, device, 3):
        step(batch)
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e6)
    else:
        print(_peak_resident())


def _peak_resident() -> float:
    """Peak memory of this process, MB; getrusage would count what its parent held when it was started (Linux)."""
    status = Path("/proc/self/status").read_text()
    return float(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def format_table(shape: Shape, measured: list[Measurement]) -> str:
    """Medians, ratios to ours at its best, memory and the share of the ceiling."""
    ours = min(m.median for m in measured if m.tool == "fluxsae")
    lines = [f"{shape!s:<40}{'ms a step':>12}{'x ours':>9}{'peak MB':>10}{'of bf16 ceiling':>17}"]
    for m in sorted(measured, key=lambda m: m.median):
        memory = "" if m.peak_megabytes is None else f"{m.peak_megabytes:.0f}"
        lines.append(
            f"{m.tool + ' ' + m.precision:<40}{m.median:>12.1f}{m.median / ours:>9.2f}{memory:>10}"
            f"{100 * (m.ceiling_share or 0):>16.0f}%"
        )
    return "\n".join(lines) + "\n"


def in_environment() -> bool:
    """Whether the other tools' packages are at hand."""
    return Path(sys.prefix).resolve() == ENVIRONMENT.resolve()


def build_environment() -> Path:
    """The Python of an environment with the other tools, on top of this one's packages; built on first use."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".complete"
    if not stamp.exists():
        print(f"Building {ENVIRONMENT} with {', '.join(REQUIREMENTS)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
        inner = next((ENVIRONMENT / "lib").glob("python*")) / "site-packages"
        (inner / "shared.pth").write_text(f"{packages}\n")
        pins = [f"torch=={torch.__version__.partition('+')[0]}", *REQUIREMENTS]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *pins], check=True)
        stamp.touch()
    return python


def _run_in_environment(config: TrainingConfig) -> list[Measurement]:
    """The same benchmark among the other tools' packages; its results come back through a file."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [str(build_environment()), "-m", "train.benchmarks", "training", "--output", str(output)]
        command += ["--device", config.device, "--repetitions", str(config.repetitions), "--steps", str(config.steps)]
        command += ["--budget-seconds", str(config.budget_seconds)]
        command += ["--only", *map(str, config.only)] if config.only else []
        subprocess.run(command, check=True, env=os.environ | (WITHOUT_TRITON if config.device == "cpu" else {}))
        rows = json.loads(output.read_text())
    if config.output is not None:
        write_json(config.output, rows)
    return [Measurement(**{**row, "shape": Shape(**row["shape"])}) for row in rows]


def calibrate(config: TrainingConfig) -> None:
    """Prints the times of dense and sparse steps over k: where they cross is `fluxsae.sae.kernels.SPARSE_BELOW`."""
    device = torch.device(config.device)
    for k in (16, 32, 64, 128, 256, 512, 1024):
        shape = Shape(3072, 12_288, k, 512 if config.device == "cpu" else 4096)
        batches, times = make_batches(shape, device), {}
        for products in ("dense", "sparse"):
            step = _ours(shape, device, "bfloat16", products)
            _timed(step, batches, 2, device)
            times[products] = statistics.median(_timed(step, batches, 2, device) for _ in range(5))
        chosen = "sparse" if sparse_pays(k, shape.n_features, device) else "dense"
        print(f"k={k:<5} dense {times['dense']:.1f} ms, sparse {times['sparse']:.1f} ms, chosen: {chosen}", flush=True)


def check_paths(device: torch.device) -> float:
    """The largest difference between weights after three float32 steps on this device and on the CPU's dense path."""
    shape = Shape(256, 2048, 16, 128)
    trainers = [build_trainer(shape, torch.device("cpu"), "float32", "dense")]
    trainers += [build_trainer(shape, device, "float32", products) for products in ("dense", "sparse")]
    for i, batch in enumerate(make_batches(shape, torch.device("cpu"), 3)):
        for trainer in trainers:
            trainer.step(batch.to(trainer.device), i)
    expected, *others = (dict(trainer.sae.named_parameters()) for trainer in trainers)
    return max(float((other[name].cpu() - expected[name]).abs().max()) for other in others for name in expected)
