"""What the Steer tab and its endpoints have FLUX do: an image in several variants, and what each edit did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image

from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.runs.names import SaeName
from fluxsae.steering.edits import Recipe, SaeSource, SteeringEdit
from fluxsae.ui.serve.given import GivenPicture
from fluxsae.ui.serve.lane import OnStep
from fluxsae.ui.serve.reading import NOTHING, Unread, unread
from fluxsae.ui.serve.session import EMBEDDED, Workbench

if TYPE_CHECKING:
    from fluxsae.flux import Snapshot

CONTROL_SEED: Final = 0
EMBEDDED_RUN: Final = "fluxsae/miniature/run"


@dataclass(frozen=True, eq=False)
class Steered:
    """Images of one sweep, with what each variant did to the first."""

    images: tuple[Image.Image, ...]
    recipes: tuple[Recipe, ...]
    measurements: tuple[dict[str, Any] | None, ...]
    unread: Unread = NOTHING
    first_step: int | None = None
    """The step from which a visitor's own picture was painted on."""

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        return sum(image.width * image.height * 3 for image in self.images) + 4096


@dataclass(frozen=True)
class SteerJob:
    """Make an image in several variants, the first one unedited, and measure what each edit did."""

    variants: tuple[tuple[SteeringEdit, ...], ...]
    prompt: str
    seed: int
    num_inference_steps: int
    control: int = -1
    """The variant that writes random directions in place of the features' own; -1 for none."""
    picture: GivenPicture | None = None
    """The visitor's own, which is noised and painted on, where none is made."""
    change: float = 1.0
    """How much of it may change: the share of noise (sigma) at which the first step begins, at most."""

    def n_passes(self, bench: Workbench) -> int:
        """Passes of the transformer over one image that it needs at most, its measuring included."""
        from fluxsae.steering.naturalness import NOISE_SEEDS

        return (self.num_inference_steps + len(NOISE_SEEDS)) * len(self.variants)

    @property
    def n_pictures(self) -> int:
        """Pictures that it makes at most."""
        return len(self.variants)

    def run(self, bench: Workbench, on_step: OnStep) -> Steered:
        """The images, their recipes and measurements."""
        from fluxsae.steering.measurements import EditRecorder
        from fluxsae.steering.sweeps import sweep

        saes: dict[HookPoint, Any] = {SaeName.parse(name): sae for name, sae in bench.saes.items()}
        settings = bench.settings(self.num_inference_steps)
        snapshot = self._snapshot(bench)
        recorder = EditRecorder(bench.pipe, saes, self.variants, limits=bench.token_limits)
        with recorder.watch():
            found = sweep(
                bench.pipe,
                saes,
                self.variants,
                prompt=self.prompt,
                seed=self.seed,
                settings=settings,
                snapshot=snapshot,
                origin=run_origin(bench),
                direction_of=self._direction_of(bench, saes) if self.control >= 0 else None,
                on_edit=recorder.record,
                on_progress=lambda done, total: on_step(done - 1, total),
            )
        measured = self._measured(bench, [variant.image for variant in found], recorder.recorded)
        recipes = tuple(variant.recipe for variant in found)
        images = tuple(variant.image for variant in found)
        words = unread(bench.pipe, self.prompt, settings) if self.prompt else NOTHING
        return Steered(images, recipes, measured, words, None if snapshot is None else snapshot.step)

    def _snapshot(self, bench: Workbench) -> "Snapshot | None":
        """The visitor's own picture with the noise of the first step that begins with no more than may change."""
        from fluxsae.flux import noised_picture, schedule_sigmas

        if self.picture is None:
            return None
        settings = bench.settings(self.num_inference_steps)
        sigmas = schedule_sigmas(bench.pipe, settings)
        step = next((step for step, sigma in enumerate(sigmas) if sigma <= self.change), len(sigmas) - 1)
        asked: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "settings": settings}
        return noised_picture(bench.pipe, self.picture.image, step=step, **asked)

    def _direction_of(self, bench: Workbench, saes: Mapping[HookPoint, Any]) -> Any:
        from fluxsae.steering.measurements import random_directions

        def direction_of(edit: SteeringEdit, item: int) -> torch.Tensor | None:
            if item != self.control:
                return None
            width = saes[edit.hookpoint].config.d_model
            return random_directions(width, 1, seed=CONTROL_SEED + edit.feature)[0].to(bench.device)

        return direction_of

    def _measured(
        self, bench: Workbench, images: Sequence[Image.Image], recorded: Sequence[Any]
    ) -> tuple[dict[str, Any] | None, ...]:
        from fluxsae.steering.measurements import measure_edit
        from fluxsae.steering.naturalness import denoising_errors

        errors = denoising_errors(bench.pipe, images, bench.settings(self.num_inference_steps))
        grid = TokenGrid(bench.limits.rows, bench.limits.cols)
        values: list[dict[str, Any] | None] = [None]
        for image, seen, error in zip(images[1:], recorded[1:], errors[1:], strict=True):
            measured = measure_edit(
                images[0],
                image,
                seen,
                grid=grid,
                distance=bench.distance,
                embedder=bench.embedder,
                prompt=self.prompt,
                denoising_errors=(errors[0], error),
            )
            values.append(
                {
                    **measured.to_dict(),
                    "distance_of_unrelated": bench.unrelated_distance,
                    "looks_natural": measured.looks_natural,
                }
            )
        return tuple(values)


def run_origin(bench: Workbench) -> Any:
    """Where the models of this page's recipes come from."""
    from fluxsae.steering.sweeps import Origin

    repo, _, revision = (EMBEDDED_RUN if bench.source == EMBEDDED else bench.name).partition("@")
    saes = tuple(
        SaeSource(
            SaeName.parse(name), repo, bench.run.sae_subfolder(name), revision or None, bench.fingerprints.get(name)
        )
        for name in bench.hookpoints
    )
    return Origin(bench.info.flux_id, bench.info.flux_revision, saes)
