"""The SAEs of one hook point side by side: sparsity against what is lost, as a table and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.evaluation.tables import text_table
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName


@dataclass(frozen=True)
class MeasuredSae:
    """What was measured of one SAE; None where it was not."""

    name: SaeName
    architecture: str
    n_features: int
    fvu: float | None
    """Share of variance not explained on held-out images; lower is better."""
    l0: float | None
    """Features active on a token."""
    dead_share: float | None
    flow_loss_recovered: float | None
    """Of what replacing the activations by their mean costs FLUX; 1 is best."""


def measured_variants(run: RunFolder, place: HookPoint) -> list[MeasuredSae]:
    """The SAEs at a hook point, the main one first, with what metrics.json holds of each."""
    names = [name for name in run.sae_names() if name.place == place and run.has_sae(name)]
    return [_measured(name, run.load_sae_config(name), run.load_metrics(name)) for name in names]


def _measured(name: SaeName, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> MeasuredSae:
    keys = ("fvu", "l0", "dead_share", "flow_loss_recovered")
    values = [metrics.get(key) for key in keys]
    numbers = [value.get("value") if isinstance(value, Mapping) else value for value in values]
    return MeasuredSae(name, config["architecture"], config["n_features"], *numbers)


def variants_text(found: Sequence[MeasuredSae]) -> str:
    """One line an SAE, with a dash where nothing was measured."""

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [str(sae.name), sae.architecture, f"{sae.n_features:,}", shown(sae.l0, ".1f"), shown(sae.fvu, ".4f"),
         shown(sae.dead_share, ".1%"), shown(sae.flow_loss_recovered, ".3f")]
        for sae in found
    ]  # fmt: skip
    return text_table(["SAE", "kind", "features", "L0", "FVU", "dead", "flow loss recovered"], rows)


def draw_variants(found: Sequence[MeasuredSae], *, title: str) -> Image.Image:
    """FVU against L0, both on logarithmic axes; the share of dead features and the flow loss stand at each point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # the object interface: pyplot keeps global state
    figure = Figure(figsize=(7.6, 4.8), dpi=130, layout="constrained")
    axes = figure.subplots()
    known = [(sae, sae.l0, sae.fvu) for sae in found if sae.fvu is not None and sae.l0 is not None]
    for kind in dict.fromkeys((sae.architecture, sae.n_features) for sae, _, _ in known):
        line = sorted((l0, fvu) for sae, l0, fvu in known if (sae.architecture, sae.n_features) == kind)
        axes.plot(*zip(*line, strict=True), marker="o", label=f"{kind[0]}, {kind[1]:,} features")
    for sae, l0, fvu in known:
        notes = [sae.name.variant or "main"]
        notes += [] if sae.dead_share is None else [f"{sae.dead_share:.0%} dead"]
        notes += [] if sae.flow_loss_recovered is None else [f"flow {sae.flow_loss_recovered:.2f}"]
        axes.annotate(", ".join(notes), (l0, fvu), xytext=(6, 5), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("features active on a token (L0)")
    axes.set_ylabel("variance not explained (FVU)")
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
