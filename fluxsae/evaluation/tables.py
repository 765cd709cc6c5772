"""Evaluations as aligned plain text."""

from collections.abc import Sequence

from fluxsae.evaluation.flow import FlowQuality, FlowReport
from fluxsae.evaluation.reconstruction import ReconstructionReport, TransferCell


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
