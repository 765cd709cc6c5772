"""What fires in one image: the image and its sparse activations, from which every view is computed without FLUX."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from fluxsae.features.familiarity import Familiarity, familiarity
from fluxsae.features.firing import SparseMaps
from fluxsae.flux.bad_numbers import check_finite
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from fluxsae.runs.tables import encode_webp
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.config import TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.given import GivenPicture
from fluxsae.ui.serve.lane import OnStep

if TYPE_CHECKING:
    from fluxsae.flux import AnyFlux, BlockCall


PREVIEW_SIDE = 256
"""Longest side of a preview, pixels."""


@dataclass(frozen=True)
class Unread:
    """What FLUX does not take of a prompt."""

    words: tuple[str, ...] = ()
    """Words that the miniature does not know."""
    tokens: int = 0
    """Tokens beyond the longest prompt that is read."""


NOTHING = Unread()


def unread(pipe: "AnyFlux", prompt: str, settings: GenerationSettings) -> Unread:
    """What FLUX does not take of a prompt at these settings."""
    from fluxsae.flux import unknown_words, unread_tokens

    return Unread(tuple(unknown_words(pipe, prompt)), unread_tokens(pipe, prompt, settings))


@dataclass(frozen=True, eq=False)
class StepView:
    """What there is to see after one step: the image as the step takes it for, and what fires at each hook point."""

    preview: bytes
    """Webp."""
    step: int
    sigma: float
    maps: Mapping[str, SparseMaps]
    """Of this step; none of an SAE that may not be used at its noise level."""


@dataclass(frozen=True, eq=False)
class Reading:
    """An image made from a prompt, or a visitor's own, and what fired at every hook point."""

    prompt: str
    seed: int
    settings: GenerationSettings
    image: Image.Image
    grid: TokenGrid
    maps: Mapping[str, SparseMaps]
    unread: Unread = NOTHING
    previews: Mapping[int, bytes] = field(default_factory=dict)
    """Step -> what it shows, as webp: its estimate of the finished image, or the own picture with that step's noise."""
    picture: GivenPicture | None = None
    """The visitor's own, where none was made."""
    familiarity: tuple[Familiarity, ...] | None = None
    """How well the SAE of each hook point describes the visitor's own picture; None where the run does not say."""

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        arrays = sum(maps.n_bytes for maps in self.maps.values()) + sum(map(len, self.previews.values()))
        return arrays + self.image.width * self.image.height * (3 if self.picture is None else 6)

    @property
    def strangest(self) -> Familiarity | None:
        """The hook point at which a visitor's own picture is described worst beside the run's; None of any other."""
        return max(self.familiarity or (), key=lambda one: one.fvu / one.limit, default=None)


def readable_steps(sigmas: Sequence[float], ground: TrainedOn) -> tuple[list[int], list[int]]:
    """(all steps near enough to a trained noise level, the nearest step of each trained noise level).

    Raises:
        FluxSaeError: no step of this schedule is near enough.
    """
    from fluxsae.flux import nearest_step

    near = [
        step
        for step, sigma in enumerate(sigmas)
        if min(abs(sigma - trained) for trained in ground.sigmas) <= ground.sigma_tolerance
    ]
    own = []
    for trained in ground.sigmas:
        if not near or min(abs(sigma - trained) for sigma in sigmas) <= ground.sigma_tolerance:
            own.append(nearest_step(sigmas, trained, ground.sigma_tolerance))
    return near, sorted(set(own))


def read_image(
    pipe: "AnyFlux",
    saes: Mapping[str, SparseAutoencoder],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    on_step: OnStep | None = None,
    has_previews: bool = False,
    colours: Tensor | None = None,
) -> Reading:
    """Makes the image and reads every hook point on the way, in one generation.

    With previews each step is drawn, by the linear map `colours` or without one by the autoencoder.
    """
    from fluxsae.flux import capture, draw_latents, generate, schedule_sigmas, token_grid, watch_estimates

    sigmas = schedule_sigmas(pipe, settings)
    recorders = _recorders(pipe, saes, settings)
    previews: dict[int, bytes] = {}

    def sink(call: "BlockCall") -> None:
        recorders[str(call.hookpoint)].take(call)

    def draw(step: int, estimate: Tensor) -> None:
        previews[step] = preview_bytes(draw_latents(pipe, estimate[0], settings, colours))

    def tell(step: int, n_steps: int) -> None:
        if on_step is not None:
            on_step(step, n_steps, _view(previews, step, sigmas, recorders))

    with ExitStack() as stack:
        stack.enter_context(capture(pipe, [SaeName.parse(name) for name in saes], steps=_union(recorders), sink=sink))
        if has_previews:
            stack.enter_context(watch_estimates(pipe, draw))
        images = generate(pipe, prompt, seeds=seed, settings=settings, on_step=tell)
    assert isinstance(images, list)
    return Reading(
        prompt=prompt,
        seed=seed,
        settings=settings,
        image=images[0],
        grid=token_grid(pipe, settings),
        maps={name: recorder.maps() for name, recorder in recorders.items()},
        unread=unread(pipe, prompt, settings),
        previews=previews,
    )


def read_given(
    pipe: "AnyFlux",
    saes: Mapping[str, SparseAutoencoder],
    picture: GivenPicture,
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    metrics: Mapping[str, Mapping[str, Any]],
    on_step: OnStep | None = None,
    has_previews: bool = False,
    colours: Tensor | None = None,
) -> Reading:
    """Reads a visitor's own picture at every hook point: a pass a step, and nothing is painted.

    `metrics` are the run's, by hook point: they say how well its SAEs describe its own images.
    """
    from fluxsae.flux import draw_latents, encode_images, initial_noise, read_picture, schedule_sigmas, token_grid

    sigmas, image = schedule_sigmas(pipe, settings), picture.image
    recorders, previews = _recorders(pipe, saes, settings), dict[int, bytes]()
    steps, found = _union(recorders), list[Familiarity | None]()
    clean = noise = torch.empty(0)
    if has_previews:
        clean, noise = encode_images(pipe, [image])[0].float(), initial_noise(pipe, [seed], settings)[0].float()
    n_calls = 0

    def sink(call: "BlockCall") -> None:
        nonlocal n_calls
        n_calls += 1
        name, sigma = str(call.hookpoint), sigmas[call.step]
        recorders[name].take(call)
        if call.step == max(recorders[name].own):  # with the least noise: what else says little about the picture
            found.extend(
                familiarity(metrics[name], saes[name], call.tokens, step=call.step, sigma=call.sigma) or [None]
            )
        if n_calls % len(saes):
            return
        if has_previews:
            noised = (1 - sigma) * clean + sigma * noise
            previews[call.step] = preview_bytes(draw_latents(pipe, noised, settings, colours))
        if on_step is not None:
            on_step(n_calls // len(saes) - 1, len(steps), _view(previews, call.step, sigmas, recorders))

    read_picture(
        pipe, image, prompt=prompt, hookpoints=list(saes), steps=steps, seeds=seed, settings=settings, sink=sink
    )
    return Reading(
        prompt=prompt,
        seed=seed,
        settings=settings,
        image=image,
        grid=token_grid(pipe, settings),
        maps={name: recorder.maps() for name, recorder in recorders.items()},
        unread=unread(pipe, prompt, settings) if prompt else NOTHING,
        previews=previews,
        picture=picture,
        familiarity=None if None in found else tuple(one for one in found if one is not None),
    )


def preview_bytes(image: Image.Image) -> bytes:
    """A preview as webp."""
    return encode_webp(image, longest_side=PREVIEW_SIDE, quality=80)


def _recorders(
    pipe: "AnyFlux", saes: Mapping[str, SparseAutoencoder], settings: GenerationSettings
) -> dict[str, "_Recorder"]:
    from fluxsae.flux import schedule_sigmas, settings_ground

    for name, sae in saes.items():
        sae.require_ground(settings_ground(pipe, settings, name), allow_mismatch=["unknown"])
    sigmas = schedule_sigmas(pipe, settings)
    return {name: _Recorder(sae, sigmas) for name, sae in saes.items()}


def _union(recorders: Mapping[str, "_Recorder"]) -> list[int]:
    return sorted({step for recorder in recorders.values() for step in recorder.steps})


def _view(
    previews: Mapping[int, bytes], step: int, sigmas: Sequence[float], recorders: Mapping[str, "_Recorder"]
) -> StepView | None:
    """What a step shows, where it was drawn."""
    if step not in previews:
        return None
    maps = {name: recorder.maps_at(step) for name, recorder in recorders.items() if step in recorder.acts}
    return StepView(previews[step], step, sigmas[step], maps)


class _Recorder:
    """Encodes what one hook point says at the steps its SAE may be used at."""

    def __init__(self, sae: SparseAutoencoder, sigmas: Sequence[float]) -> None:
        self.sae, self.sigmas = sae, sigmas
        ground = sae.config.trained_on
        everywhere = [step for step, sigma in enumerate(sigmas) if sae.nearest_sigma(sigma) == sigma]
        self.steps, self.own = (everywhere, everywhere) if ground is None else readable_steps(sigmas, ground)
        self.acts: dict[int, SparseActs] = {}

    @torch.inference_mode()
    def take(self, call: "BlockCall") -> None:
        """Keeps the image's sparse activations at this step.

        Raises:
            FluxSaeError: they are not numbers.
        """
        if call.step in self.steps and call.is_conditional:
            check_finite(call.tokens, ["this image"], hookpoint=call.hookpoint, step=call.step)
            self.acts[call.step] = self.sae.encode_sparse(call.tokens[0], sigma=call.sigma)

    def maps_at(self, step: int) -> SparseMaps:
        """What was kept at one step."""
        return SparseMaps.build({step: self.acts[step]}, sigmas=[self.sigmas[step]], own_steps=[step])

    def maps(self) -> SparseMaps:
        """Everything kept."""
        by_step = {step: self.acts[step] for step in self.steps}
        return SparseMaps.build(by_step, sigmas=[self.sigmas[step] for step in self.steps], own_steps=self.own)
