"""The page's own look: calm, legible, light and dark, no font or file from elsewhere."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import gradio as gr
import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from fluxsae.features.firing import CONFIDENCE
from fluxsae.features.naming import ON_IT, PLACES
from fluxsae.pictures.heatmaps import HEAT, NEUTRAL_COLOUR, heat_colours
from fluxsae.ui.kit.snippets import ORIGIN
from fluxsae.ui.kit.views import base64_text
from fluxsae.ui.serve.pictures import FOR_GOOD

UI: Final = Path(__file__).parent.parent
ACCENT: Final = gr.themes.Color(
    name="iris",
    c50="#f3f2fd",
    c100="#e6e4fa",
    c200="#cfccf5",
    c300="#b1acee",
    c400="#8f88e4",
    c500="#6a62d2",
    c600="#4f46c8",
    c700="#423aa8",
    c800="#362f88",
    c900="#2a2569",
    c950="#1b1845",
)
LIGHT: Final = {
    "accent": ACCENT.c600,
    "button": ACCENT.c600,
    "button-hover": ACCENT.c700,
    "link": ACCENT.c700,
    "brush": ACCENT.c500,
    "ink": "#1d1d26",
    "title": "#3a3a47",
    "soft": "#5d5d6e",
    "faint": "#6b6b7b",
    "line": "#dcdce4",
    "edge": "#8a8a9b",
    "paper": "#ffffff",
    "raised": "#ffffff",
    "page": "#f6f6f9",
    "tint": "#ecebfa",
    "natural": "#2f9e6e",
    "warn": "#8a5200",
    "warn-paper": "#fff4de",
}
"""What a colour is for -> the colour on light paper. Style sheets and scripts know it as `--fs-<name>`."""
DARK: Final = LIGHT | {
    "accent": "#a7a2ff",
    "button": ACCENT.c500,
    "button-hover": ACCENT.c600,
    "link": ACCENT.c300,
    "ink": "#ececf2",
    "title": "#c9c9d6",
    "soft": "#a9a9ba",
    "faint": "#9a9aab",
    "line": "#363642",
    "edge": "#6f6f80",
    "paper": "#1c1c23",
    "raised": "#25252d",
    "page": "#131318",
    "tint": "#2b2a45",
    "warn": "#ffd08a",
    "warn-paper": "#3a2d12",
}
GRADIO: Final = {
    "body_background_fill": "page",
    "body_text_color": "ink",
    "body_text_color_subdued": "soft",
    "block_background_fill": "paper",
    "block_border_color": "line",
    "block_label_text_color": "soft",
    "block_title_text_color": "title",
    "block_info_text_color": "soft",
    "checkbox_background_color_selected": "button",
    "checkbox_border_color": "edge",
    "checkbox_border_color_selected": "button",
    "input_background_fill": "paper",
    "input_border_color": "edge",
    "input_placeholder_color": "faint",
    "button_primary_background_fill": "button",
    "button_primary_background_fill_hover": "button-hover",
    "button_secondary_background_fill": "raised",
    "button_secondary_border_color": "edge",
    "button_secondary_text_color": "ink",
    "link_text_color": "link",
}
"""Gradio's theme variable -> the colour it takes."""
MOUNT: Final = (
    "FS.mount=(root,...rest)=>customElements.whenDefined(root.querySelector('[data-fs]').localName)"
    ".then(()=>FS.feed(root,...rest))"
)
"""Gradio shows its components without waiting for the scripts; each is fed once its element is defined."""
SANS: Final = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "sans-serif"]
MONO: Final = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def build_theme() -> gr.themes.Base:
    """Paper and ink with one accent; the heat of the overlays is the only other colour."""
    theme = gr.themes.Base(
        primary_hue=ACCENT,
        secondary_hue=ACCENT,
        neutral_hue=gr.themes.colors.zinc,
        font=SANS,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_lg,
        text_size=gr.themes.sizes.text_md,
    )
    return theme.set(
        **{name: LIGHT[colour] for name, colour in GRADIO.items()},
        **{f"{name}_dark": DARK[colour] for name, colour in GRADIO.items()},
        block_shadow="none",
        button_border_width="1px",
        input_border_width="1px",
        checkbox_border_radius="4px",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        slider_color=ACCENT.c600,
        slider_color_dark=ACCENT.c400,
    )


def page_css() -> str:
    """The page's style sheet: the colours, the shared elements, then each tab's own."""
    return "\n".join([_variables(":root, .light", LIGHT), _variables(".dark", DARK), *_texts("css")])


def page_head() -> str:
    """The values that scripts share with Python, and where the scripts are."""
    name = hashlib.sha256(page_scripts()).hexdigest()[:16]
    return (
        f"<script>window.FS = {json.dumps(shared_values(), separators=(',', ':'))};{MOUNT}</script>"
        f'<script src="scripts/{name}.js"></script>'
    )


@functools.cache
def page_scripts() -> bytes:
    """All scripts of the page, in one file."""
    return "\n".join(_texts("js")).encode()


def script_route() -> Route:
    """What the served app answers for the scripts: not in the configuration, so that browsers keep them."""
    return Route("/scripts/{name}", lambda _: Response(page_scripts(), media_type="text/javascript", headers=FOR_GOOD))


def shared_values() -> dict[str, Any]:
    """What scripts must not state again: the heat's colours and curve, and the words for how far to trust a name."""
    ramp = heat_colours(np.linspace(0, 1, 256, dtype=np.float32)[None])
    return {
        "heat": {**HEAT._asdict(), "table": base64_text(np.ascontiguousarray(ramp[0]))},
        "neutral": NEUTRAL_COLOUR,
        "confidence": list(CONFIDENCE.items()),
        "places": {place: words for place, words in PLACES.items() if place != ON_IT},
        "origin": ORIGIN,
    }


def element(name: str) -> str:
    """Template of a gr.HTML that shows one of the page's own elements."""
    return f"<{name} data-fs></{name}>"


def mount(**events: str) -> str:
    """Script that feeds a gr.HTML's value to its element and turns the element's events into Gradio's."""
    return f"FS.mount(element, props, trigger, watch, {json.dumps(events)});"


def _variables(selector: str, colours: dict[str, str]) -> str:
    return f"{selector} {{ {' '.join(f'--fs-{name}: {colour};' for name, colour in colours.items())} }}"


def _texts(extension: str) -> list[str]:
    """The files of one kind in this folder, in which elements are defined, and then in those of the tabs."""
    files = [*sorted((UI / "kit").glob(f"*.{extension}")), *sorted((UI / "tabs").glob(f"*/*.{extension}"))]
    return [_stripped(file.read_text(encoding="utf-8")) for file in files]


def _stripped(text: str) -> str:
    """Without indents and lines of comment: the page's configuration holds all scripts and styles."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith("//"))
