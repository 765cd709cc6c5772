"""The run folder, on disk as on the Hub: the only place that spells a file name."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from fluxsae.errors import FluxSaeError
from fluxsae.files import load_tensors, read_json, remove_leftovers, save_tensors, write_bytes, write_json, write_text
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.identity import FluxIdentity
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from fluxsae.runs.tables import (
    Embeddings,
    FeatureTable,
    Heatmaps,
    ImageRow,
    ImageTable,
    load_directions,
    load_given_labels,
    load_lines,
    write_images,
)

SCHEMA_VERSION = 1
_LIBRARIES = ("fluxsae", "torch", "diffusers", "transformers", "safetensors", "numpy", "open_clip_torch")
_LOCAL_ONLY = ("activations", ".work")


@dataclass(frozen=True)
class StageRecord:
    """What a completed stage was asked for and what it cost."""

    config: dict[str, Any]
    """The values that decide the stage's result; another value means that the stage is not complete."""
    seconds: float
    megabytes: float
    """Size of the files that the stage wrote into the run folder."""


@dataclass(frozen=True)
class RunInfo:
    """`run.json`: which FLUX, how its images were generated, and which stages are complete."""

    flux_id: str
    settings: GenerationSettings
    hookpoints: tuple[str, ...]
    steps: tuple[int, ...] = ()
    """Captured steps, 0-based in the full schedule."""
    sigmas: tuple[float, ...] = ()
    """Noise levels of those steps."""
    rows: int = 0
    """Token grid of the images."""
    cols: int = 0
    flux_revision: str | None = None
    prompts_hash: str = ""
    """sha256 of the prompts that were scored (before that, of those collected)."""
    source: str = "prompts"
    """What the images come from: "prompts" (generated) or "pictures" (read)."""
    pictures: dict[str, Any] = field(default_factory=dict)
    """Where pictures are read: name of the source, how many, what was changed in them and what was left out."""
    splits: dict[str, Any] = field(default_factory=dict)
    """Different prompts (or pictures) in training, held-out and scores, and whether some may be in several."""
    is_exact: bool = True
    """False where FLUX was quantised or cached, so that its activations are not the model's own."""
    flux_weights: str | None = None
    """SHA-256 over the transformer's weight files; None in runs of before this field, as for the two below."""
    adapters: tuple[str, ...] | None = None
    """Hashes of the adapters (LoRAs) that were active or fused."""
    dtype: str | None = None
    """The type that FLUX ran in: float32, bfloat16 or float16."""
    versions: dict[str, str] = field(default_factory=dict)
    """Library versions."""
    stages: dict[str, StageRecord] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def identity(self) -> FluxIdentity:
        """The FLUX of the run."""
        return FluxIdentity(self.flux_id, self.flux_revision, self.flux_weights, self.adapters, self.is_exact)

    def to_dict(self) -> dict[str, Any]:
        """The info as plain JSON values."""
        values = asdict(self)
        return {"schema_version": values.pop("schema_version"), **values, "settings": self.settings.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The info from `to_dict`'s form.

        Raises:
            FluxSaeError: a newer schema, or fields missing or unknown.
        """
        check_schema(values, "run.json")
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        missing = [name for name in ("flux_id", "settings", "hookpoints") if name not in values]
        if unknown or missing:
            raise FluxSaeError(
                f"run.json has unknown fields {unknown} and lacks {missing}. Restore it from its source."
            )
        fields = dict(values)
        fields["settings"] = GenerationSettings.from_dict(values["settings"])
        fields["stages"] = {name: StageRecord(**record) for name, record in values.get("stages", {}).items()}
        for name in ("hookpoints", "steps", "sigmas"):
            fields[name] = tuple(values.get(name, ()))
        if values.get("adapters") is not None:
            fields["adapters"] = tuple(values["adapters"])
        return cls(**fields)

    def with_stage(self, name: str, record: StageRecord) -> "RunInfo":
        """The info with a stage recorded as complete."""
        return replace(self, stages={**self.stages, name: record})

    def without_stages(self, names: Iterable[str]) -> "RunInfo":
        """The info with these stages no longer complete."""
        return replace(self, stages={name: record for name, record in self.stages.items() if name not in set(names)})


def check_schema(values: Mapping[str, Any], name: str) -> None:
    """Refuses a file written by a newer fluxsae.

    Raises:
        FluxSaeError: the file's schema version is missing or above this program's.
    """
    version = values.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise FluxSaeError(f"{name} has schema_version {version!r}; it must be a number from 1 to {SCHEMA_VERSION}.")
    if version > SCHEMA_VERSION:
        raise FluxSaeError(
            f"{name} was written with schema version {version}; this program reads up to {SCHEMA_VERSION}. "
            "Update fluxsae."
        )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def prompts_hash(prompts: Sequence[str]) -> str:
    """sha256 of the prompts in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


class RunFolder:
    """A run folder: every path in it, and a typed reader and writer for every file that is not an SAE.

    Nothing is read or made until a method is called. Paths are properties and `*_path` methods; `load_*` read,
    `save_*` write atomically.
    """

    def __init__(self, path: "str | Path | RunFolder") -> None:
        self.path: Path = path.path if isinstance(path, RunFolder) else Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    # The run itself

    @property
    def index_path(self) -> Path:
        """config.json, the index on which the Hub counts downloads."""
        return self.path / "config.json"

    @property
    def info_path(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def toml_path(self) -> Path:
        """run.toml, the pipeline's config as given."""
        return self.path / "run.toml"

    @property
    def card_path(self) -> Path:
        """README.md, the model card."""
        return self.path / "README.md"

    @property
    def checksums_path(self) -> Path:
        """SHA256SUMS, the hashes of the published files, as `sha256sum -c` reads them."""
        return self.path / "SHA256SUMS"

    @property
    def origin_path(self) -> Path:
        """Which commit of which Hub repository this folder is; hidden, so never part of the repository itself."""
        return self.path / ".hub.json"

    def exists(self) -> bool:
        """Whether run.json is there."""
        return self.info_path.is_file()

    def load_info(self) -> RunInfo:
        """run.json as a value.

        Raises:
            FluxSaeError: there is no run here, or it is damaged or newer than this program.
        """
        if not self.path.is_dir():
            raise FluxSaeError(f"There is no run folder at {self.path}. Give the folder of a run, or run the pipeline.")
        return RunInfo.from_dict(read_json(self.info_path))

    def save_info(self, info: RunInfo) -> None:
        """Writes run.json, and the index beside it."""
        write_json(self.info_path, info.to_dict())
        self.save_index(info.hookpoints)

    def save_index(self, hookpoints: Sequence[str]) -> None:
        """Writes config.json: schema version, hook points and the folder of each SAE that is there."""
        names = self._sae_names(map(HookPoint.parse, hookpoints))
        saes = {str(name): self.sae_subfolder(name) for name in names if self.has_sae(name)}
        index = {"schema_version": SCHEMA_VERSION, "library_name": "fluxsae", "hookpoints": list(hookpoints)}
        write_json(self.index_path, {**index, "saes": saes})

    def indexed_saes(self) -> list[SaeName]:
        """The SAEs that config.json lists, and hook points without any: what a repository has, before it is pulled."""
        listed = read_json(self.index_path).get("saes", {}) if self.index_path.is_file() else {}
        present = {SaeName.parse(name) for name in listed}
        bare = set(self.hookpoints()) - {name.place for name in present}
        return sorted({*present, *map(SaeName.parse, bare)})

    def hookpoints(self) -> list[HookPoint]:
        """The hook points of the run, in FLUX's order."""
        return sorted(HookPoint.parse(name) for name in self.load_info().hookpoints)

    def sae_names(self) -> list[SaeName]:
        """The names of the run's SAEs in FLUX's order, the main one of a hook point before its variants.

        A hook point that has no SAE yet is named too.
        """
        return self._sae_names(self.hookpoints())

    def _sae_names(self, hookpoints: Iterable[HookPoint]) -> list[SaeName]:
        configs = self.path.glob("sae/*/config.json")
        present = {SaeName.parse(path.parent.name) for path in configs if not path.parent.name.startswith(".")}
        places = set(hookpoints)
        bare = places - {name.place for name in present}
        return sorted({*map(SaeName.parse, bare), *(name for name in present if name.place in places)})

    def default_sae(self) -> SaeName:
        """The SAE that is meant where none is named: at the last hook point, the main one or else the first variant."""
        names = self.sae_names()
        return next(name for name in names if name.place == names[-1].place)

    def check_sae(self, name: HookPoint | str) -> SaeName:
        """The name, if the run has such an SAE, or a hook point that may get it.

        Raises:
            FluxSaeError: it is no name of an SAE, or the run does not have it.
        """
        wanted = SaeName.parse(name)
        present = self.sae_names()
        if wanted not in present:
            raise FluxSaeError(f"This run has no SAE {wanted}; it has {', '.join(map(str, present))}.")
        return wanted

    # SAEs

    def sae_subfolder(self, hookpoint: HookPoint | str) -> str:
        """The SAE's folder relative to the run, as `from_pretrained(subfolder=...)` takes it."""
        return f"sae/{SaeName.parse(hookpoint)}"

    def sae_path(self, hookpoint: HookPoint | str) -> Path:
        """The folder of the SAE: config.json, model.safetensors, metrics.json."""
        return self.path / self.sae_subfolder(hookpoint)

    def has_sae(self, hookpoint: HookPoint | str) -> bool:
        """Whether the SAE's config and weights are there."""
        folder = self.sae_path(hookpoint)
        return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()

    def load_sae_config(self, hookpoint: HookPoint | str) -> dict[str, Any]:
        """The SAE's config.json as plain values (the strict reader is `SaeConfig`)."""
        return read_json(self.sae_path(hookpoint) / "config.json")

    def metrics_path(self, hookpoint: HookPoint | str) -> Path:
        """The SAE's metrics.json."""
        return self.sae_path(hookpoint) / "metrics.json"

    def load_metrics(self, hookpoint: HookPoint | str) -> dict[str, Any]:
        """The SAE's measured quality; empty where nothing was measured yet."""
        path = self.metrics_path(hookpoint)
        return read_json(path) if path.is_file() else {}

    def save_metrics(self, hookpoint: HookPoint | str, metrics: Mapping[str, Any]) -> None:
        """Writes metrics.json."""
        write_json(self.metrics_path(hookpoint), dict(metrics))

    def update_metrics(self, hookpoint: HookPoint | str, metrics: Mapping[str, Any]) -> None:
        """Adds to metrics.json, or replaces keys that are there."""
        self.save_metrics(hookpoint, {**self.load_metrics(hookpoint), **metrics})

    # Images and scores

    @property
    def images_path(self) -> Path:
        """images/images.parquet."""
        return self.path / "images" / "images.parquet"

    def load_images(self) -> ImageTable:
        """The scored images."""
        return ImageTable(self.images_path)

    def save_images(self, rows: Iterable[ImageRow]) -> None:
        """Writes the scored images, in the order of their ids."""
        write_images(self.images_path, rows)

    def scores_path(self, hookpoint: HookPoint | str) -> Path:
        """S and its argmax tokens; read by `ScoreMatrix.load`."""
        return self.path / "scores" / str(SaeName.parse(hookpoint)) / "scores.safetensors"

    def stats_path(self, hookpoint: HookPoint | str) -> Path:
        """Per-feature sums; read by `FeatureStats.load`."""
        return self.path / "scores" / str(SaeName.parse(hookpoint)) / "stats.safetensors"

    @property
    def embeddings_path(self) -> Path:
        """CLIP embeddings of the scored images."""
        return self.path / "clip" / "embeddings.safetensors"

    def load_embeddings(self) -> Embeddings:
        """CLIP embeddings of the scored images."""
        return Embeddings.load(self.embeddings_path)

    def save_embeddings(self, embeddings: Embeddings) -> None:
        """Writes the CLIP embeddings."""
        embeddings.save(self.embeddings_path)

    # Features

    def features_path(self, hookpoint: HookPoint | str) -> Path:
        """features.parquet, one row a feature."""
        return self.path / "features" / str(SaeName.parse(hookpoint)) / "features.parquet"

    @property
    def labels_path(self) -> Path:
        """labels.csv, names that people gave: columns hookpoint (or hookpoint@variant), feature, label."""
        return self.path / "labels.csv"

    def load_features(self, hookpoint: HookPoint | str, *, given: bool = True) -> FeatureTable:
        """The features of an SAE; with `given`, names of labels.csv stand in place of those that were found.

        Raises:
            FluxSaeError: no features, or a line of labels.csv that cannot be read or names no feature of this run.
        """
        table = FeatureTable.load(self.features_path(hookpoint))
        if not given or not self.labels_path.is_file():
            return table
        names = [str(name) for name in self.sae_names()]
        labels = load_given_labels(self.labels_path, names)
        return table.with_given_labels(labels.get(str(SaeName.parse(hookpoint)), {}), self.labels_path.name)

    def save_features(self, hookpoint: HookPoint | str, table: FeatureTable) -> None:
        """Writes the features of a hook point."""
        table.save(self.features_path(hookpoint))

    def heatmaps_path(self, hookpoint: HookPoint | str) -> Path:
        """heatmaps.safetensors, token grids of the top images."""
        return self.path / "features" / str(SaeName.parse(hookpoint)) / "heatmaps.safetensors"

    def load_heatmaps(self, hookpoint: HookPoint | str) -> Heatmaps:
        """Token grids of every alive feature's top images."""
        return Heatmaps.load(self.heatmaps_path(hookpoint))

    def directions_path(self, hookpoint: HookPoint | str) -> Path:
        """Neighbours and map of the decoder directions."""
        return self.path / "directions" / f"{SaeName.parse(hookpoint)}.safetensors"

    def load_directions(self, hookpoint: HookPoint | str) -> dict[str, torch.Tensor]:
        """Neighbours and map of the decoder directions."""
        return load_directions(self.directions_path(hookpoint))

    def save_directions(self, hookpoint: HookPoint | str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Writes neighbours and map of the decoder directions."""
        save_tensors(self.directions_path(hookpoint), tensors)

    def comparison_path(self, first: HookPoint | str, second: HookPoint | str) -> Path:
        """Features of two hook points matched with each other."""
        name = f"{SaeName.parse(first)}--{SaeName.parse(second)}.safetensors"
        return self.path / "directions" / name

    def load_comparison(self, first: HookPoint | str, second: HookPoint | str) -> dict[str, torch.Tensor]:
        """Features of two hook points matched with each other; read by `LayerComparison.from_tensors`."""
        return load_tensors(self.comparison_path(first, second))

    def save_comparison(
        self, first: HookPoint | str, second: HookPoint | str, tensors: Mapping[str, torch.Tensor]
    ) -> None:
        """Writes features of two hook points matched with each other."""
        save_tensors(self.comparison_path(first, second), tensors)

    # Demos and sheets

    def demos_path(self, hookpoint: HookPoint | str) -> Path:
        """demos.jsonl, one steering demo a line."""
        return self.path / "demos" / str(SaeName.parse(hookpoint)) / "demos.jsonl"

    def demo_image_path(self, hookpoint: HookPoint | str, name: str) -> Path:
        """The webp picture of a demo."""
        return self.demos_path(hookpoint).with_name(f"{_safe_name(name)}.webp")

    def load_demos(self, hookpoint: HookPoint | str) -> list[dict[str, Any]]:
        """The steering demos; none where none were searched."""
        return load_lines(self.demos_path(hookpoint))

    def save_demos(self, hookpoint: HookPoint | str, lines: Sequence[str]) -> None:
        """Writes demos.jsonl from JSON texts of one line each."""
        write_text(self.demos_path(hookpoint), "".join(f"{line}\n" for line in lines))

    def swaps_path(self, hookpoint: HookPoint | str) -> Path:
        """swaps.jsonl, one swap of a name for another a line."""
        return self.demos_path(hookpoint).with_name("swaps.jsonl")

    def load_swaps(self, hookpoint: HookPoint | str) -> list[dict[str, Any]]:
        """The swaps, best first; none where none were searched."""
        return load_lines(self.swaps_path(hookpoint))

    def opening_path(self, hookpoint: HookPoint | str) -> Path:
        """opening.json: the swap that a page opens on, whose strip is the demo image "opening"."""
        return self.demos_path(hookpoint).with_name("opening.json")

    def load_opening(self, hookpoint: HookPoint | str) -> dict[str, Any] | None:
        """What a page opens on; None where nothing was recorded."""
        path = self.opening_path(hookpoint)
        return dict(read_json(path)) if path.is_file() else None

    def save_swaps(self, hookpoint: HookPoint | str, lines: Sequence[str]) -> None:
        """Writes swaps.jsonl from JSON texts of one line each."""
        write_text(self.swaps_path(hookpoint), "".join(f"{line}\n" for line in lines))

    def sheet_path(self, hookpoint: HookPoint | str, name: str) -> Path:
        """A contact sheet or steering grid, PNG."""
        return self.path / "sheets" / str(SaeName.parse(hookpoint)) / f"{_safe_name(name)}.png"

    def sheets(self, hookpoint: HookPoint | str) -> list[Path]:
        """The sheets that are there."""
        return sorted(self.sheet_path(hookpoint, "any").parent.glob("*.png"))

    def save_sheet(self, hookpoint: HookPoint | str, name: str, png: bytes) -> None:
        """Writes a sheet that is already encoded as PNG."""
        write_bytes(self.sheet_path(hookpoint, name), png)

    # What stays on this machine

    @property
    def activations_path(self) -> Path:
        """Folder of the activation shards, one subfolder a hook point; never part of the Hub repository."""
        return self.path / "activations"

    def activations_folder(self, hookpoint: HookPoint | str) -> Path:
        """Folder of one hook point's activation shards, as `mixing_buffer` takes it."""
        return self.activations_path / str(HookPoint.parse(hookpoint).place)

    def work_path(self, stage: str) -> Path:
        """Folder for the parts of an unfinished stage; never part of the Hub repository."""
        return self.path / ".work" / _safe_name(stage)

    def published_files(self) -> list[str]:
        """The files of the run as the Hub has them: paths relative to the folder, sorted."""
        return sorted(path.relative_to(self.path).as_posix() for path in self._iter_published())

    def _iter_published(self) -> Iterator[Path]:
        for path in self.path.rglob("*"):
            parts = path.relative_to(self.path).parts
            if path.is_file() and parts[0] not in _LOCAL_ONLY and not any(part.startswith(".") for part in parts):
                yield path

    def remove_leftovers(self) -> list[Path]:
        """Deletes temporary files of killed processes; returns their paths."""
        return remove_leftovers(self.path) if self.path.is_dir() else []


def _safe_name(name: str) -> str:
    if not name or name.startswith(".") or any(sign in name for sign in "/\\\0"):
        raise FluxSaeError(f"{name!r} is no file name. Use letters, digits, '-', '_' and '.'.")
    return name
