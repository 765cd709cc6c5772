"""The Gallery tab: features that mean something, served from the run folder; /search_features and /feature."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import IDLE, QUIET, Shell, end_at_idle, with_progress
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import LANE, REQUIRED, add_endpoint
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.serve.schemas import FeatureRequest, SearchRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.gallery.desk import CLASSES, PAGE, SORTS, GalleryDesk
from fluxsae.ui.tabs.gallery.words import WordsDesk


def build_gallery_tab(bench: Workbench, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    desk, words = GalleryDesk(bench), WordsDesk(bench)
    with gr.Row(elem_classes="fs-ask"):
        query = gr.Textbox(
            label="Search",
            placeholder="striped, a red circle, or a number such as 12",
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
        coherent = gr.Checkbox(False, label="Only features whose images look alike", min_width=220)
    page = gr.HTML(
        None,
        html_template=element("fs-feature"),
        js_on_load=mount(select="select", steer="edit", map="expand", close="clear", why="submit"),
        elem_id="gallery-feature",
    )
    with gr.Row():
        status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount(), elem_id="gallery-status")
        stop = gr.Button("Stop", scale=0, min_width=80, elem_id="gallery-stop")
    silence = gr.HTML(None, html_template=element("fs-silence"), js_on_load=mount(), elem_id="gallery-silence")
    inputs = [query, hookpoint, kind, coherent, sort]
    gallery = gr.HTML(
        desk.gallery("", bench.limits.default_hookpoint, "any", False, "best"),
        html_template=element("fs-gallery"),
        js_on_load=mount(select="select", more="expand"),
        elem_id="gallery-cards",
    )
    shown = gr.State(PAGE)

    def more(shown: int, query: Any, place: Any, kind: Any, coherent: Any, sort: Any) -> Any:  # noqa: PLR0917 - inputs
        return desk.gallery(query, place, kind, coherent, sort, shown + PAGE), shown + PAGE

    def why(chosen: gr.EventData) -> Iterator[Any]:
        yield from with_progress(words.silence(chosen._data), makes="gallery-silence")

    gallery.expand(
        guarded(more),
        [shown, *inputs],
        [gallery, shown],
        **QUIET,
    )
    asking = page.submit(
        guarded(why, bench.visitors),
        None,
        [status, silence],
        show_progress="minimal",
        show_progress_on=status,
        concurrency_id=LANE,
        api_visibility="private",
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


def add_gallery_endpoints(bench: Workbench) -> None:
    """/search_features and /feature."""
    desk, limits = GalleryDesk(bench), bench.limits

    def search_features(query: str = "", hookpoint: str = limits.default_hookpoint, limit: int = 20) -> Any:
        """Finds features by number, by label, or by any words, which CLIP compares with the features' images.

        Args:
            query: A feature number, words of a label, or any words; empty for the most meaningful features.
            hookpoint: Where in FLUX the features are read: a module path of this run.
            limit: How many features, best first.

        Returns:
            The features (JSON) with label, statistics, reason and score (clip: cosine); none if no word is known.
        """
        return desk.search(SearchRequest.parse(limits, query=query, hookpoint=hookpoint, limit=limit))

    def feature(hookpoint: str = limits.default_hookpoint, feature: int = REQUIRED) -> Any:
        """Gives one feature's card: label, statistics, neighbours, and its top images with overlays.

        Args:
            hookpoint: Where in FLUX the feature is read: a module path of this run.
            feature: Number of the feature, from 0.

        Returns:
            The card (JSON); the top images with the feature's heatmap (gallery).
        """
        return desk.feature(FeatureRequest.parse(limits, hookpoint=hookpoint, feature=feature))

    add_endpoint(
        search_features,
        schema=SearchRequest,
        bench=bench,
        uses_flux=False,
        outputs=[gr.JSON(label="features", visible=False)],
    )
    add_endpoint(
        feature,
        schema=FeatureRequest,
        bench=bench,
        uses_flux=False,
        outputs=[gr.JSON(label="card", visible=False), gr.Gallery(label="top_images", format="png", visible=False)],
    )
