"""Measures FLUX.1-dev at full size with random weights: no download, no account, only a GPU of 48 GB or more.

    python -m train.benchmarks gpu --out bench
    python -m train.benchmarks gpu --tiny      # on a CPU with a tiny model: checks the program, not speed

Every result is on disk as soon as it stands: `results.json`, and `results.md` for train/LOG.md.
"""

import time
import traceback
from collections.abc import Callable

import torch

from fluxsae.errors import FluxSaeError
from train.benchmarks.gpu import flux_work
from train.benchmarks.gpu.clock import measure_ceilings
from train.benchmarks.gpu.desk import Desk
from train.benchmarks.gpu.floors import Ceilings
from train.benchmarks.gpu.flux_work import FluxBench
from train.benchmarks.gpu.models import DEV, TINY, Scale, build_pipeline
from train.benchmarks.gpu.report import Report, Row, describe_machine
from train.benchmarks.gpu.sae_work import measure_training
from train.benchmarks.options import GROUPS, GpuConfig

_LEAST_FREE_BYTES = 44_000_000_000


def main(config: GpuConfig) -> Report:
    """Runs the measurements.

    Raises:
        FluxSaeError: no such group, no GPU, or too little memory on it.
    """
    start = time.monotonic()
    scale, device = _check(config)
    deadline = start + config.budget_seconds
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    report = Report(config.out, describe_machine(device, dtype=dtype), has_targets=not config.tiny)
    report.save()
    ceilings = measure_ceilings(device, side=scale.product_side)
    _report_ceilings(report, ceilings)
    desk = Desk(scale, device, ceilings, report, config.repeats, deadline)
    if set(config.only) - {"training"}:
        began = time.monotonic()
        pipe = build_pipeline(scale, device=device, dtype=dtype)
        report.add(Row(name="build the pipeline with random weights", value=time.monotonic() - began, unit="s"))
        bench = FluxBench(pipe, desk)
    works: dict[str, Callable[[], None]] = {
        "steps": lambda: flux_work.measure_steps(bench),
        "early-exit": lambda: flux_work.measure_early_exit(bench),
        "sweep": lambda: flux_work.measure_sweep(bench),
        "ends": lambda: flux_work.measure_ends(bench),
        "determinism": lambda: flux_work.measure_determinism(bench),
        "batches": lambda: flux_work.measure_batches(bench),
        "compiled": lambda: flux_work.measure_compiled(bench, backend=config.compile_backend),
        "training": lambda: measure_training(desk),
    }
    for group in config.only:
        if time.monotonic() > deadline:
            report.skip(group, f"the budget of {config.budget_seconds:g} s was spent")
            continue
        _run_group(group, works[group], report)
    return report


def _run_group(group: str, work: Callable[[], None], report: Report) -> None:
    """One group; a fault there is reported and does not cost the others."""
    print(f"-- {group}", flush=True)
    try:
        work()
    except Exception as error:
        traceback.print_exc()
        report.skip(group, f"{type(error).__name__}: {error}".splitlines()[0][:300])
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(config: GpuConfig) -> tuple[Scale, torch.device]:
    unknown = sorted(set(config.only) - set(GROUPS))
    if unknown:
        raise FluxSaeError(f"Unknown groups {', '.join(unknown)}. Allowed are {', '.join(GROUPS)}.")
    device = torch.device(config.device or ("cpu" if config.tiny else "cuda"))
    if config.tiny:
        return TINY, device
    if device.type != "cuda" or not torch.cuda.is_available():
        raise FluxSaeError("FLUX.1-dev at full size wants a CUDA device. Use --tiny to check the program on a CPU.")
    free = torch.cuda.mem_get_info(device)[0]
    if free < _LEAST_FREE_BYTES:
        raise FluxSaeError(
            f"{free / 1e9:.0f} GB are free on the GPU; FLUX.1-dev with its text encoders and room to work needs "
            f"{_LEAST_FREE_BYTES / 1e9:.0f} GB. Use a larger GPU, or --only training."
        )
    return DEV, device


def _report_ceilings(report: Report, ceilings: Ceilings) -> None:
    for name, value, unit in (
        ("ceiling: bf16 matrix product", ceilings.bf16 / 1e12, "TFLOP/s"),
        ("ceiling: fp32 matrix product", ceilings.fp32 / 1e12, "TFLOP/s"),
        ("ceiling: memory, copy", ceilings.memory / 1e9, "GB/s"),
    ):
        report.add(Row(name=name, value=value, unit=unit))
