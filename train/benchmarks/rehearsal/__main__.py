"""A whole run at the true widths of a FLUX with random weights: seconds and peak memory of each stage.

    python -m train.benchmarks rehearsal
    python -m train.benchmarks rehearsal --model flux2-klein
    python -m train.benchmarks rehearsal --model tiny        # tries the rehearsal itself, in two minutes

The transformer is 3072 wide with 24 heads, the text 4096 wide (klein: 7680), the autoencoder's configuration the real
one; there are 2 + 2 blocks instead of 19 + 38 (klein: 5 + 20), so that all fits in 16 GB of memory. It shows that
every stage works in bfloat16 and on an image that is not square, and what it costs; the features mean nothing. Stopped
at any moment, the same command continues.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.files import write_text
from fluxsae.runs.folder import RunFolder
from train.benchmarks.options import RehearsalConfig
from train.benchmarks.rehearsal.clock import Timing, timed_program
from train.benchmarks.rehearsal.models import SCALES
from train.benchmarks.rehearsal.page import measure_page

STEP = 2
LEAST_IMAGES = 10
"""Every tenth collected image is held out, and without any `fit` fails."""
PROMPT = "a red fox in the snow"
Parts = dict[str, Callable[[], list[Timing]]]


def main(config: RehearsalConfig) -> list[Timing]:
    """Runs what is not done yet, prints the table, and deletes the scratch folder.

    Raises:
        FluxSaeError: too few images, or a stage fails.
    """
    if config.n_images < LEAST_IMAGES:
        raise FluxSaeError(
            f"n_images is {config.n_images}; give at least {LEAST_IMAGES}, since every tenth is held out."
        )
    folder = config.folder or Path(tempfile.gettempdir()) / f"fluxsae-rehearsal-{config.model}"
    notes = folder / "rehearsal.json"
    done = _load(notes, config)
    for name, work in _parts(config, folder).items():
        if name in done:
            print(f"{name}: done before")
            continue
        done[name] = work()
        saved = {part: [asdict(timing) for timing in timings] for part, timings in done.items()}
        write_text(notes, json.dumps({"for": _key(config), "done": saved}, indent=2))
    timings = [timing for part in done.values() for timing in part]
    table = format_table(timings)
    print(f"\n{table}")
    if config.out is not None:
        write_text(config.out, table + "\n")
    if not config.keep:
        shutil.rmtree(folder)
    return timings


def format_table(timings: Sequence[Timing]) -> str:
    """The figures as a table in Markdown."""
    rows = [
        f"| {t.name} | {t.seconds:,.1f} | {'' if t.peak_gb is None else f'{t.peak_gb:.1f}'} | {t.note} |"
        for t in timings
    ]
    return "\n".join(["| stage | seconds | peak memory, GB | |", "|---|---:|---:|---|", *rows])


def _parts(config: RehearsalConfig, folder: Path) -> Parts:
    flux, run, scale = folder / "flux", RunFolder(folder / "run"), SCALES[config.model]
    place = ("--run", run.path)
    opened = (*place, "--flux", flux)
    images = ("--images", config.n_images, "--batch-size", 4)
    fit = ("--n-features", scale.n_features, "--k", scale.k, "--batch-size", 512, "--epochs", 4)
    programs: dict[str, tuple[str, tuple[object, ...]]] = {
        "build": ("train.benchmarks.rehearsal.models", ("--out", flux, "--model", config.model)),
        "collect": ("train.collect", (*opened, *images, "--steps", STEP)),
        "fit": ("train.fit", (*place, *fit)),
        "score": ("train.score", (*opened, *images)),
        "analyze": ("train.analyze", place),
        "embed": ("train.embed", place),
        "select": ("train.select", place),
        "directions": ("train.directions", place),
    }
    return {
        **{name: partial(_program, name, *program) for name, program in programs.items()},
        "page": lambda: measure_page(run, flux),
        "steer": lambda: [_steer(run, flux, folder)],
    }


def _program(name: str, module: str, options: Sequence[object]) -> list[Timing]:
    return [timed_program(name, module, options)]


def _steer(run: RunFolder, flux: Path, folder: Path) -> Timing:
    """An image with the highest ranked feature scaled."""
    hookpoint = run.hookpoints()[-1]
    feature = CardIndex(run, hookpoint).ranked[0]
    edit = ("--hookpoint", hookpoint, "--feature", feature, "--mode", "scale", "--strength", 3)
    out = ("--prompt", PROMPT, "--out", folder / "steered.png")
    return timed_program("steer", "train.steer", ("--run", run.path, "--flux", flux, *edit, *out))


def _key(config: RehearsalConfig) -> dict[str, object]:
    return {"model": config.model, "n_images": config.n_images}


def _load(notes: Path, config: RehearsalConfig) -> dict[str, list[Timing]]:
    """What an earlier, stopped rehearsal has done.

    Raises:
        FluxSaeError: it was one of something else.
    """
    if not notes.is_file():
        return {}
    saved = json.loads(notes.read_text(encoding="utf-8"))
    if saved["for"] != _key(config):
        raise FluxSaeError(f"{notes.parent} holds a rehearsal of {saved['for']}. Delete it, or name another --folder.")
    return {part: [Timing(**timing) for timing in timings] for part, timings in saved["done"].items()}
