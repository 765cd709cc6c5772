"""The run-time type checker behind the import hook of conftest.py: beartype, on tensor shapes and dtypes.

Plain types are mypy's affair; checked here as well, they would raise before our own errors for what users get wrong.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under beartype, for those of its annotations that hold a shape."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _holds_shape(hint)}
    return beartype(function)


def _holds_shape(hint: object) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_holds_shape(part) for part in get_args(hint))
