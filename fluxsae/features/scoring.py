"""FLUX and SAEs to images, S, sums and heatmaps in one generation or read, in parts that survive being stopped."""

import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxsae.activations.collection import ImagePlan, OnImages, check_finite
from fluxsae.errors import FluxSaeError
from fluxsae.features.familiarity import image_fvu, summarise_fvu
from fluxsae.features.scores import ScoreAccumulator, ScoreMatrix, merge_score_files
from fluxsae.features.statistics import FeatureStats
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import load_tensors, read_json, remove_leftovers, save_tensors, write_json
from fluxsae.flux import BlockCall, capture, generate, nearest_step, read_picture, token_grid
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import ImageRow, encode_webp, iter_image_rows, write_images
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder

_STAGE, _FVU = "score", "image_fvu"
OnActs = Callable[[BlockCall, SparseActs], None]
"""(call of a hooked block, acts of its batch of images there)."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score and how the work is cut into parts."""

    plan: ImagePlan
    settings: GenerationSettings
    steps: Mapping[HookPoint, tuple[int, ...]]
    """Captured steps of each hook point; S is the maximum over them."""
    sae_hashes: Mapping[HookPoint, str]
    """Checksum of each SAE's weights: parts of other weights are never mixed in."""
    grids: Mapping[HookPoint, TokenGrid]
    """Token grid of each hook point's stream."""
    batch_size: int = 8
    images_per_part: int = 64
    n_top: int = 12
    """Images a feature whose heatmaps are kept."""
    thumbnail_side: int = 384
    """Longest side of the thumbnails, pixels."""

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return -(-len(self.plan) // self.images_per_part)

    def image_ids(self, part: int) -> range:
        """The images of a part."""
        start = part * self.images_per_part
        return range(start, min(start + self.images_per_part, len(self.plan)))

    def bytes_on_disk(self, n_features: int) -> int:
        """Room that the parts and the files made of them take at most, for `n_features` over all SAEs."""
        # An image and feature: S and token in the part (8 bytes), in the file (up to 8), half as much for map entries.
        return len(self.plan) * (20 * n_features + self.thumbnail_side**2)

    def to_dict(self) -> dict[str, Any]:
        """Everything that decides the bytes of a part, as plain JSON values."""
        return {
            "n_images": len(self.plan),
            "prompts_hash": self.plan.prompts_hash,
            "first_seed": self.plan.first_seed,
            "settings": self.settings.to_dict(),
            "steps": {str(hookpoint): list(steps) for hookpoint, steps in self.steps.items()},
            "saes": {str(hookpoint): digest for hookpoint, digest in self.sae_hashes.items()},
            "batch_size": self.batch_size,
            "images_per_part": self.images_per_part,
            "n_top": self.n_top,
            "thumbnail_side": self.thumbnail_side,
        }


def trained_steps(sae: SparseAutoencoder, sigmas: Sequence[float]) -> tuple[int, ...]:
    """The steps of a schedule at the noise levels that the SAE was trained on.

    Raises:
        FluxSaeError: the SAE does not say what it was trained on, or the schedule has no step near a trained sigma.
    """
    ground = sae.config.trained_on
    if ground is None:
        raise FluxSaeError(
            "The SAE does not say what steps it was trained on. Name the steps to score, or train it again."
        )
    return tuple(sorted({nearest_step(sigmas, sigma, ground.sigma_tolerance) for sigma in ground.sigmas}))


def check_trained_step(
    sae: SparseAutoencoder, step: int, sigmas: Sequence[float], *, allow_mismatch: Collection[Mismatch] = ()
) -> int:
    """The step, if the SAE was trained near its noise level.

    Raises:
        FluxSaeError: outside the schedule, or far from every trained sigma and `allow_mismatch` does not name sigmas.
    """
    if not 0 <= step < len(sigmas):
        raise FluxSaeError(f"Step {step} is outside the schedule; steps go from 0 to {len(sigmas) - 1}.")
    ground = sae.config.trained_on
    if ground is not None and "sigmas" not in allow_mismatch:
        distance = min(abs(sigmas[step] - sigma) for sigma in ground.sigmas)
        if distance > ground.sigma_tolerance:
            raise FluxSaeError(
                f"Step {step} has sigma {sigmas[step]:.3f}, but the SAE was trained at sigmas "
                f"{', '.join(f'{sigma:.3f}' for sigma in ground.sigmas)} (steps {[*ground.steps]} of its schedule). "
                "Name one of these, or allow it by name: sigmas (allow_mismatch)."
            )
    return step


class ScoreParts:
    """The parts of an unfinished scoring in the run's work folder; each is there or not, never half.

    Raises:
        FluxSaeError: the work folder holds parts of another scoring.
    """

    def __init__(self, run: RunFolder, request: ScoreRequest) -> None:
        self.run, self.request = run, request
        self.path = run.work_path(_STAGE)
        plan_path = self.path / "plan.json"
        if plan_path.is_file() and read_json(plan_path) != request.to_dict():
            raise FluxSaeError(
                f"{self.path} holds parts of a scoring with other settings or SAEs. "
                "Finish that one with its own settings, or pass --force to start anew."
            )
        if self.path.is_dir():
            remove_leftovers(self.path)
        if not plan_path.is_file():
            write_json(plan_path, request.to_dict())

    def scores_path(self, hookpoint: HookPoint, part: int) -> Path:
        """S, argmax tokens, sums and map entries of one part."""
        return self.path / str(hookpoint) / f"part-{part:05d}.safetensors"

    def images_path(self, part: int) -> Path:
        """Prompts, seeds and thumbnails of one part; written last."""
        return self.path / f"images-{part:05d}.parquet"

    def all_scores(self, hookpoint: HookPoint) -> list[Path]:
        """The files of all parts of a hook point, in order."""
        return [self.scores_path(hookpoint, part) for part in range(self.request.n_parts)]

    def is_done(self, part: int) -> bool:
        """Whether the part is complete."""
        return self.images_path(part).is_file()

    def missing(self) -> list[int]:
        """The parts that are not complete."""
        return [part for part in range(self.request.n_parts) if not self.is_done(part)]


def score_images(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    parts: ScoreParts,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_images: OnImages | None = None,
) -> None:
    """Makes the parts that this process has still to make; each image is generated once for all SAEs."""
    request = parts.request
    collectors = {
        hookpoint: TopMapCollector(
            sae.config.n_features, n_top=request.n_top, n_tokens=request.grids[hookpoint].n_tokens
        )
        for hookpoint, sae in saes.items()
    }
    mine = range(rank, request.n_parts, world_size)
    total = sum(len(request.image_ids(part)) for part in mine if not parts.is_done(part))
    done = 0
    for part in mine:
        if parts.is_done(part):
            for hookpoint, collector in collectors.items():
                collector.skip(request.image_ids(part), load_tensors(parts.scores_path(hookpoint, part))["S"])
            continue
        _score_part(pipe, saes, parts, part, collectors)
        done += len(request.image_ids(part))
        if on_images is not None:
            on_images(done, total)


def _score_part(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    parts: ScoreParts,
    part: int,
    collectors: Mapping[HookPoint, TopMapCollector],
) -> None:
    request = parts.request
    accumulators = {
        hookpoint: ScoreAccumulator(
            sae.config.n_features, grid=request.grids[hookpoint], steps=request.steps[hookpoint]
        )
        for hookpoint, sae in saes.items()
    }
    rows: list[ImageRow] = []
    fvus: dict[tuple[HookPoint, int], list[Tensor]] = defaultdict(list)

    ids, pictures = request.image_ids(part), request.plan.pictures
    for start in range(0, len(ids), request.batch_size):
        batch = list(ids[start : start + request.batch_size])

        def keep(call: BlockCall, acts: SparseActs, batch: list[int] = batch) -> None:
            accumulators[call.hookpoint].update(batch, acts, step=call.step)
            collectors[call.hookpoint].update(batch, acts)
            fvus[call.hookpoint, call.step].append(image_fvu(saes[call.hookpoint], call.tokens, acts))

        images = generate_with_acts(
            pipe,
            saes,
            request.steps,
            prompts=[request.plan.prompts[i] for i in batch],
            seeds=[request.plan.seed(i) for i in batch],
            settings=request.settings,
            pictures=None if pictures is None else [pictures.picture(i) for i in batch],
            on_acts=keep,
        )
        for hookpoint, collector in collectors.items():
            collector.complete(batch, accumulators[hookpoint].scores(batch))
        rows += [_image_row(request, i, image) for i, image in zip(batch, images, strict=True)]
    for hookpoint, accumulator in accumulators.items():
        fvu = torch.stack([torch.cat(fvus[hookpoint, step]) for step in request.steps[hookpoint]], dim=1)
        entries = {**collectors[hookpoint].pop(), _FVU: fvu}
        _save_part(parts.scores_path(hookpoint, part), accumulator, entries)
    write_images(parts.images_path(part), rows)


def generate_with_acts(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    steps: Mapping[HookPoint, Sequence[int]],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings,
    on_acts: OnActs,
    pictures: Sequence[Image.Image] | None = None,
) -> list[Image.Image]:
    """Images; meanwhile `on_acts` gets the acts (images, tokens, features) of each SAE at its steps, as they come.

    With `pictures` nothing is generated: they are read with these prompts as captions, and handed back.
    """

    def encode(call: BlockCall) -> None:
        if call.step in steps[call.hookpoint]:
            check_finite(call, [f"seed {seed} ({prompt!r:.60})" for seed, prompt in zip(seeds, prompts, strict=True)])
            sae = saes[call.hookpoint]
            on_acts(call, sae.encode_sparse(call.tokens.to(sae.W_enc.device)))

    wanted = sorted({step for chosen in steps.values() for step in chosen})
    if pictures is not None:
        asked = {"hookpoints": list(saes), "steps": wanted, "seeds": list(seeds), "settings": settings}
        read_picture(pipe, pictures, prompt=list(prompts), **asked, sink=encode)  # type: ignore[arg-type]
        return list(pictures)
    with torch.no_grad(), capture(pipe, list(saes), wanted, sink=encode):
        images = generate(pipe, list(prompts), seeds=list(seeds), settings=settings)
    assert isinstance(images, list)
    return images


def _image_row(request: ScoreRequest, image_id: int, image: Image.Image) -> ImageRow:
    thumbnail, plan = encode_webp(image, longest_side=request.thumbnail_side), request.plan
    source = None if plan.pictures is None else plan.pictures.entries[image_id].name
    return ImageRow(image_id, plan.prompts[image_id], plan.seed(image_id), thumbnail, source)


def _save_part(path: Path, accumulator: ScoreAccumulator, entries: Mapping[str, Tensor]) -> None:
    stats = accumulator.stats()
    tensors = {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens(), **stats.tensors(), **entries}
    save_tensors(path, tensors, metadata=stats.metadata())


def merge_parts(parts: ScoreParts) -> None:
    """Writes images, S, sums and heatmaps of the run from the complete parts; a rerun gives the same bytes.

    Raises:
        FluxSaeError: parts are missing.
    """
    request, run = parts.request, parts.run
    if parts.missing():
        raise FluxSaeError(
            f"{len(parts.missing())} of {request.n_parts} parts of the scoring are missing, the first is "
            f"{parts.missing()[0]}. Start the same command again to make them."
        )
    run.save_images(_iter_rows(parts))
    for hookpoint, steps in request.steps.items():
        files = parts.all_scores(hookpoint)
        merge_score_files(run.scores_path(hookpoint), files, steps=steps, grid=request.grids[hookpoint])
        stats = reduce(FeatureStats.merge, (FeatureStats.load(file) for file in files))
        top = ScoreMatrix.load(run.scores_path(hookpoint)).top(request.n_top)
        write_heatmaps(run.heatmaps_path(hookpoint), files, top, scale=stats.maxima, grid=request.grids[hookpoint])
        stats.save(run.stats_path(hookpoint))
        fvus = torch.cat([load_tensors(file)[_FVU] for file in files])
        run.update_metrics(hookpoint, summarise_fvu(fvus, steps))


def _iter_rows(parts: ScoreParts) -> Iterator[ImageRow]:
    for part in range(parts.request.n_parts):
        yield from iter_image_rows(parts.images_path(part))


def forget_parts(run: RunFolder) -> None:
    """Deletes the work folder of scoring."""
    shutil.rmtree(run.work_path(_STAGE), ignore_errors=True)


def stream_grid(pipe: Any, hookpoint: HookPoint, settings: GenerationSettings) -> TokenGrid:
    """The image's token grid, or a single row for a text stream."""
    return token_grid(pipe, settings) if hookpoint.stream == "image" else TokenGrid(1, settings.max_sequence_length)
