"""Draws steering grids: a row a feature, a column a strength, PNG with every image's recipe inside.

    python -m train.steering_grids --run runs/miniature --n-features 8
    python -m train.steering_grids --run runs/miniature --demos

With --demos each feature is turned on the image that `train.find_demos` found for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature import miniature_path
from fluxsae.steering.edits import Recipe, SteeringEdit, png_bytes
from train.command import start
from train.find_demos import choose_features

if TYPE_CHECKING:
    from fluxsae.features.cards import CardIndex
    from fluxsae.pictures.grids import GridRow
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class SteeringGridsConfig:
    """Which features, on which images, at which strengths."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored and analysed."""
    hookpoints: tuple[str, ...] = ()
    """Hook points; left out, all that have an SAE."""
    features: tuple[int, ...] = ()
    """Numbers of the features; left out, those of the best demos (--demos), or the best ranked ones."""
    n_features: int = 8
    """Rows of a grid."""
    demos: bool = False
    """Each feature on the image of its demo; otherwise on the image where it fires most."""
    prompt: str | None = None
    """One prompt for all rows, in place of the run's own images."""
    seed: int = 0
    """Seed of that prompt."""
    suppress: tuple[float, ...] = (-1.0, 0.0)
    """Columns left of the unedited image: strengths of mode scale."""
    amplify: tuple[float, ...] = (0.1, 0.2, 0.3)
    """Columns right of it: strengths of mode add."""
    steps: tuple[int, int] | None = None
    """Window [start, stop) of steps that are edited; left out, the noise levels the SAE was trained on."""
    cell: int = 160
    """Width of an image at least, pixels."""
    distance: str = "random-features"
    """Perceptual distance: lpips (fetches its network once) or random-features (needs no network)."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    max_batch: int | None = None
    """Images generated together; left out, as many as fit into half of the free memory."""


def main(config: SteeringGridsConfig) -> list[Path]:
    """Writes one grid a hook point into the run's sheets."""
    from fluxsae.flux import load_flux
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    info = run.load_info()
    described = [name for name in run.sae_names() if run.features_path(name).is_file()]
    places: list[HookPoint] = [run.check_sae(name) for name in config.hookpoints] or [*described]
    subjects = {place: _subjects(run, place, config) for place in places}
    pipe = load_flux(info.flux_id, revision=info.flux_revision, device=config.device)
    painter = _Painter(run, pipe, config)
    return [painter.paint(place, subjects[place]) for place in places]


@dataclass(frozen=True)
class _Subject:
    """A row to be drawn: which feature on which image."""

    feature: int
    label: str | None
    prompt: str
    seed: int


def _subjects(run: RunFolder, place: HookPoint, config: SteeringGridsConfig) -> list[_Subject]:
    from fluxsae.features.cards import CardIndex

    index = CardIndex(run, place)
    if config.demos:
        demos = [demo for demo in run.load_demos(place) if not config.features or demo["feature"] in config.features]
        if not demos:
            raise FluxSaeError(f"{run.path} has no such demos at {place}; run train.find_demos first.")
        chosen = demos[: config.n_features]
        return [_Subject(demo["feature"], demo["label"], demo["prompt"], demo["seed"]) for demo in chosen]
    features = choose_features(run, place, config.features, config.n_features)
    return [_subject(index, feature, config) for feature in features]


def _subject(index: CardIndex, feature: int, config: SteeringGridsConfig) -> _Subject:
    if config.prompt is not None:
        return _Subject(feature, index.labels[feature], config.prompt, config.seed)
    top = index[feature].top_images
    if not top:
        raise FluxSaeError(f"Feature {feature} fires in none of the run's images; give --prompt, or another feature.")
    return _Subject(feature, index.labels[feature], top[0].prompt, top[0].seed)


class _Painter:
    """Makes and measures the images of one hook point after the other and draws them."""

    def __init__(self, run: RunFolder, pipe: object, config: SteeringGridsConfig) -> None:
        from fluxsae.pictures.perceptual import load_distance
        from fluxsae.steering.demos import run_origin

        self.run, self.pipe, self.config = run, pipe, config
        self.distance = load_distance(config.distance, device=str(getattr(pipe, "device", "cpu")))
        source = "miniature" if run.path == miniature_path("run") else None
        self.origin = run_origin(run, pipe, source=source)

    def paint(self, place: HookPoint, subjects: Sequence[_Subject]) -> Path:
        """The grid of one hook point, written as PNG with the recipes of its images row by row."""
        from fluxsae.pictures.grids import steering_grid
        from fluxsae.sae.model import SparseAutoencoder

        sae = SparseAutoencoder.from_pretrained(self.run.sae_path(place), device=getattr(self.pipe, "device", "cpu"))
        rows, recipes = [], list[Recipe]()
        for subject in subjects:
            row, made = self._row(place, sae, subject)
            rows.append(row)
            recipes += made
        name = "demos" if self.config.demos else "steering"
        sheet = steering_grid(
            rows,
            title=f"Features of {place} turned down and up",
            subtitle=f"{self.run.load_info().flux_id} · under each picture: {self.distance.name} to the unedited · "
            "red frame: does not look natural (edited tokens, or a picture, that FLUX would not make)",
            cell=self.config.cell,
        )
        self.run.save_sheet(place, f"{name}-01", png_bytes(sheet, recipes))
        path = self.run.sheet_path(place, f"{name}-01")
        print(f"{place}: {len(rows)} features in {path}")
        return path

    def _row(self, place: HookPoint, sae: SparseAutoencoder, subject: _Subject) -> tuple[GridRow, list[Recipe]]:
        from fluxsae.steering.demos import grid_row, load_limits, measured_sweep

        config = self.config
        modes = [("scale", value) for value in config.suppress] + [("add", value) for value in config.amplify]
        edits = [(SteeringEdit(place, subject.feature, mode, value, steps=config.steps),) for mode, value in modes]
        limits = load_limits(self.run, place)
        variants, measured = measured_sweep(
            self.pipe,
            {place: sae},
            [(), *edits],
            prompt=subject.prompt,
            seed=subject.seed,
            settings=self.run.load_info().settings,
            distance=self.distance,
            limits=None if limits is None else {place: limits},
            origin=self.origin,
            max_batch=config.max_batch,
        )
        # read from left to right: less, as it is, more
        n_less = len(config.suppress)
        order = [*range(1, 1 + n_less), 0, *range(1 + n_less, len(variants))]
        row = grid_row(
            [variants[place] for place in order],
            [measured[place] for place in order],
            label=subject.label,
            detail=f"“{subject.prompt}”\nseed {subject.seed}",
        )
        return row, [variants[place].recipe for place in order]


if __name__ == "__main__":
    start(main, SteeringGridsConfig, __doc__)
