"""The page: header, tabs and endpoints around one run."""

from typing import Any

import gradio as gr

from fluxsae.ui.kit.header import header_html
from fluxsae.ui.kit.shell import Shell
from fluxsae.ui.kit.theme import build_theme, page_css, page_head
from fluxsae.ui.serve.endpoints import add_endpoint
from fluxsae.ui.serve.malformed_calls import exception_handlers
from fluxsae.ui.serve.session import Workbench, open_workbench
from fluxsae.ui.tabs.registry import TABS

TITLE = "fluxsae: what fires where inside FLUX"
MAX_QUEUE = 256
MAX_FILE_SIZE = "8mb"
DAY = 86_400


def build_app(bench: Workbench | None = None) -> gr.Blocks:
    """The app of a run (of the one that the environment names where none is given), ready to launch."""
    bench = bench or open_workbench()
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY), fill_width=True) as app:
        gr.HTML(header_html(bench))
        selection = gr.State({"hookpoint": bench.limits.default_hookpoint, "feature": None})
        desks = {tab: tab.desk(bench) for tab in TABS}
        answers = {schema: answer for desk in desks.values() for schema, answer in desk.answers().items()}
        with gr.Tabs(elem_id="tabs") as tabs:
            shell = Shell(app, selection, tabs, endpoints=tuple(answers))
            for tab, desk in desks.items():
                with gr.Tab(tab.title, id=tab.name) as place:
                    tab.build(desk, shell, place)
        shell.tell_bad_links(*(tab.name for tab, desk in desks.items() if desk.answers()))
        for schema, answer in answers.items():
            add_endpoint(schema, answer, bench)
    app.queue(max_size=MAX_QUEUE, default_concurrency_limit=4)
    return app


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
        "footer_links": ["api"],
        "app_kwargs": {"exception_handlers": exception_handlers()},
    }
