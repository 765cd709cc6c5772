"""What an SAE does to the denoising: the velocity with the hook point's output replaced by its reconstruction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from fluxsae.evaluation.intervals import Estimate, Weights, bootstrap_weights, interval, safe_ratio
from fluxsae.evaluation.stream import ImageSet, OnProgress, batches
from fluxsae.flux import (
    AnyFlux,
    BlockCall,
    BlockHandler,
    block_hooks,
    embed_prompts,
    encode_images,
    generate,
    initial_noise,
    schedule_sigmas,
    velocity,
)
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature.scenes import Scene, caption_scene, render_scene, sample_scene
from fluxsae.sae.metrics import to_float64
from fluxsae.sae.model import SparseAutoencoder


@dataclass(frozen=True)
class FlowQuality:
    """An SAE spliced into the denoising, at one step or over several."""

    loss_clean: float
    """E||v - (noise - x0)||^2, mean over latent values, nothing replaced."""
    loss_sae: float
    """The same with the hook point's output replaced by x_hat."""
    loss_mean: float
    """The same with it replaced by its mean."""
    recovered: Estimate | None
    """(L_mean - L_sae) / (L_mean - L_clean); None where the interval of L_mean - L_clean contains 0."""
    splice_error: Estimate
    """E||v_sae - v||^2 / E||v_mean - v||^2: 0 is perfect, 1 as bad as the mean."""
    velocity_fvu: Estimate
    """E||v_sae - v||^2 / E||v - mean v||^2."""

    def to_dict(self) -> dict[str, Any]:
        """The values as plain JSON values."""
        return {
            **vars(self),
            "recovered": None if self.recovered is None else self.recovered.to_dict(),
            "splice_error": self.splice_error.to_dict(),
            "velocity_fvu": self.velocity_fvu.to_dict(),
        }


@dataclass(frozen=True)
class FlowReport:
    """Flow quality over all steps and at each of them."""

    n_images: int
    guidance_scale: float
    uses_true_latents: bool
    """Whether x0 are latents of real pictures (drawn scenes) and not the model's own samples."""
    overall: FlowQuality
    by_step: dict[int, FlowQuality]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, under the names of metrics.json."""
        overall = self.overall.to_dict()
        return {
            "flow_loss_recovered": overall["recovered"],
            "splice_error": overall["splice_error"],
            "velocity_fvu": overall["velocity_fvu"],
            "flow_loss": {name: overall[f"loss_{name}"] for name in ("clean", "sae", "mean")},
            "flow_images": self.n_images,
            "flow_guidance_scale": self.guidance_scale,
            "flow_uses_true_latents": self.uses_true_latents,
            "flow_by_step": [{"step": step, **quality.to_dict()} for step, quality in self.by_step.items()],
        }


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Prompts with the packed latents of an image of each."""

    prompts: tuple[str, ...]
    latents: Float[Tensor, "images tokens channels"]
    are_true: bool

    def __len__(self) -> int:
        return len(self.prompts)


def drawn_images(pipe: AnyFlux, count: int, *, seed: int = 0) -> CleanImages:
    """Scenes that the miniature's world draws, with full captions: true latents."""
    rng = np.random.default_rng(seed)
    scenes: list[Scene] = [sample_scene(rng, held_out=None) for _ in range(count)]
    prompts = tuple(caption_scene(scene, rng, keep=1.0) for scene in scenes)
    pictures = [Image.fromarray(render_scene(scene)) for scene in scenes]
    latents = [encode_images(pipe, some) for some in batches(pictures, 16)]
    return CleanImages(prompts, torch.cat(latents), are_true=True)


def own_images(pipe: AnyFlux, images: ImageSet, *, settings: GenerationSettings, batch_size: int = 8) -> CleanImages:
    """The model's own samples, where no true images are at hand."""
    parts = [
        generate(pipe, prompts, seeds=seeds, settings=settings, output_type="latent")
        for prompts, seeds in zip(batches(images.prompts, batch_size), batches(images.seeds, batch_size), strict=True)
    ]
    return CleanImages(images.prompts, torch.cat(parts), are_true=False)  # type: ignore[arg-type]


def splice(sae: SparseAutoencoder) -> BlockHandler:
    """A handler that puts the reconstruction in place of the tokens."""
    return lambda call: sae.reconstruct(call.tokens, sigma=call.sigma)


def splice_mean(mean: Float[Tensor, " d_model"]) -> BlockHandler:
    """A handler that puts one vector in place of every token."""
    return lambda call: mean.to(call.tokens).expand_as(call.tokens)


@dataclass(frozen=True)
class _StepSums:
    """Per image: mean squared losses and distances of the velocity, and sums of the clean velocity."""

    clean: Float[np.ndarray, " images"]
    sae: Float[np.ndarray, " images"]
    mean: Float[np.ndarray, " images"]
    sae_distance: Float[np.ndarray, " images"]
    mean_distance: Float[np.ndarray, " images"]
    velocity_mean: Float[np.ndarray, "images channels"]
    velocity_square: Float[np.ndarray, " images"]
    """Mean over tokens and channels of v^2."""

    def of(self, images: Sequence[int]) -> "_StepSums":
        """The sums of some of the images."""
        return _StepSums(*(getattr(self, name)[list(images)] for name in _StepSums.__dataclass_fields__))

    @property
    def is_sound(self) -> Bool[np.ndarray, " images"]:
        """Whether all velocities of each image are finite."""
        sound: Bool[np.ndarray, " images"] = np.isfinite(self.clean + self.sae + self.mean)
        return sound


@torch.no_grad()
def evaluate_flow(
    pipe: AnyFlux,
    saes: Mapping[HookPoint, SparseAutoencoder],
    images: CleanImages,
    steps: Mapping[HookPoint, Sequence[int]],
    *,
    settings: GenerationSettings,
    batch_size: int = 8,
    draws: int = 500,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> dict[HookPoint, FlowReport]:
    """Flow-loss recovered, splice error and velocity FVU of each SAE, with intervals over images.

    Noise comes from seeds of the evaluation's own, the same for clean, spliced and mean velocities. Guidance is 1.
    Images with a velocity that is NaN or infinite are left out and logged.

    Raises:
        FluxSaeError: too many images are left out.
    """
    # Distilled guidance shifts the velocity away from noise - x0, the target that FLUX was trained on.
    settings = replace(settings, guidance_scale=1.0, true_cfg_scale=1.0)
    reports = {}
    for hookpoint, sae in saes.items():
        left_out = LeftOut(len(images))
        sums: dict[int, list[_StepSums]] = {step: [] for step in steps[hookpoint]}
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            part = CleanImages(images.prompts[rows], images.latents[rows], images.are_true)
            made = _batch_sums(pipe, hookpoint, sae, part, steps=list(sums), settings=settings, first_seed=seed + start)
            sound = _sound_images(made, hookpoint, range(start, start + len(part)), left_out)
            for step, here in made.items():
                sums[step].append(here.of(sound))
            if on_progress is not None:
                on_progress(f"flow loss at {hookpoint}", min(start + batch_size, len(images)), len(images))
        weights = bootstrap_weights(len(images) - len(left_out.image_ids), draws=draws, seed=seed)
        reports[hookpoint] = _flow_report(sums, weights, settings, images.are_true)
    return reports


def _sound_images(
    made: Mapping[int, _StepSums], hookpoint: HookPoint, image_ids: range, left_out: LeftOut
) -> list[int]:
    """The places in a batch of images whose velocities are numbers at every step."""
    for step, here in made.items():
        for place in np.flatnonzero(~here.is_sound).tolist():
            left_out.add(
                image_ids[place],
                f"At step {step}, a velocity of image {image_ids[place]} with {hookpoint} as it is, reconstructed or "
                "at its mean holds NaN or infinite numbers. Load FLUX in bfloat16 or float32, or try another GPU.",
            )
    return [place for place, image_id in enumerate(image_ids) if image_id not in left_out.image_ids]


def _batch_sums(
    pipe: AnyFlux,
    hookpoint: HookPoint,
    sae: SparseAutoencoder,
    images: CleanImages,
    *,
    steps: Sequence[int],
    settings: GenerationSettings,
    first_seed: int,
) -> dict[int, _StepSums]:
    sigmas = schedule_sigmas(pipe, settings)
    embeddings = embed_prompts(pipe, images.prompts, settings)
    noise = initial_noise(pipe, range(first_seed, first_seed + len(images)), settings)
    x0 = images.latents.to(noise)

    def velocity_at(step: int, handler: BlockHandler | None) -> Tensor:
        x_t = (1 - sigmas[step]) * x0 + sigmas[step] * noise
        with block_hooks(pipe, {hookpoint: handler or _leave}):
            return to_float64(velocity(pipe, x_t, embeddings, step=step, settings=settings))

    return {
        step: _step_sums(
            velocity_at(step, None),
            velocity_at(step, splice(sae)),
            velocity_at(step, splice_mean(sae.input_mean)),
            target=to_float64(noise - x0),
        )
        for step in steps
    }


def _leave(call: BlockCall) -> None:
    return None


def _step_sums(clean: Tensor, spliced: Tensor, mean: Tensor, *, target: Tensor) -> _StepSums:
    def distance(a: Tensor, b: Tensor) -> Float[np.ndarray, " images"]:
        squared: Float[np.ndarray, " images"] = (a - b).square().mean((1, 2)).cpu().numpy()
        return squared

    return _StepSums(
        clean=distance(clean, target),
        sae=distance(spliced, target),
        mean=distance(mean, target),
        sae_distance=distance(spliced, clean),
        mean_distance=distance(mean, clean),
        velocity_mean=clean.mean(1).cpu().numpy(),
        velocity_square=clean.square().mean((1, 2)).cpu().numpy(),
    )


def _flow_report(
    sums: Mapping[int, list[_StepSums]], weights: Weights, settings: GenerationSettings, are_true: bool
) -> FlowReport:
    joined = {
        step: _StepSums(*(np.concatenate([getattr(p, name) for p in parts]) for name in _StepSums.__dataclass_fields__))
        for step, parts in sums.items()
    }
    return FlowReport(
        n_images=weights.shape[1],
        guidance_scale=settings.guidance_scale,
        uses_true_latents=are_true,
        overall=_quality(list(joined.values()), weights),
        by_step={step: _quality([one], weights) for step, one in joined.items()},
    )


def _quality(steps: Sequence[_StepSums], weights: Weights) -> FlowQuality:
    """The ratios of sums over steps and images; every step's velocity has its own mean."""
    n_images = weights.sum(axis=1)

    def total(name: str) -> Float[np.ndarray, " draws"]:
        values = np.sum([getattr(step, name) for step in steps], axis=0)
        mean: Float[np.ndarray, " draws"] = weights @ values / n_images
        return mean

    channel_means = [weights @ step.velocity_mean / n_images[:, None] for step in steps]
    variance = total("velocity_square") - np.sum([np.square(mean).mean(axis=1) for mean in channel_means], axis=0)
    clean, spliced, mean = total("clean"), total("sae"), total("mean")
    gap = interval(mean - clean)
    return FlowQuality(
        loss_clean=float(clean[0] / len(steps)),
        loss_sae=float(spliced[0] / len(steps)),
        loss_mean=float(mean[0] / len(steps)),
        recovered=None if gap.contains(0.0) else interval((mean - spliced) / (mean - clean)),
        splice_error=interval(safe_ratio(total("sae_distance"), total("mean_distance"))),
        velocity_fvu=interval(safe_ratio(total("sae_distance"), variance)),
    )
