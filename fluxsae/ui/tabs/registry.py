"""The tabs of the page, in their order. A new tab is a folder beside this file and one line in `TABS`."""

from collections.abc import Callable
from dataclasses import dataclass

import gradio as gr

from fluxsae.ui.kit.shell import Shell
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.about.tab import build_about_tab
from fluxsae.ui.tabs.directions.tab import add_directions_endpoints, build_directions_tab
from fluxsae.ui.tabs.gallery.tab import add_gallery_endpoints, build_gallery_tab
from fluxsae.ui.tabs.heatmap.tab import add_heatmap_endpoints, build_heatmap_tab
from fluxsae.ui.tabs.steer.tab import add_steer_endpoints, build_steer_tab


@dataclass(frozen=True)
class Tab:
    """One tab: its title, how it is built, and its named endpoints."""

    title: str
    build: Callable[[Workbench, Shell, gr.Tab], None]
    add_endpoints: Callable[[Workbench], None] | None = None
    """None for a tab that only shows: links lead to the others."""

    @property
    def name(self) -> str:
        """The tab's id on the page and in links."""
        return self.title.lower()


TABS: tuple[Tab, ...] = (
    Tab("Heatmap", build_heatmap_tab, add_heatmap_endpoints),
    Tab("Gallery", build_gallery_tab, add_gallery_endpoints),
    Tab("Directions", build_directions_tab, add_directions_endpoints),
    Tab("Steer", build_steer_tab, add_steer_endpoints),
    Tab("About", build_about_tab),
)
