"""Errors as visitors meet them: their own mistakes in words, ours as an apology with a reference to the log."""

import functools
import html
import inspect
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from fluxsae.errors import FluxSaeError
from fluxsae.ui.serve.arguments import Limits
from fluxsae.ui.serve.given import forget_uploads
from fluxsae.ui.serve.schemas import Request, RequestError

log = logging.getLogger("fluxsae.app")


def current_visitor() -> str:
    """Who made the request that is being answered."""
    return visitor_of(LocalContext.request.get(None))


def current_visit() -> str:
    """The visit, from a page's opening to its closing, of the request that is being answered; "" outside any."""
    request = LocalContext.request.get(None)
    return str(request.session_hash or "") if request is not None else ""


def visitor_of(request: gr.Request | None) -> str:
    """Who asks: the address that the Space's proxy passes on, or the connection's own."""
    if request is None or request.client is None:
        return "unknown"
    forwarded = request.headers.get("x-forwarded-for", "") if os.environ.get("SPACE_ID") else ""
    return forwarded.split(",")[0].strip() or str(request.client.host)


def as_gradio_error(error: BaseException) -> BaseException:
    """What the visitor sees of an exception."""
    if isinstance(error, FluxSaeError):
        return _gradio_error(str(error), title="That did not work")
    if isinstance(error, gr.Error) or not isinstance(error, Exception):
        return error
    reference = secrets.token_hex(4)
    log.error("reference %s", reference, exc_info=error)
    text = f"Something failed on our side. Please try again. If it fails again, report the reference {reference}."
    return _gradio_error(text, title="Our mistake")


def _gradio_error(text: str, *, title: str) -> BaseException:
    # Gradio's page shows messages as HTML: what a visitor typed must stay text
    error: BaseException = gr.Error(html.escape(text, quote=False), print_exception=False, title=title, duration=12)
    return error


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
            forget_uploads(values)
        return [gr.validate(name not in problems, problems.get(name, "")) for name in names]

    return validate
