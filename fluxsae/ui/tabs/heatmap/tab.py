"""The Heatmap tab: type a prompt, see what fires where; and the endpoints /heatmap and /features_at."""

from collections.abc import Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import EACH, IDLE, QUIET, Shell, end_at_idle, with_progress, working
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import REQUIRED, add_endpoint, in_lane
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.serve.lane import StepDone
from fluxsae.ui.serve.schemas import FeaturesAtRequest, HeatmapRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk


def build_heatmap_tab(bench: Workbench, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    desk = HeatmapDesk(bench)
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
        stop = gr.Button("Stop", scale=0, min_width=80, elem_id="heatmap-stop")
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
    status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount(), elem_id="heatmap-status")
    lab = gr.HTML(
        desk.example(bench.limits.default_hookpoint),
        html_template=element("fs-lab"),
        js_on_load=mount(select="select", patch="submit", steer="edit", page="expand"),
        elem_id="heatmap-lab",
    )
    patch = gr.HTML(None, html_template=element("fs-patch"), js_on_load=mount(), elem_id="heatmap-patch")
    with gr.Accordion("Compare with another prompt: what differs?", open=False, elem_id="heatmap-compare"):
        with gr.Row():
            other = gr.Textbox(
                label="The other prompt, same seed",
                max_lines=3,
                scale=5,
                elem_id="heatmap-other",
                placeholder="the same words with one changed",
            )
            compare_go = gr.Button("Compare", variant="primary", scale=1, min_width=110, elem_id="heatmap-compare-go")
        diff = gr.HTML(
            None, html_template=element("fs-diff"), js_on_load=mount(select="select"), elem_id="heatmap-diff"
        )
    follow = gr.HTML(None, html_template=element("fs-follow"), js_on_load=mount(need="select"))
    current = gr.State(desk.example_request())

    def show(prompt: Any, hookpoint: Any, seed: Any, steps: Any) -> Iterator[Any]:
        for event in desk.show(prompt, hookpoint, seed, steps):
            if isinstance(event, StepDone):
                yield working(event, makes="heatmap-lab"), gr.skip(), gr.skip(), gr.skip()
            else:
                yield IDLE, event.value["lab"], None, event.value["request"]

    def ask(values: Any, place: gr.EventData) -> Iterator[Any]:
        yield from with_progress(desk.patch(values, place._data), makes="heatmap-patch")

    def compare(*values: Any) -> Iterator[Any]:
        yield from with_progress(desk.compare(*values), makes="heatmap-diff")

    asked, shown = [prompt, hookpoint, seed, steps], [status, lab, patch, current]
    lane = in_lane(status)
    running = gr.on(
        [go.click, prompt.submit],
        guarded(show, bench.visitors),
        asked,
        shown,
        trigger_mode="always_last",
        **lane,
    )
    surprised = surprise.click(guarded(desk.surprise), None, [prompt, seed, steps], **QUIET).success(
        guarded(show, bench.visitors), asked, shown, trigger_mode="always_last", **lane
    )
    comparing = gr.on(
        [compare_go.click, other.submit],
        guarded(compare, bench.visitors),
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
        guarded(ask, bench.visitors),
        current,
        [status, patch],
        **{**lane, "show_progress": "hidden", "trigger_mode": EACH["trigger_mode"]},
    )
    shell.remember(lab, diff)
    shell.open_on(lab.edit, "steer")
    shell.open_on(lab.expand, "gallery")
    shell.follow(lambda chosen: chosen, [], follow)
    follow.select(
        guarded(lambda chosen, values: desk.pin(chosen, values) or gr.skip()), [shell.selection, current], lab, **QUIET
    )
    linked = shell.open_link("heatmap", desk.linked, asked)
    linking = linked.submit(guarded(show, bench.visitors), asked, shown, **lane)
    runs = [running, surprised, comparing, asking, linking]
    stop.click(lambda: IDLE, None, status, cancels=runs, **QUIET)
    for run in runs:
        end_at_idle(run, status)


def add_heatmap_endpoints(bench: Workbench) -> None:
    """/heatmap and /features_at."""
    desk, limits = HeatmapDesk(bench), bench.limits

    def heatmap(  # noqa: PLR0917 - the order of the endpoint's arguments
        prompt: str,
        hookpoint: str = limits.default_hookpoint,
        seed: int = 0,
        num_inference_steps: int = limits.default_steps,
        step: int | None = None,
        limit: int = 8,
    ) -> Iterator[Any]:
        """Makes an image and tells which features of the autoencoder fire in it, and where.

        Args:
            prompt: What the image shows, 1 to 2,000 characters.
            hookpoint: Where in FLUX the features are read: a module path of this run.
            seed: Random seed; the same seed and prompt give the same image.
            num_inference_steps: Denoising steps of the image.
            step: Denoising step to look at, from 0; null for the strongest of the steps it was trained on.
            limit: How many features, most telling first.

        Returns:
            The image; the ranked features (JSON); one overlay a feature.
        """
        request = HeatmapRequest.parse(
            limits,
            prompt=prompt,
            hookpoint=hookpoint,
            seed=seed,
            num_inference_steps=num_inference_steps,
            step=step,
            limit=limit,
        )
        for event in desk.heatmap(request):
            yield (gr.skip(), gr.skip(), gr.skip()) if isinstance(event, StepDone) else event.value

    def features_at(  # noqa: PLR0917 - the order of the endpoint's arguments
        prompt: str,
        hookpoint: str = limits.default_hookpoint,
        seed: int = 0,
        num_inference_steps: int = limits.default_steps,
        step: int | None = None,
        row: int = REQUIRED,
        column: int = REQUIRED,
        limit: int = 8,
    ) -> Iterator[Any]:
        """Tells which features fire at one patch of an image, most telling first.

        Args:
            prompt: What the image shows, 1 to 2,000 characters.
            hookpoint: Where in FLUX the features are read: a module path of this run.
            seed: Random seed; the same seed and prompt give the same image.
            num_inference_steps: Denoising steps of the image.
            step: Denoising step to look at, from 0; null for the strongest of the steps it was trained on.
            row: Row of the patch, from the top, from 0.
            column: Column of the patch, from the left, from 0.
            limit: How many features.

        Returns:
            The ranked features at that patch (JSON).
        """
        request = FeaturesAtRequest.parse(
            limits,
            prompt=prompt,
            hookpoint=hookpoint,
            seed=seed,
            num_inference_steps=num_inference_steps,
            step=step,
            row=row,
            column=column,
            limit=limit,
        )
        for event in desk.features_at(request):
            yield gr.skip() if isinstance(event, StepDone) else event.value

    image = gr.Image(label="image", format="png", visible=False)
    overlays = gr.Gallery(label="overlays", format="png", visible=False)
    add_endpoint(
        heatmap,
        schema=HeatmapRequest,
        bench=bench,
        uses_flux=True,
        outputs=[image, gr.JSON(label="features", visible=False), overlays],
    )
    add_endpoint(
        features_at,
        schema=FeaturesAtRequest,
        bench=bench,
        uses_flux=True,
        outputs=[gr.JSON(label="features", visible=False)],
    )
