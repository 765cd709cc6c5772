"""The README of a published run: what it holds, how good it is, how to use it, under which terms."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import DatasetCardData, ModelCardData

from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import FeatureTable

_MOST_SHEETS = 2
_MOST_FEATURES = 10
_TAGS = ("sparse-autoencoder", "interpretability", "flux", "diffusion", "steering")
_INEXACT = "The transformer was quantised or cached: its activations are not exactly the model's own."
_FIGURES = {
    "fvu": "share of variance not explained (FVU)",
    "l0": "features active on a token (L0)",
    "dead_share": "share of dead features",
    "flow_loss_recovered": "flow loss recovered, of what a mean activation loses",
    "splice_error": "splice error, of what a mean activation does",
    "velocity_fvu": "velocity not explained (FVU)",
    "concepts.label_accuracy": "matched features whose label names their concept",
    "concepts.ratio": "tells true concepts, as a share of a linear probe (AUC above chance)",
    "concepts.matched_share": "share that matches a true concept",
}
"""Where metrics.json has a figure -> what the card calls it; the rest of the file is too long for a card."""
_AUDITED = {
    "fvu": "FVU",
    "l0": "L0",
    "dead_share": "dead share",
    "flow_loss_recovered": "flow loss recovered",
    "splice_error": "splice error",
    "concepts.label_accuracy": "label accuracy",
    "concepts.ratio": "concept AUC",
}
"""The figures that the audit of our measures judges -> what it calls them."""
_UNSEPARATED = "†"
_CONTROLS = ("trained", "untrained", "permuted decoder", "PCA")


@dataclass(frozen=True)
class Licence:
    """The terms under which a FLUX model, and what is made from it, may be used."""

    name: str
    link: str | None
    notice: str


_DEV = Licence(
    "flux-1-dev-non-commercial-license",
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    "The autoencoders were trained on activations of FLUX.1 [dev], and the pictures were made by it. FLUX.1 [dev] is "
    "licensed by Black Forest Labs under the FLUX.1 [dev] Non-Commercial License: its weights are not part of this "
    "repository, you need to accept that licence to load them, and whoever uses this repository together with them has "
    "to keep to it. Read it before any commercial use.",
)
_APACHE = Licence(
    "apache-2.0",
    None,
    "The Apache License 2.0 holds for {model}, and for the autoencoders and tables here.",
)
_OTHER = Licence(
    "other",
    None,
    "The autoencoders were trained on activations of {model}, and the pictures were made by it: the terms of that "
    "model decide what may be done with them.",
)


def licence_of(flux_id: str) -> Licence:
    """The licence that goes with a run of this FLUX model."""
    name = flux_id.lower()
    if "flux.1" in name and "schnell" not in name:
        return _DEV
    is_open = any(word in name for word in ("schnell", "miniature", "flux.2-klein-4b", "flux.2-klein-base-4b"))
    return _APACHE if is_open else _OTHER


def build_card(run: RunFolder, repo_id: str, *, revision: str | None = None, tables_repo: str | None = None) -> str:
    """The model card of a run as Markdown with front matter, every figure from the run's own files.

    `revision` is the tag that the usage snippets pin; `tables_repo` the dataset repository that shows the tables.
    """
    info = run.load_info()
    sections = [
        _front_matter(info, tables_repo),
        _introduction(info, repo_id),
        *(_hookpoint_section(run, hookpoint) for hookpoint in run.sae_names()),
        _usage(run, repo_id, revision),
        _tables(tables_repo),
        _terms(info),
        _reproduction(info),
    ]
    return _joined(sections)


def build_sae_card(run: RunFolder, hookpoint: HookPoint, repo_id: str, *, revision: str | None = None) -> str:
    """The model card of one SAE that is published alone."""
    info = run.load_info()
    pin = f', revision="{revision}"' if revision else ""
    config = run.load_sae_config(hookpoint)
    d_model, sigma = config.get("d_model"), ", sigma=sigma" * bool(config.get("sigma_table"))
    level = "; sigma: their noise level" * bool(sigma)
    usage = f"""\
## Use

```python
from fluxsae import SparseAutoencoder

sae = SparseAutoencoder.from_pretrained("{repo_id}"{pin})
acts = sae.encode(x{sigma})        # x: (tokens, {d_model}), raw outputs of {hookpoint}{level}
```"""
    sections = [
        _front_matter(info, None),
        f"# A sparse autoencoder of {_model_link(info)} at `{hookpoint}`",
        _facts(run, hookpoint),
        usage,
        _terms(info),
        _reproduction(info),
    ]
    return _joined(sections)


def _joined(sections: Iterable[str]) -> str:
    return "\n\n".join(section.strip() for section in sections if section) + "\n"


def build_tables_card(run: RunFolder, tables: Mapping[str, str], model_repo: str) -> str:
    """The README of the dataset repository: `tables` maps a configuration's name to its parquet file."""
    info = run.load_info()
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": path}]}
        | ({"default": True} if name == "images" else {})
        for name, path in tables.items()
    ]
    front = DatasetCardData(
        **_licence_fields(info), pretty_name=f"Tables of {model_repo}", tags=[*_TAGS], configs=configs
    )
    rows = "\n".join(f"| `{name}` | `{path}` |" for name, path in tables.items())
    return f"""\
---
{front.to_yaml()}
---

# Images and features of [{model_repo}](https://huggingface.co/{model_repo})

The scored pictures (prompt, seed, thumbnail) of {_model_link(info)}, and one row a feature for each hook point of the
sparse autoencoders in [{model_repo}](https://huggingface.co/{model_repo}): density, highest activation, class,
coherence, label, best images (`top_images` are `image_id`s of the configuration `images`).

| configuration | file |
|---|---|
{rows}

{_terms(info)}
"""


def _front_matter(info: RunInfo, tables_repo: str | None) -> str:
    card = ModelCardData(
        **_licence_fields(info),
        library_name="fluxsae",
        base_model=info.flux_id if _is_hub_id(info.flux_id) else None,
        datasets=[tables_repo] if tables_repo else None,
        tags=[*_TAGS],
    )
    return f"---\n{card.to_yaml()}\n---"


def _licence_fields(info: RunInfo) -> dict[str, Any]:
    licence = licence_of(info.flux_id)
    if licence.link is None:
        return {"license": licence.name}
    return {"license": "other", "license_name": licence.name, "license_link": licence.link}


def _is_hub_id(flux_id: str) -> bool:
    return flux_id.count("/") == 1 and not Path(flux_id).exists()


def _model_link(info: RunInfo) -> str:
    if _is_hub_id(info.flux_id):
        return f"[{info.flux_id}](https://huggingface.co/{info.flux_id})"
    return "the miniature, a toy FLUX that fluxsae embeds," if info.flux_id == "miniature" else f"`{info.flux_id}`"


def _introduction(info: RunInfo, repo_id: str) -> str:
    steps = ", ".join(f"{step} (σ {sigma:.2f})" for step, sigma in zip(info.steps, info.sigmas, strict=False))
    settings = info.settings
    images = f"{settings.height} x {settings.width} px, {settings.num_inference_steps} steps"
    images += f", guidance {settings.guidance_scale:g}"
    exact = "" if info.is_exact else f"\n\n> {_INEXACT}"
    return f"""\
# {repo_id.rpartition("/")[2]}: what {_model_link(info)} computes, feature by feature

Sparse autoencoders that read one block's output of {_model_link(info)} and write it as a few active features a token;
for each feature the images it likes, where it fires, whether it means something, and what turning it does.

| | |
|---|---|
| model | {_model_link(info)}{f" at `{info.flux_revision}`" if info.flux_revision else ""} |
| its weights | {f"SHA-256 `{info.flux_weights}`" if info.flux_weights else "not recorded"} |
| adapters | {"not recorded" if info.adapters is None else ", ".join(info.adapters) or "none"} |
| images | {images} |
| captured steps | {steps or "not recorded"} |
| token grid | {info.rows} x {info.cols} |
| hook points | {", ".join(f"`{name}`" for name in info.hookpoints)} |{exact}"""


def _hookpoint_section(run: RunFolder, hookpoint: HookPoint) -> str:
    parts = [f"## `{hookpoint}`", _facts(run, hookpoint)]
    path = run.features_path(hookpoint)
    if path.is_file():
        parts.append(_features(run.load_features(hookpoint)))
    # features on their images are worth most, then grids and maps
    sheets = sorted(run.sheets(hookpoint), key=lambda sheet: (not sheet.stem.startswith("features"), sheet.stem))
    parts += [
        f"![{sheet.stem} of {hookpoint}]({sheet.relative_to(run.path).as_posix()})" for sheet in sheets[:_MOST_SHEETS]
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(run: RunFolder, hookpoint: HookPoint) -> str:
    """The SAE's sizes and its measured quality as one table."""
    metrics = run.load_metrics(hookpoint)
    unseparated = _at(metrics, "audit.unseparated") or ()
    rows = [
        (f"{name} {_UNSEPARATED}" if _AUDITED.get(path) in unseparated else name, value)
        for path, title in _FIGURES.items()
        for name, value in _figure(title, _at(metrics, path))
    ]
    rows += _transfer(metrics.get("transfer") or ())
    if run.has_sae(hookpoint):
        config = run.load_sae_config(hookpoint)
        k = f", k = {config['k']}" if config.get("k") else ""
        sizes = f"{config['n_features']} features of width {config['d_model']}"
        levels = f", with a table of {len(table)} noise levels" if (table := config.get("sigma_table")) else ""
        rows.insert(0, ("autoencoder", f"{config['architecture']}, {sizes}{k}{levels}"))
    if not rows:
        return ""
    parts = ["| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows)]
    if any(value.endswith(")") for _, value in rows):
        parts.append("In brackets: 95 % bootstrap intervals over images.")
    return "\n\n".join([*parts, *_audit(metrics.get("audit"))])


def _transfer(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """FVU at each size, over all steps of the schedule: where the autoencoder may be used."""
    by_size: dict[tuple[int, int], list[float]] = {}
    for cell in cells:
        by_size.setdefault((cell["height"], cell["width"]), []).append(cell["fvu"])
    return [
        (f"FVU at {height} x {width} px, best to worst step", f"{_number(min(found))} to {_number(max(found))}")
        for (height, width), found in by_size.items()
    ]


def _audit(audit: Mapping[str, Any] | None) -> Iterator[str]:
    """Our measures of this kind of autoencoder beside dictionaries that should fare worse."""
    if not audit:
        return
    values, unseparated = audit["values"], audit["unseparated"]
    names = list(dict.fromkeys(name for one in values["trained"] for name in one))
    rows = [
        [
            f"{name} {_UNSEPARATED}" if name in unseparated else name,
            *(_mean(values.get(kind), name) for kind in _CONTROLS),
        ]
        for name in names
    ]
    lines = ["| measure | trained | untrained | permuted decoder | PCA |", "|---|---|---|---|---|"]
    yield "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
    told = f"Measured on {audit['images']} images: autoencoders of this kind, trained anew, and other dictionaries."
    if unseparated:
        told += f" {_UNSEPARATED}: this measure does not tell trained from untrained ones."
    yield told


def _mean(found: Sequence[Mapping[str, float | None]] | None, name: str) -> str:
    known = [value for one in found or () if (value := one.get(name)) is not None]
    return _number(sum(known) / len(known)) if known else "-"


def _at(metrics: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = metrics
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _figure(title: str, value: Any) -> Iterator[tuple[str, str]]:
    """A number, a number with its interval, or several by name, as rows of the table."""
    if isinstance(value, Mapping) and "value" in value:
        if value["value"] is not None:
            bounds = [_number(value[name]) for name in ("low", "high") if value.get(name) is not None]
            yield title, _number(value["value"]) + (f" ({' to '.join(bounds)})" if len(bounds) == 2 else "")
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _figure(f"{title}: {name}", item)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield title, _number(value)


def _number(value: Real | float) -> str:
    number = float(value)
    return f"{number:,.0f}" if number.is_integer() and abs(number) >= 10 else f"{number:.3g}"


def _features(table: FeatureTable) -> str:
    """How many features there are of each class, and those that mean most."""
    classes, counts = np.unique(table.column("feature_class").astype(str), return_counts=True)
    summary = (
        f"{len(table)} features: " + ", ".join(f"{n} {name}" for name, n in zip(classes, counts, strict=True)) + "."
    )
    if "is_coherent" in table:
        n_coherent = sum(map(bool, table.column("is_coherent")))
        summary += f" {n_coherent} are coherent: their best images resemble each other more than chance allows."
    best = _best_features(table)
    if not best:
        return summary
    lines = [f"| {row} | {_cell(label)} | {coherence} | {density} |" for row, label, coherence, density in best]
    return summary + "\n\n| feature | label | coherence | fires on |\n|---|---|---|---|\n" + "\n".join(lines)


def _best_features(table: FeatureTable) -> list[tuple[int, str, str, str]]:
    """The labelled features, the most coherent first."""
    if "label" not in table or "coherence" not in table:
        return []
    labels, densities = table.column("label"), table.column("density")
    coherences = table.column("coherence").astype(np.float64)  # NaN where there is none
    order = np.argsort(-coherences, kind="stable")
    known = [int(f) for f in order if labels[f] and np.isfinite(coherences[f])]
    by = table.column("label_by") if "label_by" in table else [None] * len(table)
    named = {f: f"{labels[f]}, named by a {by[f]}" if by[f] else str(labels[f]) for f in known[:_MOST_FEATURES]}
    return [
        (
            f,
            named[f],
            f"{coherences[f]:.2f}",
            f"{float(densities[f]):.2%} of tokens",
        )
        for f in known[:_MOST_FEATURES]
    ]


def _cell(text: str) -> str:
    """Text that cannot leave its table cell or bring markup with it."""
    return "".join(sign if sign.isalnum() or sign in " -,.'" else f"&#{ord(sign)};" for sign in text)[:400]


def _usage(run: RunFolder, repo_id: str, revision: str | None) -> str:
    shown = run.default_sae() if run.hookpoints() else None
    subfolder = run.sae_subfolder(shown) if shown else "sae"
    pin, at = (f', revision="{revision}"', f"@{revision}") if revision else ("", "")
    return f"""\
## Use

```python
from fluxsae import SparseAutoencoder, pull_run

sae = SparseAutoencoder.from_pretrained("{repo_id}", subfolder="{subfolder}"{pin})
run = pull_run("{repo_id}"{pin})    # everything here, checked by its hashes
print(run.load_features("{shown or ""}")[0])
```

Browse it in a page on your machine, with the source of fluxsae: `FLUXSAE_RUN={repo_id}{at} make app`. Check a copy:
`python -m train.verify --run {repo_id}{at}`, or `sha256sum -c SHA256SUMS` in its folder."""


def _tables(tables_repo: str | None) -> str:
    if tables_repo is None:
        return ""
    return (
        f"## Tables\n\nThe pictures and the features as tables to look through: [{tables_repo}]"
        f"(https://huggingface.co/datasets/{tables_repo})."
    )


def _terms(info: RunInfo) -> str:
    return "## Terms\n\n" + licence_of(info.flux_id).notice.format(model=_model_link(info))


def _reproduction(info: RunInfo) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(info.versions.items()))
    prompts = f"Prompts: sha256 `{info.prompts_hash}`." if info.prompts_hash else ""
    if not versions and not prompts:
        return ""
    return (
        f"## Made with\n\n{versions}{'. ' if versions and prompts else ''}{prompts} The configuration is in `run.json`."
    )
