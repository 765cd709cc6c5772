"""FLUX to token rows: onto disk as shards, or straight into training."""

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from fluxsae.activations.mixing import MixingBuffer
from fluxsae.activations.shards import ActivationManifest, ShardFolder, ShardWriter, has_manifest, missing_bytes
from fluxsae.errors import FluxSaeError
from fluxsae.files import check_free_space
from fluxsae.flux import (
    BlockCall,
    capture,
    default_settings,
    flux_identity,
    generate,
    read_picture,
    schedule_sigmas,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.sources import PictureSet
from fluxsae.runs.folder import prompts_hash

_log = logging.getLogger(__name__)

SEED_BLOCK = 1_000_000
"""Image seeds of one purpose lie in a block of this size, so that no two images of a run share one."""

MAX_BAD_SHARE = 0.05
"""Of a collection's images may be left out since they hold NaN or infinite numbers; beyond it something is wrong."""

OnBad = Callable[[int, str], None]
"""Called with (image id, what is wrong) for an image that is to be left out; may raise to stop."""

OnImages = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@dataclass(frozen=True)
class ImagePlan:
    """Which images a stage makes: image i is (prompts[i], first_seed + i).

    With `pictures`, image i is read and not generated: picture i with that caption (or none) and that seed's noise.
    """

    prompts: tuple[str, ...]
    first_seed: int
    pictures: PictureSet | None = None

    @classmethod
    def build(
        cls, prompts: Sequence[str], *, seed: int, purpose: str, pictures: PictureSet | None = None
    ) -> "ImagePlan":
        """The plan of one purpose, `"collect"` or `"score"`; their seeds never meet, whatever `seed` is.

        Raises:
            FluxSaeError: too many images, or a seed below 0.
        """
        purposes = ("collect", "score")
        if not 1 <= len(prompts) <= SEED_BLOCK or seed < 0:
            raise FluxSaeError(
                f"{len(prompts)} images with seed {seed}: allowed are 1 to {SEED_BLOCK} images and a seed from 0."
            )
        block = seed * len(purposes) + purposes.index(purpose)
        return cls(tuple(prompts), block * SEED_BLOCK, pictures)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> "ImagePlan":
        """The plan of the first `count` images."""
        pictures = None if self.pictures is None else self.pictures.take(range(count))
        return ImagePlan(self.prompts[:count], self.first_seed, pictures)

    def seed(self, image_id: int) -> int:
        """The seed of an image's noise."""
        return self.first_seed + image_id

    @property
    def keys(self) -> tuple[str, ...]:
        """What splits go by: each image's prompt, or the digest of its picture."""
        return self.prompts if self.pictures is None else tuple(entry.digest for entry in self.pictures.entries)

    @property
    def prompts_hash(self) -> str:
        """sha256 of the prompts in order, with the digests of the pictures where pictures are read."""
        if self.pictures is None:
            return prompts_hash(self.prompts)
        return prompts_hash([f"{digest} {prompt}" for digest, prompt in zip(self.keys, self.prompts, strict=True)])


@dataclass(frozen=True)
class CaptureRequest:
    """What to keep of each generated image."""

    hookpoints: tuple[HookPoint, ...]
    steps: tuple[int, ...]
    """0-based steps of the full schedule, ascending."""
    settings: GenerationSettings
    tokens_per_image: int | None = None
    """Tokens kept of each image, step and hook point, chosen at random; None keeps all."""
    batch_size: int = 8
    """Images generated together."""
    seed: int = 0
    """Decides which tokens are kept."""


def build_request(
    pipe: Any,
    hookpoints: Sequence[HookPoint | str],
    steps: Sequence[int],
    *,
    settings: GenerationSettings | None = None,
    tokens_per_image: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> CaptureRequest:
    """A checked request.

    Raises:
        FluxSaeError: no hook points, steps outside the schedule, or a count below 1.
    """
    settings = settings or default_settings(pipe)
    n_steps = settings.num_inference_steps
    wanted = tuple(sorted(set(steps)))
    if not hookpoints or not wanted or not (wanted[0] >= 0 and wanted[-1] < n_steps):
        raise FluxSaeError(
            f"Cannot capture steps {[*steps]} at {len(hookpoints)} hook points: name at least one hook point, "
            f"and steps from 0 to {n_steps - 1} of this schedule."
        )
    for name, value in (("batch_size", batch_size), ("tokens_per_image", tokens_per_image)):
        if value is not None and value < 1:
            raise FluxSaeError(f"{name} is {value}; it must be at least 1.")
    parsed = tuple(sorted({HookPoint.parse(hookpoint) for hookpoint in hookpoints}))
    return CaptureRequest(parsed, wanted, settings, tokens_per_image, batch_size, seed)


def stream_shapes(pipe: Any, request: CaptureRequest) -> dict[HookPoint, tuple[int, int]]:
    """(tokens, d_model) of each hook point's stream, read off one step of one image."""
    shapes: dict[HookPoint, tuple[int, int]] = {}

    def note_shape(call: BlockCall) -> None:
        shapes[call.hookpoint] = (call.tokens.shape[1], call.tokens.shape[2])

    with capture(pipe, request.hookpoints, [0], stop_early=True, sink=note_shape):
        generate(pipe, ["a"], seeds=[0], settings=request.settings, output_type="latent")
    return shapes


def kept_tokens(request: CaptureRequest, image_id: int, step: int, *, n_tokens: int) -> Int[Tensor, " kept"]:
    """The tokens kept of an image and step, ascending: a pure function of the request's seed, image and step."""
    if request.tokens_per_image is None or request.tokens_per_image >= n_tokens:
        return torch.arange(n_tokens)
    generator = torch.Generator().manual_seed((request.seed * SEED_BLOCK + image_id) * 1009 + step)
    return torch.randperm(n_tokens, generator=generator)[: request.tokens_per_image].sort().values


Rows = tuple[BFloat16[Tensor, "images steps tokens d_model"], Int[Tensor, "images steps tokens"]]


def capture_rows(
    pipe: Any, plan: ImagePlan, image_ids: Sequence[int], request: CaptureRequest, *, on_bad: OnBad | None = None
) -> dict[HookPoint, Rows]:
    """Token rows (bf16, main memory) and token indices of some images; nothing after the last wanted block runs.

    Raises:
        FluxSaeError: an image holds NaN or infinite numbers, and there is no `on_bad`; with it the rows are zeros.
    """
    parts = [
        _capture_batch(pipe, plan, image_ids[start : start + request.batch_size], request, on_bad)
        for start in range(0, len(image_ids), request.batch_size)
    ]
    return {
        hookpoint: (
            torch.cat([part[hookpoint][0] for part in parts]),
            torch.cat([part[hookpoint][1] for part in parts]),
        )
        for hookpoint in request.hookpoints
    }


def check_finite(call: BlockCall, names: Sequence[str]) -> None:
    """Refuses activations that are no numbers, before anything is made of them; `names` says what each item is.

    Raises:
        FluxSaeError: an item of the batch holds NaN or an infinite number.
    """
    bad = [names[item] for item in _bad_items(call)]
    if bad:
        raise FluxSaeError(_describe_bad(call, ", ".join(bad)))


def _bad_items(call: BlockCall) -> list[int]:
    is_sound = call.tokens.flatten(1).isfinite().all(1).tolist()
    return [item for item, sound in enumerate(is_sound) if not sound]


def _describe_bad(call: BlockCall, names: str) -> str:
    return (
        f"At step {call.step} of {call.hookpoint}, the activations of {names} hold NaN or infinite "
        f"numbers; nothing was made of them. FLUX ran in {str(call.tokens.dtype).removeprefix('torch.')}: float16 "
        "overflows in it, so load it in bfloat16 or float32; if it was loaded so, try another GPU."
    )


def _capture_batch(
    pipe: Any, plan: ImagePlan, image_ids: Sequence[int], request: CaptureRequest, on_bad: OnBad | None
) -> dict[HookPoint, Rows]:
    kept: dict[tuple[HookPoint, int], tuple[Tensor, Tensor]] = {}

    def keep(call: BlockCall) -> None:
        names = [f"image {i}" for i in image_ids]
        if on_bad is None:
            check_finite(call, names)
        bad = _bad_items(call)
        for item in bad:
            assert on_bad is not None
            on_bad(image_ids[item], _describe_bad(call, names[item]))
        n_tokens = call.tokens.shape[1]
        index = torch.stack([kept_tokens(request, i, call.step, n_tokens=n_tokens) for i in image_ids])
        tokens = call.tokens.gather(1, index.to(call.tokens.device)[..., None].expand(-1, -1, call.tokens.shape[2]))
        tokens[bad] = 0
        kept[call.hookpoint, call.step] = (tokens.to(torch.bfloat16).cpu(), index.to(torch.int32))

    prompts, seeds = [plan.prompts[i] for i in image_ids], [plan.seed(i) for i in image_ids]
    if plan.pictures is not None:
        read_picture(
            pipe,
            [plan.pictures.picture(i) for i in image_ids],
            prompt=prompts,
            hookpoints=request.hookpoints,
            steps=request.steps,
            seeds=seeds,
            settings=request.settings,
            sink=keep,
        )
    else:
        with capture(pipe, request.hookpoints, request.steps, stop_early=True, sink=keep):
            generate(pipe, prompts, seeds=seeds, settings=request.settings, output_type="latent")
    return {
        hookpoint: (
            torch.stack([kept[hookpoint, step][0] for step in request.steps], dim=1),
            torch.stack([kept[hookpoint, step][1] for step in request.steps], dim=1),
        )
        for hookpoint in request.hookpoints
    }


def build_manifests(
    pipe: Any,
    plan: ImagePlan,
    request: CaptureRequest,
    *,
    images_per_shard: int = 32,
    held_out_every: int = 10,
) -> dict[HookPoint, ActivationManifest]:
    """What the folders of a collection will hold, before any image is made."""
    sigmas, identity = schedule_sigmas(pipe, request.settings), flux_identity(pipe)
    return {
        hookpoint: ActivationManifest(
            hookpoint=str(hookpoint),
            d_model=d_model,
            flux_id=identity.flux_id,
            flux_revision=identity.revision,
            flux_weights=identity.weights,
            adapters=identity.adapters,
            settings=request.settings,
            steps=request.steps,
            sigmas=tuple(sigmas[step] for step in request.steps),
            n_tokens=n_tokens,
            tokens_per_image=min(n_tokens, request.tokens_per_image or n_tokens),
            n_images=len(plan),
            images_per_shard=images_per_shard,
            prompts_hash=plan.prompts_hash,
            seed=request.seed,
            held_out_every=held_out_every,
            is_exact=bool(identity.is_exact),
        )
        for hookpoint, (n_tokens, d_model) in stream_shapes(pipe, request).items()
    }


def collect(
    pipe: Any,
    plan: ImagePlan,
    request: CaptureRequest,
    *,
    folders: Mapping[HookPoint, str | Path],
    manifests: Mapping[HookPoint, ActivationManifest],
    rank: int = 0,
    world_size: int = 1,
    on_images: OnImages | None = None,
) -> int:
    """Fills one folder of shards per hook point; shards that are there are kept, so a killed run is taken up.

    The images of a shard are the unit of work, dealt to the processes in turn; each is generated once for all hook
    points, in the same batches whoever does it, so that the bytes do not depend on where a run was cut off.
    An image with NaN or infinite activations is left out, at all hook points, and logged with its step; returned is
    how many images the folders leave out.

    Raises:
        FluxSaeError: a folder holds other activations, or the disk is too small, before any image is made; or more
            than `MAX_BAD_SHARE` of the images are left out.
    """
    _check_growth(plan, folders, manifests)
    _check_space(folders, manifests)
    writers = {
        hookpoint: ShardWriter(folders[hookpoint], manifests[hookpoint], rank=rank, world_size=world_size)
        for hookpoint in request.hookpoints
    }
    manifest = manifests[request.hookpoints[0]]
    missing = {hookpoint: set(writer.missing()) for hookpoint, writer in writers.items()}
    wanted = sorted(set().union(*missing.values()))
    present = {index: min(writers[h].n_present(index) for h in writers if index in missing[h]) for index in wanted}
    total = sum(len(manifest.image_ids(index)) - present[index] for index in wanted)
    done = 0
    left_out: set[int] = set().union(*(writer.left_out() for writer in writers.values()))

    def leave_out(image_id: int, reason: str) -> None:
        if image_id not in left_out:
            left_out.add(image_id)
            _log.warning("image %d of %d is left out. %s", image_id, len(plan), reason)
        if len(left_out) > MAX_BAD_SHARE * len(plan):
            raise FluxSaeError(f"{len(left_out)} of {len(plan)} images would be left out, too many to go on. {reason}")

    for index in wanted:
        new = manifest.image_ids(index)[present[index] :]
        rows = capture_rows(pipe, plan, new, request, on_bad=leave_out)
        bad = [image_id for image_id in manifest.image_ids(index) if image_id in left_out]
        for hookpoint, writer in writers.items():
            if index in missing[hookpoint]:
                writer.write(index, *_added(writer, index, rows[hookpoint], present[index]), left_out=bad)
        done += len(new)
        if on_images is not None:
            on_images(done, total)
    return len(left_out)


def _added(
    writer: ShardWriter, index: int, new: Rows, first: int
) -> tuple[BFloat16[Tensor, "all steps tokens d_model"], Int[Tensor, "all steps tokens"]]:
    """A shard's rows: those that are there, and behind them the new ones, which begin with its image number `first`."""
    n_present = writer.n_present(index)
    if not n_present:
        return new
    old = writer.present_rows(index)
    tokens, token_index = (torch.cat([kept, made[n_present - first :]]) for kept, made in zip(old, new, strict=True))
    return tokens, token_index


def _check_growth(
    plan: ImagePlan, folders: Mapping[HookPoint, str | Path], manifests: Mapping[HookPoint, ActivationManifest]
) -> None:
    """Refuses to add images to a folder whose images are not the first of the plan."""
    for hookpoint, manifest in manifests.items():
        if not has_manifest(folders[hookpoint]):
            continue
        present = ShardFolder(folders[hookpoint]).manifest
        manifest.grown_from(present)
        if plan.first(present.n_images).prompts_hash != present.prompts_hash:
            raise FluxSaeError(
                f"{folders[hookpoint]} holds activations of other prompts or pictures, so images cannot be added to "
                "it. Give the prompts that it was collected with, name another folder, or pass --force to start anew."
            )


def _check_space(folders: Mapping[HookPoint, str | Path], manifests: Mapping[HookPoint, ActivationManifest]) -> None:
    """Refuses what would not fit, all hook points together."""
    needed: dict[Path, int] = defaultdict(int)
    for hookpoint, manifest in manifests.items():
        needed[Path(folders[hookpoint]).parent] += missing_bytes(folders[hookpoint], manifest)
    for folder, n_bytes in needed.items():
        check_free_space(folder, n_bytes, purpose=f"Collecting at {', '.join(map(str, manifests))}")


@runtime_checkable
class Peers(Protocol):
    """The processes of a live source; `fluxsae.sae.training.Processes` is one."""

    @property
    def rank(self) -> int:
        """This process's number."""

    @property
    def world_size(self) -> int:
        """How many there are."""

    def broadcast_(self, tensor: Tensor, *, source: int) -> Tensor:
        """The tensor, replaced by that of process `source`."""


class LiveImages:
    """Images that are made once for all hook points of a request, with fresh noise in every epoch.

    Batches of images are dealt to the processes in turn and their rows exchanged: every process has all rows, which do
    not depend on how many processes there are. Rows that a hook point has not asked for yet wait for it; beyond
    `waiting_bytes` the oldest are forgotten, and made again if they are asked for after all.
    """

    def __init__(
        self,
        pipe: Any,
        plan: ImagePlan,
        request: CaptureRequest,
        *,
        images_per_shard: int = 32,
        held_out_every: int = 10,
        waiting_bytes: int = 1 << 30,
        peers: Peers | None = None,
    ) -> None:
        self._pipe, self._plan, self._request, self._peers = pipe, plan, request, peers
        self._shapes = stream_shapes(pipe, request)
        every = held_out_every
        ids = [i for i in range(len(plan)) if not every or i % every != every - 1]
        self._shards = [ids[start : start + images_per_shard] for start in range(0, len(ids), images_per_shard)]
        self._waiting: OrderedDict[tuple[int, int, HookPoint], Tensor] = OrderedDict()
        self._waiting_bytes = waiting_bytes

    def d_model(self, hookpoint: HookPoint) -> int:
        """Width of a hook point's rows."""
        return self._shapes[hookpoint][1]

    def n_rows(self, hookpoint: HookPoint) -> list[int]:
        """Rows of each shard; held-out images are never generated."""
        return [len(shard) * self._rows_per_image(hookpoint) for shard in self._shards]

    def image_sigmas(self, hookpoint: HookPoint) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each of a hook point's rows of an image."""
        sigmas = torch.tensor(schedule_sigmas(self._pipe, self._request.settings))[list(self._request.steps)]
        return sigmas.repeat_interleave(self._rows_per_image(hookpoint) // len(sigmas))

    def take(self, hookpoint: HookPoint, shard: int, *, epoch: int) -> BFloat16[Tensor, "rows d_model"]:
        """A hook point's rows of a shard's images.

        Raises:
            FluxSaeError: so many epochs that the seeds would leave their block.
        """
        if (epoch, shard, hookpoint) not in self._waiting:
            made = self._make(shard, epoch)
            self._waiting |= {(epoch, shard, place): rows for place, rows in made.items()}
        rows = self._waiting.pop((epoch, shard, hookpoint))
        while sum(tensor.nbytes for tensor in self._waiting.values()) > self._waiting_bytes:
            self._waiting.popitem(last=False)
        return rows

    def _rows_per_image(self, hookpoint: HookPoint) -> int:
        n_tokens, asked = self._shapes[hookpoint][0], self._request.tokens_per_image
        return len(self._request.steps) * min(n_tokens, asked or n_tokens)

    def _make(self, shard: int, epoch: int) -> dict[HookPoint, Tensor]:
        first = epoch * len(self._plan)
        if first + len(self._plan) > SEED_BLOCK:
            raise FluxSaeError(
                f"Epoch {epoch} of {len(self._plan)} images would need more than {SEED_BLOCK} seeds. Use fewer epochs."
            )
        plan, size = replace(self._plan, first_seed=self._plan.first_seed + first), self._request.batch_size
        ids = self._shards[shard]
        batches = [ids[start : start + size] for start in range(0, len(ids), size)]
        rank, world_size = (self._peers.rank, self._peers.world_size) if self._peers else (0, 1)
        pieces: dict[HookPoint, list[Tensor]] = {place: [] for place in self._request.hookpoints}
        for start in range(0, len(batches), world_size):
            turn = batches[start : start + world_size]
            own = capture_rows(self._pipe, plan, turn[rank], self._request) if rank < len(turn) else None
            for source, images in enumerate(turn):
                for place, made in pieces.items():
                    if own is not None and source == rank:
                        rows = own[place][0].flatten(0, 2)
                    else:
                        shape = (len(images) * self._rows_per_image(place), self.d_model(place))
                        rows = torch.empty(shape, dtype=torch.bfloat16)
                    made.append(self._peers.broadcast_(rows, source=source) if self._peers else rows)
        return {place: torch.cat(made) for place, made in pieces.items()}


class LiveReader:
    """One hook point's rows straight from FLUX: a shard is generated when it is asked for."""

    reads_ahead = False

    def __init__(self, images: LiveImages, hookpoint: HookPoint) -> None:
        self._images, self._hookpoint = images, hookpoint
        self.d_model = images.d_model(hookpoint)

    def n_rows(self) -> list[int]:
        """Rows of each shard."""
        return self._images.n_rows(self._hookpoint)

    def image_sigmas(self) -> Float[Tensor, " rows_of_image"]:
        """The noise level of each row of an image."""
        return self._images.image_sigmas(self._hookpoint)

    def rows(
        self, shards: Sequence[int], wanted: Int[Tensor, " wanted"], *, epoch: int
    ) -> BFloat16[Tensor, "wanted d_model"]:
        """Some of the rows of some shards' images, with the noise of this epoch."""
        rows = torch.empty(len(wanted), self.d_model, dtype=torch.bfloat16)
        first, place = 0, 0
        for shard in shards:
            made = self._images.take(self._hookpoint, shard, epoch=epoch)
            stop = place + int(torch.searchsorted(wanted[place:], first + len(made)))
            rows[place:stop] = made[wanted[place:stop] - first]
            first, place = first + len(made), stop
        return rows


def live_sources(
    pipe: Any,
    plan: ImagePlan,
    request: CaptureRequest,
    *,
    batch_size: int,
    seed: int = 0,
    images_per_shard: int = 32,
    held_out_every: int = 10,
    buffer_bytes: int = 1 << 30,
    peers: Peers | None = None,
) -> dict[HookPoint, MixingBuffer]:
    """Batches of every requested hook point that come from FLUX itself and never touch the disk.

    Each is used as `mixing_buffer` is. Their images are the same and made once, as long as all sources are read side by
    side; `buffer_bytes` is shared out among them. Under several processes (`peers`) each generates its share of the
    images and gets its slice of every batch.

    Raises:
        FluxSaeError: there are too few rows for a batch, or `batch_size` does not divide by the number of processes.
    """
    images = LiveImages(
        pipe, plan, request, images_per_shard=images_per_shard, held_out_every=held_out_every,
        waiting_bytes=buffer_bytes, peers=peers,
    )  # fmt: skip
    rank, world_size = (peers.rank, peers.world_size) if peers else (0, 1)
    return {
        hookpoint: MixingBuffer(
            LiveReader(images, hookpoint), batch_size=batch_size, seed=seed,
            buffer_bytes=buffer_bytes // len(request.hookpoints), rank=rank, world_size=world_size,
        )
        for hookpoint in request.hookpoints
    }  # fmt: skip
