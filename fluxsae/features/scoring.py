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

from fluxsae.activations.collection import ImagePlan, OnImages
from fluxsae.errors import FluxSaeError
from fluxsae.features.familiarity import image_fvu, summarise_fvu
from fluxsae.features.scores import (
    ScoreAccumulator,
    ScoreMatrix,
    left_out_images,
    left_out_metadata,
    merge_score_files,
)
from fluxsae.features.statistics import FeatureStats
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import load_tensors, read_json, remove_leftovers, save_tensors, write_json
from fluxsae.flux import BlockCall, capture, generate, nearest_step, read_picture, token_grid
from fluxsae.flux.bad_numbers import LeftOut, OnBad, bad_items, check_finite, describe_bad
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName
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

    def bytes_on_disk(self, n_features: int) -> int:
        """Room that the parts and the files made of them take at most, for `n_features` over all SAEs."""
        # An image and feature: S and token in the part (8 bytes), in the file (up to 8), half as much for map entries.
        return len(self.plan) * (20 * n_features + self.thumbnail_side**2)

    def shared(self) -> dict[str, Any]:
        """What decides the bytes of every SAE's parts, beside the images themselves, as plain JSON values."""
        return {
            "first_seed": self.plan.first_seed,
            "settings": self.settings.to_dict(),
            "batch_size": self.batch_size,
            "images_per_part": self.images_per_part,
            "n_top": self.n_top,
            "thumbnail_side": self.thumbnail_side,
        }

    def own(self, name: HookPoint) -> dict[str, Any]:
        """What decides the bytes of one SAE's parts."""
        return {"sae": self.sae_hashes[name], "steps": list(self.steps[name])}


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
    """The parts of a scoring in the run's work folder; each is there or not, never half.

    They stay when the scoring is complete: another SAE, or more images, then adds parts. An SAE's part of images that
    the run has already is made without decoding them. With `anew` the run's images do not count.

    Raises:
        FluxSaeError: the work folder or the run holds the scores of other images, settings or SAEs.
    """

    def __init__(self, run: RunFolder, request: ScoreRequest, *, anew: bool = False) -> None:
        self.run, self.request = run, request
        self.path = run.work_path(_STAGE)
        if self.path.is_dir():
            remove_leftovers(self.path)
        known = read_json(self._plan_path) if self._plan_path.is_file() else {}
        present = known or self._present(anew=anew)
        bounds = [*present["bounds"]]
        self._check(present, bounds[-1])
        self.n_there: int = present["n_there"]
        """How many of the first images the run has."""
        while bounds[-1] < len(request.plan):
            bounds.append(min(bounds[-1] + request.images_per_part, len(request.plan)))
        self.bounds = tuple(bounds)
        """Where each part begins, and where the last one ends."""
        self._save_plan(known)
        for name in request.steps:
            if not self._own_path(name).is_file():
                write_json(self._own_path(name), request.own(name))

    def _present(self, *, anew: bool) -> dict[str, Any]:
        """The plan of a run whose parts are not here: it was pulled, or never scored."""
        request, size = self.request, self.request.images_per_part
        n_there = 0
        if not anew and self.run.images_path.is_file():
            images, plan = self.run.load_images(), request.plan
            n_there = len(images)
            seeds = [plan.seed(image_id) for image_id in range(len(plan))]
            if (list(plan.prompts[:n_there]), seeds[:n_there]) != (images.prompts, images.seeds):
                raise FluxSaeError(
                    f"{self.run.path} holds {n_there} images, and these are not the first of the {len(plan)} that were "
                    "asked for. Give the prompts, seed and number of images that it was scored with, or more images; "
                    "or pass --force to score all SAEs on other images."
                )
        bounds = [*range(0, n_there, size), n_there] if n_there else [0]
        return {
            **request.shared(), "bounds": bounds, "n_there": n_there,
            "prompts_hash": request.plan.first(bounds[-1]).prompts_hash,
        }  # fmt: skip

    def _check(self, present: dict[str, Any], count: int) -> None:
        wanted = {**self.request.shared(), "prompts_hash": self.request.plan.first(count).prompts_hash}
        differing = [name for name, value in wanted.items() if present[name] != value]
        if count > len(self.request.plan):
            differing.append(f"images ({count}, more than {len(self.request.plan)})")
        differing += [
            f"SAE of {name}"
            for name in self.request.steps
            if self._own_path(name).is_file() and read_json(self._own_path(name)) != self.request.own(name)
        ]
        if differing:
            raise FluxSaeError(
                f"{self.path} holds parts of a scoring with other settings or SAEs: {', '.join(differing)}. "
                "Finish that one with its own settings, or pass --force to start anew."
            )

    def _save_plan(self, known: dict[str, Any]) -> None:
        plan = {
            **self.request.shared(), "bounds": [*self.bounds], "n_there": self.n_there,
            "prompts_hash": self.request.plan.prompts_hash,
        }  # fmt: skip
        if plan != known:
            write_json(self._plan_path, plan)

    @property
    def _plan_path(self) -> Path:
        return self.path / "plan.json"

    def _own_path(self, name: HookPoint) -> Path:
        return self.path / str(name) / "plan.json"

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.bounds) - 1

    def image_ids(self, part: int) -> range:
        """The images of a part."""
        return range(self.bounds[part], self.bounds[part + 1])

    def scores_path(self, name: HookPoint, part: int) -> Path:
        """S, argmax tokens, sums and map entries of one part."""
        return self.path / str(name) / f"part-{part:05d}.safetensors"

    def images_path(self, part: int) -> Path:
        """Prompts, seeds and thumbnails of one part; written last, and gone when the run has them."""
        return self.path / f"images-{part:05d}.parquet"

    def all_scores(self, name: HookPoint) -> list[Path]:
        """The files of all parts of an SAE, in order."""
        return [self.scores_path(name, part) for part in range(self.n_parts)]

    def has_images(self, part: int) -> bool:
        """Whether the pictures of a part are there."""
        return self.bounds[part + 1] <= self.n_there or self.images_path(part).is_file()

    def missing_saes(self, part: int) -> list[HookPoint]:
        """The SAEs whose part has still to be made; all of them where the pictures have to be."""
        if not self.has_images(part):
            return list(self.request.steps)
        return [name for name in self.request.steps if not self.scores_path(name, part).is_file()]

    def missing(self) -> list[int]:
        """The parts that are not complete."""
        return [part for part in range(self.n_parts) if self.missing_saes(part)]

    def left_out(self) -> set[int]:
        """The images that the parts which are there leave out."""
        made = [path for name in self.request.steps for path in self.all_scores(name) if path.is_file()]
        return {image_id for path in made for image_id in left_out_images(path)}

    def forget_images(self) -> None:
        """Called when the run has all pictures: those of the parts are not needed any more."""
        self.n_there = len(self.request.plan)
        self._save_plan({})
        for part in range(self.n_parts):
            self.images_path(part).unlink(missing_ok=True)


def score_images(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    parts: ScoreParts,
    *,
    rank: int = 0,
    world_size: int = 1,
    on_images: OnImages | None = None,
) -> None:
    """Makes the parts that this process has still to make; each image is generated once for all SAEs.

    An image with NaN or infinite activations is left out, at all SAEs, and logged with its step.

    Raises:
        FluxSaeError: too many of the images are left out.
    """
    request, left_out = parts.request, LeftOut(len(parts.request.plan), parts.left_out())
    collectors = {
        name: TopMapCollector(sae.config.n_features, n_top=request.n_top, n_tokens=request.grids[name].n_tokens)
        for name, sae in saes.items()
    }
    mine = range(rank, parts.n_parts, world_size)
    total = sum(len(parts.image_ids(part)) for part in mine if parts.missing_saes(part))
    done = 0
    for part in mine:
        missing = parts.missing_saes(part)
        for name in collectors.keys() - {*missing}:
            collectors[name].skip(parts.image_ids(part), load_tensors(parts.scores_path(name, part))["S"])
        if not missing:
            continue
        _score_part(pipe, {name: saes[name] for name in missing}, parts, part, collectors, left_out)
        done += len(parts.image_ids(part))
        if on_images is not None:
            on_images(done, total)


def _score_part(  # noqa: PLR0917 - all that a part is made of
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    parts: ScoreParts,
    part: int,
    collectors: Mapping[HookPoint, TopMapCollector],
    left_out: LeftOut,
) -> None:
    request, with_images = parts.request, not parts.has_images(part)
    accumulators = _no_scores(saes, request)
    rows: list[ImageRow] = []
    fvus: dict[tuple[HookPoint, int], list[Tensor]] = defaultdict(lambda: [torch.zeros(0)])

    ids = parts.image_ids(part)
    for start in range(0, len(ids), request.batch_size):
        batch = list(ids[start : start + request.batch_size])
        made = _score_batch(pipe, saes, request, batch, collectors, left_out, with_images=with_images)
        for name, accumulator in made.accumulators.items():
            if made.kept:
                collectors[name].complete(made.kept, accumulator.scores(made.kept))
            accumulator.leave_out([i for i in batch if i not in made.kept])
            accumulators[name] = accumulators[name].merge(accumulator)
        for place, fvu in made.fvus.items():
            fvus[place].append(fvu)
        if with_images:
            rows += [_image_row(request, i, image) for i, image in zip(batch, made.images, strict=True)]
    bad = [i for i in ids if i in left_out.image_ids]
    for name, accumulator in accumulators.items():
        fvu = torch.stack([torch.cat(fvus[name, step]) for step in request.steps[name]], dim=1)
        entries = {**collectors[name].pop(), _FVU: fvu}
        _save_part(parts.scores_path(name, part), accumulator, entries, left_out=bad)
    if with_images:
        write_images(parts.images_path(part), rows)


def _no_scores(saes: Mapping[HookPoint, SparseAutoencoder], request: ScoreRequest) -> dict[HookPoint, ScoreAccumulator]:
    return {
        name: ScoreAccumulator(sae.config.n_features, grid=request.grids[name], steps=request.steps[name])
        for name, sae in saes.items()
    }


@dataclass(frozen=True, eq=False)
class _ScoredBatch:
    """What was made of the images of a batch that are not left out, and the pictures of all of them."""

    kept: list[int]
    accumulators: dict[HookPoint, ScoreAccumulator]
    fvus: dict[tuple[HookPoint, int], Tensor]
    images: list[Image.Image]


def _score_batch(  # noqa: PLR0917 - as its caller
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    request: ScoreRequest,
    batch: Sequence[int],
    collectors: Mapping[HookPoint, TopMapCollector],
    left_out: LeftOut,
    *,
    with_images: bool,
) -> _ScoredBatch:
    """Scores a batch; once more where an image turned out bad when some of its steps were counted already."""
    pictures, known = request.plan.pictures, left_out.image_ids & {*batch}
    sound = [place for place, image_id in enumerate(batch) if image_id not in known]
    kept = [batch[place] for place in sound]
    accumulators, fvus = _no_scores(saes, request), dict[tuple[HookPoint, int], Tensor]()

    def keep(call: BlockCall, acts: SparseActs) -> None:
        if not kept:
            return
        own, tokens = (acts.images(sound), call.tokens[sound]) if known else (acts, call.tokens)
        accumulators[call.hookpoint].update(kept, own, step=call.step)
        collectors[call.hookpoint].update(kept, own)
        fvus[call.hookpoint, call.step] = image_fvu(saes[call.hookpoint], tokens, own)

    images = generate_with_acts(
        pipe,
        saes,
        {name: request.steps[name] for name in saes},
        prompts=[request.plan.prompts[i] for i in batch],
        seeds=[request.plan.seed(i) for i in batch],
        settings=request.settings,
        pictures=None if pictures is None else [pictures.picture(i) for i in batch],
        with_images=with_images,
        on_acts=keep,
        on_bad=lambda place, reason: left_out.add(batch[place], reason),
    )
    if known == left_out.image_ids & {*batch}:
        return _ScoredBatch(kept, accumulators, fvus, images)
    for name in saes:
        collectors[name].forget()
    return _score_batch(pipe, saes, request, batch, collectors, left_out, with_images=with_images)


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
    with_images: bool = True,
    on_bad: OnBad | None = None,
) -> list[Image.Image]:
    """Images; meanwhile `on_acts` gets the acts (images, tokens, features) of each SAE at its steps, as they come.

    With `pictures` nothing is generated: they are read with these prompts as captions, and handed back. Without
    `with_images` a generation ends after the last wanted step and block, nothing is decoded, and no image comes back.
    `on_bad` gets the place in the batch of an image whose activations are not numbers; zeros are encoded for it.

    Raises:
        FluxSaeError: the activations of an image are not numbers, and there is no `on_bad`.
    """
    names = [f"seed {seed} ({prompt!r:.60})" for seed, prompt in zip(seeds, prompts, strict=True)]

    def encode(call: BlockCall) -> None:
        if call.step not in steps[call.hookpoint]:
            return
        place, step, sae = call.hookpoint, call.step, saes[call.hookpoint]
        if on_bad is None:
            check_finite(call.tokens, names, hookpoint=place, step=step)
        bad = bad_items(call.tokens)
        for item in bad:
            assert on_bad is not None
            on_bad(item, describe_bad(call.tokens, names[item], hookpoint=place, step=step))
        tokens = call.tokens.to(sae.W_enc.device)
        if bad:
            tokens = tokens.clone()
            tokens[bad] = 0
        on_acts(call, sae.encode_sparse(tokens, sigma=call.sigma))

    wanted = sorted({step for chosen in steps.values() for step in chosen})
    if pictures is not None:
        asked = {"hookpoints": list(saes), "steps": wanted, "seeds": list(seeds), "settings": settings}
        read_picture(pipe, pictures, prompt=list(prompts), **asked, sink=encode)  # type: ignore[arg-type]
        return list(pictures)
    images: Any = []
    with torch.no_grad(), capture(pipe, list(saes), wanted, sink=encode, stop_early=not with_images):
        images = generate(pipe, list(prompts), seeds=list(seeds), settings=settings)
    return list(images)


def _image_row(request: ScoreRequest, image_id: int, image: Image.Image) -> ImageRow:
    thumbnail, plan = encode_webp(image, longest_side=request.thumbnail_side), request.plan
    source = None if plan.pictures is None else plan.pictures.entries[image_id].name
    return ImageRow(image_id, plan.prompts[image_id], plan.seed(image_id), thumbnail, source)


def _save_part(
    path: Path, accumulator: ScoreAccumulator, entries: Mapping[str, Tensor], *, left_out: Sequence[int]
) -> None:
    stats = accumulator.stats()
    tensors = {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens(), **stats.tensors(), **entries}
    save_tensors(path, tensors, metadata={**stats.metadata(), **left_out_metadata(left_out)})


def merge_parts(parts: ScoreParts) -> int:
    """Writes images, S, sums and heatmaps of the run from the complete parts; a rerun gives the same bytes.

    Returned is how many images they leave out.

    Raises:
        FluxSaeError: parts are missing, or all processes together left out too many images.
    """
    request, run = parts.request, parts.run
    if parts.missing():
        raise FluxSaeError(
            f"{len(parts.missing())} of {parts.n_parts} parts of the scoring are missing, the first is "
            f"{parts.missing()[0]}. Start the same command again to make them."
        )
    left_out = LeftOut(len(request.plan), parts.left_out())
    left_out.check("Each is logged above with its step.")
    if parts.n_there < len(request.plan):
        run.save_images(_iter_rows(parts))
        parts.forget_images()
    for hookpoint, steps in request.steps.items():
        files = parts.all_scores(hookpoint)
        merge_score_files(run.scores_path(hookpoint), files, steps=steps, grid=request.grids[hookpoint])
        stats = reduce(FeatureStats.merge, (FeatureStats.load(file) for file in files))
        top = ScoreMatrix.load(run.scores_path(hookpoint)).top(request.n_top)
        write_heatmaps(run.heatmaps_path(hookpoint), files, top, scale=stats.maxima, grid=request.grids[hookpoint])
        stats.save(run.stats_path(hookpoint))
        fvus = torch.cat([load_tensors(file)[_FVU] for file in files])
        run.update_metrics(hookpoint, summarise_fvu(fvus, steps))
    return len(left_out.image_ids)


def _iter_rows(parts: ScoreParts) -> Iterator[ImageRow]:
    if parts.n_there:
        yield from parts.run.load_images()
    for part in range(parts.n_parts):
        if parts.images_path(part).is_file():
            yield from iter_image_rows(parts.images_path(part))


def scored_saes(run: RunFolder) -> list[SaeName]:
    """The SAEs that were scored on the run's images."""
    return [name for name in run.sae_names() if run.scores_path(name).is_file()]


def forget_parts(run: RunFolder, names: Collection[HookPoint] | None = None) -> None:
    """Deletes the parts of some SAEs, or without `names` of all of them and the plan that they share."""
    folder = run.work_path(_STAGE)
    for path in [folder] if names is None else [folder / str(name) for name in names]:
        shutil.rmtree(path, ignore_errors=True)


def has_other_parts(run: RunFolder, name: HookPoint, digest: str) -> bool:
    """Whether there are parts of an SAE of this name with other weights."""
    plan = run.work_path(_STAGE) / str(name) / "plan.json"
    return plan.is_file() and read_json(plan)["sae"] != digest


def stream_grid(pipe: Any, hookpoint: HookPoint, settings: GenerationSettings) -> TokenGrid:
    """The image's token grid, or a single row for a text stream."""
    return token_grid(pipe, settings) if hookpoint.stream == "image" else TokenGrid(1, settings.max_sequence_length)
