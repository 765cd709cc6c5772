"""Errors as visitors meet them: their own mistakes in words, ours as an apology with a reference to the log."""

import functools
import html
import inspect
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import anyio.to_thread
import gradio as gr
from gradio.context import LocalContext

from fluxsae.errors import FluxSaeError
from fluxsae.ui.serve.given import forget_uploads
from fluxsae.ui.serve.lane import Pending
from fluxsae.ui.serve.schemas import RequestError

log = logging.getLogger("fluxsae.app")

HEARTBEAT: Final = 2.0
"""Seconds after which a visitor who waits is told the same again."""
_NOTHING: Final = object()
MAX_REMEMBERED: Final = 1024
_words: dict[str, str] = {}
"""What each browser tab was last refused with: Gradio tells it in a corner, and the page beside the button."""
FOLDERS: Final = re.compile(r"(?<![\w:/.])~?/(?:[\w.+@~ -]+/)+(?=[\w.+@-])")
"""The folders of an absolute path; no part of an address of the web or of an endpoint's name."""


def current_visitor() -> str:
    """Who made the request that is being answered."""
    return visitor_of(LocalContext.request.get(None))


def current_visit() -> str:
    """The visit, from a page's opening to its closing, of the request that is being answered; "" outside any."""
    request = LocalContext.request.get(None)
    return str(request.session_hash or "") if request is not None else ""


def visitor_of(request: gr.Request | None) -> str:
    """Who asks: the address that the outermost trusted proxy saw, or the connection's own where there is none.

    Each proxy appends the address that it saw to `X-Forwarded-For`; what stands before was sent by the visitor.
    """
    if request is None or request.client is None:
        return "unknown"
    hops = [hop.strip() for line in request.headers.getlist("x-forwarded-for") for hop in line.split(",")]
    n_trusted = trusted_proxies()
    return hops[-n_trusted] if 0 < n_trusted <= len(hops) else str(request.client.host)


def trusted_proxies() -> int:
    """How many proxies stand before this app: as FLUXSAE_PROXIES says, else one on a Space and none elsewhere.

    Raises:
        FluxSaeError: it is not a whole number of at least 0.
    """
    text = os.environ.get("FLUXSAE_PROXIES", "").strip()
    if not text:
        return 1 if os.environ.get("SPACE_ID") else 0
    if not (text.isascii() and text.isdigit()):
        raise FluxSaeError(f"FLUXSAE_PROXIES is {text!r}; give how many proxies stand before this app, 0 for none.")
    return int(text)


def as_gradio_error(error: BaseException) -> BaseException:
    """What the visitor sees of an exception."""
    if isinstance(error, FluxSaeError):
        return _gradio_error(without_folders(str(error)), title="That did not work")
    if isinstance(error, gr.Error) or not isinstance(error, Exception):
        return error
    reference = secrets.token_hex(4)
    log.error("reference %s", reference, exc_info=error)
    text = f"Something failed on our side. Please try again. If it fails again, report the reference {reference}."
    return _gradio_error(text, title="Our mistake")


def without_folders(text: str) -> str:
    """A text in which paths of this machine are shortened to their last names: visitors need not know its folders."""
    return FOLDERS.sub("", text)


def last_words() -> str:
    """What the browser tab that asks was last refused with, told once."""
    return _words.pop(current_visit(), "")


def _gradio_error(text: str, *, title: str) -> BaseException:
    while len(_words) >= MAX_REMEMBERED:
        _words.pop(next(iter(_words)))
    _words[current_visit()] = text
    # Gradio's page shows messages as HTML: what a visitor typed must stay text
    error: BaseException = gr.Error(html.escape(text, quote=False), print_exception=False, title=title, duration=12)
    return error


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with every exception turned into what a visitor may see.

    A generator becomes an asynchronous one. It works on a thread, but holds none while it waits for FLUX: many may wait
    without keeping others from browsing, and a cancel is heard at once.
    """
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            events, told = handler(*args, **kwargs), _NOTHING
            try:
                while (item := await anyio.to_thread.run_sync(next, events, _NOTHING)) is not _NOTHING:
                    if not isinstance(item, Pending):
                        told = item
                        yield item
                        continue
                    while not await item.mail.arrived(HEARTBEAT):
                        if told is not _NOTHING:  # Gradio hears only here that the visitor has left
                            yield told
            except Exception as error:
                raise as_gradio_error(error) from error
            finally:
                events.close()

        return stream

    @functools.wraps(handler)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except Exception as error:
            raise as_gradio_error(error) from error

    return call


def validator(
    parse: Callable[[Mapping[str, Any]], Any], names: Sequence[str]
) -> Callable[..., list[Mapping[str, Any]]]:
    """A Gradio validator of what `parse` refuses: runs before the queue, for the page, HTTP and MCP alike."""

    def validate(*values: Any) -> list[Mapping[str, Any]]:
        problems: dict[str, str] = {}
        try:
            parse(dict(zip(names, values, strict=True)))
        except RequestError as error:
            problems = error.problems
            forget_uploads(values)
        return [gr.validate(name not in problems, problems.get(name, "")) for name in names]

    return validate
