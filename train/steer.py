"""Makes an image with features turned up or down, beside the image without, or the image of a recipe once more.

    python -m train.steer --prompt "a red star on a black background" --feature 1 --mode add --strength 0.3
    python -m train.steer --recipe steered.png

A picture carries its recipe: the second command makes it again, bit for bit the same on the same machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature import miniature_path
from fluxsae.sae.config import Mismatch
from fluxsae.steering.conditions import Condition
from fluxsae.steering.edits import (
    HeatmapRegion,
    Mode,
    Recipe,
    SteeringEdit,
    load_recipes,
    parse_edits,
    png_bytes,
    with_features,
)
from train.command import start
from train.flux_options import open_flux
from train.outputs import check_png_path

if TYPE_CHECKING:
    import torch

    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.steering.measurements import EditMeasurement
    from fluxsae.steering.sweeps import Variant


EMBEDDED = "miniature"


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """What is turned, in which image."""

    prompt: str | None = None
    """What the image shows."""
    feature: int | None = None
    """Number of the feature that is turned."""
    mode: Mode = "add"
    """scale, add, clamp, ablate or project_out."""
    strength: float = 0.3
    """scale: factor; add, clamp: multiples of the feature's usual activation; ablate, project_out: 0 to 1."""
    steps: tuple[int, int] | None = None
    """Window [start, stop) of steps that are edited; left out, the noise levels the SAE was trained on."""
    heatmap: float | None = None
    """Edit only where the feature itself fires above this fraction of its usual activation."""
    when: str | None = None
    """Edit only images in which this is there: a label, or the number of a feature of the same hook point."""
    when_above: float = 0.5
    """From which multiple of its usual activation it counts as there; 0: it fires at all."""
    edits: str | None = None
    """JSON list of edits, or a file that holds one, in place of --feature and what belongs to it."""
    recipe: Path | None = None
    """PNG or JSON file that fluxsae wrote: its image is made again, and nothing else is asked."""
    index: int = 0
    """Which recipe of the file, where it holds several (a grid)."""
    run: Path | None = None
    """Run folder with the SAEs; left out, the embedded miniature's, or the one that the recipe names."""
    flux: str | None = None
    """Local folder or Hub repository of the FLUX; left out, the one that the run or the recipe names."""
    hookpoint: str | None = None
    """Hook point of the feature; left out, the last of the run."""
    seed: int = 0
    """Seed of the image."""
    num_inference_steps: int | None = None
    """Denoising steps; left out, the run's own number."""
    distance: str = "random-features"
    """Perceptual distance: lpips (fetches its network once) or random-features (needs no network)."""
    allow_mismatch: tuple[Mismatch, ...] = ()
    """What may differ from what the SAEs were trained on, by name."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    out: Path = Path("steered.png")
    """The picture to write, PNG with its recipe; beside it the recipe as .json and the unedited image, -before.png."""


def main(config: SteerConfig) -> Variant:
    """Writes the picture and its recipe and prints what the edit did."""
    from fluxsae.features.cards import CardIndex
    from fluxsae.files import write_bytes
    from fluxsae.flux import execution_device
    from fluxsae.pictures.perceptual import load_distance, load_embedder
    from fluxsae.runs.folder import RunFolder
    from fluxsae.steering.demos import describe_edit, load_limits, measured_sweep, run_origin

    check_png_path(config.out)
    if config.recipe is not None:
        return _again(config, config.recipe)
    if config.prompt is None:
        raise FluxSaeError("prompt is missing; give --prompt, or --recipe with a file that fluxsae wrote.")
    run = RunFolder(config.run or miniature_path("run"))
    edits = with_features(_edits(config, run), lambda place, label: CardIndex(run, place).named().get(label, ()))
    info = run.load_info()
    pipe = open_flux(config.flux, info.flux_id, info.flux_revision, device=config.device)
    saes = load_saes(run, edits, device=execution_device(pipe))
    n_steps = config.num_inference_steps or info.settings.num_inference_steps
    limits = {place: found for place in saes if (found := load_limits(run, place)) is not None}
    variants, measured = measured_sweep(
        pipe,
        saes,
        [(), edits],
        prompt=config.prompt,
        seed=config.seed,
        settings=replace(info.settings, num_inference_steps=n_steps),
        distance=load_distance(config.distance, device=str(execution_device(pipe))),
        embedder=load_embedder("miniature") if info.flux_id == EMBEDDED else None,
        limits=limits,
        origin=run_origin(run, pipe, source=EMBEDDED if run.path == miniature_path("run") else None),
        allow_mismatch=config.allow_mismatch,
    )
    write_image(config.out, variants[1])
    before = config.out.with_name(f"{config.out.stem}-before.png")
    write_bytes(before, png_bytes(variants[0].image, [variants[0].recipe]))
    print(f"{', '.join(map(describe_edit, edits))}: {config.out}, unedited: {before}")
    _print_measurement(measured[1])
    return variants[1]


def load_saes(
    run: RunFolder, edits: tuple[SteeringEdit, ...], *, device: torch.device
) -> dict[HookPoint, SparseAutoencoder]:
    """The run's SAEs that the edits name."""
    from fluxsae.sae.model import SparseAutoencoder

    places = sorted({run.check_sae(edit.hookpoint) for edit in edits})
    return {place: SparseAutoencoder.from_pretrained(run.sae_path(place), device=device) for place in places}


def write_image(path: Path, variant: Variant) -> None:
    """The picture as PNG with its recipe, and the recipe once more as JSON beside it."""
    from fluxsae.files import write_bytes, write_text

    write_bytes(path, png_bytes(variant.image, [variant.recipe]))
    write_text(path.with_suffix(".json"), json.dumps(variant.recipe.to_dict(), indent=2) + "\n")


def _edits(config: SteerConfig, run: RunFolder) -> tuple[SteeringEdit, ...]:
    if config.edits is not None:
        path = Path(config.edits)
        is_file = not config.edits.lstrip().startswith("[") and path.is_file()
        return parse_edits(path.read_text(encoding="utf-8") if is_file else config.edits)
    if config.feature is None:
        raise FluxSaeError("feature is missing; give --feature, --edits or --recipe.")
    hookpoint = run.check_sae(config.hookpoint or run.default_sae())
    region = None if config.heatmap is None else HeatmapRegion(config.heatmap)
    edit = SteeringEdit(hookpoint, config.feature, config.mode, config.strength, steps=config.steps, region=region)
    return (replace(edit, when=_condition(config)),)


def _condition(config: SteerConfig) -> Condition | None:
    if config.when is None:
        return None
    named = {"features": (int(config.when),)} if config.when.isdecimal() else {"label": config.when}
    return Condition(above=config.when_above, **named)


def _again(config: SteerConfig, path: Path) -> Variant:
    import torch

    from fluxsae.flux import execution_device
    from fluxsae.steering.sweeps import reproduce

    recipes = load_recipes(path)
    if not 0 <= config.index < len(recipes):
        raise FluxSaeError(f"index is {config.index}; {path} holds recipes 0 to {len(recipes) - 1}.")
    recipe = recipes[config.index]
    pipe = open_flux(
        config.flux,
        recipe.flux_id,
        recipe.flux_revision,
        device=config.device or recipe.device,
        dtype=getattr(torch, recipe.dtype),
    )
    saes = _recipe_saes(recipe, config.run, device=execution_device(pipe))
    variant = reproduce(pipe, saes, recipe, allow_mismatch=config.allow_mismatch)
    match = describe_match(path, variant.image)  # before the file is written: it may be the recipe's own
    write_image(config.out, variant)
    print(f"{path} made again: {config.out} ({match})")
    return variant


def describe_match(path: Path, image: Image.Image) -> str:
    """Whether an image equals the one in the recipe's file, where that is a picture of one image."""
    if path.suffix.lower() != ".png":
        return "the file holds no picture to compare with"
    with Image.open(path) as original:
        if original.size != image.size:
            return "the file's picture shows several images"
        same = original.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    return "bit for bit the same" if same else "NOT bit for bit the same as the file's picture"


def _recipe_saes(recipe: Recipe, run: Path | None, *, device: torch.device) -> Mapping[HookPoint, SparseAutoencoder]:
    from fluxsae.runs.folder import RunFolder

    needed = {edit.hookpoint for edits in recipe.batch for edit in edits}
    if run is not None:
        edits = tuple(edit for item in recipe.batch for edit in item)
        return load_saes(RunFolder(run), edits, device=device)
    sources = {source.hookpoint: source for source in recipe.saes}
    missing = sorted(needed - set(sources))
    if missing:
        raise FluxSaeError(
            f"The recipe does not say where the SAE of {missing[0]} comes from; give its run with --run."
        )
    return {place: _load_source(sources[place], device) for place in sorted(needed)}


def _load_source(source: Any, device: torch.device) -> SparseAutoencoder:
    from fluxsae.sae.model import SparseAutoencoder

    path = str(miniature_path("run")) if source.path in (EMBEDDED, "embedded") else source.path
    return SparseAutoencoder.from_pretrained(
        path, subfolder=source.subfolder or None, revision=source.revision, device=device
    )


def _print_measurement(measured: EditMeasurement) -> None:
    values = {name: value for name, value in measured.to_dict().items() if name != "natural"}
    for name, value in {**values, "looks_natural": str(measured.looks_natural)}.items():
        print(f"  {name:<22}{value if isinstance(value, str) or value is None else f'{value:.4g}'}")


if __name__ == "__main__":
    start(main, SteerConfig, __doc__)
