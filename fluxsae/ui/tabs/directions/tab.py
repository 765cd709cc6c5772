"""The Directions tab: a map of what features write, what is near, layers compared."""

from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import QUEUED, Shell
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.tabs.directions.desk import DirectionsDesk


def build_directions_tab(desk: DirectionsDesk, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events. The map is fetched when the tab is first opened."""
    bench = desk.bench
    hookpoint = gr.Radio(
        bench.hookpoint_choices(), value=bench.limits.default_hookpoint, label="Where", elem_id="directions-hook"
    )
    with gr.Row():
        with gr.Column(scale=7, min_width=300):
            chart = gr.HTML(
                None, html_template=element("fs-map"), js_on_load=mount(select="select"), elem_id="directions-map"
            )
        with gr.Column(scale=4, min_width=280):
            near = gr.HTML(
                None,
                html_template=element("fs-near"),
                js_on_load=mount(select="select", steer="edit", page="expand"),
                elem_id="directions-near",
            )
    if len(bench.hookpoints) > 1:
        with gr.Accordion("Compare two hook points: shared and new features", open=False, elem_id="directions-compare"):
            with gr.Row():
                first = gr.Dropdown(bench.hookpoint_choices(), value=bench.hookpoints[0], label="First")
                second = gr.Dropdown(bench.hookpoint_choices(), value=bench.hookpoints[-1], label="Second")
                go = gr.Button("Compare", variant="primary", scale=0, min_width=140, elem_id="directions-compare-go")
            compared = gr.HTML(None, html_template=element("fs-compared"), js_on_load=mount(select="select"))
        go.click(guarded(desk.compared), [first, second], compared, **QUEUED)
        shell.remember(compared)
    tab.select(guarded(desk.map), [hookpoint, shell.selection], chart, **QUEUED)
    hookpoint.change(guarded(desk.map), [hookpoint, shell.selection], chart, **QUEUED)
    shell.remember(chart, near)
    shell.follow(desk.near, [], near)
    shell.follow(_other_hookpoint, [hookpoint], hookpoint)
    shell.open_on(near.edit, "steer")
    shell.open_on(near.expand, "gallery")
    shell.open_link("directions", desk.linked, [hookpoint, chart, near])


def _other_hookpoint(chosen: Any, hookpoint: Any) -> Any:
    return gr.skip() if chosen["hookpoint"] == hookpoint else chosen["hookpoint"]
