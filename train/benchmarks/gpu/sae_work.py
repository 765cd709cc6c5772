"""What is measured on SAE training: seconds a step, beside the operations at the bf16 ceiling and Adam's bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig
from fluxsae.sae.training.trainer import SaeTrainer
from train.benchmarks.gpu.desk import Desk
from train.benchmarks.gpu.floors import optimiser_bytes, training_operations
from train.benchmarks.gpu.report import Row, row_of

WANTED_SHARE = 0.60


@dataclass(frozen=True)
class Case:
    """One SAE and the way its products are made."""

    d_model: int
    n_features: int
    k: int
    products: Literal["dense", "sparse"]

    def __str__(self) -> str:
        return f"{self.d_model} x {self.n_features}, k {self.k}, {self.products}"


def measure_training(desk: Desk) -> None:
    """A training step at the usual size with small and large k, dense and sparse, and at 16 times expansion."""
    scale, width = desk.scale, desk.scale.d_model
    for case in (
        Case(width, scale.n_features, scale.k, "dense"),
        Case(width, scale.n_features, scale.k, "sparse"),
        Case(width, scale.n_features, scale.large_k, "dense"),
        Case(width, 16 * width, scale.k, "dense"),
        Case(width, 16 * width, scale.k, "sparse"),
    ):
        _measure_case(desk, case)


def _measure_case(desk: Desk, case: Case) -> None:
    n_tokens, ceilings = desk.scale.training_tokens, desk.ceilings
    work = training_step(case, n_tokens=n_tokens, device=desk.device)
    timing = desk.alternate({"step": work}, repeats=max(desk.repeats, 5))["step"]
    operations = training_operations(n_tokens, case.d_model, case.n_features)
    floor = operations / ceilings.bf16 + optimiser_bytes(case.d_model, case.n_features) / ceilings.memory
    name = f"SAE training step, {case}, {n_tokens} tokens"
    if case.products == "sparse":
        desk.report.add(row_of(name, timing, details={"dense_floor_seconds": floor}))
        return
    desk.report.add(row_of(name, timing, floor_seconds=floor, floor_note="dense operations and Adam's bytes"))
    share = operations / timing.seconds / ceilings.bf16
    target = f">= {WANTED_SHARE}"
    desk.report.add(
        Row(name=f"its share of the bf16 ceiling, {case}", value=share, unit="x", target=target,
            is_met=share >= WANTED_SHARE)
    )  # fmt: skip


def training_step(case: Case, *, n_tokens: int, device: torch.device) -> Callable[[], object]:
    """One optimiser step of the library's own trainer on random activations, ready to be called again and again."""
    generator = torch.Generator(device).manual_seed(0)
    config = SaeConfig(architecture="topk", d_model=case.d_model, n_features=case.n_features, k=case.k)
    sae = SparseAutoencoder(config, seed=None).to(device)
    with torch.no_grad():
        rows = torch.randn(case.n_features, case.d_model, device=device, generator=generator)
        sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
        sae.W_enc.copy_(sae.W_dec)
    trainer = SaeTrainer(sae, TrainConfig(products=case.products), n_steps=1000)
    batches = [torch.randn(n_tokens, case.d_model, device=device, generator=generator) for _ in range(2)]
    n_done = 0

    def step() -> None:
        nonlocal n_done
        trainer.step(batches[n_done % 2], n_done)
        n_done += 1

    return step
