"""Thin scripts over the library, run as `python -m train.NAME`."""

import sys
from types import TracebackType

from fluxsae.errors import FluxSaeError


def _show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A fault that the user can mend is its message; anything else keeps its traceback."""
    if issubclass(kind, FluxSaeError):
        print(f"Error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _show
