"""Errors as visitors meet them: their own mistakes in words, ours as an apology with a reference to the log."""

import functools
import inspect
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr

from fluxsae.errors import FluxSaeError
from fluxsae.ui.requests import Limits, Request, RequestError

log = logging.getLogger("fluxsae.app")


def as_gradio_error(error: BaseException) -> BaseException:
    """What the visitor sees of an exception."""
    if isinstance(error, FluxSaeError):
        return gr.Error(str(error), print_exception=False, title="That did not work", duration=12)
    if isinstance(error, gr.Error) or not isinstance(error, Exception):
        return error
    reference = secrets.token_hex(4)
    log.error("reference %s", reference, exc_info=error)
    text = f"Sorry, something failed on our side. Please try again; if it stays, report the reference {reference}."
    return gr.Error(text, print_exception=False, title="Our mistake", duration=12)


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with every exception turned into what a visitor may see. Generators stay generators."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from handler(*args, **kwargs)
            except Exception as error:
                raise as_gradio_error(error) from error

        return stream

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise as_gradio_error(error) from error

    return call


def validator(schema: type[Request], limits: Limits, names: Sequence[str]) -> Callable[..., list[Mapping[str, Any]]]:
    """A Gradio validator for a schema: runs before the queue, for the page, HTTP and MCP alike."""

    def validate(*values: Any) -> list[Mapping[str, Any]]:
        problems: dict[str, str] = {}
        try:
            schema.parse(limits, **dict(zip(names, values, strict=True)))
        except RequestError as error:
            problems = error.problems
        return [gr.validate(name not in problems, problems.get(name, "")) for name in names]

    return validate
