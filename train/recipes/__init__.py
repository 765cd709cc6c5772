"""Recipes: what decides a run, as TOML. Bundled ones lie in this folder; each run folder holds its own as run.toml.

    [flux]
    flux = "miniature"
    [pipeline]
    hookpoints = ["layer1", "layer3"]
    [fit]                         # the options of `python -m train.fit`, with _ for -
    epochs = 20

Where hook points need other SAEs, [[fit]] stands once for each, with its own hookpoints = [...]; see miniature.toml.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar, get_origin, get_type_hints

import tyro
from pydantic import TypeAdapter, ValidationError

from fluxsae.checked import describe
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.names import SaeName
from train import analyze, collect, directions, embed, find_demos, fit, render, score, select
from train.command import described, plainly
from train.flux_options import FluxOptions
from train.stages import STAGES, StageName, StageResult, renamed

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.toml"))}
"""The bundled recipes by name."""


class Script(NamedTuple):
    """What runs a stage: the options of its script, and its `main`."""

    options: type[Any]
    main: Callable[..., StageResult | None]


SCRIPTS: dict[StageName, Script] = {
    "collect": Script(collect.CollectConfig, collect.main),
    "fit": Script(fit.FitConfig, fit.main),
    "score": Script(score.ScoreConfig, score.main),
    "analyze": Script(analyze.AnalyzeConfig, analyze.main),
    "embed": Script(embed.EmbedConfig, embed.main),
    "select": Script(select.SelectConfig, select.main),
    "directions": Script(directions.DirectionsConfig, directions.main),
    "render": Script(render.RenderConfig, render.main),
    "demos": Script(find_demos.FindDemosConfig, find_demos.main),
}
_FLUX_FIELDS = tuple(field.name for field in fields(FluxOptions))
_PIPELINE_FIELDS = ("hookpoints", "steps", "skip")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(FluxOptions):
    """A recipe, and what is changed of it. What is given as a flag goes to every stage."""

    recipe: str | None = None
    """A bundled recipe (flux-dev, flux-dev-evening, flux-schnell, flux2-klein, miniature) or a TOML file, such as a
    run.toml; flags override it. Left out, the bundled one for the miniature, nothing for other models."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, the recipe's, or an early and a late double-stream block."""
    steps: tuple[int, ...] = ()
    """Steps to collect and train on; left out, the recipe's, or five spread over the schedule."""
    set: tuple[str, ...] = ()
    """Options of stages, such as fit.k=16 or analyze.features.rare_below=1e-4."""
    skip: tuple[StageName, ...] = ()
    """Stages to leave out."""

    @classmethod
    def from_recipe(cls, name: str, **changes: Any) -> Self:
        """The options that a recipe describes, with changes.

        Raises:
            FluxSaeError: no such recipe, or it names an option that does not exist.
        """
        path = find_recipe(name)
        tables = _read_tables(path)
        flux, pipeline = tables.get("flux", {}), tables.get("pipeline", {})
        _refuse_unknown(flux, _FLUX_FIELDS, where=f"{path} [flux]")
        _refuse_unknown(pipeline, _PIPELINE_FIELDS, where=f"{path} [pipeline]")
        values = _converted(cls, {**flux, **pipeline}, where=str(path))
        return cls(**{**values, "recipe": name, **changes})


Options = TypeVar("Options", bound=RecipeOptions)
Config = TypeVar("Config")


def parse_recipe_options(kind: type[Options], arguments: Sequence[str], description: str | None) -> Options:
    """The options of a command line: flags, and where a flag is left out the recipe that --recipe names."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--recipe")
    name = finder.parse_known_args(arguments)[0].recipe
    default = kind() if name is None else kind.from_recipe(name)
    return tyro.cli(plainly(kind), args=arguments, default=default, description=described(description))


def find_recipe(name: str) -> Path:
    """The file of a bundled recipe, or of a path.

    Raises:
        FluxSaeError: neither.
    """
    path = RECIPES.get(name, Path(name))
    if not path.is_file():
        raise FluxSaeError(
            f"There is no recipe {name}. Bundled are {', '.join(RECIPES)}; or give a TOML file, such as the run.toml "
            "that a run folder holds."
        )
    return path


@dataclass(frozen=True)
class Recipe:
    """What decides a run: shared options of FLUX, hook points and steps, and each stage's own options."""

    flux: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    stages: Mapping[str, Sequence[Mapping[str, Any]]]
    """Several tables for one stage: it is run once with each."""

    def to_toml(self) -> str:
        """The recipe as `--recipe` reads it."""
        parts = [_to_toml(f"[{name}]", values) for name, values in (("flux", self.flux), ("pipeline", self.pipeline))]
        for name, tables in self.stages.items():
            head = f"[[{name}]]" if len(tables) > 1 else f"[{name}]"
            parts += [_to_toml(head, values) for values in tables if values or len(tables) > 1]
        return "\n".join(parts)


def build_recipe(config: RecipeOptions) -> Recipe:
    """The stages' options of the file (or the bundled recipe) with --set on top, and what all stages share.

    Raises:
        FluxSaeError: the file cannot be read, or names a table that is no stage.
    """
    name = config.recipe or ("miniature" if config.flux == "miniature" else None)
    tables = _read_tables(find_recipe(name)) if name is not None else {}
    stages = {
        name: values if isinstance(values, list) else [values]
        for name, values in tables.items()
        if name not in ("flux", "pipeline")
    }
    for assignment in config.set:
        _assign(stages, assignment)
    _refuse_unknown(stages, STAGES, where="a table of the file or --set")
    flux = {name: getattr(config, name) for name in _FLUX_FIELDS}
    pipeline = {name: getattr(config, name) for name in _PIPELINE_FIELDS}
    if config.recipe is None and not config.hookpoints:
        pipeline["hookpoints"] = tables.get("pipeline", {}).get("hookpoints", ())
    _check_fits(stages.get("fit", [{}]), pipeline["hookpoints"])
    flux |= {name: str(flux[name]) for name in ("prompts", "pictures") if flux[name] is not None}
    return Recipe(flux, {name: list(values) for name, values in pipeline.items()}, stages)


def _check_fits(fits: Sequence[Mapping[str, Any]], hookpoints: Sequence[str]) -> None:
    """Refuses several [[fit]] that do not share out the run's hook points, before anything runs."""
    if len(fits) < 2:
        return
    named = [SaeName.parse(name) for fit in fits for name in _listed(fit.get("hookpoints", ()))]
    wanted = sorted(map(HookPoint.parse, hookpoints))
    is_shared_out = len({*named}) == len(named) and sorted({name.place for name in named}) == wanted
    if not all(fit.get("hookpoints") for fit in fits) or not is_shared_out:
        raise FluxSaeError(
            f"The [[fit]] tables are for {', '.join(map(str, named)) or 'no hook point'}; the run's hook points are "
            f"{', '.join(map(str, wanted)) or 'not given'}. Several [[fit]] share out the hook points that [pipeline] "
            "lists, each with hookpoints = [...], several SAEs at one hook point as hookpoint@variant; for others give "
            "a --recipe of your own with one [fit]."
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _read_tables(path: Path) -> dict[str, Any]:
    """The file's tables by name; `fit` may be a list of tables."""
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
    return {
        name: [renamed(name, table) for table in value] if isinstance(value, list) else renamed(name, value)
        for name, value in tables.items()
    }


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


def run_defaults(kind: type[Config], run: RunFolder) -> list[Config]:
    """What a stage's script does for this run where an option is left out: as its run.toml says, a config each table.

    More images than the recipe's, once they were made, stay.
    """
    stage = next((name for name, script in SCRIPTS.items() if script.options.__name__ == kind.__name__), None)
    if stage is None or not run.toml_path.is_file():
        return []
    recipe = build_recipe(RecipeOptions.from_recipe(str(run.toml_path)))
    made = run.exists() and stage in run.load_info().stages
    tables = [
        {name: value for name, value in table.items() if not (made and name == "images")}
        for table in recipe.stages.get(stage, [{}])
    ]
    return [_stage_config(stage, table, recipe, run, force=False, kind=kind) for table in tables]


def _stage_config(
    stage: StageName,
    own: Mapping[str, Any],
    recipe: Recipe,
    run: RunFolder,
    *,
    force: bool,
    kind: type[Any] | None = None,
) -> Any:
    kind = kind or SCRIPTS[stage].options
    shared: dict[str, Any] = {"run": str(run.path), "force": force}
    names = {field.name for field in fields(kind)}
    runs_flux = issubclass(kind, FluxOptions)  # elsewhere a seed or device goes to a stage only where it was given
    shared |= {name: value for name, value in recipe.flux.items() if name in names and (runs_flux or value is not None)}
    if stage == "collect":
        shared |= {name: recipe.pipeline[name] for name in ("hookpoints", "steps")}
    clash = sorted(set(own) & set(shared))
    if clash:
        raise FluxSaeError(
            f"{stage}.{clash[0]} belongs to all stages. Give it as a flag, or under [flux] or [pipeline]."
        )
    return kind(**_converted(kind, {**shared, **own}, where=stage))


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
