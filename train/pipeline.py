"""Runs all stages in order, in one process: from prompts to a browsable run.

    python -m train.pipeline --recipe miniature
    python -m train.pipeline --recipe flux-dev-evening
    python -m train.pipeline --recipe runs/mine/run.toml --run runs/again
    python -m train.pipeline --flux miniature --run runs/small --set fit.k=16 score.images=400
    python -m train.pipeline --flux miniature --set render.n_features=60 --from render --force
    python -m train.pipeline --only select render --force

A stage that is complete with the same settings is skipped; other settings are an error; --force runs it again. A stage
that was stopped continues where it stopped. The recipe is saved into the run as run.toml, with what was changed.
`python -m train.cost --recipe ...` prints beforehand what a recipe costs.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fluxsae.errors import FluxSaeError
from fluxsae.miniature import miniature_path
from train.command import start
from train.recipes import (
    RECIPES,
    SCRIPTS,
    Recipe,
    RecipeOptions,
    build_recipe,
    build_stage_configs,
    parse_recipe_options,
)
from train.stages import STAGES, StageName, StageResult, check_push, format_table, push_complete
from train.steer import EMBEDDED

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder


_OPENS_FLUX: tuple[StageName, ...] = ("collect", "score")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(RecipeOptions):
    """What to run. Options of a stage are given by --set or in a recipe; what is given here goes to every stage."""

    run: Path | None = None
    """Run folder; left out, runs/ and the name of the bundled recipe, or else of FLUX."""
    from_: Annotated[StageName | None, tyro.conf.arg(name="from")] = None
    """Start with this stage; those before it must be complete already."""
    only: tuple[StageName, ...] = ()
    """Run these stages alone."""
    force: bool = False
    """Do the chosen stages again, also where they are complete."""
    push_to: str | None = None
    """Hub repository (user/name) that gets the run when all chosen stages are complete."""
    export: Path | None = None
    """Folder that becomes a copy of the finished run without activations and unfinished work."""


def main(config: PipelineConfig) -> list[StageResult]:
    """Runs the chosen stages and prints one line for each."""
    from fluxsae.files import write_text
    from fluxsae.runs.folder import RunFolder

    recipe = build_recipe(config)
    chosen = choose_stages(config)
    if config.export is not None:
        check_export(config.export)
    check_push(config.push_to)
    run = RunFolder(config.run or Path("runs") / _default_name(config))
    configs = {stage: build_stage_configs(stage, recipe, run, force=config.force) for stage in chosen}
    if not config.only and config.from_ is None:
        if not config.force:
            _refuse_other_flux(run, recipe)
        write_text(run.toml_path, recipe.to_toml())
    open_flux = functools.cache(config.open)
    results = []
    for stage in chosen:
        extra = {"open_flux": open_flux} if stage in _OPENS_FLUX else {}
        found = [SCRIPTS[stage].main(own, **extra) for own in configs[stage]]
        results += [result for result in found if result is not None]
    print("\n" + format_table(results))
    if config.export is not None:
        export_run(run, config.export)
    push_complete(run, config.push_to)
    return results


def _refuse_other_flux(run: RunFolder, recipe: Recipe) -> None:
    """Refuses the folder of another FLUX's run, before its recipe is replaced and a FLUX is loaded."""
    if not run.toml_path.is_file():
        return
    present, asked = RecipeOptions.from_recipe(str(run.toml_path)).flux, recipe.flux["flux"]
    if present != asked:
        raise FluxSaeError(f"{run.path} is a run of {present}, not of {asked}. Name another --run folder.")


def _default_name(config: PipelineConfig) -> str:
    return config.recipe if config.recipe in RECIPES else Path(config.flux).name


def check_export(target: Path) -> None:
    """Refuses to replace a file, or a folder that holds something other than a run.

    Raises:
        FluxSaeError: it does.
    """
    from fluxsae.runs.folder import RunFolder

    is_empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not is_empty and not RunFolder(target).exists():
        raise FluxSaeError(f"{target} holds something that is no run. Name a new folder, or one that holds a run.")


def export_run(run: RunFolder, target: Path) -> None:
    """Makes `target` a copy of what the Hub would have of the run; an older run there is replaced as a whole.

    Raises:
        FluxSaeError: `target` holds something that is no run.
    """
    from fluxsae.runs.folder import RunFolder

    check_export(target)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in run.published_files():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path / name, fresh / name)
    name = EMBEDDED if target.resolve() == miniature_path("run").resolve() else str(target)
    _rename_source(RunFolder(fresh), str(run.path), name)
    if target.exists():
        shutil.rmtree(target)
    fresh.rename(target)
    megabytes = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) / 1e6
    print(f"exported {len(run.published_files())} files, {megabytes:.1f} MB, to {target}")


def _rename_source(copy: RunFolder, old: str, new: str) -> None:
    """Lets every recipe of the copied demos name the copy."""
    from fluxsae.files import write_text

    for path in [of(hookpoint) for of in (copy.demos_path, copy.swaps_path) for hookpoint in copy.sae_names()]:
        if path.exists():
            renamed = path.read_text().replace(f'"source": {json.dumps(old)}', f'"source": {json.dumps(new)}')
            write_text(path, renamed)


def choose_stages(config: PipelineConfig) -> list[StageName]:
    """The stages to run, in order.

    Raises:
        FluxSaeError: both --from and --only are given.
    """
    if config.only and config.from_ is not None:
        raise FluxSaeError("--from and --only contradict each other. Give one of them.")
    first = STAGES.index(config.from_) if config.from_ is not None else 0
    wanted = config.only or [stage for stage in STAGES[first:] if stage not in config.skip]
    return [stage for stage in STAGES if stage in wanted]


def parse_arguments(arguments: Sequence[str]) -> PipelineConfig:
    """The config of a command line."""
    return parse_recipe_options(PipelineConfig, arguments, __doc__)


if __name__ == "__main__":
    start(main, parse_arguments)
