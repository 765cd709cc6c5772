"""Evaluations as aligned plain text."""

from collections.abc import Sequence

import numpy as np

from fluxsae.evaluation.concept_report import METHODS, PROBE, ConceptReport
from fluxsae.evaluation.flow import FlowQuality, FlowReport
from fluxsae.evaluation.intervals import Estimate
from fluxsae.evaluation.reconstruction import ReconstructionReport, TransferCell
from fluxsae.evaluation.truths import HEADLINE_ATTRIBUTES
from fluxsae.miniature.scenes import ATTRIBUTES

MEASURES = ("iou", "pointing")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell: the first one flush left, the others flush right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def reconstruction_text(report: ReconstructionReport) -> str:
    """FVU, L0 and dead features, and FVU step by step."""
    summary = text_table(
        ["", f"{report.n_images} images, {report.n_tokens:,} tokens"],
        [
            ["FVU", str(report.fvu)],
            ["L0", str(report.l0)],
            ["dead features", f"{report.dead_share:.1%}"],
        ],
    )
    steps = text_table(["step", "FVU"], [[str(step), str(fvu)] for step, fvu in report.fvu_by_step.items()])
    return f"{summary}\n\n{steps}"


def transfer_text(cells: Sequence[TransferCell]) -> str:
    """FVU / L0 at every step (rows) and size (columns); * marks where the SAE was trained."""
    sizes = list(dict.fromkeys((cell.height, cell.width) for cell in cells))
    by_place = {(cell.step, cell.height, cell.width): cell for cell in cells}
    rows = []
    for step in dict.fromkeys(cell.step for cell in cells):
        here = [by_place[step, *size] for size in sizes]
        marks = ["*" if cell.is_trained else " " for cell in here]
        values = [f"{cell.fvu:.3f} / {cell.l0:4.1f}{mark}" for cell, mark in zip(here, marks, strict=True)]
        rows.append([str(step), f"{here[0].sigma:.3f}", *values])
    return text_table(["step", "sigma", *(f"{height} x {width} " for height, width in sizes)], rows)


def flow_text(report: FlowReport) -> str:
    """Flow losses, the share recovered, splice error and velocity FVU, step by step and over all."""
    source = "true latents" if report.uses_true_latents else "the model's own samples"
    rows = [_flow_row(str(step), quality) for step, quality in report.by_step.items()]
    table = text_table(
        ["step", "L clean", "L SAE", "L mean", "recovered", "splice error", "velocity FVU"],
        [*rows, _flow_row("all", report.overall)],
    )
    return f"{report.n_images} images, {source}, guidance {report.guidance_scale:g}\n{table}"


def _flow_row(name: str, quality: FlowQuality) -> list[str]:
    losses = [f"{loss:.4f}" for loss in (quality.loss_clean, quality.loss_sae, quality.loss_mean)]
    recovered = str(quality.recovered) if quality.recovered else "not resolved"
    return [name, *losses, recovered, str(quality.splice_error), str(quality.velocity_fvu)]


def concepts_text(report: ConceptReport) -> str:
    """Every concept's AUC by method, the ratios to the linear probe, localisation, labels and matches."""
    parts = [
        f"{report.n_images} images at steps {', '.join(map(str, report.steps))} "
        f"({report.n_unread} more were left out as unreadable); chosen on one half, reported on the other",
        _auc_text(report),
        _ratio_text(report),
        _localisation_text(report),
        _match_text(report),
    ]
    if report.skipped:
        parts.append(f"too few images: {', '.join(map(str, report.skipped))}")
    return "\n\n".join(parts)


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
