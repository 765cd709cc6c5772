"""Compares two layers (or two SAEs) by matching features that fire on the same images.

python -m train.compare_layers --run runs/miniature --first layer1 --second transformer_blocks.3
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import COUNTERPART
from train.command import start

if TYPE_CHECKING:
    from fluxsae.features.cards import CardIndex
    from fluxsae.features.layers import LayerComparison


@dataclass(frozen=True, kw_only=True)
class CompareLayersConfig:
    """What is compared with what."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored."""
    first: str | None = None
    """Hook point; left out, the first of the run."""
    second: str | None = None
    """Hook point; left out, the last of the run (of `other_run`)."""
    other_run: Path | None = None
    """Run folder of the second hook point, of the same prompts and seeds; left out, `run` itself."""
    counterpart: float = COUNTERPART
    """Correlation from which a feature counts as having a counterpart."""
    min_images: int = 5
    """Images a feature must fire on to take part."""
    seed: int = 0
    """Seed of the shuffle that tells what a match is worth by chance."""


def main(config: CompareLayersConfig) -> None:
    """Writes the comparison, a plot of it among the sheets of the first hook point, and prints the best of both."""
    from fluxsae.features.cards import CardIndex
    from fluxsae.features.directions import draw_comparison
    from fluxsae.features.layers import compare_layers
    from fluxsae.features.scores import load_scores
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    other = RunFolder(config.other_run) if config.other_run else run
    first = CardIndex(run, config.first or run.sae_names()[0])
    second = CardIndex(other, config.second or other.sae_names()[-1])
    _check_comparable(first, second)
    comparison = compare_layers(
        load_scores(run, first.hookpoint).stored(),
        load_scores(other, second.hookpoint).stored(),
        counterpart=config.counterpart,
        min_images=config.min_images,
        seed=config.seed,
    )
    _report(comparison, first, second)
    if other is run:
        run.save_comparison(first.hookpoint, second.hookpoint, comparison.tensors())
    png = io.BytesIO()
    draw_comparison(
        comparison, first=str(first.hookpoint), second=str(second.hookpoint), counterpart=config.counterpart
    ).save(png, format="PNG", optimize=True)
    name = (
        f"compared-with-{second.hookpoint}" if other is run else f"compared-with-{other.path.name}-{second.hookpoint}"
    )
    run.save_sheet(first.hookpoint, name, png.getvalue())
    print(f"plot in {run.sheet_path(first.hookpoint, name)}")


def _check_comparable(first: CardIndex, second: CardIndex) -> None:
    if first.run.path == second.run.path and first.hookpoint == second.hookpoint:
        raise FluxSaeError(f"{first.hookpoint} was to be compared with itself; name two hook points, or another run")
    if (first.images.subjects, first.images.seeds) != (second.images.subjects, second.images.seeds):
        raise FluxSaeError(
            f"{first.run.path} and {second.run.path} hold other images; score both with the same prompts and first seed"
        )


def _report(comparison: LayerComparison, first: CardIndex, second: CardIndex) -> None:
    print(
        f"{first.hookpoint} with {second.hookpoint}: {len(comparison.pairs)} pairs, mean correlation "
        f"{comparison.correlations.mean():.3f} (by chance {comparison.null_correlation:.3f})"
    )
    for left, right in comparison.pairs[:10]:
        place = np.flatnonzero((comparison.pairs == (left, right)).all(axis=1))[0]
        print(
            f"  {left:6d} {first.labels[left] or '(no label)':28.28s} = {right:6d} "
            f"{second.labels[right] or '(no label)':28.28s} {comparison.correlations[place]:.3f}"
        )
    for index, alone in ((first, comparison.only_first), (second, comparison.only_second)):
        best = [feature for feature in index.ranked if feature in set(alone.tolist())][:8]
        names = ", ".join(f"{feature} {index.labels[feature] or ''}".strip() for feature in best)
        print(f"only in {index.hookpoint}: {len(alone)} features, the best: {names or 'none'}")


if __name__ == "__main__":
    start(main, CompareLayersConfig, __doc__)
