"""Finds, for each feature, the image on which turning it down and up shows best, and keeps it as a demo of the run.

On each demo's image it also tries to put another name in place of the feature's own, such as red in place of pink, and
keeps what CLIP sees happen. Without CLIP there are no swaps.

    python -m train.find_demos --run runs/miniature --n-features 24

A search that was cut off goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.steering.demos.config import DemoConfig, SwapConfig
from train.command import Bars, start
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from fluxsae.pictures.perceptual import ImageEmbedder
    from fluxsae.runs.folder import RunFolder
    from fluxsae.steering.demos import SteeringDemo, Swap


@dataclass(frozen=True, kw_only=True)
class FindDemosConfig:
    """Which features, and how hard to look."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored and analysed."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, all that have an SAE."""
    features: tuple[int, ...] = ()
    """Numbers of the features, the same at each hook point; left out, the best ranked ones."""
    n_features: int = 24
    """How many of the best ranked features at each hook point."""
    search: DemoConfig = field(default_factory=DemoConfig)
    """What is tried for each feature."""
    swap: SwapConfig = field(default_factory=SwapConfig)
    """What is tried to swap one name for another."""
    distance: str = "random-features"
    """Perceptual distance: lpips (fetches its network once) or random-features (needs no network)."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    max_batch: int | None = None
    """Images generated together; left out, as many as fit into half of the free memory."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: FindDemosConfig) -> StageResult:
    """Writes demos.jsonl and a strip for each demo into the run."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    described = [name for name in run.sae_names() if run.features_path(name).is_file()]
    places: list[HookPoint] = [run.check_sae(name) for name in config.hookpoints] or [*described]
    features = {place: choose_features(run, place, config.features, config.n_features) for place in places}
    asked = {**asdict(config.search), "swap": asdict(config.swap), "distance": config.distance}
    asked["steps"] = list(config.search.steps) if config.search.steps else None
    return run_stage(
        run,
        "demos",
        {str(place): {**asked, "features": list(chosen)} for place, chosen in features.items()},
        lambda todo: _search(run, {run.check_sae(name): features[run.check_sae(name)] for name in todo}, config),
        outputs=lambda asked: [path(name) for path in (run.demos_path, run.swaps_path) for name in asked],
        force=config.force,
        by_name=True,
    )


def choose_features(run: RunFolder, place: HookPoint, features: tuple[int, ...], n_features: int) -> list[int]:
    """The features that were asked for, or the best ranked ones that fire.

    Raises:
        FluxSaeError: a feature does not exist, or none fires.
    """
    from fluxsae.features.cards import CardIndex

    index = CardIndex(run, place)
    for feature in features:
        index.features[feature]  # refuses what does not exist
    chosen = list(features) or [f for f in index.ranked if index.features[f].top_images][:n_features]
    if not chosen:
        raise FluxSaeError(f"No feature of {place} fires in the run's images; score more images first.")
    return chosen


def _search(run: RunFolder, features: dict[HookPoint, list[int]], config: FindDemosConfig) -> None:
    from fluxsae.flux import execution_device, load_flux
    from fluxsae.pictures.perceptual import load_distance
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.steering.demos import find_demos, find_swaps, opening_swap, write_opening

    info = run.load_info()
    pipe = load_flux(info.flux_id, revision=info.flux_revision, device=config.device)
    device = execution_device(pipe)
    saes = {place: SparseAutoencoder.from_pretrained(run.sae_path(place), device=device) for place in features}
    distance, embedder = load_distance(config.distance, device=str(device)), _embedder(run)
    with Bars() as bars:
        found = find_demos(
            run,
            pipe,
            saes,
            features,
            distance=distance,
            embedder=embedder,
            config=config.search,
            max_batch=config.max_batch,
            on_candidate=partial(bars, "candidates"),
        )
    for place, demos in found.items():
        print(f"{place}: {len(demos)} demos of {len(features[place])} features")
        for demo in demos[:8]:
            print(_line(demo))
    if embedder is None:
        for place in features:
            run.save_swaps(place, [])
            for old in run.swaps_path(place).parent.glob("swap-*.webp"):
                old.unlink()
        return
    with Bars(unit="name") as bars:
        swaps = find_swaps(
            run,
            pipe,
            saes,
            distance=distance,
            embedder=embedder,
            config=config.swap,
            max_batch=config.max_batch,
            on_candidate=partial(bars, "swaps"),
        )
    for place, made in swaps.items():
        print(f"{place}: {len(made)} swaps on {len(found[place])} demos")
        for swap in made[:8]:
            print(_swap_line(swap))
        opening = opening_swap(made)
        if opening is not None:
            write_opening(run, pipe, saes, opening)


def _embedder(run: RunFolder) -> ImageEmbedder | None:
    """The CLIP model that embedded the run's images, where it can be had."""
    from fluxsae.pictures.perceptual import load_embedder

    if not run.embeddings_path.is_file():
        return None
    try:
        return load_embedder(run.load_embeddings().model)
    except FluxSaeError as error:
        print(f"demos are chosen without CLIP: {error}")
        return None


def _line(demo: SteeringDemo) -> str:
    score = demo.score
    return (
        f"  {demo.feature:>6} {demo.label or '-':<16} score {score.score:.3f}  less {score.less:.3f}  "
        f"more {score.more:.3f}  balance {score.balance:.2f}  collateral {score.collateral:.2f}  "
        f"“{demo.prompt}” seed {demo.seed}"
    )


def _swap_line(swap: Swap) -> str:
    score = swap.score
    return (
        f"  {swap.feature:>6} {swap.label} -> {swap.new_label:<12} score {score.score:.3f}  gone {score.gone:.3f}  "
        f"come {score.come:.3f}  collateral {score.collateral:.2f}  “{swap.prompt}” seed {swap.seed}"
    )


if __name__ == "__main__":
    start(main, FindDemosConfig, __doc__)
