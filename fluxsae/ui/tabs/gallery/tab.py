"""The Gallery tab: features that mean something, served from the run folder."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import IDLE, QUIET, Shell, end_at_idle, with_progress
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import in_lane
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.tabs.gallery.desk import CLASSES, PAGE, SORTS, GalleryDesk


def build_gallery_tab(desk: GalleryDesk, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    bench, words = desk.bench, desk.words
    with gr.Row(elem_classes="fs-ask"):
        query = gr.Textbox(
            label="Search",
            placeholder="striped, a red cat, or a number such as 12",
            scale=4,
            elem_id="gallery-query",
        )
        hookpoint = gr.Radio(
            bench.hookpoint_choices(),
            value=bench.limits.default_hookpoint,
            label="Where",
            scale=3,
            elem_id="gallery-hook",
        )
    with gr.Row(elem_classes="fs-settings"):
        kind = gr.Dropdown([(text, key) for key, text in CLASSES.items()], value="any", label="How often it fires")
        sort = gr.Dropdown([(text, key) for key, text in SORTS.items()], value="best", label="Order")
        coherent = gr.Checkbox(False, label="Only features with similar top images", min_width=220)
    page = gr.HTML(
        None,
        html_template=element("fs-feature"),
        js_on_load=mount(select="select", steer="edit", map="expand", close="clear", why="submit"),
        elem_id="gallery-feature",
    )
    with gr.Row():
        status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount(), elem_id="gallery-status")
        stop = gr.Button("Stop", scale=0, min_width=80, elem_id="gallery-stop", elem_classes="fs-stop")
    silence = gr.HTML(None, html_template=element("fs-silence"), js_on_load=mount(), elem_id="gallery-silence")
    inputs = [query, hookpoint, kind, coherent, sort]
    gallery = gr.HTML(
        None,
        html_template=element("fs-gallery"),
        js_on_load=mount(select="select", more="expand"),
        elem_id="gallery-cards",
    )
    shown = gr.State(PAGE)
    """Cards on the page, from which on the next ones are asked for."""

    # after the page is there: what a tab behind the first shows need not come with it
    shell.app.load(
        lambda: desk.gallery("", bench.limits.default_hookpoint, "any", False, "best"), None, gallery, **QUIET
    )

    def more(shown: int, query: Any, place: Any, kind: Any, coherent: Any, sort: Any) -> Any:  # noqa: PLR0917 - inputs
        return desk.gallery(query, place, kind, coherent, sort, shown), shown + PAGE

    def why(chosen: gr.EventData) -> Iterator[Any]:
        yield from with_progress(words.silence(chosen._data), makes="gallery-silence")

    gallery.expand(guarded(more), [shown, *inputs], [gallery, shown], **QUIET)
    asking = page.submit(
        guarded(why),
        None,
        [status, silence],
        **in_lane(status),
    )
    end_at_idle(asking, status)
    gr.on(
        [query.change, hookpoint.change, kind.change, coherent.change, sort.change],
        guarded(lambda *values: (desk.gallery(*values), PAGE, None, IDLE, None)),
        inputs,
        [gallery, shown, page, status, silence],
        cancels=[asking],
        trigger_mode="always_last",
        **QUIET,
    )
    ends = [page.clear, page.select, gallery.select, stop.click]
    gr.on(ends, lambda: (IDLE, None), None, [status, silence], cancels=[asking], **QUIET)
    shell.remember(gallery, page)
    shell.open_on(page.edit, "steer")
    shell.open_on(page.expand, "directions")
    shell.follow(lambda chosen: (desk.page(chosen), None), [], [page, silence])
    shell.open_link("gallery", desk.page, [page])
