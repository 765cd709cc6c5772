"""Where features fire on their best images, kept while scoring without keeping the acts of all images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.features.scores import TopImages
from fluxsae.files import load_tensors, mapped_tensors, release_pages
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.sae.acts import SparseActs

_ENTRIES_AT_ONCE = 1 << 20


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

    def pop(self) -> dict[str, Tensor]:
        """The entries since the last call, one line per active (image, feature, token), as tensors to save."""
        parts, self._parts = self._parts, []
        names = ("map_image", "map_feature", "map_token", "map_value")
        return {name: torch.cat([part[name] for part in parts]) for name in names}


def write_heatmaps(
    path: str | Path, parts: Sequence[Path], top: TopImages, *, scale: Float[Tensor, " features"], grid: TokenGrid
) -> None:
    """Writes `heatmaps.safetensors` for the images of `top` from part files with the entries of the collector.

    An act a becomes round(255 a / scale), at least 1 where the feature fires at all. One part is in memory at a time.
    """
    alive = (top.scores[:, 0] > 0).nonzero().flatten()
    position = torch.full((len(top.scores),), -1).index_put_((alive,), torch.arange(len(alive)))
    n_top = top.image_ids.shape[1]
    shapes = {
        "features": ("I32", (len(alive),)),
        "image_ids": ("I32", (len(alive), n_top)),
        "scale": ("F32", (len(alive),)),
        "values": ("U8", (len(alive), n_top, grid.n_tokens)),
    }
    with mapped_tensors(path, shapes, metadata={"rows": str(grid.rows), "cols": str(grid.cols)}) as arrays:
        arrays["features"][:] = alive.numpy()
        arrays["image_ids"][:] = top.image_ids[alive].numpy()
        arrays["scale"][:] = scale[alive].numpy()
        for part in parts:
            for features, ranks, tokens, values in _iter_wanted(load_tensors(part), top):
                levels = (values / scale[features] * 255).round().clamp(1, 255).to(torch.uint8)
                arrays["values"][position[features].numpy(), ranks.numpy(), tokens.numpy()] = levels.numpy()
            release_pages(arrays["values"])


def _iter_wanted(entries: dict[str, Tensor], top: TopImages) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(features, ranks, tokens, values) of the entries whose image is among the feature's best, in pieces."""
    for start in range(0, len(entries["map_image"]), _ENTRIES_AT_ONCE):
        piece = {name: entries[name][start : start + _ENTRIES_AT_ONCE] for name in entries if name.startswith("map_")}
        features = piece["map_feature"].long()
        matches = top.image_ids[features] == piece["map_image"][:, None]
        found, ranks = matches.nonzero(as_tuple=True)
        yield features[found], ranks, piece["map_token"].long()[found], piece["map_value"][found]
