"""Sweeps with what each variant did, measured at a run's own limits; edits and grids in words."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from PIL import Image

from fluxsae.flux import flux_identity, token_grid
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.grids import GridCell, GridRow
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import Mismatch
from fluxsae.sae.fingerprint import file_fingerprint
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.edits import SaeSource, SteeringEdit
from fluxsae.steering.measurements import EditMeasurement, EditRecorder, TokenLimits, measure_edit
from fluxsae.steering.naturalness import denoising_errors
from fluxsae.steering.sweeps import OnProgress, Origin, Variant, sweep

LIMITS_KEY: Final = "token_limits"
"""Where in a hook point's metrics.json the limits of clean tokens stand."""


def measured_sweep(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    variants: Sequence[Sequence[SteeringEdit]],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    distance: PerceptualDistance,
    embedder: ImageEmbedder | None = None,
    limits: Mapping[HookPoint, TokenLimits] | None = None,
    baseline: Image.Image | None = None,
    region_of: int | None = None,
    origin: Origin | None = None,
    max_batch: int | None = None,
    allow_mismatch: Collection[Mismatch] = (),
    on_progress: OnProgress | None = None,
) -> tuple[list[Variant], list[EditMeasurement]]:
    """A sweep and what each variant did to the baseline: `baseline`, or the first variant, which is then unedited.

    `region_of` is the variant whose touched tokens divide inside from outside for all; None: each variant's own.
    """
    recorder = EditRecorder(pipe, saes, variants, limits=limits)
    with recorder.watch():
        found = sweep(
            pipe,
            saes,
            variants,
            prompt=prompt,
            seed=seed,
            settings=settings,
            origin=origin,
            max_batch=max_batch,
            allow_mismatch=allow_mismatch,
            on_edit=recorder.record,
            on_progress=on_progress,
        )
    before = found[0].image if baseline is None else baseline
    region = None if region_of is None else recorder.recorded[region_of].touched
    plain, *errors = denoising_errors(pipe, [before, *(variant.image for variant in found)], settings)
    measured = [
        measure_edit(
            before,
            variant.image,
            seen,
            grid=token_grid(pipe, settings),
            distance=distance,
            embedder=embedder,
            prompt=prompt,
            region=region,
            denoising_errors=(plain, error),
        )
        for variant, seen, error in zip(found, recorder.recorded, errors, strict=True)
    ]
    return found, measured


def load_limits(run: RunFolder, hookpoint: HookPoint) -> TokenLimits | None:
    """The limits of clean tokens that a run has measured, if it has."""
    values = run.load_metrics(hookpoint).get(LIMITS_KEY)
    return None if values is None else TokenLimits.from_dict(values)


def run_origin(run: RunFolder, pipe: Any, *, source: str | None = None) -> Origin:
    """Where the models of a run's recipes come from; `source` is the folder or Hub repository to write down."""
    saes = tuple(
        SaeSource(
            place,
            source or str(run.path),
            run.sae_subfolder(place),
            fingerprint=file_fingerprint(run.sae_path(place)),
        )
        for place in run.sae_names()
        if run.has_sae(place)
    )
    return Origin(run.load_info().flux_id, flux_identity(pipe).revision, saes)


def describe_edit(edit: SteeringEdit) -> str:
    """What an edit does, in a few words."""
    if edit.is_identity:
        return "unchanged"
    if edit.mode == "add":
        return f"{edit.strength:+g} × usual"
    if edit.mode == "scale" and edit.strength < 1:
        return f"{1 - edit.strength:.0%} taken away" if edit.strength >= 0 else f"{1 - edit.strength:.2g} × taken away"
    words = {
        "scale": "× {:g}",
        "clamp": "set to {:g} × usual",
        "ablate": "{:.0%} ablated",
        "project_out": "{:.0%} projected out",
    }
    return words[edit.mode].format(edit.strength)


def edit_direction(edit: SteeringEdit) -> int:
    """-1 where an edit turns its feature down, 1 where up, 0 where it does nothing."""
    if edit.is_identity:
        return 0
    less = {"scale": edit.strength < 1, "add": edit.strength < 0, "clamp": edit.strength < 1}
    return -1 if less.get(edit.mode, True) else 1


def grid_row(
    variants: Sequence[Variant],
    measured: Sequence[EditMeasurement],
    *,
    label: str | None,
    detail: str,
) -> GridRow:
    """A row of a steering grid: one feature's variants, each with its words and its distance."""
    feature = next(edit.feature for variant in variants for edit in variant.edits)
    cells = [
        GridCell(
            variant.image,
            ", ".join(map(describe_edit, variant.edits)) or "unchanged",
            f"distance {measurement.distance:.3f}" if variant.edits else "the image as it is",
            max(map(edit_direction, variant.edits), key=abs, default=0),
            measurement.looks_natural,
        )
        for variant, measurement in zip(variants, measured, strict=True)
    ]
    return GridRow(feature, label or "no label", detail, cells)
