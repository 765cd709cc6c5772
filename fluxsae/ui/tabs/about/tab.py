"""The About tab: what this is and is not, licences, the run's figures, and every endpoint as code."""

from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr

from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.kit.header import flux_words
from fluxsae.ui.kit.shell import QUIET, Shell
from fluxsae.ui.kit.snippets import PICTURE, snippets
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.endpoints import endpoint_arguments
from fluxsae.ui.serve.schemas import Request
from fluxsae.ui.serve.session import Workbench

FIGURES = {
    "fvu": (
        "Not explained (FVU)",
        "share of the activations' variance that the SAE does not reconstruct; 0 is best",
        ".3g",
    ),
    "l0": ("Features at a patch (L0)", "mean number that fire at one patch", ".3g"),
    "dead_share": ("Dead features", "share that never fired on held-out images", ".1%"),
    "flow_loss_recovered": (
        "Flow loss recovered",
        "1: FLUX works as well on the reconstruction as on the original; 0: only as well as on the mean",
        ".3g",
    ),
    "splice_error": (
        "Splice error",
        "change of FLUX's output when the reconstruction replaces the original; 0 is best",
        ".3g",
    ),
}
"""Name in metrics.json -> title, meaning and number format."""


def build_about_tab(desk: Desk, shell: Shell, tab: gr.Tab) -> None:
    """The tab's text, figures and code."""
    examples = endpoint_examples(desk.bench, shell.endpoints)
    gr.HTML(about_html(desk.bench), elem_id="about-text")
    shown = gr.HTML(None, html_template=element("fs-endpoints"), js_on_load=mount())
    shell.app.load(lambda: {"endpoints": examples}, None, shown, **QUIET)


def about_html(bench: Workbench) -> str:
    """The page in words."""
    return (
        '<article class="fs-about">'
        "<h2>What you see</h2>"
        "<p>FLUX makes an image in steps. Inside FLUX, each small square of the image (a patch) is a long list of "
        "numbers. A sparse autoencoder (SAE) learned to write each list as a sum of a few <strong>features</strong>. "
        "A feature is a direction that often stands for something, such as a colour, a thing or a texture. This page "
        "shows where features fire, on which images, which features are similar, and how the image changes when you "
        "steer one.</p>"
        "<h2>What it is not</h2>"
        "<p>A name is derived from captions and images, and comes with a confidence. A feature may mean more, less or "
        "something else. A heatmap shows where a feature is active, not that it causes what is there: steer it to find "
        "out. Compare with a random direction before you believe an effect.</p>"
        f"<h2>This run</h2><p>FLUX: {escape(flux_words(bench))}. {_settings_words(bench)}</p>{_figures_html(bench)}"
        "<h2>Licences</h2>"
        "<p>This program has the Apache License 2.0. The miniature was trained for it on drawn scenes and has the same "
        "licence. FLUX.1-dev is by Black Forest Labs under the FLUX.1 [dev] Non-Commercial License: its "
        "weights are not part of this program. Ask for them on "
        '<a href="https://huggingface.co/black-forest-labs/FLUX.1-dev" rel="noopener">its page</a>. Its terms '
        "also cover the images made with it.</p></article>"
    )


def endpoint_examples(bench: Workbench, endpoints: Sequence[type[Request]]) -> list[dict[str, Any]]:
    """Each endpoint as its schema describes it, with a call that shows something on this run."""
    known = _known(bench)
    return [
        {
            "name": f"/{schema.endpoint}",
            "words": schema.description(),
            "arguments": [
                [name, argument["description"]] for name, argument in endpoint_arguments(schema, bench).items()
            ],
            "code": snippets(schema, _example(schema, bench, known), run=bench.asked_as),
        }
        for schema in endpoints
    ]


def _known(bench: Workbench) -> dict[str, Any]:
    """Values that show something: the most meaningful feature, in its best image and where it fires most there."""
    cards, feature = bench.cards[bench.limits.default_hookpoint], bench.example_edit["feature"]
    best = next(iter(cards[feature].top_images), None)
    is_made = best is not None and best.source is None and bool(best.prompt)
    token = best.argmax_token if best is not None else 0
    prompt = best.prompt if best is not None and is_made else "a large red circle"
    others = [text for text in cards.images.prompts if text and text != prompt]
    return {
        "prompt": prompt,
        "other": next(iter(others), "a large blue star"),
        "seed": best.seed if best is not None and is_made else 0,
        "query": cards.labels[feature] or "",
        "feature": feature,
        "row": token // bench.limits.cols,
        "column": token % bench.limits.cols,
        "edits": [bench.example_edit],
        "strengths": [0.1, 0.2, 0.3],
    }


def _example(schema: type[Request], bench: Workbench, known: dict[str, Any]) -> dict[str, Any]:
    """Values of a call that shows something on this run."""
    swap = _swap(bench) if "new" in schema.model_fields else {}
    row = schema.model_fields.get("row")
    patch = () if row is not None and row.is_required() else ("row", "column")
    shown = {name: value for name, value in known.items() if name not in patch}
    return {**schema.defaults(bench.limits), **shown, **swap, **_own_picture(schema)}


def _swap(bench: Workbench) -> dict[str, Any]:
    """A swap that was found to work on this run; of any two names where none was searched."""
    for hookpoint in reversed(bench.hookpoints):
        for swap in bench.swaps(hookpoint):
            if {"label", "new_label", "prompt", "seed"} <= set(swap):
                return {"old": swap["label"], "new": swap["new_label"], "prompt": swap["prompt"], "seed": swap["seed"]}
    names = [*bench.cards[bench.limits.default_hookpoint].named(), "red", "blue"]
    return {"old": names[0], "new": names[1]}


def _own_picture(schema: type[Request]) -> dict[str, str]:
    """The reader's picture, where an endpoint cannot do without."""
    field = schema.model_fields.get("picture")
    return {"picture": PICTURE, "prompt": ""} if field is not None and field.is_required() else {}


def _settings_words(bench: Workbench) -> str:
    settings = bench.info.settings
    return (
        f"Images of {settings.width} x {settings.height} pixels in {settings.num_inference_steps} steps, "
        f"{bench.limits.rows} x {bench.limits.cols} patches each."
    )


def _figures_html(bench: Workbench) -> str:
    names = bench.hookpoints
    head = "".join(
        f"<th scope='col'>{escape(bench.word(name))}<br><small>{escape(name)}</small></th>" for name in names
    )
    metrics = {name: bench.metrics(name) for name in names}
    rows = []
    for key, (words, help, form) in FIGURES.items():
        values = [_value(metrics[name].get(key), form) for name in names]
        if any(values):
            cells = "".join(f"<td class='fs-num'>{escape(value or '–')}</td>" for value in values)
            rows.append(f"<tr><th scope='row'>{words}<br><small>{help}</small></th>{cells}</tr>")
    counts = [f"{len(bench.cards[name]):,}" for name in names]
    cells = "".join(f"<td class='fs-num'>{count}</td>" for count in counts)
    rows.append(f"<tr><th scope='row'>Features</th>{cells}</tr>")
    return f"<table class='fs-table'><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _value(value: Any, form: str) -> str | None:
    number = value.get("value") if isinstance(value, dict) else value
    return format(number, form) if isinstance(number, (int, float)) and not isinstance(number, bool) else None
