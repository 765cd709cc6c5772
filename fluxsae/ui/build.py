"""The page: header and tabs around each run, and the endpoints of all of them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gradio as gr

from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.kit.header import header_html
from fluxsae.ui.kit.shell import QUIET, Shell
from fluxsae.ui.kit.theme import build_theme, page_css, page_head, script_route
from fluxsae.ui.serve.downloads import download_route, offer
from fluxsae.ui.serve.endpoints import add_endpoint
from fluxsae.ui.serve.lane import MAX_WAITING
from fluxsae.ui.serve.malformed_calls import exception_handlers
from fluxsae.ui.serve.mcp_answers import answer_in_json
from fluxsae.ui.serve.pictures import picture_route
from fluxsae.ui.serve.schemas import Request
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf, open_shelf
from fluxsae.ui.tabs.registry import TABS, Tab

TITLE = "fluxsae: what fires where inside FLUX"
MAX_QUEUE = 512
MAX_THREADS = MAX_WAITING + 64
"""Events under way at a time: those that wait for FLUX, which hold no thread, and those that do not."""
MAX_FILE_SIZE = "8mb"
DAY = 86_400


def build_app(shelf: Shelf | None = None) -> gr.Blocks:
    """The app of some runs (of those that the environment names where none are given), ready to launch.

    Each run has a page. The endpoints, which answer for all of them, have one that nobody opens, so that no visitor's
    browser loads what describes them.
    """
    shelf = shelf or open_shelf()
    desks = {name: {tab: tab.desk(bench) for tab in TABS} for name, bench in shelf.runs.items()}
    answers = {name: _answers(found.values()) for name, found in desks.items()}
    for name, found in desks.items():
        for desk in found.values():
            offer(shelf.runs[name].slug, desk.downloads())
    endpoints = tuple(answers[shelf.first.name])
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY), fill_width=True) as app:
        _build_page(app, shelf, shelf.first, desks[shelf.first.name], endpoints)
        app.unload(shelf.end_visit)
    for name, bench in shelf.runs.items():
        if bench is not shelf.first:
            with app.route(name, shelf.path(bench), show_in_navbar=False):
                _build_page(app, shelf, bench, desks[name], endpoints)
    with app.route("Endpoints", "endpoints", show_in_navbar=False):
        for schema in endpoints:
            add_endpoint(schema, {name: found[schema] for name, found in answers.items()}, shelf)
    answer_in_json()
    app.queue(max_size=MAX_QUEUE, default_concurrency_limit=4)
    return app


def _answers(desks: Iterable[Desk]) -> dict[type[Request], Callable[[Any], Any]]:
    return {schema: answer for desk in desks for schema, answer in desk.answers().items()}


def _build_page(
    app: gr.Blocks, shelf: Shelf, bench: Workbench, desks: Mapping[Tab, Desk], endpoints: tuple[type[Request], ...]
) -> None:
    gr.Navbar(visible=False)  # the header has links to the other runs
    header = gr.HTML()
    selection = gr.State({"hookpoint": bench.limits.default_hookpoint, "feature": None})
    address = gr.Textbox(visible=False)
    with gr.Tabs(elem_id="tabs") as tabs:
        shell = Shell(app, selection, tabs, address, endpoints=endpoints, fingerprints=bench.fingerprints)
        for tab, desk in desks.items():
            with gr.Tab(tab.title, id=tab.name) as place:
                tab.build(desk, shell, place)
    header.value = header_html(shelf, bench)  # last: what is damaged is found while tabs are built
    # FLUX is loaded after the page is built, and only then says whether it is offloaded or quantised
    app.load(lambda: header_html(shelf, bench) if bench.flux_remarks else gr.skip(), None, header, **QUIET)
    shell.tell_bad_links(*(tab.name for tab, desk in desks.items() if desk.answers()))


def launch_options() -> dict[str, Any]:
    """How the app is launched: own look, nothing of this machine's files served, no history of prompts kept."""
    return {
        "theme": build_theme(),
        "css": page_css(),
        "head": page_head(),
        "mcp_server": True,
        "ssr_mode": False,
        "share": False,
        "show_error": False,
        "run_history": False,
        "enable_monitoring": False,
        "allowed_paths": [],
        "max_file_size": MAX_FILE_SIZE,
        "max_threads": MAX_THREADS,
        "footer_links": [],
        "app_kwargs": {
            "exception_handlers": exception_handlers(),
            "routes": [picture_route(), download_route(), script_route()],
        },
    }
