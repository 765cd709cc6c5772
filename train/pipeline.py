"""Runs all stages in order, in one process: from prompts to a browsable run.

    python -m train.pipeline --flux miniature
    python -m train.pipeline --config run.toml
    python -m train.pipeline --flux miniature --set fit.k=16 score.n_images=400 --from score
    python -m train.pipeline --only select render --force

A stage that is complete is skipped, a stage that was cut off is taken up where it stopped. The options are saved into
the run as run.toml; a file of that form goes in by --config:

    [flux]
    flux = "miniature"
    [pipeline]
    hookpoints = ["layer1", "layer3"]
    [fit]                         # the options of `python -m train.fit`, with _ for -
    epochs = 20

Where hook points need other SAEs, [[fit]] stands once for each, with its own hookpoint = [...]; see miniature.toml.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from fluxsae.checked import describe
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature import miniature_path
from train import analyze, collect, directions, embed, find_demos, fit, render, score, select
from train.command import start
from train.flux_options import FluxOptions
from train.stages import StageResult, check_push, format_table, push_complete
from train.steer import EMBEDDED

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder


StageName = Literal["collect", "fit", "score", "analyze", "embed", "select", "directions", "render", "demos"]
PIPELINE_STAGES: tuple[StageName, ...] = get_args(StageName)
_REAL_CLIP = "ViT-B-32/laion2b_s34b_b79k"
MINIATURE_RECIPE = Path(__file__).parent / "recipes" / "miniature.toml"

_CONFIGS: dict[StageName, type[Any]] = {
    "collect": collect.CollectConfig,
    "fit": fit.FitConfig,
    "score": score.ScoreConfig,
    "analyze": analyze.AnalyzeConfig,
    "embed": embed.EmbedConfig,
    "select": select.SelectConfig,
    "directions": directions.DirectionsConfig,
    "render": render.RenderConfig,
    "demos": find_demos.FindDemosConfig,
}
_MAINS: dict[StageName, Callable[..., StageResult | None]] = {
    "collect": collect.main,
    "fit": fit.main,
    "score": score.main,
    "analyze": analyze.main,
    "embed": embed.main,
    "select": select.main,
    "directions": directions.main,
    "render": render.main,
    "demos": find_demos.main,
}
_OPENS_FLUX: tuple[StageName, ...] = ("collect", "score")
_FLUX_FIELDS = tuple(field.name for field in fields(FluxOptions))
_PIPELINE_FIELDS = ("hookpoints", "steps", "skip")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(FluxOptions):
    """What to run. Options of a stage are given by --set or in a file; what is given here goes to every stage."""

    run: Path | None = None
    """Run folder; left out, runs/ and the name of FLUX."""
    config: Path | None = None
    """A run.toml; flags override it. Left out, the bundled recipe for the miniature, nothing for other models."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, an early and a late double-stream block."""
    steps: tuple[int, ...] = ()
    """Steps to collect and train on; left out, five spread over the schedule."""
    set: tuple[str, ...] = ()
    """Options of stages, such as fit.k=16 or analyze.features.rare_below=1e-4."""
    skip: tuple[StageName, ...] = ()
    """Stages to leave out."""
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

    @classmethod
    def from_file(cls, path: Path, **changes: Any) -> PipelineConfig:
        """The config that a run.toml describes, with changes.

        Raises:
            FluxSaeError: the file cannot be read, or names an option that does not exist.
        """
        tables = _read_tables(path)
        flux, pipeline = tables.get("flux", {}), tables.get("pipeline", {})
        _refuse_unknown(flux, _FLUX_FIELDS, where=f"{path} [flux]")
        _refuse_unknown(pipeline, _PIPELINE_FIELDS, where=f"{path} [pipeline]")
        values = _converted(cls, {**flux, **pipeline}, where=str(path))
        return cls(**{**values, "config": path, **changes})


@dataclass(frozen=True)
class Recipe:
    """What decides a run: shared options of FLUX, hook points and steps, and each stage's own options."""

    flux: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    stages: Mapping[str, Sequence[Mapping[str, Any]]]
    """Several tables for one stage: it is run once with each."""

    def to_toml(self) -> str:
        """The recipe as `--config` reads it."""
        parts = [_to_toml(f"[{name}]", values) for name, values in (("flux", self.flux), ("pipeline", self.pipeline))]
        for name, tables in self.stages.items():
            head = f"[[{name}]]" if len(tables) > 1 else f"[{name}]"
            parts += [_to_toml(head, values) for values in tables if values or len(tables) > 1]
        return "\n".join(parts)


def main(config: PipelineConfig) -> list[StageResult]:
    """Runs the chosen stages and prints one line for each."""
    from fluxsae.files import write_text
    from fluxsae.runs.folder import RunFolder

    recipe = build_recipe(config)
    chosen = choose_stages(config)
    if config.export is not None:
        check_export(config.export)
    check_push(config.push_to)
    run = RunFolder(config.run or Path("runs") / Path(config.flux).name)
    configs = {stage: build_stage_configs(stage, recipe, run, force=config.force) for stage in chosen}
    if not config.only and config.from_ is None:
        write_text(run.toml_path, recipe.to_toml())
    open_flux = functools.cache(config.open)
    results = []
    for stage in chosen:
        extra = {"open_flux": open_flux} if stage in _OPENS_FLUX else {}
        found = [_MAINS[stage](own, **extra) for own in configs[stage]]
        results += [result for result in found if result is not None]
    print("\n" + format_table(results))
    if config.export is not None:
        export_run(run, config.export)
    push_complete(run, config.push_to)
    return results


def check_export(target: Path) -> None:
    """Refuses to replace a folder that holds something other than a run.

    Raises:
        FluxSaeError: it does.
    """
    from fluxsae.runs.folder import RunFolder

    if target.exists() and any(target.iterdir()) and not RunFolder(target).exists():
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

    for path in [of(hookpoint) for of in (copy.demos_path, copy.swaps_path) for hookpoint in copy.hookpoints()]:
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
    skipped = set(config.skip)
    if config.only:
        return [stage for stage in PIPELINE_STAGES if stage in config.only]
    first = PIPELINE_STAGES.index(config.from_) if config.from_ is not None else 0
    return [stage for stage in PIPELINE_STAGES[first:] if stage not in skipped]


def build_recipe(config: PipelineConfig) -> Recipe:
    """The stages' options of the file (or the bundled recipe) with --set on top, and what all stages share.

    Raises:
        FluxSaeError: the file cannot be read, or names a table that is no stage.
    """
    path = config.config or (MINIATURE_RECIPE if config.flux == "miniature" else None)
    tables = _read_tables(path) if path is not None else {}
    stages = {
        name: values if isinstance(values, list) else [values]
        for name, values in tables.items()
        if name not in ("flux", "pipeline")
    }
    for assignment in config.set:
        _assign(stages, assignment)
    _refuse_unknown(stages, PIPELINE_STAGES, where="a table of the file or --set")
    if config.flux != "miniature":
        stages.setdefault("embed", [{}])[0].setdefault("model", _REAL_CLIP)
    flux = {name: getattr(config, name) for name in _FLUX_FIELDS}
    pipeline = {name: getattr(config, name) for name in _PIPELINE_FIELDS}
    if config.config is None and not config.hookpoints:
        pipeline["hookpoints"] = tables.get("pipeline", {}).get("hookpoints", ())
    _check_fits(stages.get("fit", [{}]), pipeline["hookpoints"])
    flux |= {name: str(flux[name]) for name in ("prompts", "pictures") if flux[name] is not None}
    return Recipe(flux, {name: list(values) for name, values in pipeline.items()}, stages)


def _check_fits(fits: Sequence[Mapping[str, Any]], hookpoints: Sequence[str]) -> None:
    """Refuses several [[fit]] that do not share out the run's hook points, before anything runs."""
    if len(fits) < 2:
        return
    named = [str(HookPoint.parse(place)) for fit in fits for place in _listed(fit.get("hookpoint", ()))]
    wanted = [str(HookPoint.parse(place)) for place in hookpoints]
    if not all(fit.get("hookpoint") for fit in fits) or sorted(named) != sorted(wanted):
        raise FluxSaeError(
            f"The [[fit]] tables are for {', '.join(named) or 'no hook point'}, and the run's hook points are "
            f"{', '.join(wanted) or 'not given'}. Several [[fit]] share out the hook points that [pipeline] lists, "
            "each with hookpoint = [...]; for others give a --config of your own with one [fit]."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_tables(path: Path) -> dict[str, Any]:
    """The file's tables by name; `fit` may be a list of tables."""
    if not path.is_file():
        raise FluxSaeError(f"There is no file {path}. Give a run.toml, such as the one a run folder holds.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FluxSaeError(f"{path} is not valid TOML: {error}.") from error
    loose = [name for name, value in tables.items() if not isinstance(value, dict | list) or value == []]
    loose += [
        name
        for name, value in tables.items()
        if isinstance(value, list) and not all(isinstance(v, dict) for v in value)
    ]
    if loose:
        raise FluxSaeError(f"{path}: {', '.join(loose)} must stand in a table, such as [flux] or [fit].")
    repeated = [name for name, value in tables.items() if isinstance(value, list) and name != "fit"]
    if repeated:
        raise FluxSaeError(f"{path}: {', '.join(repeated)} stands several times; only [[fit]] may.")
    return tables


def _assign(stages: dict[str, list[dict[str, Any]]], assignment: str) -> None:
    """Adds `stage.option=value`, the value written as in TOML, or as plain text, to every table of the stage."""
    path, equals, text = assignment.partition("=")
    stage, *names = path.strip().split(".")
    if not equals or not names:
        raise FluxSaeError(f"--set {assignment} is no stage.option=value, such as fit.k=16.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for table in stages.setdefault(stage, [{}]):
        for name in names[:-1]:
            table = table.setdefault(name, {})  # noqa: PLW2901
        table[names[-1]] = value


def _refuse_unknown(given: Mapping[str, Any], allowed: Sequence[str], *, where: str) -> None:
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise FluxSaeError(f"{where} names {', '.join(unknown)}, which does not exist. Allowed: {', '.join(allowed)}.")


def build_stage_configs(stage: StageName, recipe: Recipe, run: RunFolder, *, force: bool = False) -> list[Any]:
    """The configs with which a stage is run, one after the other: its own options and what all stages share.

    Raises:
        FluxSaeError: an option that the stage does not have, that is shared, or of the wrong type.
    """
    return [_stage_config(stage, own, recipe, run, force=force) for own in recipe.stages.get(stage, [{}])]


def _stage_config(stage: StageName, own: Mapping[str, Any], recipe: Recipe, run: RunFolder, *, force: bool) -> Any:
    kind = _CONFIGS[stage]
    shared: dict[str, Any] = {"run": str(run.path), "force": force}
    names = {field.name for field in fields(kind)}
    shared |= {name: value for name, value in recipe.flux.items() if name in names and _is_shared(kind, name, value)}
    if stage == "collect":
        shared |= {name: recipe.pipeline[name] for name in ("hookpoints", "steps")}
    clash = sorted(set(own) & set(shared))
    if clash:
        raise FluxSaeError(
            f"{stage}.{clash[0]} belongs to all stages. Give it as a flag, or under [flux] or [pipeline]."
        )
    return kind(**_converted(kind, {**shared, **own}, where=stage))


def _is_shared(kind: type[Any], name: str, value: Any) -> bool:
    """Whether a flag of FLUX goes to a stage: always where FLUX is run; elsewhere a seed or device that was given."""
    return issubclass(kind, FluxOptions) or value is not None


def _converted(kind: type[Any], values: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Values as TOML has them, in the types of a config's fields."""
    hints = get_type_hints(kind, include_extras=True)
    _refuse_unknown(values, [field.name for field in fields(kind)], where=where)
    return {name: _convert(hints[name], value, where=f"{where}.{name}") for name, value in values.items()}


def _convert(hint: Any, value: Any, *, where: str) -> Any:
    if is_dataclass(hint) and isinstance(value, Mapping):
        assert isinstance(hint, type)
        return hint(**_converted(hint, value, where=where))
    if get_origin(hint) is tuple and not isinstance(value, list | tuple):
        value = [value]
    try:
        # TOML has what JSON has: lists stand for tuples and texts for paths, and true is no number.
        return TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise FluxSaeError(describe(error, where)) from None


def _to_toml(head: str, values: Mapping[str, Any]) -> str:
    lines = [head]
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in values.items() if key not in tables and value is not None}
    lines += [f"{key} = {_to_toml_value(value)}" for key, value in plain.items()]
    name = head.strip("[]")  # the tables inside a table of a list belong to the last one of that name
    return "\n".join([*lines, "", *(_to_toml(f"[{name}.{key}]", table) for key, table in tables.items())])


def _to_toml_value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_to_toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def parse_arguments(arguments: Sequence[str]) -> PipelineConfig:
    """The config of a command line: flags, and where a flag is left out the file that --config names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    default = PipelineConfig() if path is None else PipelineConfig.from_file(path)
    return tyro.cli(PipelineConfig, args=arguments, default=default, description=__doc__)


if __name__ == "__main__":
    start(main, parse_arguments)
