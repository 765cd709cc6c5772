"""Trains SAEs on collected activations, or straight from FLUX, and measures them on held-out images.

    python -m train.fit --run runs/miniature
    python -m train.fit --run runs/dev --hookpoints layer15 --steps 13 --arch topk --k 1200 --epochs 10
    python -m train.fit --run runs/dev --hookpoints layer15 --steps 13 --arch l1 --l1-coeff 1e-3
    python -m train.fit --run runs/dev --hookpoints layer15 --k 32 64 128      # a sweep: one pass over the data
    python -m train.fit --run runs/dev --hookpoints layer15@wide --n-features 24576   # a second SAE, named `wide`
    torchrun --nproc-per-node 2 --max-restarts 3 -m -- train.fit ...   # a process that dies is restarted and continues

Stopped at any moment, the same command continues.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.names import SaeName
from fluxsae.sae.config import KINDS, Architecture, SaeConfig, TrainedOn
from fluxsae.sae.training.config import TrainConfig
from train.collect import activations_path
from train.command import Bars, start
from train.flux_options import FluxOptions
from train.processes import processes
from train.stages import StageResult, check_push, push_complete, run_stage, start_over
from train.variants import report_variants

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fluxsae.activations.shards import ActivationManifest
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.sae.training import Processes, Source


_DEAD_TOKENS_AT_MOST = 1_000_000


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What to train, and on what: the options that come first in the help."""

    run: Path = Path("runs/miniature")
    """Run folder with collected activations."""
    hookpoints: tuple[str, ...] = ()
    """Hook points, or hookpoint@variant for another SAE there; left out, all hook points that were collected."""
    steps: tuple[int, ...] = ()
    """Collected steps to train on; left out, all of them."""
    arch: Architecture = "topk"
    """Architecture of the SAE."""
    k: tuple[int, ...] = ()
    """Active features a token; several values train several SAEs in one pass, each a variant of the hook point, such as
    layer15@topk-32. Left out, an eighth of the width of the activations, at most 64."""
    epochs: int = 10
    """Passes over the data."""
    l1_coeff: tuple[float, ...] = (1e-3,)
    """l1: weight of the sparsity penalty; several values as with k."""
    l0_coeff: float = 1e-3
    """jumprelu: weight of the number of active features."""
    expansion_factor: int = 4
    """Features for each dimension of the activations."""
    n_features: tuple[int, ...] = ()
    """Number of features, instead of the expansion factor; several values as with k."""
    auxk_coeff: float = 1 / 32
    """Weight of AuxK, an auxiliary loss in which dead features explain what the SAE missed; 0 switches it off."""
    dead_after_tokens: int | None = None
    """A feature is dead after this many tokens without firing; left out, a tenth of the run, at most a million."""
    batch_size: int = 2048
    """Tokens in a batch, over all processes."""
    buffer_gb: float = 4.0
    """Memory for shuffling, GB; with --from-flux shared among the hook points."""
    sigma_conditioned: bool = False
    """One dictionary for all noise levels: the encoder's input is scaled and shifted by a learned table over them."""
    activations: Path | None = None
    """Folder of the shards (files of activations); left out, `activations` in the run folder."""
    track: str | None = None
    """Project name for trackio, a tracker of experiments; left out, metrics go to metrics.jsonl only."""
    push_to: str | None = None
    """Hub repository (user/name) that gets the run when the stage is complete."""
    force: bool = False
    """Train anew, also where a complete SAE or a checkpoint is there."""


@dataclass(frozen=True, kw_only=True)
class FitConfig(FluxOptions, TrainConfig, FitOptions):
    """What to train, on what, and how."""

    from_flux: bool = False
    """Take activations straight from FLUX, without the disk; the options from --flux on belong to it."""
    images: int = 320
    """With --from-flux: images an epoch."""
    tokens_per_image: int | None = 512
    """With --from-flux: tokens kept of each image and step."""
    images_at_once: int = 8
    """With --from-flux: images generated together."""

    def training(self) -> TrainConfig:
        """The settings of the loop alone."""
        return TrainConfig(**{field.name: getattr(self, field.name) for field in fields(TrainConfig)})


@dataclass(frozen=True)
class _Data:
    """The activations of hook points that are trained side by side."""

    sources: Mapping[HookPoint, Source]
    grounds: Mapping[HookPoint, TrainedOn]
    held_out: Callable[[], Iterator[Mapping[HookPoint, Tensor]]]
    """Rows of each held-out image."""


def main(config: FitConfig, *, pipe: Any = None) -> StageResult:
    """Runs the stage; `pipe` is an already opened FLUX, for `from_flux`."""
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.training.checkpoints import CHECKPOINT_NAME

    config.training()
    check_push(config.push_to)
    run = RunFolder(config.run)
    with processes() as peers:
        if config.from_flux:
            pipe = pipe if pipe is not None else config.open()
        asked = _asked(config, run, pipe)
        result = run_stage(
            run,
            "fit",
            {str(name): values for sweep in asked.values() for name, values in _stage_config(config, sweep).items()},
            lambda todo: _fit_all(config, run, _only(asked, todo), peers, pipe),
            outputs=lambda names: [
                run.sae_path(name) / file for name in names for file in ("model.safetensors", "metrics.json")
            ],
            force=config.force,
            by_name=True,
            processes=peers,
        )
        if peers.rank == 0:
            # Only now: stopped between two hook points, the stage finds the first one's SAEs in its checkpoint.
            for sweep in asked.values():
                for path in _work_path(run, sweep).rglob(CHECKPOINT_NAME):
                    path.unlink()
            for hookpoint in asked:
                report_variants(run, hookpoint)
            push_complete(run, config.push_to)
        return result


Sweep = Mapping[str, SaeName]
"""The SAEs of one pass over the data: what tells them apart, and their names."""


def _asked(config: FitConfig, run: RunFolder, pipe: Any) -> dict[HookPoint, Sweep]:
    """The SAEs to train at each hook point.

    Raises:
        FluxSaeError: two names at one hook point, or a variant's name for the several SAEs of a sweep.
    """
    names = [SaeName.parse(place) for place in _places(config, run, pipe)]
    keys = list(sweep_values(config))
    asked: dict[HookPoint, Sweep] = {}
    for name in names:
        if name.place in asked or (name.variant and len(keys) > 1):
            raise FluxSaeError(
                f"{name}: one call trains one SAE at a hook point, or a sweep, whose SAEs become "
                f"{name.place}@{keys[0]} and so on. Name each hook point once, and no variant where values are swept."
            )
        variants = [SaeName.parse(f"{name.place}@{key}") for key in keys] if len(keys) > 1 else [name]
        asked[name.place] = dict(zip(keys, variants, strict=True))
    return asked


def _only(asked: Mapping[HookPoint, Sweep], names: Sequence[str]) -> dict[HookPoint, Sweep]:
    """Those of the SAEs that are named."""
    some = {place: {key: name for key, name in sweep.items() if str(name) in names} for place, sweep in asked.items()}
    return {place: sweep for place, sweep in some.items() if sweep}


def sweep_values(config: FitConfig) -> dict[str, tuple[int | None, float, int | None]]:
    """(k, l1_coeff, n_features) of every SAE that is asked for, by what tells them apart; None: not given.

    Raises:
        FluxSaeError: a k for an architecture that has none.
    """
    needs_k = KINDS[config.arch].needs_k
    if config.k and not needs_k:
        raise FluxSaeError(f"k is {config.k}, but {config.arch} has no k. Leave it out, or choose --arch topk.")
    ks: tuple[int | None, ...] = config.k or (None,)
    coefficients = config.l1_coeff if config.arch == "l1" else config.l1_coeff[:1]
    widths: tuple[int | None, ...] = config.n_features or (None,)
    found = {}
    for k, l1_coeff, width in product(ks, coefficients, widths):
        parts = [config.arch, *([f"{k or 'k'}"] if needs_k else [f"{l1_coeff:g}"])]
        found["-".join(parts + ([f"of-{width}"] if len(widths) > 1 else []))] = (k, l1_coeff, width)
    return found


def _places(config: FitConfig, run: RunFolder, pipe: Any) -> Sequence[str | HookPoint]:
    from fluxsae.activations.shards import find_folders

    if config.hookpoints:
        return config.hookpoints
    if config.from_flux:
        from train.flux_options import default_hookpoints

        return default_hookpoints(len(pipe.transformer.transformer_blocks))
    folder = activations_path(config.run, config.activations)
    found = [path.name for path in find_folders(folder)]
    if not found:
        raise FluxSaeError(f"{folder} holds no activations. Run `python -m train.collect --run {run.path}` first.")
    return found


def _work_path(run: RunFolder, sweep: Sweep) -> Path:
    names = sorted(sweep.values())
    text = str(names[0]) if len(names) == 1 else f"{names[0].place}@{'+'.join(name.variant for name in names)}"
    return run.work_path("fit") / text[:200]


def _stage_config(config: FitConfig, sweep: Sweep) -> dict[SaeName, Any]:
    """The values that decide each SAE."""
    irrelevant = {f.name for f in fields(FluxOptions)} - {"seed"} if not config.from_flux else {"device", "preset"}
    irrelevant |= {"run", "hookpoints", "buffer_gb", "activations", "track", "push_to", "force"}
    irrelevant |= {"log_every", "checkpoint_minutes"}
    if not config.sigma_conditioned:  # fits of before this option stay complete
        irrelevant |= {"sigma_conditioned"}
    if not config.from_flux:
        irrelevant |= {"images", "tokens_per_image", "images_at_once"}
    values = {name: value for name, value in asdict(config).items() if name not in irrelevant}
    own = {name: [*v] if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v for name, v in values.items()}
    if len(sweep) == 1:
        return dict.fromkeys(sweep.values(), own)
    swept = sweep_values(config)
    return {
        name: own | {"k": [k] if k else [], "l1_coeff": [l1_coeff], "n_features": [width] if width else []}
        for key, name in sweep.items()
        for k, l1_coeff, width in [swept[key]]
    }


def _fit_all(config: FitConfig, run: RunFolder, asked: Mapping[HookPoint, Sweep], peers: Processes, pipe: Any) -> None:
    if config.from_flux:  # one FLUX makes the images of all hook points
        _fit(config, run, _from_flux(config, run, list(asked), peers, pipe), asked, peers)
        return
    for hookpoint, sweep in asked.items():
        _fit(config, run, _from_disk(config, hookpoint, peers), {hookpoint: sweep}, peers)


def _fit(config: FitConfig, run: RunFolder, data: _Data, asked: Mapping[HookPoint, Sweep], peers: Processes) -> None:
    """Trains the SAEs of some hook points.

    At least as many SAEs as processes, of activations on disk, are dealt to the processes, which then share nothing.
    """
    for sweep in asked.values():
        if config.force and peers.rank == 0:
            start_over(run, "fit", map(str, sweep.values()))
            shutil.rmtree(_work_path(run, sweep), ignore_errors=True)
    peers.wait()
    built = {place: build_sae_configs(config, data.sources[place], data.grounds[place]) for place in asked}
    configs = {place: {key: built[place][key] for key in sweep} for place, sweep in asked.items()}
    folders = {place: _work_path(run, sweep) for place, sweep in asked.items()}
    team, folder = peers, ""
    if peers.world_size > 1 and not config.from_flux and min(map(len, configs.values())) >= peers.world_size:
        from fluxsae.sae.training import Processes

        team, folder = Processes(), f"process-{peers.rank}-of-{peers.world_size}"
        (hookpoint,) = data.sources
        data = _from_disk(config, hookpoint, team)
        configs = {hookpoint: dict(list(configs[hookpoint].items())[peers.rank :: peers.world_size])}
    folders = {place: path / folder for place, path in folders.items()}
    saes = _train(config, data, configs, team, folders=folders)
    if team.rank == 0:
        _save(run, saes, asked, data)
    peers.wait()


def _train(
    config: FitConfig,
    data: _Data,
    configs: Mapping[HookPoint, Mapping[str, SaeConfig]],
    team: Processes,
    *,
    folders: Mapping[HookPoint, Path],
) -> dict[HookPoint, dict[str, SparseAutoencoder]]:
    from fluxsae.sae.training import Task, train_together

    tasks = [
        Task(
            saes, data.sources[hookpoint], folders[hookpoint],
            _tracker(config, str(folders[hookpoint].name)) if config.track and team.rank == 0 else None,
        )
        for hookpoint, saes in configs.items()
    ]  # fmt: skip
    with Bars(unit="step", is_shown=team.rank == 0) as bars:
        results = train_together(
            tasks, config.training(), device=_device(config), processes=team,
            on_step=partial(bars, f"fit {', '.join(map(str, configs))}"),
        )  # fmt: skip
    unfinished = [result for result in results if not result.is_finished]
    if unfinished:
        print(f"Stopped at step {unfinished[0].step} of {unfinished[0].n_steps}; the same command continues.")
        raise SystemExit(0)
    return {hookpoint: result.saes for hookpoint, result in zip(configs, results, strict=True)}


def build_sae_configs(config: FitConfig, source: Source, trained_on: TrainedOn | None) -> dict[str, SaeConfig]:
    """The SAEs of a sweep by name; one of them where nothing is swept.

    Raises:
        FluxSaeError: a value out of range, such as a k above the number of features.
    """
    n_tokens = config.training().n_steps(source.n_batches) * source.batch_size
    usual_k = max(1, min(64, source.d_model // 8)) if KINDS[config.arch].needs_k else None
    return {
        key: SaeConfig(
            architecture=config.arch,
            d_model=source.d_model,
            n_features=width or config.expansion_factor * source.d_model,
            k=k or usual_k,
            l1_coeff=l1_coeff,
            l0_coeff=config.l0_coeff,
            auxk_coeff=config.auxk_coeff,
            dead_after_tokens=config.dead_after_tokens or max(1, min(_DEAD_TOKENS_AT_MOST, n_tokens // 10)),
            sigma_table=_sigma_table(config, trained_on),
            trained_on=trained_on,
        )
        for key, (k, l1_coeff, width) in sweep_values(config).items()
    }


def _sigma_table(config: FitConfig, trained_on: TrainedOn | None) -> tuple[float, ...]:
    return tuple(sorted(set(trained_on.sigmas))) if config.sigma_conditioned and trained_on is not None else ()


def _from_disk(config: FitConfig, hookpoint: HookPoint, peers: Processes) -> _Data:
    from fluxsae.activations.mixing import mixing_buffer
    from fluxsae.activations.shards import ShardFolder

    folder = ShardFolder(activations_path(config.run, config.activations) / str(hookpoint))
    folder.check_complete(hookpoint=hookpoint)
    steps = tuple(sorted(set(config.steps))) or folder.manifest.steps
    source = mixing_buffer(
        folder,
        batch_size=config.batch_size,
        seed=config.seed,
        steps=steps,
        buffer_bytes=int(config.buffer_gb * (1 << 30)),
        rank=peers.rank,
        world_size=peers.world_size,
    )
    positions = [folder.manifest.steps.index(step) for step in steps]

    def held_out() -> Iterator[Mapping[HookPoint, Tensor]]:
        for _, tokens, _ in folder.iter_images("held_out"):
            yield {hookpoint: tokens[positions].flatten(0, 1)}

    return _Data({hookpoint: source}, {hookpoint: _ground(folder.manifest, steps)}, held_out)


def _from_flux(
    config: FitConfig, run: RunFolder, hookpoints: Sequence[HookPoint], peers: Processes, pipe: Any
) -> _Data:
    from fluxsae.activations.collection import build_manifests, build_request, capture_rows
    from fluxsae.activations.live import live_sources
    from fluxsae.activations.shards import ActivationManifest
    from fluxsae.flux.bad_numbers import LeftOut
    from train.collect import describe_run, describe_splits, save_run
    from train.flux_options import default_steps

    settings = config.settings(pipe)
    steps = config.steps or default_steps(settings)
    request = build_request(
        pipe, hookpoints, steps, settings=settings, tokens_per_image=config.tokens_per_image,
        batch_size=config.images_at_once, seed=config.seed,
    )  # fmt: skip
    plan = config.build_plan(
        config.images, purpose="collect", settings=settings, held_out_every=ActivationManifest.held_out_every
    )
    splits = describe_splits(
        plan, shared=config.share_prompts, purpose="collect", every=ActivationManifest.held_out_every
    )
    info = describe_run(pipe, request, plan, hookpoints=list(hookpoints), splits=splits)
    if peers.rank == 0:
        save_run(run, info, force=config.force)
    peers.wait()
    manifests = build_manifests(pipe, plan, request)
    sources = live_sources(
        pipe, plan, request, batch_size=config.batch_size, seed=config.seed,
        buffer_bytes=int(config.buffer_gb * (1 << 30)), peers=peers,
    )  # fmt: skip

    def held_out() -> Iterator[Mapping[HookPoint, Tensor]]:
        left_out = LeftOut(len(plan))
        for image_id in filter(manifests[request.hookpoints[0]].is_held_out, range(len(plan))):
            captured = capture_rows(pipe, plan, [image_id], request, on_bad=left_out.add)
            if image_id not in left_out.image_ids:
                yield {hookpoint: tokens.flatten(0, 2) for hookpoint, (tokens, _) in captured.items()}

    grounds = {hookpoint: _ground(manifest, request.steps) for hookpoint, manifest in manifests.items()}
    return _Data(sources, grounds, held_out)


def _ground(manifest: ActivationManifest, steps: tuple[int, ...]) -> TrainedOn:
    sigmas = tuple(manifest.sigmas[manifest.steps.index(step)] for step in steps)
    ordered = sorted(sigmas)
    gaps = [high - low for low, high in pairwise(ordered)]
    return TrainedOn(
        flux_id=manifest.flux_id,
        flux_revision=manifest.flux_revision,
        hookpoint=manifest.hookpoint,
        steps=steps,
        sigmas=sigmas,
        height=manifest.settings.height,
        width=manifest.settings.width,
        guidance_scale=manifest.settings.guidance_scale,
        n_tokens=manifest.n_tokens,
        dataset_hash=manifest.dataset_hash,
        # Between two trained noise levels an SAE is on its ground: steps there are not refused.
        sigma_tolerance=max([0.05, *(gap / 2 for gap in gaps)]),
        flux_weights=manifest.flux_weights,
        adapters=manifest.adapters,
        is_exact=manifest.is_exact,
        max_sequence_length=manifest.settings.max_sequence_length,
        true_cfg_scale=manifest.settings.true_cfg_scale,
    )


def _save(
    run: RunFolder,
    saes: Mapping[HookPoint, Mapping[str, SparseAutoencoder]],
    asked: Mapping[HookPoint, Sweep],
    data: _Data,
) -> None:
    """Measures every SAE and keeps it in the run."""
    import torch

    from fluxsae.sae.training import HeldOut

    measures = {hookpoint: [HeldOut(sae) for sae in named.values()] for hookpoint, named in saes.items()}
    for image in data.held_out():
        for hookpoint, tokens in image.items():
            sigmas = torch.tensor(data.grounds[hookpoint].sigmas)
            for measure in measures[hookpoint]:
                measure.add(tokens, sigmas=sigmas.repeat_interleave(len(tokens) // len(sigmas)))
    for hookpoint, named in saes.items():
        for measure, (name, sae) in zip(measures[hookpoint], named.items(), strict=True):
            measured = measure.measure()
            named_sae = asked[hookpoint][name]
            print(
                f"{named_sae}: FVU {measured['fvu']:.4f}, L0 {measured['l0']:.1f}, "
                f"dead {100 * measured['dead_share']:.1f} % (held out: {measured['n_images']} images)"
            )
            sae.save_pretrained(run.sae_path(named_sae))
            run.save_metrics(named_sae, measured)


def _device(config: FitConfig) -> torch.device:
    import torch

    if config.device is not None:
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tracker(config: FitConfig, name: str) -> Callable[[Mapping[str, Any], int], None]:
    try:
        import trackio
    except ImportError as error:
        raise FluxSaeError(
            "--track needs trackio. Install it (python -m pip install trackio), or leave --track out."
        ) from error
    tracked = trackio.init(project=config.track, name=name, config={"arch": config.arch, "k": list(config.k)})

    def log(line: Mapping[str, Any], step: int) -> None:
        tracked.log(
            {f"{line['sae']}/{key}": value for key, value in line.items() if isinstance(value, int | float)}, step=step
        )

    return log


if __name__ == "__main__":
    start(main, FitConfig, __doc__)
