"""How well an SAE describes activations: FVU, L0, density and dead features, and where it may be used."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fluxsae.evaluation.intervals import Estimate, Weights, bootstrap_weights, interval, weighted_mean
from fluxsae.evaluation.stream import ImageSet, OnProgress, iter_activations
from fluxsae.flux import AnyFlux, schedule_sigmas
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.metrics import FiringSums, density_histogram, to_float64
from fluxsae.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class ReconstructionReport:
    """Quality of an SAE's reconstruction on images it was not trained on."""

    n_images: int
    n_tokens: int
    """Tokens looked at, all steps together."""
    steps: tuple[int, ...]
    fvu: Estimate
    """Fraction of variance unexplained over all steps."""
    l0: Estimate
    """Features that fire on a token."""
    dead_share: float
    """Share of features that fired on none of the `n_tokens`."""
    density: dict[str, Any]
    """Histogram of the features' densities by decades."""
    fvu_by_step: dict[int, Estimate]
    """FVU of each step by itself, its own mean taken as the baseline."""

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, under the names of metrics.json."""
        return {
            "fvu": self.fvu.to_dict(),
            "l0": self.l0.to_dict(),
            "dead_share": self.dead_share,
            "evaluated_images": self.n_images,
            "evaluated_tokens": self.n_tokens,
            "density_histogram": [self.density],
            "fvu_by_step": [{"step": step, **value.to_dict()} for step, value in self.fvu_by_step.items()],
        }


@dataclass
class ImageSums:
    """Sums of each (image, step): from them the FVU of any resample of the images is known."""

    squared_error: list[Float[np.ndarray, "images steps"]] = field(default_factory=list)
    sums: list[Float[np.ndarray, "images steps d"]] = field(default_factory=list)
    squares: list[Float[np.ndarray, "images steps"]] = field(default_factory=list)
    active: list[Float[np.ndarray, "images steps"]] = field(default_factory=list)
    n_tokens: int = 0
    """Tokens of one image at one step."""

    def update(
        self,
        x: Float[Tensor, "images steps tokens d"],
        x_hat: Float[Tensor, "images steps tokens d"],
        *,
        centre: Float[Tensor, " d"],
        active: Float[Tensor, "images steps"] | None = None,
    ) -> None:
        """Adds some images; `centre` is any vector near the mean, taken off so that no digits are lost."""
        centred = to_float64(x - centre)
        self.n_tokens = x.shape[2]
        self.squared_error.append(to_float64(x - x_hat).square().sum((2, 3)).cpu().numpy())
        self.sums.append(centred.sum(2).cpu().numpy())
        self.squares.append(centred.square().sum((2, 3)).cpu().numpy())
        if active is not None:
            self.active.append(active.cpu().double().numpy())

    def fvu(self, weights: Weights, *, steps: Sequence[int] | None = None) -> Float[np.ndarray, " draws"]:
        """FVU of each resample of the images, over some of the steps (positions, not step numbers) or all."""
        chosen = slice(None) if steps is None else list(steps)
        error = np.concatenate(self.squared_error)[:, chosen].sum(axis=1)
        squares = np.concatenate(self.squares)[:, chosen].sum(axis=1)
        sums = np.concatenate(self.sums)[:, chosen]
        n_steps = sums.shape[1]
        totals = weights @ sums.sum(axis=1)
        n_tokens = weights.sum(axis=1) * n_steps * self.n_tokens
        variance = weights @ squares - np.square(totals).sum(axis=1) / n_tokens
        share: Float[np.ndarray, " draws"] = weights @ error / np.where(variance > 0, variance, np.nan)
        return share


@torch.no_grad()
def evaluate_reconstruction(
    pipe: AnyFlux,
    saes: dict[HookPoint, SparseAutoencoder],
    images: ImageSet,
    steps: dict[HookPoint, list[int]],
    *,
    settings: GenerationSettings,
    batch_size: int = 8,
    draws: int = 500,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[HookPoint, ReconstructionReport]:
    """FVU, L0, density and dead features of each SAE over all tokens of the images, with intervals over images.

    Images whose activations are not numbers are left out and logged, here and in `transfer_table`.

    Raises:
        FluxSaeError: too many images are left out.
    """
    sums = {hookpoint: ImageSums() for hookpoint in saes}
    firing = {hookpoint: FiringSums.empty(sae.config.n_features) for hookpoint, sae in saes.items()}
    sigmas = torch.tensor(schedule_sigmas(pipe, settings))
    left_out = LeftOut(len(images))
    batches = iter_activations(
        pipe, images, steps, settings=settings, batch_size=batch_size, on_progress=on_progress, doing="reconstruction",
        left_out=left_out,
    )  # fmt: skip
    for batch in batches:
        for hookpoint, sae in saes.items():
            x = batch.tokens[hookpoint]
            acts = sae.encode_sparse(x, sigma=sigmas[steps[hookpoint], None])
            active = to_float64(acts.active).mean(-1)
            sums[hookpoint].update(x, sae.decode_sparse(acts), centre=sae.input_mean, active=active)
            firing[hookpoint].update(acts)
    weights = bootstrap_weights(len(images) - len(left_out.image_ids), draws=draws, seed=seed)
    return {
        hookpoint: _reconstruction_report(sums[hookpoint], firing[hookpoint], weights, steps[hookpoint])
        for hookpoint in saes
    }


def _reconstruction_report(
    sums: ImageSums, firing: FiringSums, weights: Weights, steps: list[int]
) -> ReconstructionReport:
    by_step = {step: interval(sums.fvu(weights, steps=[place])) for place, step in enumerate(steps)}
    active = np.concatenate(sums.active).mean(axis=1)
    return ReconstructionReport(
        n_images=weights.shape[1],
        n_tokens=firing.n_tokens,
        steps=tuple(steps),
        fvu=interval(sums.fvu(weights)),
        l0=interval(weighted_mean(active, weights)),
        dead_share=firing.dead_share(),
        density=density_histogram(firing.density()),
        fvu_by_step=by_step,
    )


@dataclass(frozen=True)
class TransferCell:
    """An SAE used at one step and size."""

    step: int
    sigma: float
    height: int
    width: int
    fvu: float
    """Of this step and size by itself."""
    l0: float
    is_trained: bool
    """Whether the SAE was trained at this size and noise level."""

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        return dict(vars(self))


@torch.no_grad()
def transfer_table(
    pipe: AnyFlux,
    saes: dict[HookPoint, SparseAutoencoder],
    images: ImageSet,
    *,
    settings: GenerationSettings,
    sizes: Sequence[tuple[int, int]],
    trained: dict[HookPoint, list[int]],
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> dict[HookPoint, list[TransferCell]]:
    """FVU and L0 of each SAE at every step of the schedule and at each (height, width): where it may be used."""
    cells: dict[HookPoint, list[TransferCell]] = {hookpoint: [] for hookpoint in saes}
    for height, width in sizes:
        here = replace(settings, height=height, width=width)
        sigmas = schedule_sigmas(pipe, here)
        every = {hookpoint: list(range(len(sigmas))) for hookpoint in saes}
        sums = {hookpoint: ImageSums() for hookpoint in saes}
        batches = iter_activations(
            pipe, images, every, settings=here, batch_size=batch_size, on_progress=on_progress,
            doing=f"transfer to {height} x {width}", left_out=LeftOut(len(images)),
        )  # fmt: skip
        for batch in batches:
            for hookpoint, sae in saes.items():
                _update_by_step(sums[hookpoint], sae, batch.tokens[hookpoint], sigmas)
        is_own = (height, width) == (settings.height, settings.width)
        for hookpoint, table in cells.items():
            own = trained[hookpoint] if is_own else []
            table.extend(_transfer_cells(sums[hookpoint], sigmas, size=(height, width), trained=own))
    return cells


def _update_by_step(
    sums: ImageSums, sae: SparseAutoencoder, x: Float[Tensor, "images steps tokens d"], sigmas: Sequence[float]
) -> None:
    """All steps of a schedule, encoded one at a time, since together their acts would not fit."""
    levels = [sae.nearest_sigma(float(sigma)) for sigma in sigmas]
    acts = [sae.encode_sparse(x[:, step], sigma=level) for step, level in enumerate(levels)]
    x_hat = torch.stack([sae.decode_sparse(each) for each in acts], dim=1)
    active = torch.stack([to_float64(each.active).mean(-1) for each in acts], dim=1)
    sums.update(x, x_hat, centre=sae.input_mean, active=active)


def _transfer_cells(
    sums: ImageSums, sigmas: Sequence[float], *, size: tuple[int, int], trained: Sequence[int]
) -> list[TransferCell]:
    once = np.ones((1, sum(len(part) for part in sums.squared_error)))
    l0 = rearrange(np.concatenate(sums.active), "images steps -> steps images").mean(axis=1)
    return [
        TransferCell(
            step, float(sigma), *size, float(sums.fvu(once, steps=[step])[0]), float(l0[step]), step in trained
        )
        for step, sigma in enumerate(sigmas)
    ]
