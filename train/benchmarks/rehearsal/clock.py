"""Programs timed from outside: seconds and peak memory of a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fluxsae.errors import FluxSaeError

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""


@dataclass(frozen=True)
class Timing:
    """What one part of the rehearsal took."""

    name: str
    seconds: float
    peak_gb: float | None = None
    """Most memory that its process held at a time, 10^9 bytes, at least what its parent held when it was started; None
    for a part of a process."""
    note: str = ""


def timed_program(name: str, module: str, arguments: Sequence[object]) -> Timing:
    """Runs `python -m module` and waits for it.

    Raises:
        FluxSaeError: it fails; what it printed says why.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", module, *map(str, arguments)])
    code, peak = wait_for(process)
    if code != 0:
        raise FluxSaeError(f"{name} ended with {code}. Mend what it printed above; the same command continues there.")
    return Timing(name, time.perf_counter() - started, peak)


def wait_for(process: "subprocess.Popen[bytes]") -> tuple[int, float]:
    """Exit code and peak memory, 10^9 bytes, of a process that ends."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * RSS_UNIT / 1e9
