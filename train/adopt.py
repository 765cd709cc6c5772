"""Makes an SAE of another tool a variant in a run: SAELens, sparsify, dictionary_learning, overcomplete, plain .pt.

    python -m train.adopt path/to/sae --run runs/dev --hookpoint layer15@theirs \\
        --flux black-forest-labs/FLUX.1-dev --steps 13 --height 1024 --width 1024
    python -m train.adopt sae_best.pt --run runs/dev --hookpoint layer15@old --arch topk --k 64 ...
    python -m train.adopt activations.npy --run runs/dev --hookpoint layer15 --sigmas 0.87 ...   # for train.fit

It is measured on the run's held-out activations, which shows whether it was read right and belongs there; then score
it: python -m train.score --run runs/dev --hookpoints layer15@theirs. No file that can run code is opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.sae.config import Architecture, Tool, TrainedOn
from train.command import start
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fluxsae.activations.shards import ActivationManifest, ShardFolder
    from fluxsae.runs.folder import RunFolder, RunInfo
    from fluxsae.runs.names import SaeName
    from fluxsae.sae.model import SparseAutoencoder

SAME_SIGMA = 1e-3
"""Noise levels that differ by less are those of one step, written with fewer digits."""
FLUX_PATCH = 16
"""Pixels a token, on a side, of FLUX.1 and FLUX.2."""
WORST_FVU = 0.9
"""An SAE that leaves more of the variance unexplained was read wrongly, or was trained on something else."""


@dataclass(frozen=True, kw_only=True)
class AdoptConfig:
    """Which SAE, where it belongs, and what its files do not say."""

    source: tyro.conf.Positional[Path]
    """Folder that the other tool wrote, or a .pt file; or activations, .npy of one row a token."""
    run: Path = Path("runs/miniature")
    """Run folder with activations of that hook point (`train.collect`; a few images are enough)."""
    hookpoint: str
    """Name that the SAE gets: hookpoint@variant."""
    tool: Tool | None = None
    """What wrote the files; left out, found by their names."""
    flux: str | None = None
    """The FLUX that it was trained on, as the run names it."""
    steps: tuple[int, ...] = ()
    """The steps that it was trained on, counted in the run's schedule from 0."""
    height: int | None = None
    """Height of the images that it was trained on, pixels."""
    width: int | None = None
    """Width of the images that it was trained on, pixels."""
    guidance_scale: float | None = None
    """Distilled guidance of those images; left out, the run's."""
    sigmas: tuple[float, ...] = ()
    """.npy: noise level of each of the steps, where the run does not say it."""
    num_inference_steps: int | None = None
    """.npy for a run that does not exist yet: steps of the schedule."""
    arch: Architecture | None = None
    """Architecture, where the files do not say it: l1, topk or batchtopk."""
    k: int | None = None
    """Active features a token, where the files do not say it."""
    threshold: float | None = None
    """batchtopk: the threshold in evaluation, where the files do not say it."""
    allow_bad_fit: bool = False
    """Take it in also where it reconstructs this run's activations badly (FVU above 0.9)."""
    force: bool = False
    """Replace an SAE of that name."""


def main(config: AdoptConfig) -> StageResult:
    """Reads the SAE, measures it on the run's activations, and keeps it in the run."""
    from fluxsae.runs.folder import RunFolder
    from fluxsae.runs.names import SaeName

    run, name = RunFolder(config.run), SaeName.parse(config.hookpoint)
    _check_asked(config, run)
    if config.source.suffix == ".npy":
        return run_stage(
            run,
            "collect",
            {str(name.place): {**_stage_config(config), "sigmas": [*config.sigmas]}},
            lambda _: _adopt_activations(config, run, name.place),
            outputs=lambda places: [path for place in places for path in _shards(run, place)],
            force=config.force,
            by_name=True,
        )
    _check_name(config, run, name)
    return run_stage(
        run,
        "fit",
        {str(name): _stage_config(config)},
        lambda _: _adopt(config, run, name),
        outputs=lambda names: [run.sae_path(n) / file for n in names for file in ("model.safetensors", "metrics.json")],
        force=config.force,
        by_name=True,
    )


def _check_asked(config: AdoptConfig, run: RunFolder) -> None:
    """Asks for what no file says."""
    unsaid = [f"--{option}" for option in ("flux", "steps", "height", "width") if not getattr(config, option)]
    if unsaid:
        raise FluxSaeError(
            f"The files do not say what the SAE was trained on; give {', '.join(unsaid)} as whoever trained it says. "
            f"This run: {_facts(run) if run.exists() else 'none yet'}."
        )


def _check_name(config: AdoptConfig, run: RunFolder, name: SaeName) -> None:
    """Refuses a name that is taken."""
    record = run.load_info().stages.get("fit")
    is_adopted = record is not None and "adopted" in record.config.get(str(name), {})
    if run.has_sae(name) and not is_adopted and not config.force:
        raise FluxSaeError(f"{run.path} has an SAE {name}. Choose another @variant, or pass --force to replace it.")


def _facts(run: RunFolder) -> str:
    info = run.load_info()
    size = f"{info.settings.height} x {info.settings.width} px (height x width)"
    return f"{info.flux_id}, steps {', '.join(map(str, info.steps))} of {info.settings.num_inference_steps}, {size}"


def _stage_config(config: AdoptConfig) -> dict[str, Any]:
    names = ("tool", "flux", "height", "width", "guidance_scale", "arch", "k", "threshold")
    own = {name: getattr(config, name) for name in names}
    return {"adopted": _digest(config.source), **own, "steps": [*config.steps]}


def _digest(source: Path) -> str:
    """sha256 of the files that were given."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    digest = hashlib.sha256()
    for path in files:
        if not path.is_file():
            raise FluxSaeError(f"{path} does not exist. Give the file or folder that the other tool wrote.")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _adopt(config: AdoptConfig, run: RunFolder, name: SaeName) -> None:
    from fluxsae.activations.shards import ShardFolder
    from fluxsae.sae.foreign import Told, find_tool, read_foreign
    from fluxsae.sae.training import HeldOut

    tool = config.tool or find_tool(config.source)
    sae = read_foreign(config.source, tool=tool, told=Told(config.arch, config.k, config.threshold))
    folder = ShardFolder(run.activations_folder(name))
    folder.check_complete(hookpoint=name.place, d_model=sae.config.d_model)
    sae = _grounded(config, run, sae, folder.manifest)
    measure = HeldOut(sae)
    for tokens in _held_out(folder, config.steps):
        measure.add(tokens)
    measured = measure.measure()
    print(
        f"{name}: read as {sae.config.architecture} of {sae.config.n_features} features from {tool}; on this run FVU "
        f"{measured['fvu']:.4f}, L0 {measured['l0']:.1f}, dead {100 * measured['dead_share']:.1f} % "
        f"(held out: {measured['n_images']} images)"
    )
    if measured["fvu"] > WORST_FVU and not config.allow_bad_fit:
        raise FluxSaeError(
            f"The SAE leaves {measured['fvu']:.2f} of the variance of this run's activations unexplained (allowed "
            f"{WORST_FVU}). So it was read wrongly, or trained at another hook point, step or scale of the "
            "activations. Check these, or pass --allow-bad-fit."
        )
    sae.save_pretrained(run.sae_path(name))
    run.save_metrics(name, {**measured, "adopted_from": tool})


def _held_out(folder: ShardFolder, steps: tuple[int, ...]) -> Iterator[Float[Tensor, "tokens d_model"]]:
    positions = [folder.manifest.steps.index(step) for step in sorted(set(steps))]
    for _, tokens, _ in folder.iter_images("held_out"):
        yield tokens[positions].flatten(0, 1)


def _grounded(
    config: AdoptConfig, run: RunFolder, sae: SparseAutoencoder, manifest: ActivationManifest
) -> SparseAutoencoder:
    """The SAE with the ground that was told, as far as this run can hold it.

    Raises:
        FluxSaeError: another FLUX than the run's, or steps without activations here.
    """
    info, steps = run.load_info(), tuple(sorted(set(config.steps)))
    if config.flux != info.flux_id:
        raise FluxSaeError(
            f"The SAE is of {config.flux}, but this is a run of {info.flux_id}. Use a run of that FLUX; where both are "
            "the same model, name it as this run does."
        )
    missing = [step for step in steps if step not in manifest.steps]
    if missing:
        raise FluxSaeError(
            f"This run has no activations at steps {missing}; it has {[*manifest.steps]}. Collect them: python -m "
            f"train.collect --run {run.path} --hookpoints {manifest.hookpoint} --steps {' '.join(map(str, steps))}"
        )
    assert config.height is not None
    assert config.width is not None
    settings = manifest.settings
    ground = TrainedOn(
        flux_id=info.flux_id,
        flux_revision=info.flux_revision,
        hookpoint=manifest.hookpoint,
        steps=steps,
        sigmas=tuple(manifest.sigmas[manifest.steps.index(step)] for step in steps),
        height=config.height,
        width=config.width,
        guidance_scale=settings.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        n_tokens=manifest.n_tokens,
        dataset_hash=_digest(config.source),
        flux_weights=info.flux_weights,
        adapters=info.adapters,
        is_exact=manifest.is_exact,
        max_sequence_length=settings.max_sequence_length,
        true_cfg_scale=settings.true_cfg_scale,
    )
    return sae.with_trained_on(ground)


def _shards(run: RunFolder, place: str) -> list[Path]:
    from fluxsae.activations.shards import expected_files

    return expected_files(run.activations_folder(place))


def _adopt_activations(config: AdoptConfig, run: RunFolder, place: HookPoint) -> None:
    from fluxsae.activations.foreign import adopt_rows
    from fluxsae.flux.settings import GenerationSettings
    from fluxsae.runs.folder import RunInfo, library_versions

    assert config.flux is not None
    assert config.height is not None
    assert config.width is not None
    steps = tuple(sorted(set(config.steps)))
    if config.steps != steps:
        raise FluxSaeError(f"--steps are {[*config.steps]}; give them rising, each once, and the rows in that order.")
    if run.exists():
        info = run.load_info()
        if config.flux != info.flux_id:
            raise FluxSaeError(f"The activations are of {config.flux}, but this is a run of {info.flux_id}.")
    elif config.num_inference_steps is None:
        raise FluxSaeError("There is no run yet; give --num-inference-steps, the steps of the schedule.")
    else:
        settings = GenerationSettings(
            height=config.height, width=config.width, num_inference_steps=config.num_inference_steps
        )
        info = RunInfo(flux_id=config.flux, settings=settings, hookpoints=(), versions=library_versions())
    known = dict(zip(info.steps, info.sigmas, strict=True)) | _told_sigmas(config, info)
    if any(step not in known for step in steps):
        raise FluxSaeError(f"The noise levels of steps {[*steps]} are not known; give --sigmas, one for each of them.")
    settings = replace(info.settings, height=config.height, width=config.width)
    if config.guidance_scale is not None:
        settings = replace(settings, guidance_scale=config.guidance_scale)
    n_tokens = settings.max_sequence_length
    if place.stream == "image":
        patch = info.settings.height // info.rows if info.rows else FLUX_PATCH
        n_tokens = TokenGrid.from_size(settings.height, settings.width, patch=patch).n_tokens
    n_images = adopt_rows(
        config.source, run.activations_folder(place), hookpoint=place, flux_id=config.flux, settings=settings,
        sigmas={step: known[step] for step in steps}, n_tokens=n_tokens, digest=_digest(config.source),
    )  # fmt: skip
    places = sorted({HookPoint.parse(name) for name in info.hookpoints} | {place})
    known = dict(sorted(known.items()))
    run.save_info(replace(info, hookpoints=tuple(map(str, places)), steps=tuple(known), sigmas=tuple(known.values())))
    print(f"{place}: activations of {n_images} images at steps {', '.join(map(str, steps))}; train.fit can use them")


def _told_sigmas(config: AdoptConfig, info: RunInfo) -> dict[int, float]:
    """The noise level of each step as they were told, in the same order.

    Raises:
        FluxSaeError: more or fewer than the steps, or another than the run's own.
    """
    if not config.sigmas:
        return {}
    if len(config.sigmas) != len(config.steps):
        raise FluxSaeError(f"--sigmas are {len(config.sigmas)} and --steps {len(config.steps)}; give one for each.")
    told, own = dict(zip(config.steps, config.sigmas, strict=True)), dict(zip(info.steps, info.sigmas, strict=True))
    other = [step for step, sigma in told.items() if abs(own.get(step, sigma) - sigma) > SAME_SIGMA]
    if other:
        raise FluxSaeError(
            f"The noise levels of this run are {', '.join(f'{own[step]:.4f} at step {step}' for step in other)}, not "
            f"{', '.join(f'{told[step]:g}' for step in other)}. Give the steps in this run's schedule."
        )
    return told


if __name__ == "__main__":
    start(main, AdoptConfig, __doc__)
