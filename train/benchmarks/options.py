"""The options of every benchmark, apart from its work, so that `--help` answers without loading torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.flux_options import FluxOptions

Model = Literal["flux1-dev", "flux2-klein", "tiny"]
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
class ConditionsConfig:
    """How much to measure."""

    pictures: int = 6
    """Pictures of each concept that show it, and as many that do not, for the report."""
    development: int = 400
    """Other pictures, unedited, on which the conditions are chosen; a multiple of 16."""
    start: float = 0.2
    """Where the edits begin, as a fraction of the schedule; they act to its end."""
    seed: int = 3_000_000
    """Of scenes and noise."""
    run: Path | None = None
    """Run folder of the miniature; without it the embedded one."""
    draws: int = 2000
    """Bootstrap draws."""


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
    images: int | None = None
    """Images of `scoring`, `record-...` and `limits-...`; left out, a batch of FLUX.1-dev's: 8, 32 and 16."""
    steps: int = 5
    """Steps of `scoring`."""
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


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """What is served, and to how many."""

    images: int = 20_000
    """Images of the run."""
    features: int = 12_288
    """Features at each of two hook points."""
    side: int = 1024
    """Width and height of the images, in pixels."""
    steps: int = 20
    """Denoising steps of a picture."""
    visitors: int = 50
    """Visitors who browse while one has pictures made."""
    seconds: float = 40.0
    """How long they do."""
    folder: Path | None = None
    """Folder for run and FLUX, 300 MB; left out, one of the system's temporary folders. Deleted in the end."""
    keep: bool = False
    """Leave run and FLUX in the folder."""


@dataclass(frozen=True, kw_only=True)
class PicturesConfig:
    """What is drawn, read and trained."""

    n_scenes: int = 500
    """Drawn scenes."""
    n_collected: int = 250
    """Of them at most so many train or test the two SAEs."""
    hookpoint: str = "transformer_blocks.3"
    """Where features are read."""
    step: int = 18
    """Step of the schedule of 20 whose noise is added."""
    batch_size: int = 25
    """Pictures read together."""
    epochs: int = 40
    """Passes over the activations of the two SAEs."""
    repeats: int = 5
    """Timed repetitions; the median counts."""
    seed: int = 0
    """Decides scenes and halves."""


@dataclass(frozen=True, kw_only=True)
class GrowthConfig:
    """How large the run is."""

    images: int = 500
    """Images that are collected and scored, and that are added to the scored ones."""
    batch_size: int = 20
    """Images generated together; it divides the number of images, so that batches are those of a run made at once."""
    epochs: int = 4
    """Passes over the activations."""
    folder: Path | None = None
    """Where the scratch folder is made; left out, among the system's temporary ones."""


@dataclass(frozen=True, kw_only=True)
class SigmasConfig:
    """What to collect, train and measure."""

    images: int = 320
    """Images whose activations are collected; every tenth is held out."""
    hookpoint: str = "transformer_blocks.3"
    """Where."""
    steps: tuple[int, ...] = tuple(range(20))
    """Steps of the schedule of 20."""
    n_features: int = 512
    """Features of each SAE."""
    k: int = 10
    """Active features a token."""
    epochs: int = 10
    """Passes over the data."""
    batch_size: int = 2048
    """Rows in a batch, all steps together."""
    lr: float = 3e-3
    """Learning rate."""
    flow_images: int = 24
    """Drawn scenes for splice error and velocity FVU; 0 leaves them out."""
    seed: int = 0
    """Of images, weights and order."""
    draws: int = 1000
    """Bootstrap draws, over images."""
    folder: Path | None = None
    """Run folder that keeps the activations; left out, a temporary one."""


CONFIGS: dict[str, type[Any]] = {
    "causes": CausesConfig,
    "collection": CollectionConfig,
    "conditions": ConditionsConfig,
    "feeding": FeedingConfig,
    "gpu": GpuConfig,
    "growth": GrowthConfig,
    "memory": MemoryConfig,
    "page": PageConfig,
    "pictures": PicturesConfig,
    "quality": QualityConfig,
    "rehearsal": RehearsalConfig,
    "sigmas": SigmasConfig,
    "steering": SteeringConfig,
    "training": TrainingConfig,
}
