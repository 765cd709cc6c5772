"""The page's own look: calm, legible, light and dark, no font or file from elsewhere."""

from pathlib import Path

import gradio as gr

from fluxsae.pictures.heatmaps import NEUTRAL_COLOUR
from fluxsae.ui.kit.views import heat_table

UI = Path(__file__).parent.parent
ACCENT = gr.themes.Color(
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
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Helvetica Neue", "sans-serif"]
MONO = ["ui-monospace", "SF Mono", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


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
        body_background_fill="#f6f6f9",
        body_background_fill_dark="#131318",
        body_text_color="#1d1d26",
        body_text_color_dark="#ececf2",
        body_text_color_subdued="#5d5d6e",
        body_text_color_subdued_dark="#a9a9ba",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c1c23",
        block_border_color="#dcdce4",
        block_border_color_dark="#363642",
        block_label_text_color="#5d5d6e",
        block_label_text_color_dark="#a9a9ba",
        block_title_text_color="#3a3a47",
        block_title_text_color_dark="#c9c9d6",
        block_info_text_color="#5d5d6e",
        block_info_text_color_dark="#a9a9ba",
        block_shadow="none",
        checkbox_border_radius="4px",
        checkbox_background_color_selected="#4f46c8",
        checkbox_background_color_selected_dark="#6a62d2",
        checkbox_border_color_selected="#4f46c8",
        checkbox_border_color_selected_dark="#6a62d2",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1c1c23",
        input_border_color="#c9c9d4",
        input_border_color_dark="#45454f",
        input_placeholder_color="#6b6b7b",
        input_placeholder_color_dark="#9a9aab",
        button_primary_background_fill="#4f46c8",
        button_primary_background_fill_hover="#423aa8",
        button_primary_background_fill_dark="#6a62d2",
        button_primary_background_fill_hover_dark="#7d76dd",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#25252d",
        button_secondary_border_color="#c9c9d4",
        button_secondary_border_color_dark="#45454f",
        button_secondary_text_color="#1d1d26",
        button_secondary_text_color_dark="#ececf2",
        slider_color="#4f46c8",
        slider_color_dark="#8f88e4",
        link_text_color="#423aa8",
        link_text_color_dark="#b1acee",
    )


def page_css() -> str:
    """The page's style sheet."""
    return (UI / "kit" / "app.css").read_text(encoding="utf-8")


def page_head() -> str:
    """The page's scripts, and the colours they paint with."""
    core = UI / "kit" / "core.js"  # first, since the others define their elements with it
    files = [core, *(file for file in sorted(UI.glob("**/*.js")) if file != core)]
    scripts = "\n".join(file.read_text(encoding="utf-8") for file in files)
    colours = f'window.FS_HEAT = "{heat_table()}"; window.FS_NEUTRAL = "{NEUTRAL_COLOUR}";'
    return f"<script>{colours}\n{scripts}</script>"


def element(name: str) -> str:
    """Template of a gr.HTML that shows one of the page's own elements."""
    return f"<{name} data-fs></{name}>"


def mount(**events: str) -> str:
    """Script that feeds a gr.HTML's value to its element and turns the element's events into Gradio's."""
    pairs = ", ".join(f"'{name}': '{target}'" for name, target in events.items())
    return f"FS.mount(element, props, trigger, watch, {{{pairs}}});"
