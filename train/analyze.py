"""Describes every feature: how often, how strongly, where and at which steps it fires, its best images, its companions.

    python -m train.analyze --run runs/miniature

Reads S and the sums of `train.score`; needs no FLUX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import AnalysisConfig
from train.command import start
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """What to describe."""

    run: Path = Path("runs/miniature")
    """Run folder with scored images."""
    features: AnalysisConfig = field(default_factory=AnalysisConfig)
    force: bool = False
    """Describe again, also where it is complete; labels and coherence have then to be found again."""


def main(config: AnalyzeConfig) -> StageResult:
    """Runs the stage."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    names = [name for name in run.sae_names() if run.scores_path(name).is_file()]
    if not names:
        raise FluxSaeError(f"{run.path} has no scores. Score images first: python -m train.score --run {run.path}")
    own = {**asdict(config.features), "quantile_levels": [*config.features.quantile_levels]}
    return run_stage(
        run,
        "analyze",
        dict.fromkeys(map(str, names), own),
        lambda todo: _analyze(config, run, todo),
        outputs=lambda asked: [run.features_path(name) for name in asked],
        force=config.force,
        by_name=True,
    )


def _analyze(config: AnalyzeConfig, run: RunFolder, names: Sequence[str]) -> None:
    from fluxsae.features.analysis import class_counts, describe_features
    from fluxsae.features.scores import load_scores
    from fluxsae.features.statistics import FeatureStats

    for name in names:
        scores = load_scores(run, name)
        table = describe_features(scores, FeatureStats.load(run.stats_path(name)), config.features)
        run.save_features(name, table)
        counts = ", ".join(f"{count} {kind}" for kind, count in class_counts(table).items())
        print(f"{name}: {len(table)} features: {counts}; {scores.n_images} images")


if __name__ == "__main__":
    start(main, AnalyzeConfig, __doc__)
