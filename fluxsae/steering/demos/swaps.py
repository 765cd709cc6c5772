"""Swaps: where one feature fires it is taken away and another is added, so that pink becomes red and the rest stays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux import BlockCall, OnStep, capture, generate, schedule_sigmas
from fluxsae.flux.bad_numbers import check_finite
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import edit_window
from fluxsae.steering.demos.config import SwapConfig
from fluxsae.steering.demos.measured import measured_sweep
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.measurements import EditMeasurement, TokenLimits
from fluxsae.steering.sweeps import OnProgress

Region = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True)
class SwapScore:
    """How well a picture shows one name in place of another; CLIP cosines, and the run's perceptual measure."""

    score: float
    """The smaller of `gone` and `come`, times 1 - `collateral`; 0 where the picture does not look natural, or where
    another name is read."""
    gone: float
    """How much farther the picture came from its prompt, or from the old name alone if the prompt does not have it."""
    come: float
    """How much nearer it came to the same with the new name in the old one's place."""
    collateral: float
    """Distance outside the region as a share of outside and inside together."""
    is_read: bool
    """Whether, of all names of the kind, CLIP reads the old one before and the new one after."""
    looks_natural: bool
    """Whether the picture stayed within what the run's unedited pictures show."""


def acts_in_window(
    pipe: Any,
    sae: SparseAutoencoder,
    place: HookPoint,
    features: Sequence[int],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    steps: tuple[int, int] | None = None,
    on_step: OnStep | None = None,
) -> Float[Tensor, "steps features tokens"]:
    """Activations of features in an unedited picture at the steps in which edits of them would act.

    The run ends after the last of these steps, without a picture.
    """
    seen: list[Float[Tensor, "features tokens"]] = []

    @torch.no_grad()
    def take(call: BlockCall) -> None:
        if call.is_conditional:
            check_finite(call.tokens, [f"seed {seed} ({prompt!r:.60})"], hookpoint=call.hookpoint, step=call.step)
            seen.append(sae.encode_features(call.tokens[0], list(features), sigma=call.sigma).float().cpu().T)

    edit = SteeringEdit(place, features[0], "scale", 0.0, steps=steps)
    window = range(*edit_window(edit, sae, schedule_sigmas(pipe, settings)))
    with capture(pipe, [place], steps=window, stop_early=True, sink=take):
        generate(pipe, prompt, seeds=seed, settings=settings, output_type="latent", on_step=on_step)
    return torch.stack(seen)


def addable(sae: SparseAutoencoder, features: Sequence[int]) -> list[int]:
    """Those features that mode add knows a usual activation of."""
    return [feature for feature in features if float(sae.reference_acts[feature]) > 0]


def hot_region(acts: Float[Tensor, " tokens"], grid: TokenGrid, *, heat: float) -> Region:
    """The patches where a feature fires, at `heat` of its strongest patch or more; all False where it never does."""
    fires: Bool[Tensor, " tokens"] = (acts > 0) & (acts >= heat * acts.max())
    return tuple(tuple(line) for line in fires.reshape(grid.rows, grid.cols).tolist())


def swap_variants(
    place: HookPoint, feature: int, new_features: Sequence[int], region: Region, config: SwapConfig
) -> list[tuple[SteeringEdit, ...]]:
    """Every way to take `feature` away and add others in a region that `config` names, without repeats.

    Raises:
        FluxSaeError: `config` names none for so few new features.
    """
    found = [
        (
            SteeringEdit(place, feature, "scale", less, steps=config.steps, region=region),
            *(SteeringEdit(place, new, "add", more, steps=config.steps, region=region) for new in new_features[:count]),
        )
        for less in config.suppress
        for count, more in config.amplify
        if count <= len(new_features)
    ]
    if not found:
        raise FluxSaeError(f"There is no way to add {len(new_features)} features; amplify is {config.amplify}.")
    return list(dict.fromkeys(found))


def swap_score(
    measured: EditMeasurement,
    texts: Float[Tensor, "names width"],
    pictures: Float[Tensor, "2 width"],
) -> SwapScore:
    """The score of a picture from CLIP's vectors of (before, after) and of texts with (old, new, every other) name."""
    near = pictures @ texts.T
    gone, come = float(near[0, 0] - near[1, 0]), float(near[1, 1] - near[0, 1])
    inside, outside = measured.distance_inside or 0.0, measured.distance_outside or 0.0
    collateral = outside / (inside + outside) if inside + outside > 0 else 0.0
    is_read = near.argmax(dim=1).tolist() == [0, 1]
    score = max(0.0, min(gone, come)) * (1 - collateral) if measured.looks_natural and is_read else 0.0
    return SwapScore(score, gone, come, collateral, is_read, measured.looks_natural)


def try_swaps(
    pipe: Any,
    sae: SparseAutoencoder,
    place: HookPoint,
    variants: Sequence[Sequence[SteeringEdit]],
    texts: Sequence[str],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    distance: PerceptualDistance,
    embedder: ImageEmbedder,
    limits: Mapping[HookPoint, TokenLimits] | None = None,
    max_batch: int | None = None,
    on_progress: OnProgress | None = None,
) -> list[SwapScore]:
    """The score of each variant on one picture; `texts` name what it shows now, is to show, and might show instead."""
    found, measured = measured_sweep(
        pipe,
        {place: sae},
        [(), *variants],
        prompt=prompt,
        seed=seed,
        settings=settings,
        distance=distance,
        embedder=embedder,
        limits=limits,
        max_batch=max_batch,
        on_progress=on_progress,
    )
    names = embedder.embed_texts(list(texts))
    seen = embedder.embed_images([variant.image for variant in found])
    return [swap_score(measured[at], names, seen[[0, at]]) for at in range(1, len(found))]
