"""What the features know of true concepts, as aligned plain text."""

import numpy as np

from fluxsae.evaluation.intervals import Estimate
from fluxsae.evaluation.tables import text_table
from fluxsae.laboratory.concept_report import METHODS, PROBE, ConceptReport
from fluxsae.laboratory.truths import HEADLINE_ATTRIBUTES
from fluxsae.miniature.scenes import ATTRIBUTES

MEASURES = ("iou", "pointing")


def concepts_text(report: ConceptReport) -> str:
    """Every concept's AUC by method, the ratios to the linear probe, localisation, labels and matches."""
    parts = [
        f"{report.n_images} images at steps {', '.join(map(str, report.steps))} "
        f"({report.n_unread} more were left out as unreadable{_left_out_text(report)}); "
        "chosen on one half, reported on the other",
        _auc_text(report),
        _ratio_text(report),
        _localisation_text(report),
        _match_text(report),
    ]
    if report.skipped:
        parts.append(f"too few images: {', '.join(map(str, report.skipped))}")
    return "\n\n".join(parts)


def _left_out_text(report: ConceptReport) -> str:
    return f", {report.n_left_out} for NaN or infinite numbers" if report.n_left_out else ""


def _auc_text(report: ConceptReport) -> str:
    head = ["AUC", "images", "feature", *METHODS, "label"]
    rows = [
        [
            str(score.concept),
            str(score.n_images),
            str(score.methods[METHODS[0]].candidate),
            str(score.methods[METHODS[0]].auc),
            *(f"{score.methods[method].auc.value:.3f}" for method in METHODS[1:]),
            score.label or "-",
        ]
        for score in report.concepts
    ]
    return text_table(head, rows)


def _ratio_text(report: ConceptReport) -> str:
    head = ["(AUC - 0.5) / probe's", "mean of 4", *ATTRIBUTES]
    rows = [
        [method, str(report.ratio[method]), *(f"{report.attribute_ratio[method][name]:.2f}" for name in ATTRIBUTES)]
        for method in METHODS
        if method != PROBE
    ]
    kinds = ["stronger probe", "", *(report.probe_kind[name].removesuffix(" probe") for name in ATTRIBUTES)]
    return text_table(head, [*rows, kinds])


def _localisation_text(report: ConceptReport) -> str:
    measures = [(name, what) for what in MEASURES for name in ("mean of 4", *HEADLINE_ATTRIBUTES)]
    head = ["localisation", *(f"{name} {'IoU' if what == 'iou' else what}" for name, what in measures)]
    rows = []
    for method in METHODS:
        means = {(name, what): _mean(report, method, name, what) for name in HEADLINE_ATTRIBUTES for what in MEASURES}
        for what in MEASURES:
            means["mean of 4", what] = float(np.mean([means[name, what] for name in HEADLINE_ATTRIBUTES]))
        rows.append([method, *("-" if np.isnan(means[key]) else f"{means[key]:.3f}" for key in measures)])
    return text_table(head, rows)


def _mean(report: ConceptReport, method: str, attribute: str, what: str) -> float:
    found = [getattr(s.methods[method], what) for s in report.concepts if s.concept.attribute == attribute]
    known: list[Estimate] = [value for value in found if value is not None]
    return sum(value.value for value in known) / len(known) if known else float("nan")


def _match_text(report: ConceptReport) -> str:
    shares = ", ".join(f"{method} {share:.1%}" for method, share in report.matched_share.items())
    lines = [f"match some concept: {shares} ({report.n_matched} of {report.n_alive} alive features)"]
    if report.label_accuracy is not None:
        lines.append(f"labels of matched features that name the concept: {report.label_accuracy}")
    steps = ", ".join(f"{step}: {auc:.3f}" for step, auc in report.step_auc.items())
    lines.append(f"mean AUC of the best features from one step alone: {steps}")
    return "\n".join(lines)
