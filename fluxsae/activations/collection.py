"""FLUX to token rows: onto disk as shards, or straight into training."""

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import BFloat16, Int
from torch import Tensor

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
from fluxsae.flux.bad_numbers import LeftOut, OnBad, bad_items, check_finite, describe_bad
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.sources import PictureSet
from fluxsae.runs.folder import prompts_hash

_log = logging.getLogger(__name__)

SEED_BLOCK = 1_000_000
"""Image seeds of one purpose lie in a block of this size, so that no two images of a run share one."""

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


def _capture_batch(
    pipe: Any, plan: ImagePlan, image_ids: Sequence[int], request: CaptureRequest, on_bad: OnBad | None
) -> dict[HookPoint, Rows]:
    kept: dict[tuple[HookPoint, int], tuple[Tensor, Tensor]] = {}

    def keep(call: BlockCall) -> None:
        names = [f"image {i}" for i in image_ids]
        if on_bad is None:
            check_finite(call.tokens, names, hookpoint=call.hookpoint, step=call.step)
        bad = bad_items(call.tokens)
        for item in bad:
            assert on_bad is not None
            on_bad(image_ids[item], describe_bad(call.tokens, names[item], hookpoint=call.hookpoint, step=call.step))
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
    left_out = LeftOut(len(plan), set().union(*(writer.left_out() for writer in writers.values())))
    for index in wanted:
        new = manifest.image_ids(index)[present[index] :]
        rows = capture_rows(pipe, plan, new, request, on_bad=left_out.add)
        bad = [image_id for image_id in manifest.image_ids(index) if image_id in left_out.image_ids]
        for hookpoint, writer in writers.items():
            if index in missing[hookpoint]:
                writer.write(index, *_added(writer, index, rows[hookpoint], present[index]), left_out=bad)
        done += len(new)
        if on_images is not None:
            on_images(done, total)
    return len(left_out.image_ids)


def count_left_out(plan: ImagePlan, folders: Mapping[HookPoint, str | Path]) -> int:
    """How many images a collection of one process or several leaves out.

    Raises:
        FluxSaeError: more than `MAX_BAD_SHARE` of them.
    """
    left_out = LeftOut(len(plan), set().union(*(ShardFolder(folder).left_out() for folder in folders.values())))
    left_out.check("Each is logged above with its step.")
    return len(left_out.image_ids)


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
