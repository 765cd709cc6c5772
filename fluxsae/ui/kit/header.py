"""The bar above the tabs: what this is, and what is being looked at."""

from html import escape

from fluxsae.ui.serve.session import Workbench

LOGO = (
    '<svg width="40" height="40" viewBox="0 0 40 40" aria-hidden="true">'
    '<rect width="40" height="40" rx="10" fill="#1b1033"/>'
    + "".join(
        f'<circle cx="{8 + 8 * x}" cy="{8 + 8 * y}" r="2.6" fill="{fill}"/>'
        for y, row in enumerate(("aaaa", "abca", "acdc", "aaca"))
        for x, fill in enumerate({"a": "#57407c", "b": "#b5367a", "c": "#f1605d", "d": "#fee08b"}[key] for key in row)
    )
    + "</svg>"
)


def header_html(bench: Workbench) -> str:
    """Name, one sentence, and the facts: FLUX, hook points, run, device."""
    facts = {
        "FLUX": flux_words(bench),
        "Device": "GPU" if bench.device == "cuda" else "CPU",
        "Looking at": ", ".join(f"{bench.word(name)} = {name}" for name in bench.hookpoints),
        "Run": bench.source,
    }
    terms = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in facts.items())
    notice = f'<p class="fs-notice" role="status">{escape(bench.notice)}</p>' if bench.notice else ""
    return (
        f'<header class="fs-head"><div class="fs-brand">{LOGO}<div><h1>fluxsae</h1>'
        "<p>See which features fire inside FLUX, and steer them.</p></div></div>"
        f'<details class="fs-about-run"><summary><span>{escape(flux_words(bench))} </span>Details</summary>'
        f'<dl class="fs-facts">{terms}</dl></details></header>{notice}'
    )


def flux_words(bench: Workbench) -> str:
    """Which FLUX, in words; the miniature is introduced as what it is."""
    if bench.is_miniature:
        return "the miniature, a toy FLUX whose inside can be checked"
    revision = f" at {bench.info.flux_revision[:8]}" if bench.info.flux_revision else ""
    return f"{bench.info.flux_id}{revision}"
