"""What the tabs share: the chosen feature, which follows the visitor, and going from tab to tab."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from fluxsae.errors import FluxSaeError
from fluxsae.ui.kit.links import check_view, view_of
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.guard import current_visit, guarded, last_words
from fluxsae.ui.serve.lane import Cancelled, Done, Event, Mail, Pending, StepDone, Waiting
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

FRAGMENT: Final = "() => [location.hash]"
EACH: Final[Mapping[str, Any]] = {**QUEUED, "trigger_mode": "multiple"}
"""Queued events that carry what was clicked: none is dropped while another is under way, as Gradio's default would, and
none comes to carry what an earlier one did, as "always_last" would."""


def working(event: StepDone, *, makes: str, counts: str = "Denoising step") -> dict[str, Any]:
    """The progress bar's data after a step; `makes` is the id of what is dimmed until it is shown anew.

    It carries what there is to see by then.
    """
    told = {"state": "working", "step": event.step, "n_steps": event.n_steps, "makes": makes, "counts": counts}
    return told if event.view is None else {**told, "view": event.view}


def waiting(event: Waiting, *, makes: str) -> dict[str, Any]:
    """The progress bar's data before the first step."""
    return {"state": "waiting", "ahead": event.ahead, "loading": event.is_loading, "makes": makes}


def with_progress(
    events: Iterable[Event[Any]], *, makes: str, n: int = 1, counts: str = "Denoising step"
) -> Iterator[Any]:
    """(progress bar, the `n` things that are made) after every event: nothing new until all is done."""
    is_told = False
    for event in events:
        if isinstance(event, Pending) and not is_told:  # there is something to stop from the click on
            yield waiting(Waiting(0), makes=makes), *(gr.skip(),) * n
        is_told = True
        match event:
            case StepDone():
                yield working(event, makes=makes, counts=counts), *(gr.skip(),) * n
            case Waiting():
                yield waiting(event, makes=makes), *(gr.skip(),) * n
            case Done(value=value):
                yield IDLE, *(value if n > 1 else (value,))
            case Pending():
                yield event


def making(ask: Callable[..., Iterable[Any]], *, makes: str, n: int = 1) -> Callable[..., Any]:
    """What FLUX makes when the page asks: guarded, with progress. A visitor's newer request ends the older one."""
    asked: dict[str, Mail] = {}

    def make(*values: Any) -> Iterator[Any]:
        session, mine = current_visit(), None
        if session in asked:
            asked.pop(session).put(Cancelled())
        try:
            for event in with_progress(ask(*values), makes=makes, n=n):
                if isinstance(event, Pending):
                    mine = asked[session] = event.mail
                yield event
        except Cancelled:
            return
        finally:
            if mine is not None and asked.get(session) is mine:
                del asked[session]

    return guarded(make)


def end_at_idle(running: Any, status: gr.HTML) -> None:
    """Puts what went wrong in the place of the progress bar when a run fails."""
    running.failure(lambda: {"state": "failed", "words": last_words()}, None, status, **QUIET)


def end_runs(stop: gr.Button, *groups: tuple[gr.HTML, list[Any]]) -> None:
    """Lets a button stop runs, and says beside the button that began them what went wrong: (progress bar, its runs)."""
    bars = [status for status, _ in groups]
    every = [run for _, runs in groups for run in runs]
    stop.click(lambda: [IDLE] * len(bars) if len(bars) > 1 else IDLE, None, bars, cancels=every, **QUIET)
    for status, runs in groups:
        for run in runs:
            end_at_idle(run, status)


@dataclass(frozen=True)
class Shell:
    """The chosen feature, the tabs, and links into them."""

    app: gr.Blocks
    selection: gr.State
    """{"hookpoint", "feature", "for": the tab it was sent to, "picture": what is to be made again there}, the last two
    if there are any; feature is None until one is chosen."""
    tabs: gr.Tabs
    address: gr.Textbox
    """Takes what stands behind the # of the page's address."""
    endpoints: tuple[type[Request], ...]
    """The endpoints that the tabs answer."""
    fingerprints: Mapping[str, str]
    """Of the run's SAEs, by name: a link may be of others."""

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

        def open_page(address: Any, request: gr.Request) -> Any:
            try:
                view = view_of(request.query_params, address)
            except FluxSaeError:
                view = {}  # told once, for all tabs
            if view.get("tab") != tab:
                return tuple(gr.skip() for _ in range(len(outputs) + 2))
            check_view(view, self.fingerprints)
            shown = show(view)
            return (gr.Tabs(selected=tab), {"tab": tab}, *(shown if isinstance(shown, tuple) else (shown,)))

        self.app.load(guarded(open_page), self.address, [self.tabs, arrived, *outputs], js=FRAGMENT, **QUEUED)
        return arrived

    def tell_bad_links(self, *tabs: str) -> None:
        """Says so when a link is damaged, or leads to no tab of these."""

        def check(address: Any, request: gr.Request) -> None:
            view = view_of(request.query_params, address)
            if view and view.get("tab") not in tabs:
                raise FluxSaeError(f"This link leads to {str(view.get('tab'))[:40]!r}; the page has {', '.join(tabs)}.")

        self.app.load(guarded(check), self.address, None, js=FRAGMENT, **QUEUED)


def _chosen(event: gr.EventData) -> dict[str, Any]:
    chosen = event._data
    if not isinstance(chosen, Mapping):
        raise FluxSaeError("Choose a feature: its hook point and number are missing.")
    # with the time, so that the same feature chosen again, as after it was closed, is a change that tabs hear of
    return {"hookpoint": chosen.get("hookpoint"), "feature": chosen.get("feature"), "at": time.monotonic()}
