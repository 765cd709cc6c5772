"""Describes every feature: how often, how strongly, where and at which steps it fires, its best images, its companions.

    python -m train.analyze --run runs/miniature

Reads S and the sums of `train.score`; needs no FLUX.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import AnalysisConfig
from fluxsae.flux.hookpoints import HookPoint
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
    hookpoints = [hookpoint for hookpoint in run.hookpoints() if run.scores_path(hookpoint).is_file()]
    if not hookpoints:
        raise FluxSaeError(f"{run.path} has no scores. Score images first: python -m train.score --run {run.path}")
    return run_stage(
        run,
        "analyze",
        {**asdict(config.features), "quantile_levels": [*config.features.quantile_levels]},
        lambda: _analyze(config, run, hookpoints),
        outputs=lambda: [run.features_path(hookpoint) for hookpoint in hookpoints],
        force=config.force,
    )


def _analyze(config: AnalyzeConfig, run: RunFolder, hookpoints: list[HookPoint]) -> None:
    from fluxsae.features.analysis import class_counts, describe_features
    from fluxsae.features.scores import ScoreMatrix
    from fluxsae.features.statistics import FeatureStats

    for hookpoint in hookpoints:
        scores = ScoreMatrix.load(run.scores_path(hookpoint))
        table = describe_features(scores, FeatureStats.load(run.stats_path(hookpoint)), config.features)
        run.save_features(hookpoint, table)
        counts = ", ".join(f"{count} {name}" for name, count in class_counts(table).items())
        print(f"{hookpoint}: {len(table)} features: {counts}; {scores.n_images} images")


if __name__ == "__main__":
    start(main, AnalyzeConfig, __doc__)
