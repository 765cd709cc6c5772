"""Is a run folder whole? Every file against its hash, its schema, and the other files that it speaks of."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.activations.shards import ActivationShard, ShardFolder
from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.scores import ScoreMatrix, sae_changed
from fluxsae.features.statistics import FeatureStats
from fluxsae.files import map_array, read_header, read_json
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.identity import identity_differences
from fluxsae.publishing.checksums import read_checksums, wrong_files
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import Embeddings, FeatureTable, Heatmaps, ImageTable
from fluxsae.sae.ground import trained_identity
from fluxsae.sae.model import SparseAutoencoder

_BLOCK = 256
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy")
_CLASSES = {"dead", "rare", "common", "very common"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in which file, and what to do."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """What was checked and what was found."""

    n_files: int
    hookpoints: tuple[str, ...]
    problems: tuple[Problem, ...]
    absent: tuple[str, ...]
    """Parts of a run that this one does not have: no fault in itself."""

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_run(run: RunFolder | str | Path) -> Verdict:
    """Everything that can be checked about a run without FLUX: schema, shapes, finite values, hashes, dangling ids.

    Raises:
        FluxSaeError: there is no run, or run.json cannot be read.
    """
    run = RunFolder(run)
    whole = _WholeRun(run, run.load_info())
    files = run.published_files()
    problems = [
        Problem(name, "is a kind of file that can run code or that no stage writes. Delete it.")
        for name in files
        if name.endswith(_PICKLES)
    ]
    problems += whole.findings(whole.checks())
    for hookpoint in run.sae_names():
        problems += whole.findings(_AboutHookpoint(whole, hookpoint).checks())
    return Verdict(len(files), whole.info.hookpoints, tuple(problems), tuple(whole.absent))


Checks = Iterable[tuple[Path, Callable[[Path], Iterator[str]]]]
"""A file or folder, and what finds its faults."""


@dataclass(eq=False)
class _WholeRun:
    """The checks of what all hook points share; what was found is what the later checks are held against."""

    run: RunFolder
    info: RunInfo
    absent: list[str] = field(default_factory=list)
    n_images: int | None = None

    def findings(self, checks: Checks) -> Iterator[Problem]:
        """What is wrong; a part that cannot be read is one problem, what is not there is noted."""
        for path, check in checks:
            name = path.relative_to(self.run.path).as_posix()
            if not path.exists():
                self.absent.append(name)
                continue
            try:
                yield from (Problem(name, text) for text in check(path))
            except FluxSaeError as error:
                yield Problem(name, str(error))
            except (ValueError, KeyError, TypeError, OSError, IndexError) as error:
                kind = type(error).__name__
                yield Problem(name, f"cannot be read ({kind}: {error}). Run the stage that writes it again.")

    def checks(self) -> Checks:
        run = self.run
        yield run.index_path, self.index
        yield run.checksums_path, self.checksums
        yield run.images_path, self.images
        yield run.embeddings_path, self.embeddings

    def index(self, path: Path) -> Iterator[str]:
        index = read_json(path)
        if list(index.get("hookpoints", [])) != list(self.info.hookpoints):
            yield f"lists the hook points {index.get('hookpoints')}, run.json lists {list(self.info.hookpoints)}."
        unlisted = {str(name) for name in self.run.sae_names() if self.run.has_sae(name)} - set(index.get("saes", {}))
        if unlisted:
            yield f"does not list the SAEs of {', '.join(sorted(unlisted))}. Push the run to renew it."

    def checksums(self, path: Path) -> Iterator[str]:
        sums = read_checksums(path)
        files = set(self.run.published_files()) - {path.name}
        for name in wrong_files(self.run, {name: digest for name, digest in sums.items() if name in files}):
            yield f"{name} does not have its hash: it was changed or damaged. Pull it again, or push to renew the hash."
        for name in sorted(set(sums) - files):
            yield f"{name} is listed but not there. Pull the run again."
        for name in sorted(files - set(sums)):
            yield f"{name} is there but not listed. Push the run to renew the hashes, or delete the file."

    def images(self, path: Path) -> Iterator[str]:
        images = ImageTable(path)
        self.n_images = len(images)
        for (subject, seed), n in Counter(zip(images.subjects, images.seeds, strict=True)).items():
            if n > 1:
                yield f"holds {subject[:60]!r} with seed {seed} {n} times; a pair identifies one image."
        for image_id in images.image_ids:
            if fault := _picture_fault(images.thumbnail(image_id)):
                yield f"the thumbnail of image {image_id} cannot be shown ({fault})."

    def embeddings(self, path: Path) -> Iterator[str]:
        vectors = np.asarray(Embeddings.load(path).vectors, dtype=np.float32)
        yield from _counted("embeddings", len(vectors), self.n_images, "images")
        norms = np.linalg.norm(vectors, axis=1)
        if not np.isfinite(vectors).all() or (len(norms) and np.abs(norms - 1).max() > 0.02):
            yield f"has vectors that are not finite unit vectors. Make it again: {maker('embed')}."


class _AboutHookpoint:
    """The checks of the files of one hook point; what the first tells, the later are held against."""

    def __init__(self, whole: _WholeRun, hookpoint: HookPoint) -> None:
        self.whole, self.run, self.info, self.hookpoint = whole, whole.run, whole.info, hookpoint
        self.n_features: int | None = None
        self.score_matrix: ScoreMatrix | None = None
        self.image_counts: np.ndarray | None = None

    def checks(self) -> Checks:
        run, hookpoint = self.run, self.hookpoint
        yield run.sae_path(hookpoint), self.sae
        yield run.metrics_path(hookpoint), self.metrics
        yield run.scores_path(hookpoint), self.scores
        yield run.stats_path(hookpoint), self.stats
        yield run.features_path(hookpoint), self.features
        yield run.heatmaps_path(hookpoint), self.heatmaps
        yield run.directions_path(hookpoint), self.directions
        yield run.demos_path(hookpoint), self.demos
        # no run of before has swaps; activations stay on the machine that collected them
        seldom = ((run.swaps_path(hookpoint), self.swaps), (run.activations_folder(hookpoint), self.activations))
        yield from ((path, check) for path, check in seldom if path.exists())
        yield from ((sheet, self.sheet) for sheet in run.sheets(hookpoint))

    def sae(self, path: Path) -> Iterator[str]:
        config = self.run.load_sae_config(self.hookpoint)
        self.n_features = int(config["n_features"])
        if not self.run.has_sae(self.hookpoint):
            self.whole.absent.append(f"weights of {self.hookpoint}")
            return
        trained_on = SparseAutoencoder.from_pretrained(path).config.trained_on
        if trained_on is None:
            yield "does not say what it was trained on, so it cannot be refused where it does not belong."
            return
        if trained_on.hookpoint != str(self.hookpoint.place):
            yield f"was trained on the hook point {trained_on.hookpoint}, but lies at {self.hookpoint.place}."
        for text in identity_differences(trained_identity(trained_on), self.info.identity).values():
            yield f"was not trained on the run's FLUX: {text}."

    def metrics(self, path: Path) -> Iterator[str]:
        def refuse(name: str) -> Any:
            raise ValueError(f"it holds {name}")

        json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
        yield from ()

    def scores(self, path: Path) -> Iterator[str]:
        scores = ScoreMatrix.load(path)
        self.score_matrix = scores
        yield from filter(None, [sae_changed(self.run, self.hookpoint, scores.sae_fingerprint)])
        yield from _counted("rows", scores.n_images, self.whole.n_images, "images")
        yield from self._columns(scores.n_features)
        if (scores.rows, scores.cols) != (self.info.rows, self.info.cols):
            yield f"is of a {scores.rows} x {scores.cols} grid, the run of {self.info.rows} x {self.info.cols}."
        counts = np.zeros(scores.n_features, dtype=np.int64)
        for start in range(0, scores.n_images, _BLOCK):
            block = np.asarray(scores.values[start : start + _BLOCK])
            if not _is_sound(block):
                yield f"has values that are negative or not finite from image {start} on. Score the images again."
                return
            if np.asarray(scores.argmax_token[start : start + _BLOCK]).max(initial=0) >= scores.grid.n_tokens:
                yield f"names tokens off the grid from image {start} on. Score the images again."
                return
            counts += (block > 0).sum(0)
        self.image_counts = counts

    def stats(self, path: Path) -> Iterator[str]:
        stats = FeatureStats.load(path)
        yield from self._columns(len(stats.counts))
        n_left_out = len(self.score_matrix.left_out) if self.score_matrix else 0
        yield from _counted("images", stats.n_images + n_left_out, self.whole.n_images, "images")
        if self.image_counts is not None and not np.array_equal(stats.image_counts.numpy(), self.image_counts):
            yield "counts other images than S does. Score the images again."
        for name, values in stats.tensors().items():
            if not _is_sound(values.numpy()):
                yield f"has values of {name} that are negative or not finite. Score the images again."

    def features(self, path: Path) -> Iterator[str]:
        table = FeatureTable.load(path)
        yield from filter(None, [sae_changed(self.run, self.hookpoint, table.sae_fingerprint)])
        yield from self._columns(len(table))
        if unknown := set(table.column("feature_class").tolist()) - _CLASSES:
            yield f"has the classes {sorted(unknown)}; allowed are {sorted(_CLASSES)}."
        for name in ("density", "mean_act", "max_act"):
            if not _is_sound(table.column(name).astype(np.float64)):
                yield f"has values of {name} that are negative or not finite. Make it again: {maker('analyze')}."
        if "top_images" in table:
            yield from self._top_images(table)
        ids = (("neighbours", self.n_features, "features"), ("silent_images", self.whole.n_images, "images"))
        for name, size, of in ids:
            if name in table:
                yield from self._dangling(name, table.column(name), size, of)

    def _top_images(self, table: FeatureTable) -> Iterator[str]:
        top = table.column("top_images")
        dangling = list(self._dangling("top_images", top, self.whole.n_images, "images"))
        yield from dangling
        if dangling or self.score_matrix is None or self.score_matrix.n_features != len(table):
            return
        values = self.score_matrix.values
        both = enumerate(zip(top, table.column("top_scores"), strict=True))
        wrong = [f for f, (images, scores) in both if not _are_near(values[list(images), f], scores)]
        if wrong:
            yield f"has top scores that are not those in S (features {wrong[:5]}). Make it again: {maker('analyze')}."

    def heatmaps(self, path: Path) -> Iterator[str]:
        maps = Heatmaps.load(path)
        features = np.asarray(maps.features)
        yield from self._dangling("features", [features], self.n_features, "features")
        yield from self._dangling("image_ids", [maps.image_ids[maps.image_ids >= 0]], self.whole.n_images, "images")
        if len(features) and (np.diff(features) <= 0).any():
            yield "does not list its features in rising order."
        if not maps.fits():
            yield "has maps that fit neither its image ids nor its grid."
        if not np.isfinite(maps.scale).all():
            yield "has scales that are not finite."

    def directions(self, path: Path) -> Iterator[str]:
        header = read_header(path)
        for name, (dtype, shape) in header.shapes.items():
            if dtype.startswith("F") and not np.isfinite(np.asarray(map_array(path, name, header=header))).all():
                yield f"{name} has values that are not finite. Make it again: {maker('directions')}."
            if shape and name in ("neighbours", "similarities", "positions"):
                yield from self._columns(shape[0])
        neighbours = self.run.load_directions(self.hookpoint)["neighbours"].numpy()
        yield from self._dangling("neighbours", [neighbours], self.n_features, "features")

    def demos(self, path: Path) -> Iterator[str]:
        yield from self._shown(self.run.load_demos(self.hookpoint))

    def swaps(self, path: Path) -> Iterator[str]:
        swaps = self.run.load_swaps(self.hookpoint)
        for number, swap in enumerate(swaps, 1):
            if not all(isinstance(swap.get(name), str) for name in ("label", "new_label", "image")):
                yield f"line {number} names no old and new label and picture. Make it again: {maker('find_demos')}."
        yield from self._shown([swap for swap in swaps if isinstance(swap.get("image"), str)])

    def _shown(self, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        for number, demo in enumerate(lines, 1):
            for feature in (demo.get("feature"), *demo.get("new_features", ())):
                if isinstance(feature, int) and self.n_features is not None and not 0 <= feature < self.n_features:
                    yield f"line {number} is about feature {feature}, which does not exist."
            picture = self.run.demo_image_path(self.hookpoint, demo["image"])
            if not picture.is_file():
                yield f"line {number} names the picture {picture.name}, which is not there."
            elif fault := _picture_fault(picture.read_bytes()):
                yield f"line {number} names the picture {picture.name}, which cannot be shown ({fault})."

    def activations(self, path: Path) -> Iterator[str]:
        for shard in ShardFolder(path).shards:
            if shard.path.is_file() and (wrong := _images_not_finite(shard)):
                yield (
                    f"{shard.path.name} holds NaN or infinite numbers of images {wrong[:5]}. Delete the file and "
                    "collect again, in bfloat16 or float32."
                )

    def sheet(self, path: Path) -> Iterator[str]:
        if fault := _picture_fault(path.read_bytes()):
            yield f"cannot be shown ({fault}). Make it again: {maker('render')}."

    def _columns(self, n: int) -> Iterator[str]:
        yield from _counted("features", n, self.n_features, "features at this hook point")
        if self.n_features is None:
            self.n_features = n

    def _dangling(self, name: str, lists: Any, size: int | None, of: str) -> Iterator[str]:
        ids = [np.asarray(entry, dtype=np.int64).ravel() for entry in lists]
        every = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
        wrong = every[(every < 0) | (every >= size)] if size is not None else every[:0]
        if len(wrong):
            yield f"{name} names {of} that do not exist, for example {int(wrong[0])} of {size}. Run its stage again."


def _counted(what: str, n: int, expected: int | None, of: str) -> Iterator[str]:
    if expected is not None and n != expected:
        yield f"has {n} {what}, but the run has {expected} {of}. Run the stage that writes it again."


def _is_sound(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all() and (values >= 0).all())


def _are_near(own: np.ndarray, scores: list[float]) -> bool:
    return len(own) == len(scores) and bool(np.allclose(own.astype(np.float64), scores, rtol=2e-3, atol=1e-6))


def _images_not_finite(shard: ActivationShard) -> list[int]:
    is_sound = [bool(tokens.isfinite().all()) for tokens in shard.tokens()]  # one image at a time: shards are large
    return [image_id for image_id, sound in zip(shard.image_ids, is_sound, strict=True) if not sound]


def _picture_fault(data: bytes) -> str | None:
    """Why the bytes are no picture; None if they are."""
    try:
        Image.open(io.BytesIO(data)).load()
    except (OSError, ValueError, SyntaxError) as error:
        return str(error) or type(error).__name__
    return None
