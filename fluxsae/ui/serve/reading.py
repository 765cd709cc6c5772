"""What fires in one image: the image and its sparse activations, from which every view is computed without FLUX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.config import TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.lane import OnStep

if TYPE_CHECKING:
    from fluxsae.flux import BlockCall, FluxPipeline


@dataclass(frozen=True, eq=False)
class SparseMaps:
    """One hook point's activations over an image, step by step: only what fires is kept."""

    steps: tuple[int, ...]
    """Steps that were read: every one near enough to a noise level the SAE was trained on."""
    sigmas: tuple[float, ...]
    own_steps: tuple[int, ...]
    """Steps nearest to the noise levels the SAE was trained on: what is shown unless a step is asked for."""
    values: Float[np.ndarray, "steps tokens width"]
    indices: Int[np.ndarray, "steps tokens width"]
    n_features: int

    def acts(self, feature: int, step: int | None) -> Float[np.ndarray, " tokens"]:
        """One feature's activation on every token: at a step, or the most over the SAE's own steps."""
        chosen = self._chosen(step)
        fired = np.where(self.indices[chosen] == feature, self.values[chosen], 0)
        acts: Float[np.ndarray, " tokens"] = fired.max(axis=(0, 2)).astype(np.float32)
        return acts

    def peaks(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's highest activation over the image."""
        chosen = self._chosen(step)
        peaks = np.zeros(self.n_features, dtype=np.float32)
        np.maximum.at(peaks, self.indices[chosen].ravel(), self.values[chosen].ravel().astype(np.float32))
        return peaks

    def means(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's mean activation over all patches (and steps)."""
        chosen = self._chosen(step)
        totals = np.zeros(self.n_features)
        np.add.at(totals, self.indices[chosen].ravel(), self.values[chosen].ravel().astype(np.float64))
        means: Float[np.ndarray, " n_features"] = totals / (len(chosen) * self.values.shape[1])
        return means

    def spreads(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Share of all patches (and steps) on which each feature fires with more than half of its peak."""
        chosen, peaks = self._chosen(step), self.peaks(step)
        strong = self.indices[chosen][self.values[chosen] > 0.5 * peaks[self.indices[chosen]]]
        spreads: Float[np.ndarray, " n_features"] = np.bincount(strong.ravel(), minlength=self.n_features) / (
            len(chosen) * self.values.shape[1]
        )
        return spreads

    def at(self, token: int, step: int | None) -> dict[int, float]:
        """Feature -> activation at one token, of those that fire there."""
        chosen = self._chosen(step)
        found: dict[int, float] = {}
        for feature, value in zip(self.indices[chosen, token].ravel(), self.values[chosen, token].ravel(), strict=True):
            if value > 0:
                found[int(feature)] = max(found.get(int(feature), 0.0), float(value))
        return found

    def _chosen(self, step: int | None) -> list[int]:
        if step is None:
            return [self.steps.index(own) for own in self.own_steps]
        if step not in self.steps:
            raise FluxSaeError(
                f"step is {step}; this autoencoder was trained at other noise levels. Give one of "
                f"{', '.join(map(str, self.steps))}, or null for the steps it was trained on."
            )
        return [self.steps.index(step)]


@dataclass(frozen=True)
class Unread:
    """What FLUX does not take of a prompt."""

    words: tuple[str, ...] = ()
    """Words that the miniature does not know."""
    tokens: int = 0
    """Tokens beyond the longest prompt that is read."""


NOTHING = Unread()


def unread(pipe: "FluxPipeline", prompt: str, settings: GenerationSettings) -> Unread:
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
        arrays = sum(maps.values.nbytes + maps.indices.nbytes for maps in self.maps.values())
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
    pipe: "FluxPipeline",
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
        everywhere = list(range(len(sigmas)))
        self.steps, self.own = (everywhere, everywhere) if ground is None else readable_steps(sigmas, ground)
        self.values: dict[int, np.ndarray] = {}
        self.indices: dict[int, np.ndarray] = {}

    @torch.inference_mode()
    def take(self, call: "BlockCall") -> None:
        """Keeps the image's sparse activations at this step."""
        if call.step in self.steps and call.is_conditional:
            acts = self.sae.encode_sparse(call.tokens[0])
            self.values[call.step] = acts.values.float().cpu().numpy()
            self.indices[call.step] = acts.indices.cpu().numpy().astype(np.int32)

    def maps(self) -> SparseMaps:
        """Everything kept, padded to the busiest token."""
        width = max(values.shape[1] for values in self.values.values())
        return SparseMaps(
            steps=tuple(self.steps),
            sigmas=tuple(self.sigmas[step] for step in self.steps),
            own_steps=tuple(self.own),
            values=np.stack([_padded(self.values[step], width) for step in self.steps]),
            indices=np.stack([_padded(self.indices[step], width) for step in self.steps]),
            n_features=self.sae.config.n_features,
        )


def _padded(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))
