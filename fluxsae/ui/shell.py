"""What the tabs share: the chosen feature, which follows the visitor, and going from tab to tab."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import gradio as gr

from fluxsae.ui.guard import guarded
from fluxsae.ui.lane import StepDone

IDLE: Final[Mapping[str, Any]] = {"state": "idle"}
QUIET: Final[Mapping[str, Any]] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Events that are answered at once and are no endpoint."""

CHOOSING: Final[Mapping[str, Any]] = {
    "show_progress": "hidden",
    "api_visibility": "private",
    "concurrency_id": "choose",
    "concurrency_limit": None,
}
"""Events that change the chosen feature: Gradio tells a state's listeners only of events that were queued."""


def working(event: StepDone) -> dict[str, Any]:
    """The progress bar's data after a denoising step."""
    return {"state": "working", "step": event.step, "n_steps": event.n_steps}


@dataclass(frozen=True)
class Shell:
    """The chosen feature and the tabs."""

    selection: gr.State
    """{"hookpoint", "feature"}; feature is None until one is chosen."""
    tabs: gr.Tabs

    def remember(self, *sources: gr.HTML) -> None:
        """A feature chosen in one of these becomes the visitor's."""
        for source in sources:
            source.select(_chosen, None, self.selection, **CHOOSING)

    def open_on(self, listener: Callable[..., Any], tab: str) -> None:
        """An event that brings a feature makes it the visitor's and opens a tab."""

        def go(event: gr.EventData) -> Any:
            return _chosen(event), gr.Tabs(selected=tab)

        listener(go, None, [self.selection, self.tabs], **CHOOSING)

    def follow(self, show: Callable[..., Any], inputs: list[Any], outputs: Any) -> None:
        """Shows the chosen feature whenever it changes: `show(selection, *inputs)`."""
        self.selection.change(guarded(show), [self.selection, *inputs], outputs, **QUIET)


def _chosen(event: gr.EventData) -> Any:
    chosen = event._data
    if not isinstance(chosen, Mapping):
        return gr.skip()
    return {"hookpoint": chosen.get("hookpoint"), "feature": chosen.get("feature")}
