"""FLUX and SAEs to images, S, sums and heatmaps in one generation or read, in parts that survive being stopped."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fluxsae.activations.collection import OnImages
from fluxsae.errors import FluxSaeError
from fluxsae.features.familiarity import image_fvu, summarise_fvu
from fluxsae.features.score_parts import ScoreParts, ScoreRequest
from fluxsae.features.scores import (
    ScoreAccumulator,
    ScoreMatrix,
    fingerprint_metadata,
    left_out_metadata,
    merge_score_files,
)
from fluxsae.features.statistics import FeatureStats
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import load_tensors, save_tensors
from fluxsae.flux import BlockCall, capture, generate, nearest_step, read_picture, token_grid
from fluxsae.flux.bad_numbers import LeftOut, OnBad, bad_items, check_finite, describe_bad
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.tables import ImageRow, encode_webp, iter_image_rows, write_images
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder

_FVU = "image_fvu"
OnActs = Callable[[BlockCall, SparseActs], None]
"""(call of a hooked block, acts of its batch of images there)."""


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
        told = {**left_out_metadata(bad), **fingerprint_metadata(saes[name].fingerprint)}
        _save_part(parts.scores_path(name, part), accumulator, entries, told)
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
    path: Path, accumulator: ScoreAccumulator, entries: Mapping[str, Tensor], told: Mapping[str, str]
) -> None:
    stats = accumulator.stats()
    tensors = {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens(), **stats.tensors(), **entries}
    save_tensors(path, tensors, metadata={**stats.metadata(), **told})


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


def stream_grid(pipe: Any, hookpoint: HookPoint, settings: GenerationSettings) -> TokenGrid:
    """The image's token grid, or a single row for a text stream."""
    return token_grid(pipe, settings) if hookpoint.stream == "image" else TokenGrid(1, settings.max_sequence_length)
