"""The bar above the tabs: what this is, and what is being looked at."""

from html import escape

from fluxsae.ui.serve.guard import without_folders
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf

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


def header_html(shelf: Shelf, bench: Workbench) -> str:
    """Name, one sentence, and the facts: FLUX, hook points, run, device; with several runs, where the others are."""
    facts = {
        "FLUX": flux_words(bench),
        "Device": "GPU" if bench.device == "cuda" else "CPU",
        "Looking at": ", ".join(f"{bench.word(name)} = {name}" for name in bench.hookpoints),
        **({"Run": bench.name} if len(shelf.runs) == 1 else {}),
    }
    terms = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd></div>" for term, value in facts.items())
    told = [bench.notice, *bench.changed_saes]
    told += [f"Left out, as a file is damaged: {without_folders(each)}" for each in bench.problems]
    notice = "".join(f'<p class="fs-notice" role="status">{escape(each)}</p>' for each in told if each)
    return (
        f'<header class="fs-head"><div class="fs-brand">{LOGO}<div><h1>fluxsae</h1>'
        "<p>See which features fire inside FLUX, and steer them.</p></div></div>"
        f'<details class="fs-about-run"><summary><span>{escape(flux_words(bench))} </span><b>Details</b></summary>'
        f'<dl class="fs-facts">{terms}</dl></details></header>{_chooser(shelf, bench)}{notice}'
    )


def _chooser(shelf: Shelf, bench: Workbench) -> str:
    """Links to the pages of all runs; nothing where there is one."""
    if len(shelf.runs) == 1:
        return ""
    links = "".join(
        f'<a href="./{shelf.path(other)}"{" aria-current=page" if other is bench else ""}>{escape(name)}</a>'
        for name, other in shelf.runs.items()
    )
    return f'<nav class="fs-runs" aria-label="Runs"><span>Run</span>{links}</nav>'


def flux_words(bench: Workbench) -> str:
    """Which FLUX, in words; the miniature is introduced as what it is."""
    if bench.is_miniature:
        return "the miniature, a toy FLUX that paints a picture book and whose inside can be checked"
    revision = f" at {bench.info.flux_revision[:8]}" if bench.info.flux_revision else ""
    made = (
        "" if bench.info.is_exact else ", quantised or cached when the run was made, so not the model's own activations"
    )
    return ", ".join([f"{without_folders(bench.info.flux_id)}{revision}{made}", *bench.flux_remarks])
