"""S, the highest activation of each feature on each image, and sums over all tokens: streaming and mergeable."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.statistics import FeatureStats, coarse_cells
from fluxsae.files import load_tensors, map_array, mapped_tensors, read_header, release_pages
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.fingerprint import file_fingerprint

SAE_FINGERPRINT: Final = "sae_fingerprint"
"""Where the metadata of a file with S say which SAE it was made with."""


@dataclass(frozen=True)
class ScoreMatrix:
    """S and argmax tokens of a run; row i is image i. Values are paged in as they are used."""

    values: Float[np.ndarray, "images features"]
    """S: the highest act over the image's tokens and captured steps; 0 where the feature stays silent."""
    argmax_token: Integer[np.ndarray, "images features"]
    """The token of that act, ties to the lower token; 0 where S is 0."""
    steps: tuple[int, ...]
    """The captured steps that S is the maximum over."""
    rows: int
    cols: int
    left_out: tuple[int, ...] = ()
    """Images whose activations were NaN or infinite: S is 0 for them, and the sums do not know them."""
    sae_fingerprint: str | None = None
    """Of the SAE that S was made with; None in files of before it was kept."""

    @classmethod
    def load(cls, path: str | Path) -> "ScoreMatrix":
        """The matrix in `scores.safetensors`.

        Raises:
            FluxSaeError: missing, cut off, or without the two tensors.
        """
        header = read_header(path)
        values, tokens = (map_array(path, name, header=header) for name in ("S", "argmax_token"))
        if values.ndim != 2 or values.shape != tokens.shape:
            raise FluxSaeError(
                f"{path}: S has shape {values.shape}, argmax_token {tokens.shape}; score the images again."
            )
        steps = tuple(int(step) for step in header.metadata["steps"].split(","))
        rows, cols = (int(header.metadata[name]) for name in ("rows", "cols"))
        return cls(values, tokens, steps, rows, cols, left_out_images(path), header.metadata.get(SAE_FINGERPRINT))

    @property
    def n_images(self) -> int:
        """Number of scored images."""
        return int(self.values.shape[0])

    @property
    def n_features(self) -> int:
        """Number of features."""
        return int(self.values.shape[1])

    @property
    def grid(self) -> TokenGrid:
        """The token grid of the images."""
        return TokenGrid(self.rows, self.cols)

    def stored(self) -> Float[Tensor, "images features"]:
        """All of S in the type of its file, paged in as it is used; read-only."""
        stored: Tensor = from_dlpack(self.values)
        return stored

    def image(self, image_id: int) -> Float[Tensor, " features"]:
        """S of one image, fp32."""
        if not 0 <= image_id < self.n_images:
            raise FluxSaeError(f"Image id {image_id} is not in this run; ids go from 0 to {self.n_images - 1}.")
        return torch.from_numpy(np.asarray(self.values[image_id], dtype=np.float32))

    def feature(self, feature: int) -> Float[Tensor, " images"]:
        """S of one feature over all images, fp32."""
        return self.features([feature])[:, 0]

    def features(self, features: Sequence[int]) -> Float[Tensor, "images chosen"]:
        """S of some features over all images, fp32."""
        wrong = [f for f in features if not 0 <= f < self.n_features]
        if wrong:
            raise FluxSaeError(f"Features {wrong} do not exist; features go from 0 to {self.n_features - 1}.")
        return torch.from_numpy(np.asarray(self.values[:, list(features)], dtype=np.float32))

    def top(self, n: int, *, block: int = 512) -> "TopImages":
        """The `n` images with the highest S > 0 of every feature, ties to the lower id; S is read in blocks of rows."""
        best = TopImages.empty(self.n_features, n)
        for start in range(0, self.n_images, block):
            part = torch.from_numpy(np.asarray(self.values[start : start + block], dtype=np.float32))
            best = best.updated(torch.arange(start, start + len(part)), part)
            release_pages(self.values)
        return best


def load_scores(run: RunFolder, name: HookPoint | str) -> ScoreMatrix:
    """S of one of a run's SAEs.

    Raises:
        FluxSaeError: missing or damaged, or of another SAE than the one that is there now.
    """
    scores = ScoreMatrix.load(run.scores_path(name))
    if changed := sae_changed(run, name, scores.sae_fingerprint):
        raise FluxSaeError(changed)
    return scores


def sae_changed(run: RunFolder, name: HookPoint | str, made_with: str | None) -> str:
    """What is told where an SAE is not the one that its scores or features were made with; else nothing.

    Nothing either where `made_with`, its fingerprint then, was not kept, or no SAE is there.
    """
    if made_with is None or file_fingerprint(run.sae_path(name)) in (None, made_with):
        return ""
    return (
        f"The SAE of {name} changed after scoring: scores, names and heatmaps are those of another SAE. Score it again "
        f"with --force, and do the stages after it: {maker('score')}."
    )


class TopImages(NamedTuple):
    """The best images of every feature so far, best first; id -1 and score 0 where there are fewer."""

    scores: Float[Tensor, "features top"]
    image_ids: Int[Tensor, "features top"]

    @classmethod
    def empty(cls, n_features: int, n: int) -> "TopImages":
        """No images yet."""
        return cls(torch.zeros(n_features, n), torch.full((n_features, n), -1))

    def updated(self, image_ids: Int[Tensor, " images"], scores: Float[Tensor, "images features"]) -> "TopImages":
        """With more images, whose ids are above all those seen before."""
        ids = image_ids[None].expand(scores.shape[1], -1)
        all_scores = torch.cat([self.scores, scores.T], dim=1)
        all_ids = torch.cat([self.image_ids, torch.where(scores.T > 0, ids, -1)], dim=1)
        order = all_scores.argsort(dim=1, descending=True, stable=True)[:, : self.scores.shape[1]]
        return TopImages(all_scores.gather(1, order), all_ids.gather(1, order))


class ScoreAccumulator:
    """Scores of the images seen so far, and the sums over their tokens.

    Images may come in any order and an image's steps in separate updates; each (image, step) comes once. Merging two
    accumulators gives what one pass over both would have given: S, argmax tokens and counts exactly, sums to rounding.
    `merge_score_files` does the same for part files, as several processes write them.
    """

    def __init__(self, n_features: int, *, grid: TokenGrid, steps: Sequence[int]) -> None:
        self.n_features = n_features
        self.grid = grid
        self.steps = tuple(steps)
        self._cells = coarse_cells(grid)
        self._sums = FeatureStats.empty(n_features, steps=steps, n_cells=int(self._cells.max()) + 1)
        self._scores: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}
        self._seen: set[tuple[int, int]] = set()
        self._left_out: set[int] = set()

    @property
    def image_ids(self) -> list[int]:
        """The images seen, ascending."""
        return sorted(self._scores)

    def update(self, image_ids: Sequence[int], acts: SparseActs, *, step: int) -> None:
        """Adds one step of some images: acts of shape (images, tokens, features).

        Raises:
            FluxSaeError: tokens off the grid, or an image and step that was added before.
        """
        n_images, n_tokens, _ = acts.shape
        if n_images != len(image_ids) or n_tokens != self.grid.n_tokens:
            raise FluxSaeError(
                f"Acts of {n_images} images with {n_tokens} tokens do not fit {len(image_ids)} image ids "
                f"and a grid of {self.grid.rows} x {self.grid.cols}."
            )
        self._refuse_repetition({(int(image_id), step) for image_id in image_ids})
        scores, tokens = max_over_tokens(acts)
        self._add_to_sums(acts, step)
        for image_id, row, token_row in zip(image_ids, scores.cpu(), tokens.cpu(), strict=True):
            self._keep_larger(int(image_id), row, token_row)

    def leave_out(self, image_ids: Sequence[int]) -> None:
        """Takes note of images that cannot be scored: S is 0 for them, and the sums are of the others."""
        for image_id in image_ids:
            self._left_out.add(image_id)
            self._keep_larger(image_id, torch.zeros(self.n_features), torch.zeros(self.n_features, dtype=torch.int32))

    def merge(self, other: "ScoreAccumulator") -> "ScoreAccumulator":
        """An accumulator that has seen what both have.

        Raises:
            FluxSaeError: of other features, grid or steps, or both have seen the same step of an image.
        """
        if (self.n_features, self.grid, self.steps) != (other.n_features, other.grid, other.steps):
            raise FluxSaeError("Cannot merge scores of other features, another token grid or other steps.")
        merged = ScoreAccumulator(self.n_features, grid=self.grid, steps=self.steps)
        merged._sums = self._sums.merge(other._sums)
        for part in (self, other):
            merged._refuse_repetition(part._seen)
            merged._left_out |= part._left_out
            for image_id, row in part._scores.items():
                merged._keep_larger(image_id, row, part._tokens[image_id])
        return merged

    def scores(self, image_ids: Sequence[int] | None = None) -> Float[Tensor, "images features"]:
        """S of some of the images seen, or of all `image_ids`; fp32."""
        chosen = [self._scores[i] for i in (self.image_ids if image_ids is None else image_ids)]
        return torch.stack(chosen) if chosen else torch.zeros(0, self.n_features)

    def argmax_tokens(self) -> Int[Tensor, "images features"]:
        """Argmax tokens of `image_ids`."""
        if not self._tokens:
            return torch.zeros(0, self.n_features, dtype=torch.int32)
        return torch.stack([self._tokens[i] for i in self.image_ids])

    def stats(self) -> FeatureStats:
        """The sums, with the counts of images."""
        counts = (self.scores() > 0).sum(0)
        values = {f.name: getattr(self._sums, f.name) for f in fields(FeatureStats)}
        return FeatureStats(**{**values, "n_images": len(self._scores) - len(self._left_out), "image_counts": counts})

    def _refuse_repetition(self, new: set[tuple[int, int]]) -> None:
        repeated = self._seen & new
        if repeated:
            image_id, step = min(repeated)
            raise FluxSaeError(f"Image {image_id} was scored at step {step} before; each image and step comes once.")
        self._seen |= new

    def _keep_larger(self, image_id: int, scores: Tensor, tokens: Tensor) -> None:
        if image_id in self._scores:
            old_scores, old_tokens = self._scores[image_id], self._tokens[image_id]
            tied = torch.minimum(tokens, old_tokens).where(scores == old_scores, old_tokens)
            tokens = tokens.where(scores > old_scores, tied)
            scores = scores.maximum(old_scores)
        self._scores[image_id], self._tokens[image_id] = scores, tokens

    def _add_to_sums(self, acts: SparseActs, step: int) -> None:
        cells = self._cells.to(acts.values.device)[acts.tokens % self.grid.n_tokens]
        self._sums.add(step, acts.features, acts.values, cells, n_tokens=acts.n_tokens)


def max_over_tokens(
    acts: SparseActs,
) -> tuple[Float[Tensor, "images features"], Int[Tensor, "images features"]]:
    """S and argmax tokens (ties to the lower token, 0 where silent) of acts of shape (images, tokens, features)."""
    n_images, n_tokens, n_features = acts.shape
    values = acts.values.float()
    places = acts.tokens // n_tokens * n_features + acts.features
    scores = values.new_zeros(n_images * n_features).scatter_reduce_(0, places, values, "amax")
    candidates = (acts.tokens % n_tokens).int().where(values == scores[places], n_tokens)
    best = torch.full_like(scores, n_tokens, dtype=torch.int32).scatter_reduce_(0, places, candidates, "amin")
    tokens = best.where(scores > 0, 0)
    return scores.reshape(n_images, n_features), tokens.reshape(n_images, n_features)


def merge_score_files(path: str | Path, parts: Sequence[Path], *, steps: Sequence[int], grid: TokenGrid) -> None:
    """Merges part files with `S` (fp32) and `argmax_token` into `scores.safetensors`, in the order of their images.

    This is how S of several processes, or of a run that was stopped, comes together; sums: `FeatureStats.merge`.
    One part is in memory at a time. S is stored in fp16, or in fp32 where fp16 would overflow. The fingerprint of the
    SAE is kept where all parts say the same one.
    """
    headers = [read_header(part) for part in parts]
    n_images = sum(header.shapes["S"][1][0] for header in headers)
    n_features = headers[0].shapes["S"][1][1]
    highest = max(float(load_tensors(part)["S"].max()) for part in parts)
    score_type = "F16" if highest <= torch.finfo(torch.float16).max else "F32"
    shapes = {
        "S": (score_type, (n_images, n_features)),
        "argmax_token": (_token_type(grid.n_tokens), (n_images, n_features)),
    }
    made_with = {header.metadata.get(SAE_FINGERPRINT) for header in headers}
    metadata = {
        "steps": ",".join(map(str, steps)), "rows": str(grid.rows), "cols": str(grid.cols),
        **left_out_metadata([image_id for part in parts for image_id in left_out_images(part)]),
        **fingerprint_metadata(made_with.pop() if len(made_with) == 1 else None),
    }  # fmt: skip
    with mapped_tensors(path, shapes, metadata=metadata) as arrays:
        start = 0
        for part in parts:
            tensors = load_tensors(part)
            stop = start + len(tensors["S"])
            arrays["S"][start:stop] = _stored(tensors["S"].numpy(), arrays["S"].dtype)
            arrays["argmax_token"][start:stop] = tensors["argmax_token"].numpy()
            start = stop
            for array in arrays.values():
                release_pages(array)


def left_out_metadata(image_ids: Sequence[int]) -> dict[str, str]:
    """What the metadata of a file with S say about the images that it leaves out: nothing where there are none."""
    return {"left_out": json.dumps(sorted(image_ids))} if image_ids else {}


def fingerprint_metadata(fingerprint: str | None) -> dict[str, str]:
    """What they say about the SAE: nothing where it is not known."""
    return {SAE_FINGERPRINT: fingerprint} if fingerprint else {}


def left_out_images(path: str | Path) -> tuple[int, ...]:
    """The images that a file with S leaves out."""
    return tuple(json.loads(read_header(path).metadata.get("left_out", "[]")))


def _stored(scores: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Scores in the stored type; a positive one never becomes 0, so that "fires" means the same in every file."""
    smallest = np.finfo(dtype).smallest_subnormal
    stored: np.ndarray = np.where(scores > 0, np.maximum(scores.astype(dtype), smallest), dtype.type(0))
    return stored


def _token_type(n_tokens: int) -> str:
    if n_tokens <= 1 << 8:
        return "U8"
    return "U16" if n_tokens <= 1 << 16 else "I32"
