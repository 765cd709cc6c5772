"""Can an edit be left on? Edits that suppress a concept, with a condition on it, measured on the miniature.

    python -m train.benchmarks conditions

The concepts, their features and the edit are those of the run's own laboratory report. Each edit is tried with and
without its condition, on pictures that show the concept and on pictures that do not, by what is read back from them.
Pictures without the concept should stay bit-identical; on the others the edit should do what it does without the
condition. The level is chosen on the first half of the pictures of each concept and reported on the second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from train.benchmarks.options import ConditionsConfig

if TYPE_CHECKING:
    from fluxsae.laboratory.truths import Concept
    from fluxsae.steering.edits import SteeringEdit

ATTRIBUTES = ("colour", "texture", "background")
LEAST_IDENTICAL = 0.95


@dataclass(frozen=True)
class Trial:
    """One picture with one edit."""

    concept: str
    attribute: str
    is_present: bool
    """Whether the unedited picture shows the concept."""
    above: float | None
    """Level of the condition; None: without one."""
    is_identical: bool
    """Whether no bit of the latents changed."""
    is_success: bool
    """Whether the concept, which was there, is not seen in the edited picture, which still shows something."""
    is_report: bool = False
    """Whether the picture is one of those that are reported."""


def main(config: ConditionsConfig) -> list[Trial]:
    """Measures and prints the tables."""
    trials = _measure(config)
    print(table(trials, draws=config.draws, seed=config.seed))
    return trials


def _measure(config: ConditionsConfig) -> list[Trial]:
    from fluxsae.flux import load_flux
    from fluxsae.laboratory.truths import CONCEPTS
    from fluxsae.miniature import miniature_path
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder

    run = RunFolder(config.run or miniature_path("run"))
    place = run.hookpoints()[-1]
    report = run.load_metrics(place)["steering"]
    chosen, by_name = report["defaults"]["suppress"], {str(concept): concept for concept in CONCEPTS}
    saes = {place: SparseAutoencoder.from_pretrained(run.sae_path(place))}
    work = _Work(load_flux("miniature"), saes, config)
    trials = []
    for result in report["results"]:
        concept = by_name[result["concept"]]
        if result["direction"] == "suppress" and concept.attribute in ATTRIBUTES:
            trials += work.try_concept(concept, _edits(result["features"], chosen))
            print(f"{concept}: done, {len(trials)} trials", flush=True)
    return trials


def _edits(features: Sequence[int], chosen: Mapping[str, Any]) -> "tuple[SteeringEdit, ...]":
    from fluxsae.steering.edits import SteeringEdit

    same = {name: chosen[name] for name in ("hookpoint", "mode", "strength", "steps")}
    return tuple(SteeringEdit.from_dict({**same, "feature": feature}) for feature in features)


@dataclass(frozen=True, eq=False)
class _Work:
    pipe: Any
    saes: Any
    config: ConditionsConfig

    def try_concept(self, concept: "Concept", edits: "Sequence[SteeringEdit]") -> list[Trial]:
        """Every picture of one concept with every level."""
        from fluxsae.laboratory.outcomes import draw_subject
        from fluxsae.steering.conditions import Condition

        features = tuple(edit.feature for edit in edits)
        levels = (None, *self.config.above)
        arms = [
            tuple(edit if level is None else replace(edit, when=Condition(features, level)) for edit in edits)
            for level in levels
        ]
        trials = []
        for has_concept in (True, False):
            for at in range(self.config.pictures):
                subject = draw_subject(concept, has_concept=has_concept, seed=self.config.seed + at)
                found = self._try_picture(subject, concept, levels, arms, has_concept=has_concept)
                trials += [replace(trial, is_report=at >= self.config.pictures // 2) for trial in found]
        return trials

    def _try_picture(
        self,
        subject: Any,
        concept: "Concept",
        levels: Sequence[float | None],
        arms: "Sequence[Sequence[SteeringEdit]]",
        *,
        has_concept: bool,
    ) -> list[Trial]:
        from fluxsae.laboratory.outcomes import compare_scenes
        from fluxsae.miniature.scenes import read_scene
        from fluxsae.sae.config import MISMATCHES
        from fluxsae.steering.sweeps import sweep

        made = sweep(
            self.pipe, self.saes, [(), *arms], prompt=subject.prompt, seed=subject.seed, allow_mismatch=MISMATCHES
        )
        before = read_scene(made[0].image)
        is_present = (concept.attribute, concept.value) in before.concepts()
        if is_present != has_concept or len(before.objects) != 1:
            return []
        return [
            Trial(
                concept=str(concept),
                attribute=concept.attribute,
                is_present=is_present,
                above=level,
                is_identical=bool((variant.latents == made[0].latents).all()),
                is_success=is_present
                and compare_scenes(before, read_scene(variant.image), concept).is_success(wanted=False),
            )
            for level, variant in zip(levels, made[1:], strict=True)
        ]


def choose_level(trials: Sequence[Trial]) -> float:
    """The lowest level at which enough pictures without the concept stay bit-identical; the highest where none does."""
    levels = sorted({trial.above for trial in trials if trial.above is not None})
    absent = [trial for trial in trials if not trial.is_present and not trial.is_report]
    for level in levels:
        if np.mean([trial.is_identical for trial in absent if trial.above == level]) >= LEAST_IDENTICAL:
            return level
    return levels[-1]


def table(trials: Sequence[Trial], *, draws: int, seed: int) -> str:
    """Every level on the pictures for choosing; then the chosen one on the others, by attribute."""
    level = choose_level(trials)
    lines = ["Pictures for choosing", _head()]
    for above in sorted({trial.above for trial in trials if trial.above is not None}):
        chosen = [trial for trial in trials if not trial.is_report]
        lines.append(_row(f"level {above:g}", chosen, above, draws=draws, seed=seed))
    lines += ["", f"Reported pictures, level {level:g}", _head()]
    for attribute in (*ATTRIBUTES, "all"):
        chosen = [trial for trial in trials if trial.is_report and attribute in (trial.attribute, "all")]
        if chosen:
            lines.append(_row(attribute, chosen, level, draws=draws, seed=seed))
    return "\n".join(lines)


def _head() -> str:
    return f"{'':<12} {'without: identical':>26} {'with: success':>26} {'without the condition':>26}"


def _row(name: str, trials: Sequence[Trial], level: float, *, draws: int, seed: int) -> str:
    absent = [trial for trial in trials if not trial.is_present and trial.above == level]
    present = [trial for trial in trials if trial.is_present and trial.above == level]
    plain = [trial for trial in trials if trial.is_present and trial.above is None]
    cells = [
        _share([trial.is_identical for trial in absent], draws=draws, seed=seed),
        _share([trial.is_success for trial in present], draws=draws, seed=seed),
        _share([trial.is_success for trial in plain], draws=draws, seed=seed),
    ]
    return f"{name:<12} " + " ".join(f"{cell:>26}" for cell in cells)


def _share(hits: Sequence[bool], *, draws: int, seed: int) -> str:
    if not hits:
        return "-"
    values = np.array(hits, dtype=float)
    counts = np.random.default_rng(seed).multinomial(len(values), np.full(len(values), 1 / len(values)), draws)
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}] n={len(values)}"
