"""What fires in one image: the image and its sparse activations, from which every view is computed without FLUX."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.acts import SparseActs
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
    rows: Int[np.ndarray, " entries"]
    """Token of each entry, ascending; those of the p-th step begin at p * n_tokens."""
    features: Int[np.ndarray, " entries"]
    values: Float[np.ndarray, " entries"]
    n_tokens: int
    n_features: int

    @classmethod
    def build(
        cls, by_step: Mapping[int, SparseActs], *, sigmas: Sequence[float], own_steps: Sequence[int]
    ) -> "SparseMaps":
        """The maps of acts (tokens, n_features) by step; `sigmas` are those of the steps."""
        parts = list(by_step.values())
        n_tokens, n_features = parts[0].shape
        acts = SparseActs.joined(parts, (len(parts), n_tokens, n_features))
        return cls(
            steps=tuple(by_step),
            sigmas=tuple(sigmas),
            own_steps=tuple(own_steps),
            rows=acts.tokens.int().cpu().numpy(),
            features=acts.features.int().cpu().numpy(),
            values=acts.values.float().cpu().numpy(),
            n_tokens=n_tokens,
            n_features=n_features,
        )

    @property
    def n_bytes(self) -> int:
        """Memory that the entries take."""
        return self.rows.nbytes + self.features.nbytes + self.values.nbytes

    def acts(self, feature: int, step: int | None) -> Float[np.ndarray, " tokens"]:
        """One feature's activation on every token: at a step, or the most over the SAE's own steps."""
        acts = np.zeros(self.n_tokens, dtype=np.float32)
        for part in self._chosen(step):
            fires = self.features[part] == feature
            np.maximum.at(acts, self.rows[part][fires] % self.n_tokens, self.values[part][fires])
        return acts

    def peaks(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's highest activation over the image."""
        peaks = np.zeros(self.n_features, dtype=np.float32)
        for part in self._chosen(step):
            np.maximum.at(peaks, self.features[part], self.values[part])
        return peaks

    def means(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's mean activation over all patches (and steps)."""
        totals, chosen = np.zeros(self.n_features), self._chosen(step)
        for part in chosen:
            np.add.at(totals, self.features[part], self.values[part].astype(np.float64))
        means: Float[np.ndarray, " n_features"] = totals / (len(chosen) * self.n_tokens)
        return means

    def spreads(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Share of all patches (and steps) on which each feature fires with more than half of its peak."""
        counts, chosen, peaks = np.zeros(self.n_features, dtype=np.int64), self._chosen(step), self.peaks(step)
        for part in chosen:
            strong = self.features[part][self.values[part] > 0.5 * peaks[self.features[part]]]
            counts += np.bincount(strong, minlength=self.n_features)
        spreads: Float[np.ndarray, " n_features"] = counts / (len(chosen) * self.n_tokens)
        return spreads

    def at(self, token: int, step: int | None) -> dict[int, float]:
        """Feature -> activation at one token, of those that fire there."""
        found: dict[int, float] = {}
        for part in self._chosen(step):
            first = int(self.rows[part.start]) // self.n_tokens * self.n_tokens if part.start < part.stop else 0
            low, high = part.start + np.searchsorted(self.rows[part], [first + token, first + token + 1])
            for feature, value in zip(self.features[low:high].tolist(), self.values[low:high].tolist(), strict=True):
                found[feature] = max(found.get(feature, 0.0), value)
        return found

    def _chosen(self, step: int | None) -> list[slice]:
        """Where the entries of a step, or of each of the SAE's own steps, stand."""
        if step is not None and step not in self.steps:
            raise FluxSaeError(
                f"step is {step}; this autoencoder was trained at other noise levels. Give one of "
                f"{', '.join(map(str, self.steps))}, or null for the steps it was trained on."
            )
        places = [self.steps.index(each) for each in (self.own_steps if step is None else (step,))]
        edges = [np.searchsorted(self.rows, [place * self.n_tokens, (place + 1) * self.n_tokens]) for place in places]
        return [slice(int(low), int(high)) for low, high in edges]


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
    pipe: "FluxPipeline",
    saes: Mapping[str, SparseAutoencoder],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    on_step: OnStep | None = None,
) -> Reading:
    """Makes the image and reads every hook point on the way, in one generation."""
    from fluxsae.flux import capture, flux_identity, generate, schedule_sigmas, token_grid

    _require_ground(flux_identity(pipe), saes, settings)
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


def _require_ground(identity: Any, saes: Mapping[str, SparseAutoencoder], settings: GenerationSettings) -> None:
    """Refuses autoencoders that were trained on another FLUX or on images of another size."""
    for sae in saes.values():
        if sae.config.trained_on is not None:
            sae.require_ground(
                flux_id=identity.flux_id,
                flux_revision=identity.revision,
                height=settings.height,
                width=settings.width,
                guidance_scale=settings.guidance_scale,
            )


class _Recorder:
    """Encodes what one hook point says at the steps its SAE may be used at."""

    def __init__(self, sae: SparseAutoencoder, sigmas: Sequence[float]) -> None:
        self.sae, self.sigmas = sae, sigmas
        ground = sae.config.trained_on
        everywhere = list(range(len(sigmas)))
        self.steps, self.own = (everywhere, everywhere) if ground is None else readable_steps(sigmas, ground)
        self.acts: dict[int, SparseActs] = {}

    @torch.inference_mode()
    def take(self, call: "BlockCall") -> None:
        """Keeps the image's sparse activations at this step."""
        if call.step in self.steps and call.is_conditional:
            self.acts[call.step] = self.sae.encode_sparse(call.tokens[0])

    def maps(self) -> SparseMaps:
        """Everything kept."""
        by_step = {step: self.acts[step] for step in self.steps}
        return SparseMaps.build(by_step, sigmas=[self.sigmas[step] for step in self.steps], own_steps=self.own)
