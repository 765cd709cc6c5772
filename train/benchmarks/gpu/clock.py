"""Fair timing: alternating order, medians, the device waited for; and the ceilings of the device."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from train.benchmarks.gpu.floors import Ceilings


@dataclass
class Timing:
    """Samples of one piece of work, seconds, and the most memory it held, bytes (0 where unknown)."""

    samples: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """(largest - smallest) / median: differences below it are noise."""
        return (max(self.samples) - min(self.samples)) / self.seconds


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_once(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of one run, and the peak of allocated memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def alternate(
    works: Mapping[str, Callable[[], object]], *, device: torch.device, repeats: int, deadline: float = float("inf")
) -> dict[str, Timing]:
    """Times several pieces of work by turns, every second round backwards, after one run of each that is not counted.

    Stops after a whole round once `deadline` (of `time.monotonic`) has passed.
    """
    for work in works.values():
        time_once(work, device)
    timings = {name: Timing() for name in works}
    for round_ in range(repeats):
        for name in list(works)[:: 1 if round_ % 2 == 0 else -1]:
            seconds, peak = time_once(works[name], device)
            timings[name].samples.append(seconds)
            timings[name].peak_bytes = max(timings[name].peak_bytes, peak)
        if time.monotonic() > deadline:
            break
    return timings


def measure_ceilings(device: torch.device, *, side: int) -> Ceilings:
    """What matrix products of `side` x `side` (random values) and a copy of the same bytes reach."""
    generator = torch.Generator(device).manual_seed(0)

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        timing = alternate({"product": lambda: a @ b}, device=device, repeats=9)["product"]
        return 2 * side**3 / min(timing.samples)

    source = torch.randn(4 * side, side, device=device, generator=generator)
    target = torch.empty_like(source)
    copy = alternate({"copy": lambda: target.copy_(source)}, device=device, repeats=9)["copy"]
    moved = 2 * source.numel() * source.element_size()
    return Ceilings(product(torch.bfloat16), product(torch.float32), moved / min(copy.samples))
