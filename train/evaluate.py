"""Measures a run's SAEs: reconstruction, transfer, flow loss, concepts, steering, pairs, an audit of the measures.

    python -m train.evaluate --run fluxsae/miniature/run --reconstruction --concepts

Without a flag: reconstruction, transfer and flow, and concepts where the run is of the miniature. What each costs is
printed before it starts. Nothing is written unless --write is given; then the results go into metrics.json, from where
the model card takes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxsae.flux.hookpoints import HookPoint
from fluxsae.laboratory.config import EvaluationConfig
from fluxsae.sae.config import Mismatch
from train.command import Bars, start
from train.flux_options import open_flux
from train.variants import report_variants

if TYPE_CHECKING:
    from fluxsae.laboratory.evaluate import Evaluation, Part


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What to measure."""

    run: Path = Path("runs/miniature")
    """Run folder with trained SAEs and scored images."""
    reconstruction: bool = False
    """FVU, L0, density and dead features on fresh images."""
    transfer: bool = False
    """FVU and L0 at every step and at other sizes: where an SAE may be used."""
    flow: bool = False
    """Flow loss recovered, splice error and velocity FVU."""
    concepts: bool = False
    """Features against true concepts, beside channels, PCA, random directions and linear probes (miniature only)."""
    steering: bool = False
    """The steering laboratory: edits of matched features, read back from the pictures (miniature only)."""
    pairs: bool = False
    """Features on pairs of drawn scenes that differ in one attribute, beside an untrained SAE (miniature only)."""
    audit: bool = False
    """Our own measures on trained, untrained and other dictionaries: which of them tell these apart."""
    write: bool = False
    """Write the results into the metrics.json of each SAE."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, all that have an SAE."""
    flux: str | None = None
    """Local folder or Hub repository of the FLUX; left out, the one that the run names."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    allow_mismatch: tuple[Mismatch, ...] = ()
    """What may differ from what the SAEs were trained on, by name."""
    settings: EvaluationConfig = field(default_factory=EvaluationConfig)


def main(config: EvaluateConfig, *, pipe: Any = None) -> dict[HookPoint, Evaluation]:
    """Measures, prints the tables and, where asked, writes them; `pipe` is an already opened FLUX, if there is one."""
    from fluxsae.flux import flux_identity
    from fluxsae.laboratory.evaluate import MINIATURE, evaluate
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    info = run.load_info()
    if pipe is None:
        pipe = open_flux(config.flux, info.flux_id, info.flux_revision, device=config.device)
    with Bars() as bars:
        found = evaluate(
            run,
            pipe,
            parts=_parts(config, is_miniature=flux_identity(pipe).flux_id == MINIATURE),
            hookpoints=config.hookpoints,
            config=config.settings,
            write=config.write,
            tell=lambda line: print(line, flush=True),
            allow_mismatch=config.allow_mismatch,
            on_progress=bars,
        )
    for hookpoint, evaluation in found.items():
        print(f"\n{hookpoint}\n{'=' * len(str(hookpoint))}")
        print("\n\n".join(_sections(evaluation)))
        written = f"written to {run.metrics_path(hookpoint)}" if config.write else "not written (--write does)"
        print(f"\n{written}")
    for place in sorted({name.place for name in found}) if config.write else ():
        report_variants(run, place)
    return found


def _parts(config: EvaluateConfig, *, is_miniature: bool) -> list[Part]:
    from fluxsae.laboratory.evaluate import PARTS

    asked: list[Part] = [name for name in PARTS if getattr(config, name)]
    usual: list[Part] = ["reconstruction", "transfer", "flow", *(("concepts",) if is_miniature else ())]
    return asked or usual


def _sections(evaluation: Evaluation) -> list[str]:
    from fluxsae.evaluation.tables import flow_text, reconstruction_text, transfer_text
    from fluxsae.laboratory.audit_tables import audit_text, pairs_text
    from fluxsae.laboratory.concept_tables import concepts_text
    from fluxsae.laboratory.steering_tables import laboratory_text

    sections = []
    if evaluation.reconstruction is not None:
        sections.append(f"Reconstruction\n{reconstruction_text(evaluation.reconstruction)}")
    if evaluation.transfer is not None:
        sections.append(f"Transfer: FVU / L0\n{transfer_text(evaluation.transfer)}")
    if evaluation.flow is not None:
        sections.append(f"Flow\n{flow_text(evaluation.flow)}")
    if evaluation.concepts is not None:
        sections.append(f"Concepts\n{concepts_text(evaluation.concepts)}")
    if evaluation.pairs is not None:
        sections.append(f"Pairs\n{pairs_text(evaluation.pairs)}")
    if evaluation.audit is not None:
        sections.append(f"Audit\n{audit_text(evaluation.audit)}")
    if evaluation.steering is not None:
        sections.append(f"Steering\n{laboratory_text(evaluation.steering)}")
    return sections


if __name__ == "__main__":
    start(main, EvaluateConfig, __doc__)
