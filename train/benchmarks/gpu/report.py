"""The results: one row a measurement, written to disk as soon as it stands, as JSON and as a table."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fluxsae.files import write_text
from train.benchmarks.gpu.clock import Timing


@dataclass(frozen=True)
class Row:
    """One measured figure beside its physical floor."""

    name: str
    value: float
    unit: str
    """`s`, `ms`, or `x` for a ratio of two times."""
    floor: float | None = None
    """The least it could be, in the same unit."""
    floor_note: str = ""
    target: str = ""
    is_met: bool | None = None
    peak_gb: float | None = None
    """Most memory allocated meanwhile, 10^9 bytes, model included."""
    spread: float | None = None
    """(largest - smallest) / median of the samples."""
    samples: tuple[float, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """Everything measured so far; `folder` always holds it."""

    folder: Path
    machine: dict[str, Any]
    has_targets: bool = True
    """False where the figures say nothing about FLUX.1-dev, as with a tiny model."""
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """One more row, on disk and on the screen."""
        if not self.has_targets:
            row = replace(row, target="", is_met=None)
        self.rows.append(row)
        print(_markdown_row(row), flush=True)
        self.save()

    def skip(self, name: str, reason: str) -> None:
        """Says why something was not measured."""
        self.skipped[name] = reason
        print(f"skipped {name}: {reason}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes results.json and results.md."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "results.json", json.dumps(asdict(self), indent=1, default=str) + "\n")
        write_text(self.folder / "results.md", self.markdown())

    def markdown(self) -> str:
        """The table, for `train/LOG.md`."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        lines = [
            f"Measured on: {machine}",
            "",
            "| what | measured | floor | target | peak memory | spread |",
            "|---|---|---|---|---|---|",
            *map(_markdown_row, self.rows),
        ]
        if self.skipped:
            lines += ["", *(f"Not measured: {name} ({reason})" for name, reason in self.skipped.items())]
        return "\n".join(lines) + "\n"


def row_of(name: str, timing: Timing, *, per: float = 1.0, **fields: Any) -> Row:
    """The row of a timing, its median divided by `per` (the steps in one sample, say), in ms below a second."""
    seconds = timing.seconds / per
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3)
    floor = fields.pop("floor_seconds", None)
    return Row(
        name=name,
        value=seconds * factor,
        unit=unit,
        floor=None if floor is None else floor * factor,
        peak_gb=timing.peak_bytes / 1e9 or None,
        spread=timing.spread,
        samples=tuple(sample / per for sample in timing.samples),
        **fields,
    )


def describe_machine(device: torch.device, *, dtype: torch.dtype) -> dict[str, Any]:
    """What the figures depend on: device, libraries, dtype."""
    import diffusers

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _markdown_row(row: Row) -> str:
    verdict = {None: "", True: " (met)", False: " (MISSED)"}[row.is_met]
    cells = [
        row.name,
        f"{row.value:.4g} {row.unit}",
        "" if row.floor is None else f"{row.floor:.4g} {row.unit}" + (f" ({row.floor_note})" if row.floor_note else ""),
        row.target + verdict,
        "" if row.peak_gb is None else f"{row.peak_gb:.1f} GB",
        "" if row.spread is None else f"{row.spread:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"
