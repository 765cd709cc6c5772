"""The tabs of the page, in their order. A new tab is a folder beside this file and one line in `TABS`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.about.tab import build_about_tab
from fluxsae.ui.tabs.directions.desk import DirectionsDesk
from fluxsae.ui.tabs.directions.tab import build_directions_tab
from fluxsae.ui.tabs.gallery.desk import GalleryDesk
from fluxsae.ui.tabs.gallery.tab import build_gallery_tab
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk
from fluxsae.ui.tabs.heatmap.tab import build_heatmap_tab
from fluxsae.ui.tabs.steer.desk import SteerDesk
from fluxsae.ui.tabs.steer.tab import build_steer_tab


@dataclass(frozen=True)
class Tab:
    """One tab: its title, what answers its questions, and how it is built: `build(desk, shell, place)`."""

    title: str
    desk: Callable[[Workbench], Desk]
    build: Callable[..., Any]

    @property
    def name(self) -> str:
        """The tab's id on the page and in links."""
        return self.title.lower()


TABS: tuple[Tab, ...] = (
    Tab("Heatmap", HeatmapDesk, build_heatmap_tab),
    Tab("Gallery", GalleryDesk, build_gallery_tab),
    Tab("Directions", DirectionsDesk, build_directions_tab),
    Tab("Steer", SteerDesk, build_steer_tab),
    Tab("About", Desk, build_about_tab),
)
