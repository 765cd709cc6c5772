"""FLUX itself: load, generate, hook, restart from a snapshot. The only module of the package that imports diffusers."""

import copy
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from einops import repeat
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from fluxsae._hooks import (
    BlockCall,
    BlockHandler,
    Captured,
    Schedule,
    StopGeneration,
    TransformerCall,
    block_hooks,
    capture,
    free_after_abort,
    full_schedule,
    step_clock,
)
from fluxsae.errors import FluxSaeError
from fluxsae.hookpoints import TokenGrid
from fluxsae.miniature import miniature_path
from fluxsae.settings import MAX_PROMPT_LENGTH, GenerationSettings

__all__ = [
    "BlockCall",
    "BlockHandler",
    "Captured",
    "Embeddings",
    "FluxPipeline",
    "Snapshot",
    "block_hooks",
    "capture",
    "decode_latents",
    "default_settings",
    "denoise_to",
    "embed_prompts",
    "encode_images",
    "generate",
    "generate_from",
    "initial_noise",
    "load_flux",
    "nearest_step",
    "schedule_sigmas",
    "token_grid",
    "unknown_words",
    "velocity",
]

SETTINGS_FILE = "generation_settings.json"
MAX_SEED = 2**63 - 1
OutputType = Literal["pil", "latent", "np"]
OnStep = Callable[[int, int], None]


class FluxPipeline(diffusers.FluxPipeline):  # type: ignore[misc]
    """diffusers' FluxPipeline whose plain call uses the model's own size, steps and text length.

    A model folder says what they are in `generation_settings.json`; without it, diffusers' defaults hold. It carries
    diffusers' name, so that a saved folder opens with diffusers alone.
    """

    generation_settings: GenerationSettings | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' FluxPipeline, with this model's defaults."""
        if self.generation_settings is not None:
            given = inspect.signature(super().__call__).bind_partial(*args, **kwargs).arguments
            defaults = self.generation_settings.to_dict()
            for name in ("height", "width", "num_inference_steps", "guidance_scale", "max_sequence_length"):
                if name not in given:
                    kwargs[name] = defaults[name]
        return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers', with the generation settings beside the model."""
        super().save_pretrained(str(save_directory), **kwargs)
        if self.generation_settings is not None:
            text = json.dumps(self.generation_settings.to_dict(), indent=2) + "\n"
            (Path(save_directory) / SETTINGS_FILE).write_text(text, encoding="utf-8")


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Encoded prompts: token embeddings, pooled embeddings, and the negative prompt's where it is in use."""

    prompt: Float[Tensor, "batch text d_text"]
    pooled: Float[Tensor, "batch d_pooled"]
    negative_prompt: Float[Tensor, "batch text d_text"] | None = None
    negative_pooled: Float[Tensor, "batch d_pooled"] | None = None

    def repeat(self, n: int) -> "Embeddings":
        """Every item n times in a row."""
        copies = [
            None if part is None else repeat(part, "batch ... -> (batch n) ...", n=n)
            for part in (self.prompt, self.pooled, self.negative_prompt, self.negative_pooled)
        ]
        return Embeddings(*copies)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A generation before step `step`: what `generate_from` needs to go on as if it had never stopped."""

    latents: Float[Tensor, "batch tokens channels"]
    step: int
    settings: GenerationSettings
    embeddings: Embeddings


def load_flux(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preset: str | None = None,
) -> FluxPipeline:
    """A FluxPipeline from `"miniature"`, a local folder or a Hub repository.

    Raises:
        FluxSaeError: no such model.
    """
    path = miniature_path("flux") if str(name) == "miniature" else Path(name)
    pipe = FluxPipeline.from_pretrained(str(path), revision=revision, torch_dtype=dtype or torch.float32)
    pipe.generation_settings = _read_settings(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device or "cpu")


def _read_settings(folder: Path) -> GenerationSettings | None:
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return GenerationSettings.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError, FluxSaeError) as error:
        raise FluxSaeError(f"{path} does not hold generation settings: {error} Mend or remove it.") from error


def default_settings(pipe: diffusers.FluxPipeline) -> GenerationSettings:
    """What this model generates with unless told otherwise: its folder's settings, else its family's.

    Models without a guidance embedding are the distilled few-step ones (FLUX.1-schnell: 4 steps, 256 text tokens).
    """
    own = getattr(pipe, "generation_settings", None)
    if own is not None:
        return own
    side = pipe.default_sample_size * pipe.vae_scale_factor
    if pipe.transformer.config.guidance_embeds:
        return GenerationSettings(height=side, width=side)
    return GenerationSettings(
        height=side, width=side, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
    )


def token_grid(pipe: diffusers.FluxPipeline, settings: GenerationSettings) -> TokenGrid:
    """The grid of image tokens at these settings' size.

    Raises:
        FluxSaeError: a side is not a multiple of the model's patch.
    """
    return TokenGrid.from_size(settings.height, settings.width, patch=2 * pipe.vae_scale_factor)


def schedule_sigmas(pipe: diffusers.FluxPipeline, settings: GenerationSettings) -> list[float]:
    """The noise level of every step of the full schedule, descending, without the final 0."""
    return [float(sigma) for sigma in _full_schedule(pipe, settings).sigmas]


def nearest_step(sigmas: Sequence[float], sigma: float, tolerance: float) -> int:
    """The step whose noise level is nearest to `sigma`; of two as near, the earlier.

    Raises:
        FluxSaeError: none lies within `tolerance` (absolute).
    """
    step = min(range(len(sigmas)), key=lambda i: abs(sigmas[i] - sigma))
    if abs(sigmas[step] - sigma) > tolerance:
        raise FluxSaeError(
            f"No step of this schedule of {len(sigmas)} is at sigma {sigma:.3f} (allowed: within {tolerance:g}); the "
            f"nearest is step {step} at sigma {sigmas[step]:.3f}. Use more steps or the size the SAE was trained at, "
            "or pass the flag that allows use outside the recorded range."
        )
    return step


def generate(
    pipe: diffusers.FluxPipeline,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int],
    settings: GenerationSettings | None = None,
    output_type: OutputType = "pil",
    on_step: OnStep | None = None,
) -> list[Image] | Tensor | np.ndarray:
    """One image per (prompt, seed): a list of PIL images, an array, or packed latents.

    Each image's noise comes from its own CPU generator, so (prompt, seed) names the same image in any batch.
    `on_step(step, n_steps)` is called after each step and may raise to cancel.

    Raises:
        FluxSaeError: a blank or overlong prompt, seeds that do not fit, a size off the patch, before any model work.
    """
    settings = settings or default_settings(pipe)
    prompts, seeds = _check_request(pipe, prompts, seeds, settings)
    return _run(
        pipe,
        settings,
        output_type=output_type,
        on_step=on_step,
        prompt=prompts,
        negative_prompt=[settings.negative_prompt] * len(prompts) if settings.true_cfg_scale > 1 else None,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        num_inference_steps=settings.num_inference_steps,
    )


def denoise_to(
    pipe: diffusers.FluxPipeline,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int],
    settings: GenerationSettings | None = None,
    step: int,
    on_step: OnStep | None = None,
) -> Snapshot:
    """Runs steps 0 to `step` - 1 and keeps what is needed to go on: the prefix that images edited later share.

    Raises:
        FluxSaeError: a step outside the schedule, or a scheduler that cannot restart.
    """
    settings = settings or default_settings(pipe)
    prompts, seeds = _check_request(pipe, prompts, seeds, settings)
    _refuse_unrestartable(pipe)
    _check_step(step, settings)
    embeddings = embed_prompts(pipe, prompts, settings)
    latents: list[Tensor] = []

    def keep_latents(call: TransformerCall) -> None:
        if call.step == step:
            latents.append(call.inputs["hidden_states"].detach().clone())
            raise StopGeneration

    try:
        with step_clock(pipe, keep_latents):
            _run(
                pipe,
                settings,
                output_type="latent",
                on_step=on_step,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                num_inference_steps=settings.num_inference_steps,
                **_embedding_arguments(embeddings),
            )
    except StopGeneration:
        pass
    return Snapshot(latents[0], step, settings, embeddings)


def generate_from(
    pipe: diffusers.FluxPipeline,
    snapshot: Snapshot,
    *,
    repeat: int = 1,
    output_type: OutputType = "pil",
    on_step: OnStep | None = None,
) -> list[Image] | Tensor | np.ndarray:
    """The images that the snapshot's generation would have made, each `repeat` times in a row.

    Bit-equal to the unbroken generation at equal batch size. Hooks see the steps of the full schedule.

    Raises:
        FluxSaeError: a scheduler that cannot restart, or `repeat` below 1.
    """
    _refuse_unrestartable(pipe)
    if repeat < 1:
        raise FluxSaeError(f"repeat={repeat}: allowed is a whole number from 1.")
    settings, n_steps = snapshot.settings, snapshot.settings.num_inference_steps
    with full_schedule(pipe, _full_schedule(pipe, settings)):
        return _run(
            pipe,
            settings,
            output_type=output_type,
            on_step=on_step,
            first_step=snapshot.step,
            latents=snapshot.latents.repeat_interleave(repeat, dim=0),
            sigmas=np.linspace(1.0, 1 / n_steps, n_steps)[snapshot.step :],
            num_inference_steps=n_steps - snapshot.step,
            **_embedding_arguments(snapshot.embeddings.repeat(repeat)),
        )


@torch.no_grad()
def embed_prompts(pipe: diffusers.FluxPipeline, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
    """The prompts through both text encoders, with the negative prompt where `true_cfg_scale` is above 1."""
    length = settings.max_sequence_length
    prompt, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
    if settings.true_cfg_scale <= 1:
        return Embeddings(prompt, pooled)
    negative = [settings.negative_prompt] * len(prompts)
    negative_prompt, negative_pooled, _ = pipe.encode_prompt(negative, max_sequence_length=length)
    return Embeddings(prompt, pooled, negative_prompt, negative_pooled)


def initial_noise(
    pipe: diffusers.FluxPipeline,
    seeds: Sequence[int],
    settings: GenerationSettings,
    *,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch tokens channels"]:
    """The packed noise that `generate` starts from with these seeds."""
    token_grid(pipe, settings)
    latents, _ = pipe.prepare_latents(
        len(seeds),
        pipe.transformer.config.in_channels // 4,
        settings.height,
        settings.width,
        dtype or pipe.transformer.dtype,
        pipe._execution_device,
        [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    )
    return latents


@torch.no_grad()
def velocity(
    pipe: diffusers.FluxPipeline,
    latents: Float[Tensor, "batch tokens channels"],
    embeddings: Embeddings,
    *,
    step: int,
    settings: GenerationSettings,
) -> Float[Tensor, "batch tokens channels"]:
    """The transformer's velocity (noise - image) for packed latents at one step of the schedule: the conditional pass.

    Hooks opened around it see this step. With distilled guidance where the model has it.

    Raises:
        FluxSaeError: a step outside the schedule, or latents that do not fit the settings' size.
    """
    _check_step(step, settings)
    grid, device, dtype = token_grid(pipe, settings), pipe._execution_device, latents.dtype
    if latents.shape[1] != grid.n_tokens:
        raise FluxSaeError(
            f"Latents of {latents.shape[1]} tokens do not fit {settings.height} x {settings.width} pixels, which have "
            f"{grid.n_tokens}. Pass settings of the latents' own size."
        )
    schedule = _full_schedule(pipe, settings, device=device)
    guidance = torch.full([len(latents)], settings.guidance_scale, device=device, dtype=torch.float32)
    with full_schedule(pipe, schedule):
        return pipe.transformer(
            hidden_states=latents.to(device),
            timestep=schedule.timesteps[step].expand(len(latents)).to(dtype) / 1000,
            guidance=guidance if pipe.transformer.config.guidance_embeds else None,
            pooled_projections=embeddings.pooled,
            encoder_hidden_states=embeddings.prompt,
            txt_ids=torch.zeros(embeddings.prompt.shape[1], 3, device=device, dtype=dtype),
            img_ids=pipe._prepare_latent_image_ids(len(latents), grid.rows, grid.cols, device, dtype),
            joint_attention_kwargs={},
            return_dict=False,
        )[0]


@torch.no_grad()
def encode_images(pipe: diffusers.FluxPipeline, images: Sequence[Image]) -> Float[Tensor, "batch tokens channels"]:
    """Images as packed latents (the mode, where the autoencoder is variational), scaled as the transformer sees them.

    Raises:
        FluxSaeError: a side is not a multiple of the model's patch.
    """
    width, height = images[0].size
    TokenGrid.from_size(height, width, patch=2 * pipe.vae_scale_factor)
    pixels = pipe.image_processor.preprocess(list(images)).to(pipe._execution_device, pipe.vae.dtype)
    encoded = pipe.vae.encode(pixels)
    raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    latents = (raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    return pipe._pack_latents(latents, len(latents), latents.shape[1], latents.shape[2], latents.shape[3])


@torch.no_grad()
def decode_latents(
    pipe: diffusers.FluxPipeline, latents: Float[Tensor, "batch tokens channels"], settings: GenerationSettings
) -> list[Image]:
    """Packed latents as PIL images, as FluxPipeline decodes them."""
    unpacked = pipe._unpack_latents(latents, settings.height, settings.width, pipe.vae_scale_factor)
    unpacked = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pixels = pipe.vae.decode(unpacked.to(pipe.vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def unknown_words(pipe: diffusers.FluxPipeline, prompt: str) -> list[str]:
    """The prompt's words that a word-level vocabulary (the miniature's) lacks, once each, in order.

    Empty for FLUX's own tokenizers, which spell any word from pieces.
    """
    backend = getattr(pipe.tokenizer_2, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel":
        return []
    text = backend.normalizer.normalize_str(prompt) if backend.normalizer else prompt
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return [word for word in dict.fromkeys(words) if backend.token_to_id(word) is None]


def _run(
    pipe: diffusers.FluxPipeline,
    settings: GenerationSettings,
    *,
    output_type: OutputType,
    on_step: OnStep | None,
    first_step: int = 0,
    **arguments: Any,
) -> Any:
    """One call of the pipeline at these settings; whatever ends it early, the pipeline is ready for the next."""
    if output_type not in ("pil", "latent", "np"):
        raise FluxSaeError(f"output_type={output_type!r}: allowed are 'pil', 'latent' and 'np'.")

    def after_step(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(first_step + index, settings.num_inference_steps)
        return values

    try:
        return pipe(
            height=settings.height,
            width=settings.width,
            guidance_scale=settings.guidance_scale,
            true_cfg_scale=settings.true_cfg_scale,
            max_sequence_length=settings.max_sequence_length,
            output_type=output_type,
            callback_on_step_end=after_step,
            **arguments,
        ).images
    except BaseException:
        free_after_abort(pipe)
        raise


def _embedding_arguments(embeddings: Embeddings) -> dict[str, Tensor | None]:
    return {
        "prompt_embeds": embeddings.prompt,
        "pooled_prompt_embeds": embeddings.pooled,
        "negative_prompt_embeds": embeddings.negative_prompt,
        "negative_pooled_prompt_embeds": embeddings.negative_pooled,
    }


def _full_schedule(
    pipe: diffusers.FluxPipeline, settings: GenerationSettings, *, device: torch.device | None = None
) -> Schedule:
    """The schedule FluxPipeline would set for these settings, worked out on a copy of its scheduler."""
    scheduler = copy.deepcopy(pipe.scheduler)
    config, n_steps = scheduler.config, settings.num_inference_steps
    mu = calculate_shift(
        token_grid(pipe, settings).n_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    if config.get("use_flow_sigmas", False):
        scheduler.set_timesteps(n_steps, device=device, mu=mu)
    else:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n_steps, n_steps), device=device, mu=mu)
    return Schedule(scheduler.timesteps, scheduler.sigmas[: len(scheduler.timesteps)])


def _refuse_unrestartable(pipe: diffusers.FluxPipeline) -> None:
    config = pipe.scheduler.config
    # Each of these makes a sigma depend on the whole list, or draws fresh noise: a tail is then another schedule.
    names = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas", "stochastic_sampling")
    for name in names:
        if config.get(name, False):
            raise FluxSaeError(
                f"This scheduler has {name} set, so a generation cannot be taken up in the middle. Allowed are plain "
                f"flow-matching sigmas: load the scheduler with {name}=False, or generate each image from the start."
            )


def _check_step(step: int, settings: GenerationSettings) -> None:
    if not 0 <= step < settings.num_inference_steps:
        raise FluxSaeError(
            f"step={step} is outside the schedule of {settings.num_inference_steps} steps: "
            f"allowed are 0 to {settings.num_inference_steps - 1}."
        )


def _check_request(
    pipe: diffusers.FluxPipeline,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    settings: GenerationSettings,
) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of equal length, everything checked that can be before the model works."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not prompts:
        raise FluxSaeError("No prompts given. Pass at least one.")
    if len(prompts) != len(seeds):
        raise FluxSaeError(f"{len(prompts)} prompts but {len(seeds)} seeds. Pass one seed for each prompt.")
    for prompt in prompts:
        _check_prompt(prompt)
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise FluxSaeError(f"seed={seed!r}: allowed is a whole number from 0 to {MAX_SEED}.")
    token_grid(pipe, settings)
    limit = pipe.tokenizer_2.model_max_length if pipe.tokenizer_2 is not None else settings.max_sequence_length
    if settings.max_sequence_length > limit:
        raise FluxSaeError(
            f"max_sequence_length={settings.max_sequence_length}: this model reads at most {limit} tokens."
        )
    return prompts, seeds


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise FluxSaeError(f"A prompt is text, not {type(prompt).__name__}.")
    if not prompt.strip():
        raise FluxSaeError("The prompt is blank. Describe the image in a few words.")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise FluxSaeError(f"The prompt has {len(prompt)} characters. Allowed are at most {MAX_PROMPT_LENGTH}.")
