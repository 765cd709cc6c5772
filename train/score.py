"""Scores images: FLUX generates or reads them, the run's SAEs read along; S, sums, thumbnails and heatmaps are kept.

    python -m train.score --run runs/miniature --images 1000
    python -m train.score --run runs/miniature --pictures photos
    python -m train.score --run runs/miniature --hookpoints layer1@topk-32    # on the run's images, none made again
    python -m train.score --run runs/miniature --images 2000                  # adds images, for all SAEs
    torchrun --nproc-per-node 8 -m -- train.score ...

Stopped at any moment, the same command continues. The activations themselves are never stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.sae.config import Mismatch
from train.collect import describe_run, describe_splits, report_pictures, save_run
from train.command import Bars, start
from train.flux_options import FluxOptions
from train.processes import processes
from train.stages import StageResult, check_push, push_complete, run_stage, start_over

if TYPE_CHECKING:
    from fluxsae.features.score_parts import ScoreRequest
    from fluxsae.runs.folder import RunFolder
    from fluxsae.runs.names import SaeName
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.sae.training.processes import Processes


DEFAULT_IMAGES = 1000
"""Images of a run that has none yet."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(FluxOptions):
    """What to score."""

    run: Path = Path("runs/miniature")
    """Run folder with trained SAEs."""
    hookpoints: tuple[str, ...] = ()
    """SAEs (hook points, or hookpoint@variant); left out, all of the run."""
    steps: tuple[int, ...] = ()
    """S is the maximum over these steps; left out, over the steps that each SAE was trained on."""
    images: int | None = None
    """Images to generate, or at most so many pictures to read; left out, those that the run has, or 1000."""
    batch_size: int = 8
    """Images generated together."""
    images_per_part: int = 64
    """Images in one part, the unit of work that is kept when the program is stopped."""
    n_top: int = 12
    """Best images of each feature whose heatmaps are kept."""
    thumbnail_side: int = 384
    """Longest side of the thumbnails, pixels."""
    allow_mismatch: tuple[Mismatch, ...] = ()
    """What may differ from what the SAEs were trained on, by name."""
    push_to: str | None = None
    """Hub repository (user/name) that gets the run when the stage is complete."""
    force: bool = False
    """Score again, also where it is complete."""


def main(config: ScoreConfig, *, open_flux: Callable[[], Any] | None = None) -> StageResult:
    """Runs the stage; `open_flux` gives FLUX where it is open already."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    images = (_n_scored(run) or DEFAULT_IMAGES) if config.images is None else config.images
    config = replace(config, images=images)
    hookpoints = _hookpoints(config, run)
    check_push(config.push_to)
    with processes() as peers:
        result = run_stage(
            run,
            "score",
            _stage_config(config, run, hookpoints),
            lambda todo: _score(config, run, todo, peers=peers, pipe=(open_flux or config.open)()),
            outputs=lambda asked: _outputs(run, asked),
            force=config.force,
            by_name=True,
            grows=("images",),
            processes=peers,
        )
        if peers.rank == 0:
            push_complete(run, config.push_to)
        return result


def _n_scored(run: RunFolder) -> int:
    return len(run.load_images()) if run.images_path.is_file() else 0


def _hookpoints(config: ScoreConfig, run: RunFolder) -> list[SaeName]:
    found = [run.check_sae(name) for name in config.hookpoints] or run.sae_names()
    trained = [hookpoint for hookpoint in found if run.has_sae(hookpoint)]
    missing = [str(hookpoint) for hookpoint in found if not run.has_sae(hookpoint)]
    if not trained or (config.hookpoints and missing):
        raise FluxSaeError(
            f"{run.path} has no SAE at {', '.join(missing)}. Train it first: python -m train.fit --run {run.path}"
        )
    return trained


def _outputs(run: RunFolder, hookpoints: Sequence[str]) -> list[Path]:
    files = [run.images_path]
    for hookpoint in hookpoints:
        files += [run.scores_path(hookpoint), run.stats_path(hookpoint), run.heatmaps_path(hookpoint)]
    return files


def _stage_config(config: ScoreConfig, run: RunFolder, hookpoints: Sequence[HookPoint]) -> dict[str, Any]:
    names = ("steps", "images", "batch_size", "images_per_part", "n_top", "thumbnail_side")
    shared = {**config.identity(), **{name: getattr(config, name) for name in names}}
    return {str(hookpoint): {**shared, "sae": _weights_digest(run, hookpoint)} for hookpoint in hookpoints}


def _weights_digest(run: RunFolder, hookpoint: HookPoint) -> str:
    with (run.sae_path(hookpoint) / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _score(config: ScoreConfig, run: RunFolder, names: Sequence[str], *, peers: Processes, pipe: Any) -> None:
    from fluxsae.activations.collection import CaptureRequest
    from fluxsae.features.score_parts import ScoreParts, ScoreRequest
    from fluxsae.features.scoring import merge_parts, score_images, stream_grid
    from fluxsae.files import check_free_space
    from fluxsae.flux import execution_device, schedule_sigmas, settings_ground
    from fluxsae.sae.model import SparseAutoencoder

    settings = config.settings(pipe)
    sigmas = schedule_sigmas(pipe, settings)
    device = execution_device(pipe)
    hookpoints: list[HookPoint] = [run.check_sae(name) for name in names]
    saes = {h: SparseAutoencoder.from_pretrained(run.sae_path(h), device=device) for h in hookpoints}
    for hookpoint, sae in saes.items():
        sae.require_ground(settings_ground(pipe, settings, hookpoint), allow_mismatch=config.allow_mismatch)
    steps = {hookpoint: _steps(config, sae, sigmas) for hookpoint, sae in saes.items()}
    assert config.images is not None
    plan = config.build_plan(config.images, purpose="score", settings=settings)
    request = ScoreRequest(
        plan=plan,
        settings=settings,
        steps=steps,
        sae_hashes={hookpoint: _weights_digest(run, hookpoint) for hookpoint in hookpoints},
        grids={hookpoint: stream_grid(pipe, hookpoint, settings) for hookpoint in hookpoints},
        batch_size=config.batch_size,
        images_per_part=config.images_per_part,
        n_top=config.n_top,
        thumbnail_side=config.thumbnail_side,
    )
    if peers.rank == 0:
        anew = _make_way(config, run, hookpoints, request)
        n_features = sum(sae.config.n_features for sae in saes.values())
        check_free_space(run.path, request.bytes_on_disk(n_features), purpose=f"Scoring {len(plan)} images")
        all_steps = tuple(sorted({step for chosen in steps.values() for step in chosen}))
        capture = CaptureRequest(tuple(hookpoints), all_steps, settings)
        splits = describe_splits(plan, shared=config.share_prompts, purpose="score")
        report_pictures(plan, asked=config.images)
        save_run(run, describe_run(pipe, capture, plan, hookpoints=hookpoints, splits=splits))
        parts = ScoreParts(run, request, anew=anew)
        if parts.n_there < len(plan):  # other images: what was made of the fewer is true no longer
            start_over(run, "embed")
    peers.wait()
    parts = ScoreParts(run, request)
    with Bars(is_shown=peers.rank == 0) as bars:
        score_images(pipe, saes, parts, rank=peers.rank, world_size=peers.world_size, on_images=partial(bars, "score"))
    peers.wait()
    if peers.rank == 0 and (n_left_out := merge_parts(parts)):
        print(f"score: {n_left_out} of {len(plan)} images are left out: they held NaN or infinite numbers.")


def _make_way(config: ScoreConfig, run: RunFolder, names: Sequence[HookPoint], request: ScoreRequest) -> bool:
    """Deletes what --force, or an SAE that was trained anew, makes untrue; whether the run's images are among it.

    Raises:
        FluxSaeError: there would be more images, but not for every SAE that was scored.
    """
    from fluxsae.features.score_parts import forget_parts, has_other_parts, scored_saes

    scored = scored_saes(run)
    others = [str(name) for name in scored if name not in names]
    if config.force:
        start_over(run, "score", map(str, names))
        forget_parts(run, names if others else None)
    elif others and len(request.plan) != _n_scored(run):
        raise FluxSaeError(
            f"The run's {_n_scored(run)} images would become {len(request.plan)}, but {', '.join(others)} would not be "
            "scored on them. Leave --images out, or --hookpoints."
        )
    forget_parts(run, [n for n in names if n in scored and has_other_parts(run, n, request.sae_hashes[n])])
    return config.force and not others


def _steps(config: ScoreConfig, sae: SparseAutoencoder, sigmas: list[float]) -> tuple[int, ...]:
    from fluxsae.features.scoring import check_trained_step, trained_steps

    if not config.steps:
        return trained_steps(sae, sigmas)
    asked = sorted(set(config.steps))
    return tuple(check_trained_step(sae, step, sigmas, allow_mismatch=config.allow_mismatch) for step in asked)


if __name__ == "__main__":
    start(main, ScoreConfig, __doc__)
