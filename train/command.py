"""What every script begins with: options from the command line, faults in words, other packages quiet; and its bars."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Annotated, Any, Self, TypeVar, get_type_hints

import tyro
from tqdm import tqdm

from fluxsae.errors import FluxSaeError

Config = TypeVar("Config")
Result = TypeVar("Result")

_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}


def start(
    main: Callable[[Config], Result],
    options: type[Config] | Callable[[list[str]], Config],
    description: str | None = None,
    *,
    arguments: Sequence[str] | None = None,
) -> Result:
    """Runs a script's `main` with what the command line asks for; `options` is a config class, or reads the words.

    An option of a stage that is left out is as the run's run.toml has it; where that holds several tables for the
    stage, it runs once for each. A fault that the user can mend ends the program with its message and status 1. With
    -v it keeps its traceback, and other packages may print their warnings and progress.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    is_verbose = "-v" in words
    if is_verbose:
        words.remove("-v")
        logging.basicConfig(level=logging.INFO)
    else:
        os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
        warnings.simplefilter("ignore")
    try:
        if isinstance(options, type):
            parse = partial(tyro.cli, plainly(options), args=words, description=described(description))
            results = [main(config) for config in _configs(options, words, parse)]
            return results[-1]
        return main(options(words))
    except FluxSaeError as error:
        if is_verbose:
            raise
        sys.exit(f"Error: {error}")


def _configs(kind: type[Config], words: Sequence[str], parse: Callable[..., Config]) -> list[Config]:
    """The configs of a command line: one, or one for each table of the run's recipe that says the same hook points."""
    if {"-h", "--help"} & {*words}:
        return [parse()]  # quick help: a run folder's reader loads model libraries
    from fluxsae.runs.folder import RunFolder

    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--run")
    run = RunFolder(finder.parse_known_args(words)[0].run or getattr(kind, "run", None) or "")
    if not run.toml_path.is_file():
        return [parse()]
    from train.recipes import run_defaults

    defaults = run_defaults(kind, run)
    if len(defaults) < 2:
        return [parse(default=default) for default in defaults] or [parse()]
    return _shared_out(defaults, [parse(default=default) for default in defaults], parse)


def _shared_out(defaults: Sequence[Any], asked: Sequence[Any], parse: Callable[..., Any]) -> list[Any]:
    """Each table's config with those of its hook points that are asked for; others as if there were no recipe."""
    from fluxsae.runs.names import SaeName

    found, left = [], {SaeName.parse(name) for config in asked for name in config.hookpoints}
    for default, config in zip(defaults, asked, strict=True):
        places = {SaeName.parse(name).place for name in default.hookpoints}
        own = [name for name in config.hookpoints if SaeName.parse(name).place in places]
        left -= {SaeName.parse(name) for name in own}
        if own:
            found.append(replace(config, hookpoints=tuple(own)))
    return [*found, *([replace(parse(), hookpoints=tuple(map(str, sorted(left))))] if left else [])]


def plainly(kind: type[Config]) -> type[Config]:
    """The same options, whose help does not end in "(default: None)": their texts say what being left out means."""
    types = get_type_hints(kind, include_extras=True)
    for field in fields(kind):  # type: ignore[arg-type]
        own = types[field.name]
        if field.default is None:
            kind.__annotations__[field.name] = Annotated[own, tyro.conf.arg(help_behavior_hint="")]
        elif isinstance(own, type) and is_dataclass(own):
            plainly(own)
    return kind


def described(text: str | None) -> str:
    """A script's description for its help, with the flag that all scripts have."""
    return f"{text}\n\n    -v    other packages show their warnings and progress, and errors their traceback"


class Bars:
    """Progress on stderr, one bar for each thing that is done in turn; closed when the block ends."""

    def __init__(self, *, unit: str = "image", is_shown: bool = True) -> None:
        self._unit, self._is_shown = unit, is_shown
        self._doing = ""
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Shows that `done` of `total` are done."""
        if self._bar is None or self._doing != doing:
            self.__exit__()
            self._doing = doing
            self._bar = tqdm(desc=doing, unit=self._unit, miniters=1, disable=not self._is_shown, file=sys.stderr)
        self._bar.total = total
        self._bar.update(done - self._bar.n)
