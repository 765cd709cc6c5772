"""What the tabs share: the chosen feature, which follows the visitor, and going from tab to tab."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from fluxsae.errors import FluxSaeError
from fluxsae.ui.kit.links import view_of
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.schemas import Request

IDLE: Final[Mapping[str, Any]] = {"state": "idle"}
QUIET: Final[Mapping[str, Any]] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Events that are answered at once and are no endpoint; the page's own values, which it sends, are never refused."""

QUEUED: Final[Mapping[str, Any]] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_id": "choose",
    "concurrency_limit": None,
}
"""Events that may be refused or that change the chosen feature: Gradio shows the errors of queued events only, and
only of them does it tell a state's listeners."""

EACH: Final[Mapping[str, Any]] = {**QUEUED, "trigger_mode": "multiple"}
"""Queued events that carry what was clicked: none is dropped while another is under way, as Gradio's default would, and
none comes to carry what an earlier one did, as "always_last" would."""


def working(event: StepDone, *, makes: str, counts: str = "Denoising step") -> dict[str, Any]:
    """The progress bar's data after a step; `makes` is the id of what is dimmed until it is shown anew."""
    return {"state": "working", "step": event.step, "n_steps": event.n_steps, "makes": makes, "counts": counts}


def with_progress(
    events: Iterable[StepDone | Done[Any]], *, makes: str, n: int = 1, counts: str = "Denoising step"
) -> Iterator[tuple[Any, ...]]:
    """(progress bar, the `n` things that are made) after every event: nothing new until all is done."""
    for event in events:
        if isinstance(event, StepDone):
            yield working(event, makes=makes, counts=counts), *(gr.skip(),) * n
        else:
            yield IDLE, *(event.value if n > 1 else (event.value,))


def making(ask: Callable[..., Iterable[Any]], *, makes: str, n: int = 1) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """What FLUX makes when the page asks: guarded, with progress."""

    def make(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from with_progress(ask(*values), makes=makes, n=n)

    return guarded(make)


def end_at_idle(running: Any, status: gr.HTML) -> None:
    """Takes the progress bar away when a run fails."""
    running.failure(lambda: IDLE, None, status, **QUIET)


@dataclass(frozen=True)
class Shell:
    """The chosen feature, the tabs, and links into them."""

    app: gr.Blocks
    selection: gr.State
    """{"hookpoint", "feature", "for": the tab it was sent to, "picture": what is to be made again there}, the last two
    if there are any; feature is None until one is chosen."""
    tabs: gr.Tabs
    endpoints: tuple[type[Request], ...]
    """The endpoints that the tabs answer."""

    def remember(self, *sources: gr.HTML) -> None:
        """A feature chosen in one of these becomes the visitor's."""
        for source in sources:
            source.select(guarded(_chosen), None, self.selection, **EACH)

    def open_on(self, listener: Callable[..., Any], tab: str) -> None:
        """An event that brings a feature makes it the visitor's and opens a tab."""

        def go(event: gr.EventData) -> Any:
            chosen = _chosen(event)
            return {**chosen, "for": tab, "picture": event._data.get("picture")}, gr.Tabs(selected=tab)

        listener(guarded(go), None, [self.selection, self.tabs], **EACH)

    def follow(self, show: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
        """Shows the chosen feature whenever it changes: `show(selection, *inputs)`."""
        self.selection.change(guarded(show), [self.selection, *inputs], outputs, **QUIET)

    def open_link(self, tab: str, show: Callable[[Mapping[str, Any]], Any], outputs: list[Any]) -> gr.HTML:
        """Fills a tab from a link to it when the page loads; what is returned then submits."""
        arrived = gr.HTML(None, html_template=element("fs-arrived"), js_on_load=mount(arrive="submit"))

        def open_page(request: gr.Request) -> Any:
            try:
                view = view_of(request.query_params)
            except FluxSaeError:
                view = {}  # told once, for all tabs
            if view.get("tab") != tab:
                return tuple(gr.skip() for _ in range(len(outputs) + 2))
            shown = show(view)
            return (gr.Tabs(selected=tab), {"tab": tab}, *(shown if isinstance(shown, tuple) else (shown,)))

        self.app.load(guarded(open_page), None, [self.tabs, arrived, *outputs], **QUEUED)
        return arrived

    def tell_bad_links(self, *tabs: str) -> None:
        """Says so when a link is damaged, or leads to no tab of these."""

        def check(request: gr.Request) -> None:
            view = view_of(request.query_params)
            if view and view.get("tab") not in tabs:
                raise FluxSaeError(f"This link leads to {str(view.get('tab'))[:40]!r}; the page has {', '.join(tabs)}.")

        self.app.load(guarded(check), None, None, **QUEUED)


def _chosen(event: gr.EventData) -> dict[str, Any]:
    chosen = event._data
    if not isinstance(chosen, Mapping):
        raise FluxSaeError("Choose a feature: its hook point and number are missing.")
    # with the time, so that the same feature chosen again, as after it was closed, is a change that tabs hear of
    return {"hookpoint": chosen.get("hookpoint"), "feature": chosen.get("feature"), "at": time.monotonic()}
