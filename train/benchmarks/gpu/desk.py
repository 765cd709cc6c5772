"""What every measurement needs: sizes, device, ceilings, time left, and where results go."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from train.benchmarks.gpu.clock import Timing, alternate
from train.benchmarks.gpu.floors import Ceilings
from train.benchmarks.gpu.models import Scale
from train.benchmarks.gpu.report import Report, Row


@dataclass
class Desk:
    """The circumstances of a benchmark."""

    scale: Scale
    device: torch.device
    ceilings: Ceilings
    report: Report
    repeats: int
    deadline: float
    """Of `time.monotonic`: rounds after it are left out."""

    def alternate(self, works: Mapping[str, Callable[[], object]], *, repeats: int | None = None) -> dict[str, Timing]:
        """Fair timings of several pieces of work."""
        return alternate(works, device=self.device, repeats=repeats or self.repeats, deadline=self.deadline)

    def add_ratio(
        self, name: str, timing: Timing, base: Timing, *, floor: float, limit: float | None = None, note: str = ""
    ) -> None:
        """The row of a ratio of two times: the median over rounds, so that what drifts between rounds cancels."""
        ratios = [sample / of for sample, of in zip(timing.samples, base.samples, strict=True)]
        ratio = statistics.median(ratios)
        self.report.add(
            Row(
                name=name,
                value=ratio,
                unit="x",
                floor=floor,
                floor_note=note,
                target="" if limit is None else f"<= {limit:.4g}",
                is_met=None if limit is None else ratio <= limit,
                peak_gb=timing.peak_bytes / 1e9 or None,
                spread=(max(ratios) - min(ratios)) / ratio,
                samples=tuple(ratios),
            )
        )
