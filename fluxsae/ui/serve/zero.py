"""ZeroGPU: the same jobs, run where the GPU is lent, in another process; only with the `spaces` package on a Space."""

import contextlib
import importlib.util
import math
import os
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fluxsae.errors import FluxSaeError

if TYPE_CHECKING:
    from fluxsae.ui.serve.lane import Job
    from fluxsae.ui.serve.session import Workbench

START_SECONDS: Final = 3.0
COPIED_BYTES: Final = 5e9
"""Bytes of weights that reach the lent GPU in a second (calculated, not measured)."""
OPERATIONS: Final = 125e12
"""Operations a second of a FLUX step on the half of an H200 that is lent (calculated: its share of what a whole H100
reaches, less a margin)."""
LEAST_PASS_SECONDS: Final = 0.02
PICTURE_SECONDS: Final = 1.0
"""Decoding, measuring and packing one picture."""

ELSEWHERE: Final = "Gallery, Directions and what was made before go on working; on your own machine there is no limit."
MEANINGS: Final = {
    "ZeroGPU quota exceeded": "Hugging Face lends each visitor the GPU for some seconds a day, and yours are used up, "
    "or fewer are left than this asks for. Sign in to Hugging Face for a larger share, or come back later.",
    "ZeroGPU pending credits exceeded": "The GPU seconds that Hugging Face lends you are all taken by what you have "
    "running. Wait until it is done.",
    "ZeroGPU illegal duration": "This asks for more GPU seconds than Hugging Face lends at a time. Choose fewer steps, "
    "strengths or edits.",
    "ZeroGPU queue timeout": "All GPUs that Hugging Face lends were busy for a minute. Try again.",
    "ZeroGPU client error": "Hugging Face could not lend a GPU just now. Try again; reload the page if that fails.",
    "ZeroGPU worker error": "Hugging Face took the GPU back before this was done. Try again with fewer steps.",
}
"""Title of an error of the `spaces` package -> what it means here, and what to do."""


@dataclass(frozen=True)
class Refused:
    """A refusal on its way out of the GPU's process: exceptions lose their words there."""

    words: str


@dataclass(frozen=True)
class Failed:
    """A fault on its way out of the GPU's process."""

    traceback: str


@dataclass(frozen=True)
class Served:
    """A workbench, with what its FLUX takes."""

    bench: "Workbench"
    start_seconds: float
    """To get the weights onto the lent GPU."""
    pass_seconds: float
    """A pass of the transformer over one image."""


_served: dict[str, Served] = {}
"""The workbenches of this process by their source: jobs are pickled, and they are not."""


class JobFailed(RuntimeError):
    """A fault in the GPU's process, with its traceback there."""


def is_zero_gpu() -> bool:
    """Whether this process is a Space that borrows its GPU call by call."""
    return bool(os.environ.get("SPACES_ZERO_GPU")) and importlib.util.find_spec("spaces") is not None


def serve(bench: "Workbench") -> None:
    """Loads all that jobs use, as ZeroGPU wants it before the page is launched, and sends jobs through `spaces`.

    What is loaded here is in every process that the GPU is lent to; what is not would be loaded again by each.
    """
    import spaces

    from fluxsae.ui.serve.shelf import MAX_RUNS

    bench.fluxes.most = MAX_RUNS  # each process that the GPU is lent to has all of them
    _ = (bench.pipe, bench.saes, bench.distance, bench.embedder, bench.token_limits)
    _served[bench.source] = Served(
        bench,
        start_seconds=START_SECONDS + _weight_bytes(bench.pipe) / COPIED_BYTES,
        pass_seconds=max(LEAST_PASS_SECONDS, pass_operations(bench) / OPERATIONS),
    )
    lent = spaces.GPU(duration=seconds_of)(run_job)
    bench.lane.stream_job = lambda job, bench: _stream(lent, bench.source, job)


def seconds_of(source: str, job: "Job") -> int:
    """GPU seconds to ask for: they count against the visitor's quota, so they follow the work."""
    served = _served[source]
    return math.ceil(
        served.start_seconds + job.n_passes(served.bench) * served.pass_seconds + job.n_pictures * PICTURE_SECONDS
    )


def pass_operations(bench: "Workbench") -> float:
    """Operations of one pass over one image: products with weights, and attention, twice under true guidance."""
    transformer, settings = bench.pipe.transformer, bench.info.settings
    n_blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    width, n_tokens = transformer.inner_dim, bench.info.rows * bench.info.cols + settings.max_sequence_length
    one = n_blocks * (24 * width**2 * n_tokens + 4 * n_tokens**2 * width)
    return float(one * (2 if settings.true_cfg_scale > 1 else 1))


def run_job(source: str, job: "Job") -> Iterator[Any]:
    """The job's steps and result, where the GPU is. Hooks come and go inside; results hold no tensors of the GPU's.

    Refusals and faults are results too. Closed before its end, it returns when the job has stopped.
    """
    from fluxsae.ui.serve.lane import Done, FluxLane, StepDone

    with contextlib.closing(FluxLane()) as lane, contextlib.closing(lane.stream(job, _served[source].bench)) as events:
        try:
            yield from (event for event in events if isinstance(event, StepDone | Done))
        except FluxSaeError as error:
            yield Refused(str(error))
        except Exception as error:
            yield Failed("".join(traceback.format_exception(error)))


def _stream(lent: Callable[[str, Any], Generator[Any, None, None]], source: str, job: "Job") -> Iterator[Any]:
    import gradio as gr

    fault: Refused | Failed | None = None
    try:
        with contextlib.closing(lent(source, job)) as events:
            for event in events:
                if isinstance(event, Refused | Failed):
                    fault = event
                else:
                    yield event
    except gr.Error as error:
        meaning = MEANINGS.get(str(getattr(error, "title", "")), "Hugging Face could not lend a GPU.")
        raise FluxSaeError(f"{meaning} {ELSEWHERE} (ZeroGPU: {error.message})") from error
    if isinstance(fault, Refused):
        raise FluxSaeError(fault.words)
    if isinstance(fault, Failed):
        raise JobFailed(fault.traceback)


def _weight_bytes(pipe: Any) -> int:
    parts = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for part in parts for weight in part.parameters())
