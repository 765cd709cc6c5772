"""The Heatmap tab: type a prompt, see what fires where."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import EACH, IDLE, QUIET, Shell, end_at_idle, making, with_progress
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import in_lane
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk


def build_heatmap_tab(desk: HeatmapDesk, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    bench = desk.bench
    with gr.Row(equal_height=True, elem_classes="fs-ask"):
        prompt = gr.Textbox(
            desk.example_prompt,
            label="What should the image show?",
            info=bench.vocabulary or None,
            max_lines=3,
            scale=6,
            elem_id="heatmap-prompt",
        )
        go = gr.Button("Show what fires", variant="primary", scale=0, min_width=165, elem_id="heatmap-go")
        surprise = gr.Button("Surprise me", scale=0, min_width=130, elem_id="heatmap-surprise")
        stop = gr.Button("Stop", scale=0, min_width=80, elem_id="heatmap-stop", elem_classes="fs-stop")
    with gr.Row(elem_classes="fs-settings", elem_id="heatmap-settings"):
        hookpoint = gr.Radio(
            bench.hookpoint_choices(),
            value=bench.limits.default_hookpoint,
            label="Where to look",
            elem_id="heatmap-hook",
        )
        seed = gr.Number(desk.example_seed, label="Seed", precision=0, min_width=110)
        steps = gr.Slider(
            1, bench.limits.max_steps, bench.limits.default_steps, step=1, label="Denoising steps", min_width=160
        )
    status = gr.HTML(
        IDLE,
        html_template=element("fs-status"),
        js_on_load=mount(),
        elem_id="heatmap-status",
        elem_classes="fs-progress",
    )
    lab = gr.HTML(
        desk.example(bench.limits.default_hookpoint),
        html_template=element("fs-lab"),
        js_on_load=mount(select="select", patch="submit", steer="edit", page="expand", why="apply"),
        elem_id="heatmap-lab",
    )
    patch = gr.HTML(None, html_template=element("fs-patch"), js_on_load=mount(), elem_id="heatmap-patch")
    why = gr.HTML(None, html_template=element("fs-why"), js_on_load=mount(), elem_id="heatmap-why")
    with gr.Accordion("Compare with another prompt: what differs?", open=False, elem_id="heatmap-compare"):
        with gr.Row():
            other = gr.Textbox(
                label="Other prompt, same seed",
                max_lines=3,
                scale=5,
                elem_id="heatmap-other",
                placeholder="the same prompt with one word changed",
            )
            compare_go = gr.Button("Compare", variant="primary", scale=1, min_width=110, elem_id="heatmap-compare-go")
        diff = gr.HTML(
            None, html_template=element("fs-diff"), js_on_load=mount(select="select"), elem_id="heatmap-diff"
        )
    follow = gr.HTML(None, html_template=element("fs-follow"), js_on_load=mount(need="select"))
    current = gr.State(desk.example_request())

    def ask(values: Any, place: gr.EventData) -> Iterator[Any]:
        yield from with_progress(desk.patch(values, place._data), makes="heatmap-patch")

    def ask_why(values: Any, asked: gr.EventData) -> Iterator[Any]:
        yield from with_progress(desk.why(values, asked._data), makes="heatmap-why", counts="Pass")

    show = making(desk.show, makes="heatmap-lab", n=3)
    compare = making(desk.compare, makes="heatmap-diff")
    asked, shown = [prompt, hookpoint, seed, steps], [status, lab, patch, current]
    lane = in_lane(status)
    running = gr.on(
        [go.click, prompt.submit],
        show,
        asked,
        shown,
        trigger_mode="always_last",
        **lane,
    )
    surprised = surprise.click(guarded(desk.surprise), None, [prompt, seed, steps], **QUIET).success(
        show, asked, shown, trigger_mode="always_last", **lane
    )
    comparing = gr.on(
        [compare_go.click, other.submit],
        compare,
        [prompt, other, hookpoint, seed, steps],
        [status, diff],
        **lane,
    )
    hookpoint.change(
        guarded(lambda *values: (*desk.change_hookpoint(*values), None)),
        [hookpoint, current],
        [lab, current, diff],
        **QUIET,
    )
    asking = lab.submit(
        guarded(ask),
        current,
        [status, patch],
        **{**lane, "show_progress": "hidden", "trigger_mode": EACH["trigger_mode"]},
    )
    explaining = lab.apply(guarded(ask_why), current, [status, why], trigger_mode="always_last", **lane)
    shell.remember(lab, diff)
    shell.open_on(lab.edit, "steer")
    shell.open_on(lab.expand, "gallery")
    shell.follow(lambda chosen: chosen, [], follow)
    follow.select(
        guarded(lambda chosen, values: desk.pin(chosen, values) or gr.skip()), [shell.selection, current], lab, **QUIET
    )
    linked = shell.open_link("heatmap", desk.linked, asked)
    linking = linked.submit(show, asked, shown, **lane)
    runs = [running, surprised, comparing, asking, explaining, linking]
    stop.click(lambda: IDLE, None, status, cancels=runs, **QUIET)
    for run in runs:
        end_at_idle(run, status)
