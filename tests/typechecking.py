"""The run-time type checker behind the import hook of conftest.py: beartype, on what can be resolved."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under beartype, without the annotations that a lone function cannot resolve.

    Those are `Self` (the hook decorates methods, not classes) and quoted names: of a class still being defined, or of
    one that is imported for mypy alone.
    """
    known = {name: hint for name, hint in function.__annotations__.items() if _is_resolvable(hint)}
    function.__annotations__ = known
    return beartype(function)


def _is_resolvable(hint: object) -> bool:
    return not isinstance(hint, str) and "typing.Self" not in str(hint) and "ForwardRef" not in str(hint)
