"""Token rows of FLUX on disk.

A folder of one hook point holds `manifest.json` and `shard-00000.safetensors`, ...; shard i holds the images
i * images_per_shard to (i + 1) * images_per_shard - 1:

    tokens       bf16  (images, steps, tokens_per_image, d_model)
    token_index  int32 (images, steps, tokens_per_image)    which of the stream's tokens each row is
    image_ids    int64 (images)
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor

from fluxsae.errors import FluxSaeError, check_positive, maker
from fluxsae.files import (
    check_free_space,
    load_tensors,
    read_header,
    read_json,
    remove_leftovers,
    save_tensors,
    write_json,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import SCHEMA_VERSION, check_schema

Split = Literal["train", "held_out", "all"]

_MANIFEST = "manifest.json"
_ADDED = ("flux_weights", "adapters", "earlier")


@dataclass(frozen=True, kw_only=True)
class ActivationManifest:
    """What a folder of activation shards holds, complete or not: fixed before the first shard is written."""

    hookpoint: str
    d_model: int
    flux_id: str
    flux_revision: str | None
    settings: GenerationSettings
    steps: tuple[int, ...]
    """Captured steps, 0-based in the full schedule."""
    sigmas: tuple[float, ...]
    """Noise levels of those steps."""
    n_tokens: int
    """Tokens of the hook point's stream in one image."""
    tokens_per_image: int
    """Tokens kept of each image and step."""
    n_images: int
    images_per_shard: int
    prompts_hash: str
    seed: int
    """Decides prompts, noise and kept tokens."""
    held_out_every: int = 10
    """Every n-th image is held out for evaluation; 0 holds out none."""
    is_exact: bool = True
    """False where FLUX was quantised or cached."""
    flux_weights: str | None = None
    """SHA-256 over the transformer's weight files; None in folders of before this field, as for `adapters`."""
    adapters: tuple[str, ...] | None = None
    """Hashes of the adapters (LoRAs) that were active or fused."""
    earlier: tuple[str, ...] = ()
    """Dataset hashes of this folder when it held fewer images; the shards of that time carry them."""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        HookPoint.parse(self.hookpoint)
        check_positive(self, "d_model", "n_tokens", "tokens_per_image", "n_images", "images_per_shard")
        if self.tokens_per_image > self.n_tokens:
            raise FluxSaeError(
                f"tokens_per_image is {self.tokens_per_image}, but {self.hookpoint} has {self.n_tokens} tokens."
            )
        if not self.steps or len(self.steps) != len(self.sigmas):
            raise FluxSaeError(f"steps {self.steps} and sigmas {self.sigmas} must be of one length, at least 1.")

    @property
    def n_shards(self) -> int:
        """Number of shards of the complete folder."""
        return -(-self.n_images // self.images_per_shard)

    @property
    def bytes_on_disk(self) -> int:
        """Size of the complete folder's tensors."""
        rows = self.n_images * len(self.steps) * self.tokens_per_image
        return rows * (2 * self.d_model + 4) + 8 * self.n_images

    @cached_property
    def dataset_hash(self) -> str:
        """sha256 of everything here: two folders with the same hash hold the same rows, in whatever order they grew."""
        values = {name: value for name, value in self.to_dict().items() if name != "earlier"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def grown_from(self, present: Self) -> Self:
        """This manifest for a folder that holds the first images of it already.

        Raises:
            FluxSaeError: `present` differs in more than the number of images, or has more of them.
        """
        mine, other = self.to_dict(), present.to_dict()
        differing = [
            f"{name} {other.get(name)} instead of {value}"
            for name, value in mine.items()
            if other.get(name) != value and name not in ("n_images", "prompts_hash", "earlier")
        ]
        if present.n_images == self.n_images and present.prompts_hash != self.prompts_hash:
            differing.append(f"prompts_hash {present.prompts_hash} instead of {self.prompts_hash}")
        if present.n_images > self.n_images:
            differing.append(f"{present.n_images} images, more than {self.n_images}")
        if differing:
            raise FluxSaeError(
                f"The folder already holds other activations of {self.hookpoint} ({'; '.join(differing)}). "
                "Choose another folder, or pass --force to delete them and collect anew."
            )
        earlier = dict.fromkeys([*present.earlier, present.dataset_hash])
        earlier.pop(self.dataset_hash, None)
        return replace(self, earlier=tuple(earlier))

    def image_ids(self, shard: int) -> range:
        """The images of a shard."""
        start = shard * self.images_per_shard
        return range(start, min(start + self.images_per_shard, self.n_images))

    def is_held_out(self, image_id: int) -> bool:
        """Whether the image belongs to the evaluation split."""
        return self.held_out_every > 0 and image_id % self.held_out_every == self.held_out_every - 1

    def in_split(self, image_id: int, split: Split) -> bool:
        """Whether the image belongs to `split`."""
        return split == "all" or self.is_held_out(image_id) == (split == "held_out")

    def to_dict(self) -> dict[str, Any]:
        """The manifest as plain JSON values."""
        lists = {name: [*value] for name, value in vars(self).items() if isinstance(value, tuple)}
        values = {**asdict(self), **lists, "settings": self.settings.to_dict()}
        # Not written where unknown: the hash of an older folder, which its shards carry, is that of what it holds.
        if not self.earlier:
            del values["earlier"]
        return {name: value for name, value in values.items() if name not in _ADDED or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The manifest from `to_dict`'s form.

        Raises:
            FluxSaeError: a newer schema, or fields missing or unknown.
        """
        check_schema(values, _MANIFEST)
        known = set(cls.__dataclass_fields__)
        unknown, missing = set(values) - known, known - set(values) - set(_ADDED)
        if unknown or missing:
            raise FluxSaeError(f"{_MANIFEST} has unknown fields {sorted(unknown)} and lacks {sorted(missing)}.")
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**{**fields, "settings": GenerationSettings.from_dict(values["settings"])})


@dataclass(frozen=True)
class ActivationShard:
    """One file of a folder of activations; its tensors are read when asked for."""

    path: Path
    index: int
    manifest: ActivationManifest

    def check(self) -> None:
        """Refuses a shard that is missing, cut off, or of another hook point, width or dataset.

        Raises:
            FluxSaeError: with the remedy.
        """
        if not self.path.is_file():
            raise FluxSaeError(f"{self.path} is missing. Fill the gap with the same settings: {maker('collect')}.")
        header = read_header(self.path)
        for name, expected in self._metadata().items():
            known = (expected, *self.manifest.earlier) if name == "dataset" else (expected,)
            if header.metadata.get(name) not in known:
                raise FluxSaeError(
                    f"{self.path} has {name} {header.metadata.get(name)}, but its folder's is {expected}. "
                    "Delete the file and collect again."
                )
        shape = (len(self.image_ids), len(self.manifest.steps), self.manifest.tokens_per_image)
        expected_shapes = {"tokens": ("BF16", (*shape, self.manifest.d_model)), "token_index": ("I32", shape)}
        for name, expected_shape in expected_shapes.items():
            if header.shapes.get(name) != expected_shape:
                raise FluxSaeError(
                    f"{self.path} has {name} {header.shapes.get(name)}, but {expected_shape} is expected. "
                    "Delete the file and collect again."
                )

    @property
    def image_ids(self) -> range:
        """The images of this shard."""
        return self.manifest.image_ids(self.index)

    @property
    def left_out(self) -> tuple[int, ...]:
        """Images whose activations were NaN or infinite: their rows are zeros, and no reader gives them."""
        return tuple(json.loads(read_header(self.path).metadata.get("left_out", "[]")))

    def tokens(self) -> BFloat16[Tensor, "images steps tokens d_model"]:
        """The token rows."""
        self.check()
        return load_tensors(self.path)["tokens"]

    def token_index(self) -> Int[Tensor, "images steps tokens"]:
        """Which token of its image's stream each row is."""
        self.check()
        return load_tensors(self.path)["token_index"]

    def save(
        self,
        tokens: BFloat16[Tensor, "images steps tokens d_model"],
        token_index: Int[Tensor, "images steps tokens"],
        *,
        left_out: Sequence[int] = (),
    ) -> None:
        """Writes the shard, whole or absent."""
        image_ids = torch.tensor(self.image_ids)
        tensors = {"tokens": tokens, "token_index": token_index.to(torch.int32), "image_ids": image_ids}
        left = {"left_out": json.dumps([*left_out])} if left_out else {}
        save_tensors(self.path, tensors, metadata={**self._metadata(), **left})
        self.check()

    def _metadata(self) -> dict[str, str]:
        manifest = self.manifest
        return {
            "hookpoint": manifest.hookpoint,
            "d_model": str(manifest.d_model),
            "dataset": manifest.dataset_hash,
            "shard": str(self.index),
        }


def _shard(folder: Path, manifest: ActivationManifest, index: int) -> ActivationShard:
    return ActivationShard(folder / f"shard-{index:05d}.safetensors", index, manifest)


def _left_out(shards: Sequence[ActivationShard]) -> set[int]:
    return {image_id for shard in shards if shard.path.is_file() for image_id in shard.left_out}


class ShardFolder:
    """A folder of activation shards, complete or not.

    Raises:
        FluxSaeError: there is no manifest, or it is damaged or newer than this program.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / _MANIFEST).is_file():
            raise FluxSaeError(
                f"{self.path} holds no activations. Name their folder, or collect some: {maker('collect')}."
            )
        self.manifest = ActivationManifest.from_dict(read_json(self.path / _MANIFEST))

    @property
    def shards(self) -> list[ActivationShard]:
        """Every shard of the complete folder, there or not."""
        return [_shard(self.path, self.manifest, index) for index in range(self.manifest.n_shards)]

    def missing(self) -> list[int]:
        """Shards that are not written yet."""
        return [shard.index for shard in self.shards if not shard.path.is_file()]

    def left_out(self) -> set[int]:
        """The images that the shards which are there leave out."""
        return _left_out(self.shards)

    def check_complete(self, *, hookpoint: HookPoint | str | None = None, d_model: int | None = None) -> None:
        """Refuses a folder with missing or wrong shards, or of another hook point or width than asked for.

        Raises:
            FluxSaeError: with the remedy.
        """
        if hookpoint is not None and str(HookPoint.parse(hookpoint)) != self.manifest.hookpoint:
            raise FluxSaeError(
                f"{self.path} holds activations of {self.manifest.hookpoint}, not of {HookPoint.parse(hookpoint)}. "
                "Name the folder of that hook point, or collect it."
            )
        if d_model is not None and d_model != self.manifest.d_model:
            raise FluxSaeError(
                f"{self.path} holds activations of width {self.manifest.d_model}, but {d_model} was asked for. "
                f"Use an SAE with d_model {self.manifest.d_model}."
            )
        for shard in self.shards:
            shard.check()

    def iter_images(
        self, split: Split = "held_out"
    ) -> Iterator[tuple[int, BFloat16[Tensor, "steps tokens d_model"], Int[Tensor, "steps tokens"]]]:
        """(image id, token rows, token index) of each image of a split, in order."""
        for shard in self.shards:
            wanted = [i for i in shard.image_ids if self.manifest.in_split(i, split)]
            if wanted:
                tokens, token_index = shard.tokens(), shard.token_index()
                left_out = shard.left_out
                for image_id in (i for i in wanted if i not in left_out):
                    position = image_id - shard.image_ids.start
                    yield image_id, tokens[position], token_index[position]


def has_manifest(folder: str | Path) -> bool:
    """Whether a folder holds activations, complete or not."""
    return (Path(folder) / _MANIFEST).is_file()


def find_folders(path: str | Path) -> list[Path]:
    """The folders of activations directly below `path`, one a hook point, in FLUX's order."""
    found = [manifest.parent for manifest in Path(path).glob(f"*/{_MANIFEST}")]
    return sorted(found, key=lambda folder: HookPoint.parse(folder.name))


def expected_files(folder: str | Path) -> list[Path]:
    """The manifest of a folder of activations and every shard that it announces, there or not."""
    manifest = Path(folder) / _MANIFEST
    return [manifest, *(shard.path for shard in ShardFolder(folder).shards)] if manifest.is_file() else [manifest]


def missing_bytes(folder: str | Path, manifest: ActivationManifest) -> int:
    """Room that the shards take that are not in the folder yet."""
    n_present = min(manifest.n_shards, sum(1 for _ in Path(folder).glob("shard-*.safetensors")))
    return manifest.bytes_on_disk - manifest.bytes_on_disk * n_present // manifest.n_shards


class ShardWriter:
    """Fills a folder with shards, in any order, over any number of runs and processes.

    The manifest is written first and says what the complete folder is; a shard is there or not, never half. So a
    writer that was killed is made again with the same manifest, and `missing()` says what is left to do. With a
    manifest of more images the folder grows; those that are there must be the first of it.

    Raises:
        FluxSaeError: the folder holds other activations, or the disk has too little room for what is missing.
    """

    def __init__(self, path: str | Path, manifest: ActivationManifest, *, rank: int = 0, world_size: int = 1) -> None:
        self.path = Path(path)
        self.manifest = manifest
        self.rank = rank
        self.world_size = world_size
        present = ShardFolder(self.path).manifest if has_manifest(self.path) else None
        if present is not None:
            self.manifest = manifest.grown_from(present)
        remove_leftovers(self.path)
        check_free_space(self.path, missing_bytes(self.path, manifest), purpose=f"Collecting at {manifest.hookpoint}")
        if rank == 0 and self.manifest != present:
            write_json(self.path / _MANIFEST, self.manifest.to_dict())

    def missing(self) -> list[int]:
        """Shards that this rank has still to write, or to add images to."""
        mine = range(self.rank, self.manifest.n_shards, self.world_size)
        return [index for index in mine if self.n_present(index) < len(self.manifest.image_ids(index))]

    def n_present(self, index: int) -> int:
        """How many of a shard's images are there: the last shard of a folder that grows holds some of them."""
        shard = self._shard(index)
        return read_header(shard.path).shapes["image_ids"][1][0] if shard.path.is_file() else 0

    def present_rows(
        self, index: int
    ) -> tuple[BFloat16[Tensor, "images steps tokens d_model"], Int[Tensor, "images steps tokens"]]:
        """Rows and token indices of a shard that images are to be added to."""
        tensors = load_tensors(self._shard(index).path)
        return tensors["tokens"], tensors["token_index"]

    def write(
        self,
        index: int,
        tokens: BFloat16[Tensor, "images steps tokens d_model"],
        token_index: Int[Tensor, "images steps tokens"],
        *,
        left_out: Sequence[int] = (),
    ) -> None:
        """Writes one shard: the rows of `manifest.image_ids(index)`, of which readers skip those of `left_out`."""
        self._shard(index).save(tokens, token_index, left_out=left_out)

    def left_out(self) -> set[int]:
        """The images that the shards which are there leave out."""
        return _left_out([self._shard(index) for index in range(self.manifest.n_shards)])

    def _shard(self, index: int) -> ActivationShard:
        return _shard(self.path, self.manifest, index)
