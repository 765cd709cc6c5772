"""Where features fire on their best images, kept while scoring without keeping the acts of all images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fluxsae.features.scores import TopImages
from fluxsae.files import load_tensors, mapped_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.runs.tables import HEATMAPS_SCHEMA
from fluxsae.sae.acts import SparseActs

_FARTHEST = 255


class TopMapCollector:
    """The acts of each feature on every image that was among its `n_top` best when it came.

    That is a superset of the best images in the end, and soon a small one: image i enters with chance n_top / i.
    Scores are compared as they are stored, in fp16, so that the final choice from the stored S is always covered.
    """

    def __init__(self, n_features: int, *, n_top: int, n_tokens: int) -> None:
        self._n_tokens = n_tokens
        self._best = TopImages.empty(n_features, n_top)
        self._open: dict[int, tuple[Tensor, Tensor]] = {}
        """For each image that is not complete: (feature, token) as one number, ascending, and the highest act."""
        self._parts: list[dict[str, Tensor]] = []

    def skip(self, image_ids: Sequence[int], scores: Float[Tensor, "images features"]) -> None:
        """Takes note of images that were scored before, so that the bar is as high as it was."""
        self._best = self._best.updated(torch.tensor(image_ids), scores.half().float())

    def update(self, image_ids: Sequence[int], acts: SparseActs) -> None:
        """Adds one captured step of some images, whose ids are above those of all complete ones."""
        for image_id, part in zip(image_ids, acts.split(self._n_tokens), strict=True):
            keys, values = part.features * self._n_tokens + part.tokens, part.values.float()
            if image_id in self._open:
                keys, values = (torch.cat(pair) for pair in zip(self._open[image_id], (keys, values), strict=True))
            distinct, position = keys.unique(return_inverse=True)
            highest = values.new_zeros(len(distinct)).scatter_reduce_(0, position, values, "amax")
            self._open[image_id] = (distinct, highest)

    def complete(self, image_ids: Sequence[int], scores: Float[Tensor, "images features"]) -> None:
        """Ends some images, whose S is given: kept are the acts of features for which they are among the best."""
        self.skip(image_ids, scores)
        for image_id in image_ids:
            keys, values = (part.cpu() for part in self._open.pop(image_id))
            features = keys // self._n_tokens
            kept = (self._best.image_ids == image_id).any(1)[features]
            self._parts.append(
                {
                    "map_image": torch.full((int(kept.sum()),), image_id, dtype=torch.int32),
                    "map_feature": features[kept].int(),
                    "map_token": (keys % self._n_tokens)[kept].int(),
                    "map_value": values[kept],
                }
            )

    def forget(self) -> None:
        """Drops what was added of images that are not complete; they may come again."""
        self._open.clear()

    def pop(self) -> dict[str, Tensor]:
        """The entries since the last call, one line per active (image, feature, token), as tensors to save."""
        parts, self._parts = self._parts, []
        dtypes = {"map_image": torch.int32, "map_feature": torch.int32, "map_token": torch.int32}
        dtypes["map_value"] = torch.float32
        return {
            name: torch.cat([torch.empty(0, dtype=dtype), *(part[name] for part in parts)])
            for name, dtype in dtypes.items()
        }


def write_heatmaps(
    path: str | Path, parts: Sequence[Path], top: TopImages, *, scale: Float[Tensor, " features"], grid: TokenGrid
) -> None:
    """Writes `heatmaps.safetensors` for the images of `top` from part files with the entries of the collector.

    An act a becomes the level round(255 a / scale), at least 1 where the feature fires at all. Each part is read twice,
    to count the entries of every map and to write them; one image is in memory at a time.
    """
    alive = (top.scores[:, 0] > 0).nonzero().flatten()
    n_top = top.image_ids.shape[1]
    counts = torch.zeros(len(alive) * n_top, dtype=torch.int64)
    for maps in _iter_images(parts, top, alive):
        counts.index_add_(0, maps.places, torch.ones_like(maps.places) + maps.n_passed)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    n_entries = int(starts[-1])
    shapes = {
        "features": ("I32", (len(alive),)),
        "image_ids": ("I32", (len(alive), n_top)),
        "scale": ("F32", (len(alive),)),
        "starts": ("I64", (len(starts),)),
        "steps": ("U8", (n_entries,)),
        "levels": ("U8", (n_entries,)),
    }
    metadata = {"rows": str(grid.rows), "cols": str(grid.cols), "schema_version": str(HEATMAPS_SCHEMA)}
    with mapped_tensors(path, shapes, metadata=metadata) as arrays:
        arrays["features"][:] = alive.numpy()
        arrays["image_ids"][:] = top.image_ids[alive].numpy()
        arrays["scale"][:] = scale[alive].numpy()
        arrays["starts"][:] = starts.numpy()
        map_scale = scale[alive].repeat_interleave(n_top)
        for maps in _iter_images(parts, top, alive):
            places, steps, levels = maps.written(map_scale)
            at = (starts[places] + _ranks(places)).numpy()
            arrays["steps"][at], arrays["levels"][at] = steps, levels


@dataclass(frozen=True, eq=False)
class _ImageMaps:
    """The entries of one image's maps, map after map, tokens ascending."""

    places: Int[Tensor, " entries"]
    """Which map of the file each entry belongs to."""
    distances: Int[Tensor, " entries"]
    """To the token of the entry before in the same map, or to token -1."""
    values: Float[Tensor, " entries"]

    @property
    def n_passed(self) -> Int[Tensor, " entries"]:
        """Entries of level 0 that stand before each entry, since a distance is at most 255."""
        return (self.distances - 1) // _FARTHEST

    def written(self, scale: Float[Tensor, " maps"]) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Place, distance and level of everything that is written."""
        n_passed = self.n_passed
        last = (1 + n_passed).cumsum(0) - 1
        steps = torch.full((int(last[-1]) + 1 if len(last) else 0,), _FARTHEST, dtype=torch.uint8)
        steps[last] = (self.distances - _FARTHEST * n_passed).to(torch.uint8)
        levels = torch.zeros_like(steps)
        levels[last] = (self.values / scale[self.places] * 255).round().clamp(1, 255).to(torch.uint8)
        return self.places.repeat_interleave(1 + n_passed), steps.numpy(), levels.numpy()


def _ranks(places: Int[Tensor, " entries"]) -> Int[Tensor, " entries"]:
    """How many entries of the same map stand before each, where equal ones stand together."""
    is_first = torch.ones_like(places, dtype=torch.bool)
    is_first[1:] = places[1:] != places[:-1]
    here = torch.arange(len(places))
    return here - here.where(is_first, 0).cummax(0).values if len(places) else here


def _iter_images(parts: Sequence[Path], top: TopImages, alive: Int[Tensor, " alive"]) -> Iterator[_ImageMaps]:
    """The maps of each image that is among the best of any feature."""
    position = torch.full((len(top.scores),), -1).index_put_((alive,), torch.arange(len(alive)))
    for part in parts:
        entries = load_tensors(part)
        images, counts = entries["map_image"].unique_consecutive(return_counts=True)
        for image_id, stop, count in zip(images.tolist(), counts.cumsum(0).tolist(), counts.tolist(), strict=True):
            own = slice(stop - count, stop)
            features = entries["map_feature"][own].long()
            is_kept, ranks = (top.image_ids == image_id).max(1)
            kept = is_kept[features]
            features, tokens = features[kept], entries["map_token"][own][kept].long()
            places = position[features] * top.image_ids.shape[1] + ranks[features]
            before = torch.full_like(tokens, -1)
            before[1:] = torch.where(places[1:] == places[:-1], tokens[:-1], -1)
            yield _ImageMaps(places, tokens - before, entries["map_value"][own][kept])
