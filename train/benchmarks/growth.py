"""A finished run of the miniature grows: one more hook point, one more SAE, more images; seconds, and what is equal.

python -m train.benchmarks growth
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fluxsae.evaluation.tables import text_table
from fluxsae.features.score_parts import scored_saes
from fluxsae.runs.folder import RunFolder
from train import analyze, collect, embed, fit, score, select
from train.benchmarks.options import GrowthConfig

FIRST, THIRD = ("transformer_blocks.1.ff", "transformer_blocks.3"), "transformer_blocks.2"
VARIANT = "transformer_blocks.3@wide"


def main(config: GrowthConfig) -> None:
    """Prints a table of what was added."""
    with tempfile.TemporaryDirectory(dir=config.folder) as scratch:
        print(measure(Path(scratch), config))


def measure(scratch: Path, config: GrowthConfig) -> str:
    """Each addition: its seconds, images decoded anew, and whether the scores equal those of a run made at once."""
    stages = _Stages(RunFolder(scratch / "grown"), config)
    lines = [["finished run", *stages.timed(lambda: stages.make(FIRST, config.images))]]
    lines.append(["a third hook point", *stages.timed(lambda: stages.add((THIRD,)))])
    lines.append(["a second variant", *stages.timed(lambda: stages.add((VARIANT,), collects=False))])
    lines.append([f"{config.images} more images", *stages.timed(lambda: stages.score(2 * config.images))])
    at_once = _Stages(RunFolder(scratch / "at-once"), config)
    at_once.make((*FIRST, THIRD), config.images, scores=False)
    at_once.add((VARIANT,), collects=False, scores=False)
    lines.append(["all of it at once", *at_once.timed(lambda: at_once.score(2 * config.images))])
    names = scored_saes(stages.run)
    equal = sum(
        path(stages.run)(name).read_bytes() == path(at_once.run)(name).read_bytes()
        for name in names
        for path in (lambda run: run.scores_path, lambda run: run.stats_path, lambda run: run.heatmaps_path)
    )
    table = text_table(["", "seconds", "images decoded", "SAEs"], lines)
    return f"{table}\n{equal} of {3 * len(names)} files of scores equal those of the run made at once"


class _Stages:
    """The stages of one run."""

    def __init__(self, run: RunFolder, config: GrowthConfig) -> None:
        self.run, self.config = run, config

    def make(self, places: tuple[str, ...], images: int, *, scores: bool = True) -> None:
        self.collect(places)
        self.fit(places)
        if scores:
            self.score(images)

    def add(self, names: tuple[str, ...], *, collects: bool = True, scores: bool = True) -> None:
        if collects:
            self.collect(names)
        self.fit(names, n_features=512 if collects else 1024)
        if scores:
            self.score(None)

    def collect(self, places: tuple[str, ...]) -> None:
        config = collect.CollectConfig(
            run=self.run.path, hookpoints=places, images=self.config.images, batch_size=self.config.batch_size
        )
        collect.main(config)

    def fit(self, names: tuple[str, ...], *, n_features: int = 512) -> None:
        config = fit.FitConfig(
            run=self.run.path, hookpoints=names, n_features=(n_features,), k=(10,), epochs=self.config.epochs, lr=3e-3
        )
        fit.main(config)

    def score(self, images: int | None) -> None:
        config = score.ScoreConfig(
            run=self.run.path, images=images, batch_size=self.config.batch_size,
            images_per_part=5 * self.config.batch_size, thumbnail_side=128,
        )  # fmt: skip
        score.main(config)
        analyze.main(analyze.AnalyzeConfig(run=self.run.path))
        embed.main(embed.EmbedConfig(run=self.run.path))
        select.main(select.SelectConfig(run=self.run.path))

    def timed(self, work: Callable[[], None]) -> list[str]:
        """Seconds, images decoded meanwhile, and the SAEs that are scored afterwards."""
        before, begin = self._n_images(), time.perf_counter()
        work()
        taken = time.perf_counter() - begin
        return [f"{taken:.0f}", str(self._n_images() - before), str(len(scored_saes(self.run)))]

    def _n_images(self) -> int:
        return len(self.run.load_images()) if self.run.images_path.is_file() else 0
