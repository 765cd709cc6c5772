"""The About tab: what this is and is not, licences, the run's figures, and every endpoint as code."""

from html import escape
from typing import Any

import gradio as gr

from fluxsae.ui.kit.header import flux_words
from fluxsae.ui.kit.shell import Shell
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.kit.theme import element, mount
from fluxsae.ui.serve.session import Workbench

FIGURES = {
    "fvu": (
        "Not explained (FVU)",
        "share of the activations' variance that the autoencoder does not give back; 0 is best",
        ".3g",
    ),
    "l0": ("Features at a patch (L0)", "how many fire at once, on average", ".3g"),
    "dead_share": ("Dead features", "share that never fired on held-out images", ".1%"),
    "flow_loss_recovered": (
        "Flow loss recovered",
        "1: FLUX paints as well with the autoencoder spliced in; 0: as badly as with the mean",
        ".3g",
    ),
    "splice_error": (
        "Splice error",
        "how far FLUX's next step moves when the autoencoder is spliced in; 0 is best",
        ".3g",
    ),
}
"""Name in metrics.json -> title, meaning and number format."""


def build_about_tab(bench: Workbench, shell: Shell, tab: gr.Tab) -> None:
    """The tab's text, figures and code."""
    gr.HTML(about_html(bench), elem_id="about-text")
    gr.HTML({"endpoints": endpoint_examples(bench)}, html_template=element("fs-endpoints"), js_on_load=mount())


def about_html(bench: Workbench) -> str:
    """The page in words."""
    return (
        '<article class="fs-about">'
        "<h2>What you see</h2>"
        "<p>FLUX paints an image in steps. While it does, every small square of the image (a patch) is a long list of "
        "numbers inside it. A sparse autoencoder (SAE) learned to write each list as a sum of a few <strong>features"
        "</strong>: directions that often stand for something, such as a colour, a shape or a texture. This page shows "
        "where features fire, what they like, what lies near them, and what the image becomes when one is turned.</p>"
        "<h2>What it is not</h2>"
        "<p>A label is a guess from captions and pictures, with how sure it is; a feature may mean more, less or "
        "something else. A heatmap shows where a feature is active, not that it causes what is there: turn it to see. "
        "Compare with a random direction before you believe an effect.</p>"
        f"<h2>This run</h2><p>FLUX: {escape(flux_words(bench))}. {_settings_words(bench)}</p>{_figures_html(bench)}"
        "<h2>Licences</h2>"
        "<p>This program is under the Apache License 2.0. The miniature was trained for it on drawn scenes and comes "
        "under the same licence. FLUX.1-dev is by Black Forest Labs under the FLUX.1 [dev] Non-Commercial License: its "
        "weights are not part of this program, have to be asked for at "
        '<a href="https://huggingface.co/black-forest-labs/FLUX.1-dev" rel="noopener">its page</a>, and images made '
        "with it fall under its terms.</p></article>"
    )


def endpoint_examples(bench: Workbench) -> list[dict[str, Any]]:
    """Each endpoint in one sentence, with a call that works on this run."""
    place = bench.limits.default_hookpoint
    cards = bench.cards[place]
    feature = cards.ranked[0] if cards.ranked else 0
    prompt = cards.images.prompts[0] if len(cards.images) else "a large red circle"
    steps = bench.limits.default_steps
    image = {"prompt": prompt, "hookpoint": place, "seed": 0, "num_inference_steps": steps, "step": None}
    edit = {"hookpoint": place, "feature": feature, "mode": "add", "strength": 0.3}
    made = {"prompt": prompt, "edits": [edit], "seed": 0, "num_inference_steps": steps}
    swept = {"prompt": prompt, "hookpoint": place, "feature": feature, "mode": "add", "strengths": [0.1, 0.2, 0.3],
             "steps": None, "region": None, "seed": 0, "num_inference_steps": steps}  # fmt: skip
    rows = [
        (
            "heatmap",
            "An image, the features that fire in it, and where.",
            {**image, "limit": 8},
            "image, features, overlays",
        ),
        ("features_at", "What fires at one patch.", {**image, "row": 4, "column": 4, "limit": 8}, "features"),
        (
            "search_features",
            "Features by number, label or words.",
            {"query": "striped", "hookpoint": place, "limit": 20},
            "features",
        ),
        (
            "feature",
            "One feature's card and its best images.",
            {"hookpoint": place, "feature": feature},
            "card, top_images",
        ),
        (
            "directions",
            "What writes in a similar direction.",
            {"hookpoint": place, "feature": feature, "n_neighbours": 12},
            "neighbours, plot",
        ),
        ("steer", "The image before and after turning features.", made, "before, after, facts"),
        ("sweep", "One feature at several strengths.", swept, "grid, measurements"),
    ]
    return [
        {"name": f"/{name}", "words": words, "code": snippets(name, arguments, returns)}
        for name, words, arguments, returns in rows
    ]


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
    metrics = {name: bench.run.load_metrics(name) for name in names}
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
