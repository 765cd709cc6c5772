"""The steering laboratory's findings as aligned plain text."""

from collections.abc import Callable, Sequence

from fluxsae.evaluation.intervals import Estimate
from fluxsae.evaluation.tables import text_table
from fluxsae.laboratory.config import DIRECTIONS, TARGET_ATTRIBUTES, Direction
from fluxsae.laboratory.outcomes import Tally
from fluxsae.laboratory.steering_report import EditSettings, LaboratoryReport, mean_rate
from fluxsae.miniature.scenes import ATTRIBUTES

GOALS = {"amplify": 0.6, "suppress": 0.75}
"""What is aimed at: success with nothing else changed, over colours, textures and backgrounds."""
SWAP_GOAL = 0.75
COLUMNS = {"success": "success", "specificity": "specificity", "both": "both", "idle": "did nothing"}


def laboratory_text(report: LaboratoryReport) -> str:
    """The rates of all arms, swaps, every concept, the dose-response curves and the trials."""
    parts = []
    for direction in DIRECTIONS:
        parts += [_arms_text(report, direction), _attributes_text(report, direction)]
    parts += [_swaps_text(report, attribute) for attribute in ATTRIBUTES]
    for direction in DIRECTIONS:
        parts += [_concepts_text(report, direction), _curve_text(report, direction), _trials_text(report, direction)]
    return "\n\n".join(part for part in parts if part)


def describe_settings(chosen: EditSettings) -> str:
    """Settings in one line."""
    start, stop = chosen.steps
    how = f"{chosen.method}: {chosen.mode} {chosen.strength:g} at {chosen.hookpoint}, steps {start} to {stop - 1}, "
    how += chosen.where + (f", up to {chosen.together} features together" if chosen.together > 1 else "")
    return how + (", rivals taken away" if chosen.without_rivals else "")


def _arms_text(report: LaboratoryReport, direction: Direction) -> str:
    arms = report.arms(direction)
    if not arms:
        return ""
    head = f"{direction} (aim, both: {GOALS[direction]:.2f}), {', '.join(TARGET_ATTRIBUTES)}"
    return _rates_text(head, arms, lambda arm, rate: report.rate(direction, arm, rate))


def _swaps_text(report: LaboratoryReport, attribute: str) -> str:
    swaps = [swap for swap in report.swaps if swap.concept.attribute == attribute]
    if not swaps:
        return ""
    n = sum(swap.arms["another prompt"].n for swap in swaps)
    head = f"swap of {attribute} (aim, both: {SWAP_GOAL:.2f}), {n} attempts"
    arms = list(dict.fromkeys(arm for swap in swaps for arm in swap.arms))
    return _rates_text(head, arms, lambda arm, rate: report.swap_rate(attribute, arm, rate))


def _rates_text(head: str, arms: Sequence[str], rate_of: Callable[[str, str], Estimate | None]) -> str:
    rows = [[arm, *(_rate_cell(rate_of(arm, rate)) for rate in COLUMNS)] for arm in arms]
    return text_table([head, *COLUMNS.values()], rows)


def _rate_cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _attributes_text(report: LaboratoryReport, direction: Direction) -> str:
    attributes = [name for name in ATTRIBUTES if report.rate(direction, "features", "both", attributes=[name])]
    if not attributes:
        return ""
    return _rates_text(
        f"{direction}, features", attributes,
        lambda name, rate: report.rate(direction, "features", rate, attributes=[name]),
    )  # fmt: skip


def _concepts_text(report: LaboratoryReport, direction: Direction) -> str:
    arms = report.arms(direction)
    rows = [
        [
            str(result.concept),
            str(max(tally.n for tally in result.arms.values())),
            *(_cell(result.arms.get(arm)) for arm in arms),
            "-" if result.breaking_strength is None else f"{result.breaking_strength:g}",
            describe_settings(result.settings["features"]) if "features" in result.settings else "-",
        ]
        for result in report.results
        if result.direction == direction
    ]
    head = [f"{direction}: success / both", "n", *arms, "all else falls at", "settings"]
    return text_table(head, rows) if rows else ""


def _cell(tally: Tally | None) -> str:
    return (
        "-"
        if tally is None or not tally.n
        else f"{mean_rate([tally], 'success'):.2f} / {mean_rate([tally], 'both'):.2f}"
    )


def _curve_text(report: LaboratoryReport, direction: Direction) -> str:
    """Each concept's own strengths, as multiples of the chosen one's distance from no change."""
    curves = [list(r.curve.values()) for r in report.results if r.direction == direction and len(r.curve) > 1]
    if not curves:
        return ""
    rows = [
        [str(place + 1), *(f"{mean_rate(tallies, rate):.2f}" for rate in COLUMNS)]
        for place, tallies in enumerate(zip(*[c for c in curves if len(c) == len(curves[0])], strict=True))
    ]
    return text_table([f"{direction}: strengths, weakest first", *COLUMNS.values()], rows)


def _trials_text(report: LaboratoryReport, direction: Direction) -> str:
    trials = sorted((t for t in report.trials if t.direction == direction), key=lambda trial: -trial.both)
    rows = [
        [describe_settings(trial.settings), *(f"{v:.2f}" for v in (trial.success, trial.specificity, trial.both))]
        for trial in trials
    ]
    return text_table([f"tried to {direction} (on other pictures)", "success", "specificity", "both"], rows)
