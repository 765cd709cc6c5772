"""The steering laboratory's findings as aligned plain text."""

from collections.abc import Sequence

from fluxsae.evaluation.tables import text_table
from fluxsae.laboratory.config import DIRECTIONS, Direction
from fluxsae.laboratory.outcomes import Tally
from fluxsae.laboratory.steering_report import TARGET_ATTRIBUTES, EditSettings, LaboratoryReport
from fluxsae.miniature.scenes import ATTRIBUTES

ARMS = ("feature", "random direction", "random feature", "rivals alone", "difference of means", "prompt")
GOALS = {"amplify": 0.6, "suppress": 0.8}
"""Success that is aimed at, at a specificity of 0.8, over colours, textures and backgrounds."""


def laboratory_text(report: LaboratoryReport) -> str:
    """Defaults, the means over attributes, every concept, the dose-response curves and the trials."""
    parts = [_defaults_text(report)]
    for direction in DIRECTIONS:
        parts += [_summary_text(report, direction), _concepts_text(report, direction), _curve_text(report, direction)]
        parts.append(_trials_text(report, direction))
    if report.skipped:
        parts.append("\n".join(["not reported:", *report.skipped]))
    return "\n\n".join(part for part in parts if part)


def describe_settings(chosen: EditSettings) -> str:
    """Settings in one line."""
    start, stop = chosen.steps
    how = f"{chosen.mode} {chosen.strength:g} at {chosen.hookpoint}, steps {start} to {stop - 1}, {chosen.where}"
    how += f", up to {chosen.together} features together" if chosen.together > 1 else ""
    return how + (", rivals taken away" if chosen.without_rivals else "")


def _defaults_text(report: LaboratoryReport) -> str:
    return "\n".join(f"{direction}: {describe_settings(chosen)}" for direction, chosen in report.defaults.items())


def _summary_text(report: LaboratoryReport, direction: Direction) -> str:
    groups: list[tuple[str, Sequence[str]]] = [("colour, texture, background", TARGET_ATTRIBUTES)]
    groups += [(name, (name,)) for name in ATTRIBUTES]
    rows = []
    for name, attributes in groups:
        cells = [report.group(direction, attributes, arm) for arm in ARMS]
        if any(cells):
            rows.append(
                [name, *("-" if cell is None else " / ".join(f"{value:.2f}" for value in cell) for cell in cells)]
            )
    head = [f"{direction} (aim {GOALS[direction]:.2f} / 0.80): success / specificity / others unchanged", *ARMS]
    return "\n".join([text_table(head, rows), *_headline_text(report, direction)])


def _headline_text(report: LaboratoryReport, direction: Direction) -> list[str]:
    found = report.headline(direction)
    if found is None:
        return []
    success, specificity = found
    return [f"colours, textures and backgrounds, 95 % intervals: success {success}, specificity {specificity}"]


def _concepts_text(report: LaboratoryReport, direction: Direction) -> str:
    rows = [
        [
            str(result.concept),
            " ".join(map(str, result.features)),
            str(next(iter(result.arms.values())).n),
            *(_cell(result.arms.get(arm)) for arm in ARMS),
            "-" if result.breaking_strength is None else f"{result.breaking_strength:g}",
        ]
        for result in report.results
        if result.direction == direction and result.arms
    ]
    return text_table([direction, "features", "n", *ARMS, "specificity falls at"], rows) if rows else ""


def _cell(tally: Tally | None) -> str:
    return "-" if tally is None else f"{tally.success.value:.2f} / {tally.specificity.value:.2f}"


def _curve_text(report: LaboratoryReport, direction: Direction) -> str:
    """Mean over the targeted concepts at each strength."""
    results = [
        result
        for result in report.results
        if result.direction == direction and result.concept.attribute in TARGET_ATTRIBUTES and result.curve
    ]
    if not results:
        return ""
    rows = []
    for strength in results[0].curve:
        tallies = [result.curve[strength] for result in results if strength in result.curve]
        columns = [
            [getattr(tally, name).value for tally in tallies] for name in ("success", "specificity", "unchanged")
        ]
        rows.append([f"{strength:g}", *(f"{sum(column) / len(column):.2f}" for column in columns)])
    return text_table([f"{direction}: strength", "success", "specificity", "others unchanged"], rows)


def _trials_text(report: LaboratoryReport, direction: Direction) -> str:
    trials = sorted((t for t in report.trials if t.direction == direction), key=lambda trial: -trial.merit)
    rows = [
        [
            describe_settings(trial.settings),
            *(f"{v:.2f}" for v in (trial.success, trial.specificity, trial.unchanged)),
        ]
        for trial in trials
    ]
    return text_table([f"tried to {direction} (on other pictures)", "success", "specificity", "others unchanged"], rows)
