"""Where features fire on their best images, kept while scoring without keeping the acts of all images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.features.scores import TopImages, max_over_tokens
from fluxsae.files import load_tensors, mapped_tensors, release_pages
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.sae.model import SparseActs

_ENTRIES_AT_ONCE = 1 << 20


class TopMapCollector:
    """The acts of each feature on every image that was among its `n_top` best when it came.

    That is a superset of the best images in the end, and soon a small one: image i enters with chance n_top / i.
    Scores are compared as they are stored, in fp16, so that the final choice from the stored S is always covered.
    """

    def __init__(self, n_features: int, *, n_top: int, n_tokens: int) -> None:
        self._n_features, self._n_tokens = n_features, n_tokens
        self._best = TopImages.empty(n_features, n_top)
        self._parts: list[dict[str, Tensor]] = []

    def skip(self, image_ids: Sequence[int], scores: Float[Tensor, "images features"]) -> None:
        """Takes note of images that were scored before, so that the bar is as high as it was."""
        self._best = self._best.updated(torch.tensor(image_ids), scores.half().float())

    def update(self, image_ids: Sequence[int], acts: Sequence[SparseActs]) -> None:
        """Adds some images, whose ids are above all seen before: their acts at each captured step."""
        scores = torch.stack([max_over_tokens(part, self._n_features)[0] for part in acts]).amax(0).cpu()
        self.skip(image_ids, scores)
        is_wanted = (self._best.image_ids == torch.tensor(image_ids)[:, None, None]).any(-1)
        keys, values = self._entries(acts, is_wanted)
        tokens, features = keys % self._n_tokens, keys // self._n_tokens % self._n_features
        images = torch.tensor(image_ids)[keys // (self._n_tokens * self._n_features)]
        self._parts.append(
            {
                "map_image": images.to(torch.int32),
                "map_feature": features.to(torch.int32),
                "map_token": tokens.to(torch.int32),
                "map_value": values,
            }
        )

    def _entries(self, acts: Sequence[SparseActs], is_wanted: Tensor) -> tuple[Tensor, Tensor]:
        """(image, feature, token) as one number, ascending, and the highest act over the steps."""
        keys, values = [], []
        for part in acts:
            n_images, n_tokens, _ = part.values.shape
            images = torch.arange(n_images)[:, None, None].expand_as(part.indices)
            tokens = torch.arange(n_tokens)[None, :, None].expand_as(part.indices)
            features, acts_values = part.indices.cpu().long(), part.values.float().cpu()
            kept = (acts_values > 0) & is_wanted[images, features]
            keys.append(((images * self._n_features + features) * self._n_tokens + tokens)[kept])
            values.append(acts_values[kept])
        distinct, position = torch.cat(keys).unique(return_inverse=True)
        highest = torch.zeros(len(distinct)).scatter_reduce_(0, position, torch.cat(values), "amax")
        return distinct, highest

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
