"""Several SAEs at a hook point: what is told and drawn of them when one was trained or measured."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxsae.flux.hookpoints import HookPoint
    from fluxsae.runs.folder import RunFolder


def report_variants(run: RunFolder, place: HookPoint) -> None:
    """Where a hook point has several SAEs: one table of them, and one plot among its sheets."""
    from fluxsae.evaluation.variants import draw_variants, measured_variants, variants_text

    found = measured_variants(run, place)
    if len(found) < 2:
        return
    png = io.BytesIO()
    draw_variants(found, title=f"SAEs at {place}").save(png, format="PNG", optimize=True)
    run.save_sheet(place, "variants", png.getvalue())
    print(f"\n{variants_text(found)}\n\nplot in {run.sheet_path(place, 'variants')}")
