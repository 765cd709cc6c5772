"""Renders contact sheets, and single overlays, of the features of a run.

    python -m train.render --run runs/miniature --n-features 24
    python -m train.render --run runs/miniature --hookpoints transformer_blocks.3 --features 7 12 --overlays pictures

Features that are named are drawn on a sheet of their own (chosen-NN.png).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from fluxsae.errors import FluxSaeError
from train.command import start
from train.outputs import check_folder_path
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from fluxsae.features.cards import CardIndex, FeatureCard
    from fluxsae.pictures.heatmaps import SheetRow


@dataclass(frozen=True, kw_only=True)
class RenderConfig:
    """Which features, and how they look."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored and analysed."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, all of the run."""
    features: tuple[int, ...] = ()
    """Features to show; left out, the best ones by coherence and label."""
    n_features: int = 12
    """How many of the best features to show."""
    rows: int = 6
    """Features a sheet."""
    columns: int = 6
    """Top images a feature."""
    cell: int = 150
    """Side of one picture on a sheet, pixels."""
    scale: Literal["feature", "image"] = "feature"
    """feature: the same scale in all images, the feature's maximum over the run; image: each image's own maximum."""
    opacity: float = 0.85
    """Of the overlay, 0 to 1."""
    threshold: float = 0.05
    """Fraction of the scale below which no heat is shown, 0 to 1."""
    smooth: bool = True
    """Interpolate between tokens; --no-smooth shows each token as one flat cell."""
    overlays: Path | None = None
    """Folder to which every overlay is also written by itself, at the size of the run's pictures or larger, PNG."""
    min_side: int = 512
    """Longer side of those overlays in pixels, at least; small pictures are enlarged pixel-crisp."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: RenderConfig) -> StageResult | None:
    """Writes sheets/<hookpoint>/features-NN.png: the stage; or chosen-NN.png where features were named."""
    from fluxsae.features.cards import CardIndex
    from fluxsae.runs.folder import RunFolder

    if config.overlays is not None:
        check_folder_path(config.overlays, option="--overlays")
    run = RunFolder(config.run)
    names = [*config.hookpoints] or [str(name) for name in run.sae_names() if run.features_path(name).is_file()]
    indices = [CardIndex(run, name) for name in names]
    chosen = [_chosen(index, config) for index in indices]
    if config.features or config.hookpoints:
        _render(indices, chosen, config, name="chosen")
        return None
    places = {name: place for place, name in enumerate(names)}
    own = {**asdict(config), "run": None, "overlays": None, "force": None, "features": []}

    def work(todo: Sequence[str]) -> None:
        some = [places[name] for name in todo]
        _render([indices[i] for i in some], [chosen[i] for i in some], config, name="features")

    return run_stage(
        run,
        "render",
        dict.fromkeys(names, own),
        work,
        outputs=lambda asked: [run.sheet_path(name, "features-01") for name in asked],
        force=config.force or config.overlays is not None,
        by_name=True,
    )


def _render(indices: Sequence[CardIndex], chosen: Sequence[list[int]], config: RenderConfig, *, name: str) -> None:
    for index, features in zip(indices, chosen, strict=True):
        run = index.run
        for old in run.sheets(index.hookpoint):
            if old.name.startswith(f"{name}-"):
                old.unlink()
        for number, sheet in enumerate(_sheets(index, features, config), start=1):
            png = io.BytesIO()
            sheet.save(png, format="PNG", optimize=True)
            run.save_sheet(index.hookpoint, f"{name}-{number:02d}", png.getvalue())
        if config.overlays is not None:
            _write_overlays(index, features, config.overlays / str(index.hookpoint), config)
        where = run.sheet_path(index.hookpoint, f"{name}-01").parent
        print(f"{index.hookpoint}: {len(features)} features on sheets in {where}")


def _chosen(index: CardIndex, config: RenderConfig) -> list[int]:
    """The features to show.

    Raises:
        FluxSaeError: one of those asked for does not exist or never fires, or none fires at all.
    """
    wanted = list(config.features) or index.ranked[: config.n_features]
    alive = [feature for feature in wanted if index.features[feature].top_images]
    if not alive or (config.features and len(alive) < len(wanted)):
        silent = sorted(set(wanted) - set(alive))
        raise FluxSaeError(
            f"features {silent} of {index.hookpoint} never fire in this run; choose others, for example "
            f"{index.ranked[:5]}"
        )
    return alive


def _sheets(index: CardIndex, features: Sequence[int], config: RenderConfig) -> Iterator[Image.Image]:
    from fluxsae.pictures.heatmaps import contact_sheet

    pages = -(-len(features) // config.rows)
    scale = "each feature's maximum over the run" if config.scale == "feature" else "each image's own maximum"
    for page in range(pages):
        rows = [_row(index, feature, config) for feature in features[page * config.rows : (page + 1) * config.rows]]
        yield contact_sheet(
            rows,
            title=f"What features of {index.hookpoint} like",
            subtitle=f"{index.info.flux_id} · top images and where the feature fires · full heat: {scale} · "
            f"sheet {page + 1} of {pages}",
            columns=config.columns,
            cell=config.cell,
            opacity=config.opacity,
            threshold=config.threshold,
            smooth=config.smooth,
            maximum=scale,
        )


def _row(index: CardIndex, feature: int, config: RenderConfig) -> SheetRow:
    from fluxsae.pictures.heatmaps import SheetCell, SheetRow

    card = index[feature]
    heatmaps = index.heatmaps(feature, scale=config.scale)
    cells = [
        SheetCell(index.picture(image.image_id), heatmaps[image.image_id], image.title)
        for image in card.top_images[: config.columns]
        if image.image_id in heatmaps
    ]
    return SheetRow(feature, card.label or "(no label)", _detail(card), cells)


def _detail(card: FeatureCard) -> str:
    lines = [f"fires on {card.image_density:.0%} of images", f"highest activation {card.max_act:.3g}"]
    if card.label_by is not None:
        lines.insert(0, f"label given by a {card.label_by}")
    elif card.label_confidence is not None:
        lines.insert(0, f"label confidence {card.label_confidence:.0%}")
    if card.coherence is not None and card.q_value is not None:
        sure = "q < 0.001" if card.q_value < 0.001 else f"q = {card.q_value:.3f}"
        lines.append(f"coherence {card.coherence:.2f} ({sure})")
    if card.caption_words[1:]:
        lines.append("also: " + ", ".join(card.caption_words[1:4]))
    return "\n".join(lines)


def _write_overlays(index: CardIndex, features: Sequence[int], folder: Path, config: RenderConfig) -> None:
    from fluxsae.pictures.heatmaps import overlay, with_legend

    folder.mkdir(parents=True, exist_ok=True)
    for feature in features:
        maximum = index.features[feature].max_act if config.scale == "feature" else "this image's maximum"
        for image_id, heatmap in index.heatmaps(feature, scale=config.scale).items():
            picture = overlay(
                index.picture(image_id),
                heatmap,
                opacity=config.opacity,
                threshold=config.threshold,
                smooth=config.smooth,
                min_side=config.min_side,
            )
            shown = with_legend(picture, maximum=maximum, opacity=config.opacity, threshold=config.threshold)
            shown.save(folder / f"feature-{feature}-image-{image_id}.png")


if __name__ == "__main__":
    start(main, RenderConfig, __doc__)
