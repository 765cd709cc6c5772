"""What every script begins with: options from the command line, faults in words, other packages quiet; and its bars."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

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

    A fault that the user can mend ends the program with its message and status 1. With -v it keeps its traceback, and
    other packages may print their warnings and progress.
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
            return main(tyro.cli(options, args=words, description=described(description)))
        return main(options(words))
    except FluxSaeError as error:
        if is_verbose:
            raise
        sys.exit(f"Error: {error}")


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
