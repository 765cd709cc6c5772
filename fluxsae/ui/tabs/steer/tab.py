"""The Steer tab: turn features, compare, share; and the endpoints /steer and /sweep."""

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from fluxsae.ui.kit.shell import EACH, IDLE, QUEUED, QUIET, Shell, end_at_idle, with_progress, working
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import REQUIRED, add_endpoint, in_lane
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.serve.lane import StepDone
from fluxsae.ui.serve.schemas import SteerRequest, SweepRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.desk import SteerDesk


def build_steer_tab(bench: Workbench, shell: Shell, tab: gr.Tab) -> None:
    """The tab's components and events."""
    desk = SteerDesk(bench)
    first = desk.first() or {}
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
    status = gr.HTML(IDLE, html_template=element("fs-status"), js_on_load=mount(), elem_id="steer-status")
    with gr.Row(elem_classes="fs-steer"):
        with gr.Column(scale=5, min_width=300):
            edits = gr.HTML(
                desk.start(),
                html_template=element("fs-edits"),
                js_on_load=mount(turn="input", begin="submit"),
                elem_id="steer-edits",
            )
            old, new, swap_go = _swap_row(desk)
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
                go = gr.Button("Steer", variant="primary", elem_id="steer-go")
                strip_go = gr.Button("Seven strengths", elem_id="steer-strip-go")
                stop = gr.Button("Stop", elem_id="steer-stop", min_width=70)
        with gr.Column(scale=6, min_width=300):
            result = gr.HTML(
                first or None, html_template=element("fs-result"), js_on_load=mount(), elem_id="steer-result"
            )
    strip = gr.HTML(None, html_template=element("fs-strip"), js_on_load=mount(), elem_id="steer-strip")
    asked = [prompt, seed, steps, edits]

    def turn(*values: Any) -> Iterator[Any]:
        yield from with_progress(desk.turn(*values), makes="steer-result")

    def seven(*values: Any) -> Iterator[Any]:
        yield from with_progress(desk.strip(*values), makes="steer-strip")

    def begin(starter: gr.EventData) -> Any:
        return desk.begin(starter._data)

    lane = in_lane(status)
    latest = {**lane, "trigger_mode": "always_last"}  # what is asked while another is made is made next
    runs = [
        edits.input(guarded(turn, bench.visitors), asked, [status, result], **latest),
        gr.on([go.click, prompt.submit], guarded(turn, bench.visitors), asked, [status, result], **latest),
        strip_go.click(guarded(seven, bench.visitors), asked, [status, strip], **latest),
    ]
    find.change(guarded(desk.matches), find, found, **QUIET)
    find.submit(guarded(desk.find), [find, edits], found, trigger_mode="always_last", **QUEUED)
    begun = edits.submit(guarded(begin), None, asked, **EACH)
    runs.append(begun.success(guarded(turn, bench.visitors), asked, [status, result], **lane))
    loaded = upload.upload(guarded(desk.loaded), upload, asked, **QUEUED)
    runs.append(loaded.success(guarded(turn, bench.visitors), asked, [status, result], **lane))

    def follow(chosen: Any) -> Any:
        picture, slider = desk.follow(chosen) or (None, gr.skip())
        return (*(picture or (gr.skip(),) * 3), slider)

    shell.follow(follow, [], [prompt, seed, steps, found])
    arrived = shell.open_link("steer", desk.linked, asked)
    runs.append(arrived.submit(guarded(turn, bench.visitors), asked, [status, result], **lane))
    swapped = [prompt, seed, steps, old, new]
    swapping = swap_go.click(guarded(_swapping(desk), bench.visitors), swapped, [status, *asked], **latest)
    runs += [swapping, swapping.success(guarded(turn, bench.visitors), asked, [status, result], **lane)]
    stop.click(lambda: IDLE, None, status, cancels=runs, **QUIET)
    for run in runs:
        end_at_idle(run, status)


def _swap_row(desk: SteerDesk) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    """What goes, what comes in its place, and the button; not shown where fewer than two names are to be had."""
    names = list(desk.names)
    old, new = desk.first_swap() or [*names[:1], *desk.kin(*names[:1])[:1]] if len(names) > 1 else (None, None)
    kin = desk.kin(old) if old else []
    with gr.Column(elem_classes="fs-swap", visible=len(names) > 1):
        with gr.Row():
            one = gr.Dropdown(names, value=old, label="Take this away", min_width=120, elem_id="steer-old")
            other = gr.Dropdown(kin, value=new, label="and put in its place", min_width=120, elem_id="steer-new")
            go = gr.Button("Swap", min_width=80, elem_id="steer-swap")
        gr.HTML(
            '<p class="fs-quiet fs-hint">Makes the picture eight times, where the first name fires, keeps what CLIP '
            "reads as the second, and sets the sliders to it. Colours work best, shapes hardly ever.</p>"
            if desk.bench.is_miniature
            else '<p class="fs-quiet fs-hint">Makes the picture eight times, where the first name fires, keeps what '
            "CLIP reads as the second, and sets the sliders to it.</p>"
        )
    one.change(lambda name: gr.Dropdown(desk.kin(name), value=desk.kin(name)[0]), one, other, **QUEUED)
    return one, other, go


def _swapping(desk: SteerDesk) -> Callable[..., Iterator[Any]]:
    def swap(*values: Any) -> Iterator[Any]:
        for event in desk.swap(*values):
            if isinstance(event, StepDone):
                yield working(event, makes="steer-result"), *(gr.skip(),) * 4
            else:
                yield IDLE, *event.value

    return swap


def add_steer_endpoints(bench: Workbench) -> None:
    """/steer and /sweep."""
    desk, limits = SteerDesk(bench), bench.limits

    def steer(
        prompt: str,
        edits: list[dict[str, Any]] = REQUIRED,
        seed: int = 0,
        num_inference_steps: int = limits.default_steps,
    ) -> Iterator[Any]:
        """Makes an image twice, without and with features turned up or down, and measures what the edit did.

        Args:
            prompt: What the image shows, 1 to 2,000 characters.
            edits: Objects with hookpoint, feature, mode, strength, and if wanted steps and region; [] for no edit.
            seed: Random seed; the same seed and prompt give the same image.
            num_inference_steps: Denoising steps of the image.

        Returns:
            The image before; the image after; the recipe and the measurements (JSON).
        """
        request = SteerRequest.parse(
            limits, prompt=prompt, edits=edits, seed=seed, num_inference_steps=num_inference_steps
        )
        for event in desk.steer(request):
            yield (gr.skip(), gr.skip(), gr.skip()) if isinstance(event, StepDone) else event.value

    def sweep(  # noqa: PLR0917 - the order of the endpoint's arguments
        prompt: str,
        hookpoint: str = limits.default_hookpoint,
        feature: int = REQUIRED,
        mode: str = "add",
        strengths: list[float] = REQUIRED,
        steps: list[int] | None = None,
        region: Any = None,
        seed: int = 0,
        num_inference_steps: int = limits.default_steps,
    ) -> Iterator[Any]:
        """Makes an image at several strengths of one feature, and measures what each did.

        Args:
            prompt: What the image shows, 1 to 2,000 characters.
            hookpoint: Where in FLUX the feature is read and written: a module path of this run.
            feature: Number of the feature, from 0.
            mode: How to edit: scale, add, clamp, ablate or project_out.
            strengths: 1 to 9 strengths. scale: factor; add, clamp: times its usual activation; others: 0 to 1.
            steps: Steps [start, stop) in which the edit acts; null for the noise levels the autoencoder knows.
            region: Where the edit acts: rows of 0 and 1, {"heatmap": threshold}, or null for everywhere.
            seed: Random seed; the same seed and prompt give the same image.
            num_inference_steps: Denoising steps of the image.

        Returns:
            One image a strength (gallery); the measurements of each (JSON).
        """
        request = SweepRequest.parse(
            limits,
            prompt=prompt,
            hookpoint=hookpoint,
            feature=feature,
            mode=mode,
            strengths=strengths,
            steps=steps,
            region=region,
            seed=seed,
            num_inference_steps=num_inference_steps,
        )
        for event in desk.sweep(request):
            yield (gr.skip(), gr.skip()) if isinstance(event, StepDone) else event.value

    before = gr.Image(label="before", format="png", visible=False)
    after = gr.Image(label="after", format="png", visible=False)
    grid = gr.Gallery(label="grid", format="png", visible=False)
    add_endpoint(
        steer,
        schema=SteerRequest,
        bench=bench,
        uses_flux=True,
        outputs=[before, after, gr.JSON(label="recipe_and_measurements", visible=False)],
    )
    add_endpoint(
        sweep,
        schema=SweepRequest,
        bench=bench,
        uses_flux=True,
        outputs=[grid, gr.JSON(label="measurements", visible=False)],
    )
