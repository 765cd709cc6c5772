"""The audit of our measures, and the pairs, as aligned plain text."""

from collections.abc import Mapping, Sequence

import numpy as np

from fluxsae.evaluation.intervals import Estimate
from fluxsae.evaluation.tables import text_table
from fluxsae.laboratory.audit import (
    KINDS,
    MEASURES,
    SEPARATES_FROM,
    TRAINED,
    AuditReport,
    Measured,
    rank_with_truth,
    separation,
)
from fluxsae.laboratory.pairs import PairResult, PairsReport

NOT_SEPARATING = "†"
"""Beside a measure by which trained SAEs are not told from untrained ones."""


def audit_text(report: AuditReport) -> str:
    """Each measure by kind of dictionary, and how far apart trained ones are, with and without massive channels."""
    parts = [
        f"{report.n_images} images; distance from trained SAEs in standard deviations of their seeds "
        f"(positive: trained are better); {NOT_SEPARATING}: below {SEPARATES_FROM:g} from untrained",
        _values_text(report.values, report.measures(), report.unseparated()),
    ]
    if report.massive_channels:
        channels = ", ".join(map(str, report.massive_channels))
        parts += [
            f"without the channels of massive activation ({channels})",
            _values_text(report.without_massive, report.measures(), []),
        ]
    else:
        parts.append("no channel's activation is massive")
    return "\n\n".join(parts)


def _values_text(values: Mapping[str, Sequence[Measured]], measures: Sequence[str], unseparated: Sequence[str]) -> str:
    kinds = [kind for kind in KINDS if values.get(kind)]
    rows = [
        [
            name + (NOT_SEPARATING if name in unseparated else ""),
            *(_cell(values, name, kind) for kind in kinds),
            _number(rank_with_truth(values, name)),
        ]
        for name in MEASURES
        if name in measures and any(name in one for one in values[TRAINED])
    ]
    return text_table(["measure", *kinds, "rank with truth"], rows)


def _cell(values: Mapping[str, Sequence[Measured]], name: str, kind: str) -> str:
    found = [one[name] for one in values[kind] if name in one]
    if not found or np.isnan(found).all():
        return "-"
    mean = f"{np.nanmean(found):.3f}"
    if kind == TRAINED:
        return mean + (f" (sd {np.std(found, ddof=1):.3f})" if len(found) > 1 else "")
    apart = separation(values, name, kind)
    return mean if np.isnan(apart) else f"{mean} ({apart:+.0f})"


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.2f}"


def pairs_text(report: PairsReport) -> str:
    """Shares of matched features that respond to their own attribute and to no other."""
    rows = [_pair_row("trained", report.trained), _pair_row("untrained", report.untrained)]
    head = f"step {report.step}, {report.n_pairs} pairs a concept and attribute"
    table = text_table([head, "matched", "own falls", "no other", "both"], rows)
    return f"{table}\ntrained minus untrained, both: {_share(report.difference)}"


def _pair_row(name: str, result: PairResult) -> list[str]:
    return [name, str(result.n_features), *map(_share, (result.right, result.selective, result.passes))]


def _share(estimate: Estimate | None) -> str:
    return "-" if estimate is None else f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
