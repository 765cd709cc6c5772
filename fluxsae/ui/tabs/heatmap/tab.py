"""The Heatmap tab: type a prompt, see what fires where."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import EACH, IDLE, QUIET, Shell, end_runs, making, with_progress
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
            max_lines=3,
            scale=6,
            elem_id="heatmap-prompt",
        )
        go = gr.Button("Paint", variant="primary", scale=0, min_width=110, elem_id="heatmap-go")
        surprise = gr.Button("Surprise me", scale=0, min_width=130, elem_id="heatmap-surprise")
        stop = gr.Button("Stop", scale=0, min_width=80, elem_id="heatmap-stop", elem_classes="fs-stop")
    gr.HTML(
        {"words": bench.vocabulary, "prompt": "heatmap-prompt"} if bench.vocabulary else None,
        html_template=element("fs-vocabulary"),
        js_on_load=mount(),
        elem_id="heatmap-vocabulary",
    )
    given = gr.HTML(
        {"samples": desk.samples(), "side": min(bench.limits.height, bench.limits.width)},
        html_template=element("fs-given"),
        js_on_load=mount(read="submit"),
        elem_id="heatmap-given",
    )
    status = gr.HTML(
        IDLE,
        html_template=element("fs-status"),
        js_on_load=mount(),
        elem_id="heatmap-status",
        elem_classes="fs-progress",
    )
    lab = gr.HTML(
        None,
        html_template=element("fs-lab"),
        js_on_load=mount(select="select", patch="submit", steer="edit", page="expand", why="apply"),
        elem_id="heatmap-lab",
    )
    # on its own: with FLUX.1-dev's maps it is as large as the rest of the page
    shell.app.load(lambda: desk.example(bench.limits.default_hookpoint), None, lab, **QUIET)
    hookpoint, seed, pinned, steps = _settings(desk)
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
        compare_status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount())
        diff = gr.HTML(
            None, html_template=element("fs-diff"), js_on_load=mount(select="select"), elem_id="heatmap-diff"
        )
    follow = gr.HTML(None, html_template=element("fs-follow"), js_on_load=mount(need="select"))
    current = gr.State(desk.example_request())

    def ask(values: Any, place: gr.EventData) -> Iterator[Any]:
        yield from with_progress(desk.patch(values, place._data), makes="heatmap-patch")

    def ask_why(values: Any, asked: gr.EventData) -> Iterator[Any]:
        yield from with_progress(desk.why(values, asked._data), makes="heatmap-why", counts="Pass")

    def read(hookpoint: Any, seed: Any, selection: Any, sent: gr.EventData) -> Iterator[Any]:
        events = desk.show_given(sent._data, hookpoint, seed, selection)
        yield from with_progress(events, makes="heatmap-lab", n=3)

    show = making(desk.show, makes="heatmap-lab", n=3)
    asked, shown, lane = [prompt, hookpoint, seed, steps], [status, lab, patch, current], in_lane(status)
    painted = [*asked, shell.selection]
    reseeded = gr.on(
        [go.click, prompt.submit],
        guarded(desk.seed_for),
        [prompt, seed, pinned, current],
        seed,
        trigger_mode="always_last",
        **QUIET,
    )
    running = reseeded.success(show, painted, shown, trigger_mode="always_last", **lane)
    surprised = surprise.click(guarded(desk.surprise), None, [prompt, seed, steps], **QUIET).success(
        show, painted, shown, trigger_mode="always_last", **lane
    )
    comparing = gr.on(
        [compare_go.click, other.submit],
        making(desk.compare, makes="heatmap-diff"),
        [prompt, other, hookpoint, seed, steps],
        [compare_status, diff],
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
    reading = given.submit(
        guarded(read), [hookpoint, seed, shell.selection], shown, **{**lane, "trigger_mode": EACH["trigger_mode"]}
    )
    shell.remember(lab, diff)
    shell.open_on(lab.edit, "steer")
    shell.open_on(lab.expand, "gallery")
    shell.follow(lambda chosen: chosen, [], follow)
    follow.select(
        guarded(lambda chosen, values: desk.pin(chosen, values) or gr.skip()), [shell.selection, current], lab, **QUIET
    )
    linked = shell.open_link("heatmap", desk.linked, asked)
    linking = linked.submit(show, painted, shown, **lane)
    runs = [running, surprised, asking, explaining, reading, linking]
    end_runs(stop, (status, runs), (compare_status, [comparing]))


def _settings(desk: HeatmapDesk) -> tuple[gr.Radio, gr.Number, gr.Checkbox, gr.Slider]:
    """Hook point, seed, whether a new prompt keeps it, and denoising steps."""
    bench = desk.bench
    with gr.Row(elem_classes="fs-settings", elem_id="heatmap-settings"):
        hookpoint = gr.Radio(
            bench.hookpoint_choices(),
            value=bench.limits.default_hookpoint,
            label="Where to look",
            elem_id="heatmap-hook",
        )
        seed = gr.Number(desk.example_seed, label="Seed", precision=0, min_width=110)
        pinned = gr.Checkbox(
            False,
            label="Keep this seed",
            info="Otherwise a new prompt gets a new seed.",
            min_width=170,
            elem_id="heatmap-pin",
        )
        steps = gr.Slider(
            1, bench.limits.max_steps, bench.limits.default_steps, step=1, label="Denoising steps", min_width=160
        )
    return hookpoint, seed, pinned, steps
