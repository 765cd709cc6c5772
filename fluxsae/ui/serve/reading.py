"""What fires in one image: the image and its sparse activations, from which every view is computed without FLUX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image

from fluxsae.features.firing import SparseMaps
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.config import TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.lane import OnStep

if TYPE_CHECKING:
    from fluxsae.flux import AnyFlux, BlockCall


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
class Reading:
    """An image made from a prompt, and what fired at every hook point while it was made."""

    prompt: str
    seed: int
    settings: GenerationSettings
    image: Image.Image
    grid: TokenGrid
    maps: Mapping[str, SparseMaps]
    unread: Unread = NOTHING

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        arrays = sum(maps.n_bytes for maps in self.maps.values())
        return arrays + self.image.width * self.image.height * 3


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
) -> Reading:
    """Makes the image and reads every hook point on the way, in one generation."""
    from fluxsae.flux import capture, generate, schedule_sigmas, settings_ground, token_grid

    for name, sae in saes.items():
        sae.require_ground(settings_ground(pipe, settings, name), allow_mismatch=["unknown"])
    sigmas = schedule_sigmas(pipe, settings)
    recorders = {name: _Recorder(sae, sigmas) for name, sae in saes.items()}

    def sink(call: "BlockCall") -> None:
        recorders[str(call.hookpoint)].take(call)

    steps = sorted({step for recorder in recorders.values() for step in recorder.steps})
    with capture(pipe, [HookPoint.parse(name) for name in saes], steps=steps, sink=sink):
        images = generate(pipe, prompt, seeds=seed, settings=settings, on_step=on_step)
    assert isinstance(images, list)
    return Reading(
        prompt=prompt,
        seed=seed,
        settings=settings,
        image=images[0],
        grid=token_grid(pipe, settings),
        maps={name: recorder.maps() for name, recorder in recorders.items()},
        unread=unread(pipe, prompt, settings),
    )


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
        """Keeps the image's sparse activations at this step."""
        if call.step in self.steps and call.is_conditional:
            self.acts[call.step] = self.sae.encode_sparse(call.tokens[0], sigma=call.sigma)

    def maps(self) -> SparseMaps:
        """Everything kept."""
        by_step = {step: self.acts[step] for step in self.steps}
        return SparseMaps.build(by_step, sigmas=[self.sigmas[step] for step in self.steps], own_steps=self.own)
