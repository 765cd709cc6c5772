"""Collects activations: FLUX generates images or reads pictures, token rows of some hook points and steps go to disk.

    python -m train.collect --run runs/miniature
    python -m train.collect --flux black-forest-labs/FLUX.1-dev --hookpoints layer5 layer15 --steps 13 --images 2000
    python -m train.collect --pictures photos --run runs/photos     # one pass a picture and step, nothing generated
    torchrun --nproc-per-node 8 -m -- train.collect ...      # images are dealt to the processes

Stopped at any moment, the same command continues and ends with the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.prompts import wanted_splits
from train.command import Bars, start
from train.flux_options import FluxOptions, Purpose, default_hookpoints, default_steps
from train.processes import processes
from train.stages import StageResult, renamed, run_stage, start_over

if TYPE_CHECKING:
    from fluxsae.activations.collection import CaptureRequest, ImagePlan
    from fluxsae.activations.shards import ActivationManifest
    from fluxsae.runs.folder import RunFolder, RunInfo
    from fluxsae.sae.training.processes import Processes


UNNAMED = "early and late"
"""What stands in run.json for hook points that were left out."""
DEFAULT_IMAGES = 320
"""Images of a run that has none yet."""
GROWS = ("images",)
"""What may be asked for anew in a larger number: the stage then adds to what is there."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig(FluxOptions):
    """What to collect and where to."""

    run: Path = Path("runs/miniature")
    """Run folder; made if it is not there."""
    hookpoints: tuple[str, ...] = ()
    """Hook points, such as layer15; left out, the run's own, or an early and a late double-stream block."""
    steps: tuple[int, ...] = ()
    """0-based steps of the schedule; left out, five spread over it."""
    images: int | None = None
    """Images to generate, or at most so many pictures to read; left out, those that were collected, or 320."""
    tokens_per_image: int | None = 512
    """Tokens kept of each image, step and hook point (all, where there are fewer)."""
    batch_size: int = 8
    """Images generated together."""
    images_per_shard: int = 32
    """Images in one shard (a file of activations)."""
    held_out_every: int = 10
    """Every n-th image is held out for evaluation."""
    activations: Path | None = None
    """Folder for the shards (files of activations); left out, `activations` in the run folder."""
    force: bool = False
    """Delete what was collected with other settings and start anew."""


def main(config: CollectConfig, *, open_flux: Callable[[], Any] | None = None) -> StageResult:
    """Runs the stage; `open_flux` gives FLUX where it is open already."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    if run.exists():
        config = _as_collected(config, run.load_info())
    config = replace(config, images=DEFAULT_IMAGES if config.images is None else config.images)
    with processes() as peers:
        return run_stage(
            run,
            "collect",
            stage_config(config),
            lambda todo: _collect(_only(config, todo), run, peers, (open_flux or config.open)()),
            outputs=lambda asked: _outputs(_only(config, asked)),
            force=config.force,
            by_name=True,
            grows=GROWS,
            processes=peers,
        )


def _only(config: CollectConfig, names: Sequence[str]) -> CollectConfig:
    """The config for some of its hook points."""
    return config if UNNAMED in names else replace(config, hookpoints=tuple(names))


def _as_collected(config: CollectConfig, info: RunInfo) -> CollectConfig:
    """The hook points that were named when this run was collected, and its number of images, where none are asked."""
    record = info.stages.get("collect")
    if record is None:
        return config
    counts = [renamed("collect", own).get("images") or 0 for own in record.config.values()]
    images = max(counts, default=None) if config.images is None else config.images
    hookpoints = config.hookpoints or (() if UNNAMED in record.config else info.hookpoints)
    return replace(config, hookpoints=hookpoints, images=images)


def activations_path(run: Path, chosen: Path | None) -> Path:
    """Where the shards of a run are, one folder a hook point: in the chosen folder, or else in the run."""
    from fluxsae.runs.folder import RunFolder

    return chosen or RunFolder(run).activations_path


def _outputs(config: CollectConfig) -> list[Path]:
    from fluxsae.activations.shards import expected_files, find_folders

    folder = activations_path(config.run, config.activations)
    folders = [folder / str(HookPoint.parse(name)) for name in config.hookpoints] or find_folders(folder) or [folder]
    return [path for folder in folders for path in expected_files(folder)]


def stage_config(config: CollectConfig) -> dict[str, Any]:
    """The values that decide the result, for each hook point."""
    deciding = ("images", "tokens_per_image", "images_per_shard", "held_out_every", "batch_size")
    values = {name: getattr(config, name) for name in deciding}
    own = {**config.identity(), **values, "steps": [*config.steps]}
    names = [str(HookPoint.parse(name)) for name in config.hookpoints] or [UNNAMED]
    return dict.fromkeys(names, own)


def _collect(config: CollectConfig, run: RunFolder, peers: Processes, pipe: Any) -> None:
    from fluxsae.activations.collection import build_manifests, build_request, collect, count_left_out

    settings = config.settings(pipe)
    hookpoints = [HookPoint.parse(name) for name in config.hookpoints] or default_hookpoints(
        len(pipe.transformer.transformer_blocks)
    )
    request = build_request(
        pipe,
        hookpoints,
        config.steps or default_steps(settings),
        settings=settings,
        tokens_per_image=config.tokens_per_image,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    assert config.images is not None
    plan = config.build_plan(config.images, purpose="collect", settings=settings, held_out_every=config.held_out_every)
    splits = describe_splits(plan, shared=config.share_prompts, purpose="collect", every=config.held_out_every)
    info = describe_run(pipe, request, plan, hookpoints=hookpoints, splits=splits)
    manifests = build_manifests(
        pipe,
        plan,
        request,
        images_per_shard=config.images_per_shard,
        held_out_every=config.held_out_every,
    )
    if peers.rank == 0:
        report_pictures(plan, asked=config.images)
        _make_room(config, run, manifests)
        save_run(run, info, force=config.force)
    peers.wait()
    folders = {
        hookpoint: activations_path(config.run, config.activations) / str(hookpoint) for hookpoint in request.hookpoints
    }
    with Bars(is_shown=peers.rank == 0) as bars:
        collect(
            pipe,
            plan,
            request,
            folders=folders,
            manifests=manifests,
            rank=peers.rank,
            world_size=peers.world_size,
            on_images=partial(bars, "collect"),
        )
    peers.wait()
    if peers.rank == 0 and (n_left_out := count_left_out(plan, folders)):
        print(f"collect: {n_left_out} of {len(plan)} images are left out: they held NaN or infinite numbers.")


def _make_room(config: CollectConfig, run: RunFolder, manifests: dict[HookPoint, ActivationManifest]) -> None:
    needed = sum(manifest.bytes_on_disk for manifest in manifests.values())
    n_images = next(iter(manifests.values())).n_images
    print(f"collect: {n_images} images, {needed / 1e9:.3f} GB in {activations_path(config.run, config.activations)}")
    if config.force:
        start_over(run, "collect", stage_config(config))
        for hookpoint in manifests:
            shutil.rmtree(activations_path(config.run, config.activations) / str(hookpoint), ignore_errors=True)


def report_pictures(plan: ImagePlan, *, asked: int) -> None:
    """Prints what is read, what was done to it and what was left out; nothing where images are generated."""
    if plan.pictures is not None:
        print(plan.pictures.report())
        if len(plan) < asked:
            print(f"{len(plan)} of the {asked} images asked for: one a picture of this purpose.")


def describe_splits(plan: ImagePlan, *, shared: bool, purpose: Purpose, every: int = 0) -> dict[str, Any]:
    """How many different prompts or pictures each split of a stage has, for `run.json`."""
    wanted = wanted_splits(len(plan), purpose=purpose, held_out_every=every)
    keys = {split: {key for key, own in zip(plan.keys, wanted, strict=True) if own == split} for split in set(wanted)}
    by = "prompts" if plan.pictures is None else "pictures"
    return {purpose: {"by": by, "shared": shared, **{split: len(found) for split, found in sorted(keys.items())}}}


def describe_run(
    pipe: Any,
    request: CaptureRequest,
    plan: ImagePlan,
    *,
    hookpoints: Sequence[HookPoint],
    splits: dict[str, Any] | None = None,
) -> RunInfo:
    """`run.json` for what is about to be generated."""
    from fluxsae.flux import flux_identity, schedule_sigmas, token_grid
    from fluxsae.runs.folder import RunInfo, library_versions

    identity, sigmas = flux_identity(pipe), schedule_sigmas(pipe, request.settings)
    grid = token_grid(pipe, request.settings)
    return RunInfo(
        flux_id=identity.flux_id,
        flux_revision=identity.revision,
        settings=request.settings,
        hookpoints=tuple(str(place) for place in sorted({hookpoint.place for hookpoint in hookpoints})),
        steps=request.steps,
        sigmas=tuple(sigmas[step] for step in request.steps),
        rows=grid.rows,
        cols=grid.cols,
        prompts_hash=plan.prompts_hash,
        source="prompts" if plan.pictures is None else "pictures",
        pictures={} if plan.pictures is None else plan.pictures.describe(),
        splits=splits or {},
        is_exact=bool(identity.is_exact),
        flux_weights=identity.weights,
        adapters=identity.adapters,
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        versions=library_versions(),
    )


def save_run(run: RunFolder, info: RunInfo, *, force: bool = False) -> None:
    """Writes run.json, keeping the stages and hook points that are there.

    Raises:
        FluxSaeError: the folder holds a run of another FLUX or of other settings, and `force` is off.
    """
    from fluxsae.flux.identity import identity_differences

    if run.exists():
        present = run.load_info()
        differing = list(identity_differences(present.identity, info.identity).values())
        differing += [
            f"{name} is {getattr(info, name)}, not {getattr(present, name)}"
            for name in ("settings", "dtype")
            if getattr(present, name) not in (None, getattr(info, name))
        ]
        if differing and not force:
            raise FluxSaeError(
                f"{run.path} is a run of something else: {'; '.join(differing)}. Name another --run folder."
            )
        info = info if differing else _joined(present, info)
    run.save_info(info)


def _joined(present: RunInfo, info: RunInfo) -> RunInfo:
    """The record of a run to which a stage adds hook points or steps."""
    hookpoints = sorted({*map(HookPoint.parse, present.hookpoints), *map(HookPoint.parse, info.hookpoints)})
    steps = dict(sorted({**_sigmas(present), **_sigmas(info)}.items()))
    # The images of a run are those that were scored: collecting at one more hook point does not change them.
    images = present if "score" in present.splits and "score" not in info.splits else info
    return replace(
        info,
        hookpoints=tuple(map(str, hookpoints)),
        steps=tuple(steps),
        sigmas=tuple(steps.values()),
        prompts_hash=images.prompts_hash,
        source=images.source,
        pictures=images.pictures,
        splits=present.splits | info.splits,
        stages=present.stages,
    )


def _sigmas(info: RunInfo) -> dict[int, float]:
    return dict(zip(info.steps, info.sigmas, strict=True))


if __name__ == "__main__":
    start(main, CollectConfig, __doc__)
