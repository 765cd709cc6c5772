"""The options of every benchmark, apart from its work, so that `--help` answers without loading torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.flux_options import FluxOptions

Model = Literal["flux1-dev", "tiny"]
GROUPS = ("steps", "early-exit", "sweep", "training", "ends", "determinism", "batches", "compiled")


@dataclass(frozen=True, kw_only=True)
class CausesConfig:
    """How much to measure."""

    images: int = 60
    """Scenes of two things; one feature of each attribute is explained in each."""
    pairs: int = 12
    """Sources of each kind drawn at random from each explanation."""
    steps: tuple[int, ...] = (2, 6, 10)
    """Steps at which features are explained, in turn."""
    seed: int = 41_000
    """Of scenes, features and pairs."""
    run: Path | None = None
    """Run folder of the miniature; left out, the embedded one."""
    draws: int = 2000
    """Bootstrap draws, over images."""


@dataclass(frozen=True, kw_only=True)
class CollectionConfig(FluxOptions):
    """What is timed."""

    hookpoint: str = "layer1"
    """The only hook point that is captured."""
    step: int = 10
    """The only step that is captured, from 0."""
    n_images: int = 32
    """Images of each run."""
    batch_size: int = 16
    """Images generated together."""
    repeats: int = 5
    """Runs of each measurement; the median counts."""


@dataclass(frozen=True, kw_only=True)
class GpuConfig:
    """What to measure and where to."""

    out: Path = Path("benchmark")
    """Folder for results.json and results.md."""
    tiny: bool = False
    """A tiny model on the CPU, to check the program."""
    device: str | None = None
    """cuda or cpu; left out, cuda (cpu with --tiny)."""
    only: tuple[str, ...] = GROUPS
    """What to measure, in this order."""
    repeats: int = 5
    """Samples of each short measurement."""
    budget_seconds: float = 540.0
    """No measurement is begun after this time; what is done stays."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What to train, and for how long."""

    d_model: int = 256
    """Width of the rows."""
    n_features: int = 1024
    """Features of the SAEs."""
    k: int = 16
    """Active features a row."""
    batch: int = 512
    """Rows a step."""
    steps: int = 600
    """Steps of each training."""
    lr: float = 1e-3
    """Learning rate of all of them."""
    points: int = 6
    """Points of each curve."""
    output: Path | None = None
    """JSON file for the curves."""


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """What is timed."""

    flux: str = "miniature"
    """`miniature`, a local folder or a Hub repository."""
    hookpoint: str = "layer1"
    """Where the edit is made, with a random top-k SAE."""
    expansion_factor: int = 8
    """n_features / d_model of that SAE."""
    k: int = 8
    """Active features a token."""
    n_strengths: int = 6
    """Strengths of the sweep, beside the baseline."""
    start: float = 0.5
    """Where the edits start, as a fraction of the schedule."""
    num_inference_steps: int | None = None
    """Denoising steps; left out, the model's own number."""
    repeats: int = 5
    """Runs of each measurement; the median counts."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What to measure."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    ours_only: bool = False
    """Leave the other tools out; needs nothing but this package."""
    calibrate: bool = False
    """Print dense and sparse times over k instead."""
    repetitions: int = 7
    """Timed repetitions; the median counts."""
    steps: int = 1
    """Steps in one repetition."""
    budget_seconds: float = 3600.0
    """Start no further measurement after this long."""
    only: tuple[int, ...] = ()
    """Positions of the shapes to measure; left out, all."""
    memory_of: str | None = None
    """Run one tool alone and print its peak memory (used by the benchmark itself)."""
    output: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True, kw_only=True)
class FeedingConfig:
    """What is measured."""

    d_model: int = 3072
    """Width of the rows."""
    tokens_per_image: int = 512
    """Rows of each image."""
    n_images: int = 64
    """Images on disk, 8 in a shard."""
    batch_size: int = 512
    """Rows of a batch, of all processes together."""
    world_size: int = 8
    """Processes that share the batches."""
    n_features: int = 12_288
    """Features of the SAE that is trained."""
    k: int = 64
    """Active features a token."""
    steps: int = 24
    """Training steps; 0 trains nothing."""
    repeats: int = 5
    """Passes over the data; the median counts."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """What is measured."""

    only: str | None = None
    """One measurement, in this process; left out, all of them, each in its own."""
    d_model: int = 3072
    """Width of the activations."""
    score_images: int = 20_000
    """Images of `select` and `compare`."""
    score_features: int = 49_152
    """Features of `select` and `compare`."""


@dataclass(frozen=True, kw_only=True)
class RehearsalConfig:
    """What is rehearsed, and where."""

    model: Model = "flux1-dev"
    """Whose dimensions."""
    n_images: int = 16
    """Images that are collected, and as many others that are scored."""
    folder: Path | None = None
    """Scratch folder, 6 GB; left out, one of the system's temporary folders. Deleted in the end."""
    keep: bool = False
    """Leave model and run in the scratch folder."""
    out: Path | None = None
    """Markdown file for the table."""


CONFIGS: dict[str, type[Any]] = {
    "causes": CausesConfig,
    "collection": CollectionConfig,
    "feeding": FeedingConfig,
    "gpu": GpuConfig,
    "memory": MemoryConfig,
    "quality": QualityConfig,
    "rehearsal": RehearsalConfig,
    "steering": SteeringConfig,
    "training": TrainingConfig,
}
