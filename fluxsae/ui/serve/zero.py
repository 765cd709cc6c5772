"""ZeroGPU: the same jobs, run where the GPU is lent, in another process; only with the `spaces` package on a Space."""

import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxsae.ui.serve.session import Workbench

_served: "list[Workbench]" = []
"""The one workbench of this process: jobs are pickled, and it is not."""


def is_zero_gpu() -> bool:
    """Whether this process is a Space that borrows its GPU call by call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


def serve(bench: "Workbench") -> None:
    """Loads the models onto the lent device at start-up, as ZeroGPU wants it, and sends jobs through `spaces`."""
    import spaces

    _served[:] = [bench]
    bench.device = "cuda"
    bench.load_models()
    bench.lane.stream_job = spaces.GPU(duration=seconds_of)(run_job)


def seconds_of(job: Any) -> int:
    """GPU seconds to ask for: quota is checked against them, so they follow the work."""
    return int(job.seconds)


def run_job(job: Any) -> Iterator[Any]:
    """The job's steps and result, where the GPU is. Hooks come and go inside; results hold no CUDA tensors."""
    from fluxsae.ui.serve.lane import in_thread

    bench = _served[0]
    yield from in_thread(lambda on_step: job.run(bench, on_step))
