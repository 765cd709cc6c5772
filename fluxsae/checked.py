"""Dataclasses whose values are checked when they are made; what is wrong is told in one `FluxSaeError`."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass

from fluxsae.errors import FluxSaeError

Made = TypeVar("Made")
Whole = Annotated[int, Field(ge=1)]
"""A whole number from 1."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
FromList = Strict(False)
"""In a field's annotation: a JSON list is taken for a tuple; its values are checked as strictly as others."""

_CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


@dataclass_transform(frozen_default=True)
def checked(*, kw_only: bool = False) -> Callable[[type[Made]], type[Made]]:
    """A frozen pydantic dataclass: true is no number, NaN is refused, 3.0 is no whole number.

    Making one raises a FluxSaeError that names the field, its value and what is allowed.
    """

    def decorate(kind: type[Made]) -> type[Made]:
        made: Any = dataclass(frozen=True, kw_only=kw_only, config=_CONFIG)(kind)
        check = made.__init__

        @functools.wraps(check)
        def __init__(self: Any, *args: Any, **values: Any) -> None:
            try:
                check(self, *args, **values)
            except ValidationError as error:
                names = [field.name for field in fields(made)]
                raise FluxSaeError(describe(error, names=names)) from None

        made.__init__ = __init__
        return made  # type: ignore[no-any-return]

    return decorate


def made_from(kind: type[Made], values: object) -> Made:
    """The dataclass that a JSON object describes.

    Raises:
        FluxSaeError: it is no object, a field is missing or unknown, or its value is not allowed.
    """
    if not isinstance(values, Mapping):
        raise FluxSaeError(f"{short(values)} is no JSON object with the fields of {kind.__name__}.")
    return kind(**{str(name): value for name, value in values.items()})


def from_object(kind: type[Any]) -> BeforeValidator:
    """In a field's annotation: a JSON object becomes `kind`."""
    return BeforeValidator(lambda value: made_from(kind, value) if isinstance(value, Mapping) else value)


def describe(error: ValidationError, where: str = "", *, names: Sequence[str] = ()) -> str:
    """What is wrong, a sentence or two for each value; `where` stands before every place, `names` are the fields."""
    return " ".join(dict.fromkeys(_sentence(fault, where, names) for fault in error.errors()))


def _sentence(fault: Mapping[str, Any], where: str, names: Sequence[str]) -> str:
    first, *inner = fault["loc"] or ("",)
    named = names[first] if names and isinstance(first, int) else first  # an argument that was given by its place
    place = ".".join(str(part)[:60] for part in (where, named, *inner) if part != "")
    if fault["type"] == "value_error":
        return f"{place}: {fault['ctx']['error']}" if place else str(fault["ctx"]["error"])
    if fault["type"] == "missing":
        return f"{place} is missing."
    if fault["type"] == "unexpected_keyword_argument":
        return f"{place} is unknown. Allowed are {', '.join(names)}."
    return f"{place} is {short(fault['input'])}. It must {fault['msg'].partition(' should ')[2]}."


def short(value: object) -> str:
    """The value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({type(value).__name__})"
