"""Collects activations: FLUX generates, the token rows of some hook points and steps go to disk.

    python -m train.collect --run runs/miniature
    python -m train.collect --flux black-forest-labs/FLUX.1-dev --hookpoints layer5 layer15 --steps 13 --n-images 2000
    torchrun --nproc-per-node 8 -m -- train.collect ...      # prompts are dealt to the processes

Stopped at any moment, the same command continues and ends with the same bytes.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from fluxsae.activations.collection import CaptureRequest, ImagePlan, build_manifests, build_request, collect
from fluxsae.activations.shards import ActivationManifest, expected_files, find_folders
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.identity import identity_differences
from fluxsae.runs.folder import RunFolder, RunInfo, library_versions
from fluxsae.sae.training.processes import Processes
from train.flux_options import FluxOptions, default_hookpoints, default_steps
from train.processes import processes
from train.stages import StageResult, run_stage, start_over

UNNAMED = "early and late"
"""What stands in run.json for hook points that were left out."""


@dataclass(frozen=True, kw_only=True)
class CollectConfig(FluxOptions):
    """What to collect and where to."""

    run: Path = Path("runs/miniature")
    """Run folder; made if it is not there."""
    hookpoints: tuple[str, ...] = ()
    """Hook points, such as layer15; left out, the run's own, or an early and a late double-stream block."""
    steps: tuple[int, ...] = ()
    """0-based steps of the schedule; left out, five spread over it."""
    n_images: int = 320
    """Images to generate."""
    tokens_per_image: int | None = 512
    """Tokens kept of each image, step and hook point (all, where there are fewer)."""
    batch_size: int = 8
    """Images generated together."""
    images_per_shard: int = 32
    """Images in one file."""
    held_out_every: int = 10
    """Every n-th image is held out for evaluation."""
    activations: Path | None = None
    """Folder for the shards; left out, `activations` in the run folder."""
    force: bool = False
    """Delete what was collected with other settings and start anew."""


def main(config: CollectConfig, *, open_flux: Callable[[], Any] | None = None) -> StageResult:
    """Runs the stage; `open_flux` gives FLUX where it is open already."""
    run = RunFolder(config.run)
    if not config.hookpoints and run.exists():
        config = _as_collected(config, run.load_info())
    with processes() as peers:
        return run_stage(
            run,
            "collect",
            stage_config(config),
            lambda: _collect(config, run, peers, (open_flux or config.open)()),
            outputs=lambda: _outputs(config),
            force=config.force,
            by_hookpoint=True,
            processes=peers,
        )


def _as_collected(config: CollectConfig, info: RunInfo) -> CollectConfig:
    """The hook points that were named when this run was collected."""
    record = info.stages.get("collect")
    if record is None or UNNAMED in record.config:
        return config
    return replace(config, hookpoints=info.hookpoints)


def activations_path(config: CollectConfig) -> Path:
    """Where the shards go, one folder a hook point."""
    return config.activations or RunFolder(config.run).activations_path


def _outputs(config: CollectConfig) -> list[Path]:
    folder = activations_path(config)
    folders = [folder / str(HookPoint.parse(name)) for name in config.hookpoints] or find_folders(folder) or [folder]
    return [path for folder in folders for path in expected_files(folder)]


def stage_config(config: CollectConfig) -> dict[str, Any]:
    """The values that decide the result, for each hook point."""
    deciding = ("n_images", "tokens_per_image", "images_per_shard", "held_out_every", "batch_size")
    values = {name: getattr(config, name) for name in deciding}
    own = {**config.identity(), **values, "steps": [*config.steps]}
    names = [str(HookPoint.parse(name)) for name in config.hookpoints] or [UNNAMED]
    return dict.fromkeys(names, own)


def _collect(config: CollectConfig, run: RunFolder, peers: Processes, pipe: Any) -> None:
    settings = config.settings(pipe)
    hookpoints = [HookPoint.parse(name) for name in config.hookpoints] or default_hookpoints(pipe)
    request = build_request(
        pipe,
        hookpoints,
        config.steps or default_steps(settings),
        settings=settings,
        tokens_per_image=config.tokens_per_image,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    plan = ImagePlan.build(config.load_prompts(config.n_images, "collect"), seed=config.seed, purpose="collect")
    info = describe_run(pipe, request, plan, hookpoints=hookpoints)
    manifests = build_manifests(
        pipe,
        plan,
        request,
        images_per_shard=config.images_per_shard,
        held_out_every=config.held_out_every,
    )
    if peers.rank == 0:
        _make_room(config, run, manifests)
        save_run(run, info, force=config.force)
    peers.wait()
    with tqdm(total=len(plan), desc="collect", unit="image", disable=peers.rank > 0, file=sys.stdout) as bar:
        n_left_out = collect(
            pipe,
            plan,
            request,
            folders={hookpoint: activations_path(config) / str(hookpoint) for hookpoint in request.hookpoints},
            manifests=manifests,
            rank=peers.rank,
            world_size=peers.world_size,
            on_images=lambda done, total: _show(bar, done, total),
        )
    if n_left_out:
        print(f"collect: {n_left_out} of {len(plan)} images are left out: they held NaN or infinite numbers.")


def _show(bar: "tqdm[Any]", done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _make_room(config: CollectConfig, run: RunFolder, manifests: dict[HookPoint, ActivationManifest]) -> None:
    needed = sum(manifest.bytes_on_disk for manifest in manifests.values())
    print(f"collect: {config.n_images} images, {needed / 1e9:.3f} GB in {activations_path(config)}")
    if config.force:
        start_over(run, "collect", stage_config(config))
        for hookpoint in manifests:
            shutil.rmtree(activations_path(config) / str(hookpoint), ignore_errors=True)


def describe_run(pipe: Any, request: CaptureRequest, plan: ImagePlan, *, hookpoints: list[HookPoint]) -> RunInfo:
    """`run.json` for what is about to be generated."""
    from fluxsae.flux import flux_identity, schedule_sigmas, token_grid

    identity, sigmas = flux_identity(pipe), schedule_sigmas(pipe, request.settings)
    grid = token_grid(pipe, request.settings)
    return RunInfo(
        flux_id=identity.flux_id,
        flux_revision=identity.revision,
        settings=request.settings,
        hookpoints=tuple(str(hookpoint) for hookpoint in sorted(hookpoints)),
        steps=request.steps,
        sigmas=tuple(sigmas[step] for step in request.steps),
        rows=grid.rows,
        cols=grid.cols,
        prompts_hash=plan.prompts_hash,
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
        hookpoints = sorted({*map(HookPoint.parse, present.hookpoints), *map(HookPoint.parse, info.hookpoints)})
        info = replace(info, hookpoints=tuple(map(str, hookpoints)), stages={} if differing else present.stages)
    run.save_info(info)


if __name__ == "__main__":
    main(tyro.cli(CollectConfig, description=__doc__))
