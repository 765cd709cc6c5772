"""The Steer tab: turn features, compare, share."""

from html import escape
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import EACH, IDLE, QUEUED, QUIET, Shell, end_runs, making
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import in_lane
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.tabs.steer.desk import SteerDesk


def build_steer_tab(desk: SteerDesk, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    bench = desk.bench
    first = desk.first
    with gr.Row(equal_height=True, elem_classes="fs-ask"):
        prompt = gr.Textbox(
            first.get("prompt", ""), label="What should the image show?", max_lines=3, scale=6, elem_id="steer-prompt"
        )
        seed = gr.Number(first.get("seed", 0), label="Seed", precision=0, min_width=120, scale=1)
        steps = gr.Slider(
            1,
            bench.limits.max_steps,
            bench.limits.default_steps,
            step=1,
            label="Denoising steps",
            min_width=160,
            scale=2,
        )
    status = gr.HTML(
        IDLE, html_template=element("fs-status"), js_on_load=mount(), elem_id="steer-status", elem_classes="fs-progress"
    )
    with gr.Row(elem_classes="fs-steer"):
        with gr.Column(scale=5, min_width=300):
            edits = gr.HTML(
                desk.start(),
                html_template=element("fs-edits"),
                js_on_load=mount(turn="input", begin="submit"),
                elem_id="steer-edits",
            )
            old, new, swap_go, swap_status = _swap_row(desk, tab, [prompt, seed, steps])
            with gr.Row():
                find = gr.Textbox(
                    label="Find a feature",
                    show_label=False,
                    placeholder="Find a feature: striped, red, 12",
                    container=False,
                    scale=3,
                    elem_id="steer-find",
                )
                upload = gr.UploadButton(
                    "Load a recipe",
                    file_types=[".json", ".png"],
                    size="sm",
                    scale=1,
                    min_width=130,
                    elem_id="steer-load",
                )
            found = gr.HTML(None, html_template=element("fs-found"), js_on_load=mount(), elem_id="steer-found")
            with gr.Row():
                go = gr.Button("Steer", variant="primary", min_width=100, elem_id="steer-go")
                strip_go = gr.Button("Compare strengths", min_width=190, elem_id="steer-strip-go")
                stop = gr.Button("Stop", elem_id="steer-stop", elem_classes="fs-stop", min_width=70)
            costs = gr.HTML(elem_id="steer-costs")
        with gr.Column(scale=6, min_width=300):
            result = gr.HTML(
                first or None,
                html_template=element("fs-result"),
                js_on_load=mount(control="submit"),
                elem_id="steer-result",
            )

    strip = gr.HTML(None, html_template=element("fs-strip"), js_on_load=mount(), elem_id="steer-strip")
    asked = [prompt, seed, steps, edits]

    def begin(starter: gr.EventData) -> Any:
        return desk.begin(starter._data)

    turn = making(desk.turn, makes="steer-result")
    compare = making(desk.strip, makes="steer-strip")

    swap = making(desk.swap_on, makes="steer-result", n=4)
    lane = in_lane(status)
    newest = {**lane, "trigger_mode": "multiple"}  # what is asked while another is made ends that
    latest = {**lane, "trigger_mode": "always_last"}  # what is asked while another is made is made next
    runs = [
        edits.input(making(desk.moved, makes="steer-result"), asked, [status, result], **latest),
        gr.on([go.click, prompt.submit], turn, asked, [status, result], **newest),
        result.submit(making(desk.controlled, makes="steer-result"), asked, [status, result], **newest),
        strip_go.click(compare, asked, [status, strip], **latest),
    ]
    find.change(guarded(desk.matches), find, found, **QUIET)
    find.submit(guarded(desk.find), [find, edits], found, trigger_mode="always_last", **QUEUED)
    begun = edits.submit(guarded(begin), None, asked, **EACH)
    runs.append(begun.success(turn, asked, [status, result], **lane))
    loaded = upload.upload(guarded(desk.loaded), upload, asked, **QUEUED)
    runs.append(loaded.success(turn, asked, [status, result], **lane))

    def follow(chosen: Any) -> Any:
        picture, slider = desk.follow(chosen) or (None, gr.skip())
        return (*(picture or (gr.skip(),) * 3), slider)

    shell.follow(follow, [], [prompt, seed, steps, found])
    arrived = shell.open_link("steer", desk.linked, asked)
    runs.append(arrived.submit(turn, asked, [status, result], **lane))
    swapped = [prompt, seed, steps, old, new, edits]
    swapping = swap_go.click(swap, swapped, [swap_status, *asked], **latest)
    runs.append(swapping.success(turn, asked, [status, result], **lane))
    _tell_costs(desk, shell, costs, [*runs, swapping])
    end_runs(stop, (status, runs), (swap_status, [swapping]))


def _tell_costs(desk: SteerDesk, shell: Shell, costs: gr.HTML, runs: list[Any]) -> None:
    """Says how many images the buttons make and how long that takes, when the page opens and after each run."""

    def cost() -> str:
        return f'<p class="fs-quiet fs-hint">{escape(desk.cost_words())}</p>'

    shell.app.load(cost, None, costs, **QUIET)
    for run in runs:
        run.success(cost, None, costs, **QUIET)


def _swap_row(desk: SteerDesk, tab: gr.Tab, picture: list[Any]) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button, gr.HTML]:
    """What goes, what comes in its place, the button and its progress; not shown where there are no two names.

    `picture` is prompt, seed and denoising steps.
    """
    names = list(desk.names.known)
    old, new = desk.first_swap() or names[:2] if len(names) > 1 else (None, None)
    with gr.Column(elem_classes="fs-swap", visible=len(names) > 1):
        with gr.Row():
            one = gr.Dropdown(names, value=old, label="Replace", min_width=120, elem_id="steer-old")
            other = gr.Dropdown(names, value=new, label="with", min_width=120, elem_id="steer-new")
            go = gr.Button("Swap", min_width=80, elem_id="steer-swap")
        only = " Colours work best; things rarely work." if desk.bench.is_miniature else ""
        gr.HTML(
            '<p class="fs-quiet fs-hint">Tries eight swaps where the first name fires. Keeps the one in which CLIP '
            f"recognises the second name best, and sets the sliders to it.{only} Names that cannot be had, or "
            "that rarely worked when the run was measured, come last with the reason.</p>"
        )
        status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount())
    # names of one kind are found when the tab is opened: of 20,000 prompts that takes seconds
    tab.select(guarded(lambda name, other: gr.Dropdown(desk.names.choices(name, other))), [one, other], other, **QUEUED)

    def offer(prompt: Any, seed: Any, steps: Any, name: Any) -> Any:
        choices, chosen = desk.names.replaceable(prompt, seed, steps, name)
        return gr.Dropdown(choices, value=chosen)

    gr.on([tab.select, picture[0].blur], guarded(offer), [*picture, one], one, **QUIET)

    def offer_new(name: Any) -> Any:
        choices = desk.names.choices(name)
        return gr.Dropdown(choices, value=choices[0][1])

    one.change(offer_new, one, other, **QUEUED)
    return one, other, go, status
