"""FLUX opened from a folder or the Hub, on the device and in the preset that fit."""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.hooks import (
    find_width,
)
from fluxsae.flux.identity import flux_identity
from fluxsae.flux.models import SETTINGS_FILE, component_bytes, find_model, read_settings
from fluxsae.flux.presets import (
    SMALL_MODEL_BYTES,
    Preset,
    announce,
    choose_device,
    choose_dtype,
    choose_preset,
    measure_machine,
    require_quantiser,
)
from fluxsae.flux.requests import check_channels
from fluxsae.flux.settings import GenerationSettings
from fluxsae.flux.sharing import generating

# As the models' own pages have it, where it is not FLUX.1-dev's.
_GUIDANCE = {"black-forest-labs/flux.1-krea-dev": 4.5}


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
        with generating(self):
            return super().__call__(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers', with the generation settings beside the model."""
        super().save_pretrained(str(save_directory), **kwargs)
        if self.generation_settings is not None:
            text = json.dumps(self.generation_settings.to_dict(), indent=2) + "\n"
            (Path(save_directory) / SETTINGS_FILE).write_text(text, encoding="utf-8")


def load_flux(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preset: Preset | None = None,
) -> FluxPipeline:
    """A FluxPipeline from `"miniature"`, a local folder or a Hub repository (FLUX.1-dev, -schnell, Krea, ...).

    Device, dtype and preset are chosen by what the machine has (for models above 1 GB the choice is printed with its
    reason): `full`, or `offload` (each part on the GPU only in its turn), both exact; `int8` or `nf4`, which change the
    activations (`is_exact`). Small models run in float32.

    Raises:
        FluxSaeError: no such model, no access to it (with the steps to get it), no room, or a model that needs more
            than a prompt (FLUX.1 Fill, Depth, Canny).
    """
    folder = find_model(name, revision)
    sizes = component_bytes(folder)
    device = choose_device(device)
    dtype = dtype or choose_dtype(device, sum(sizes.values()))
    choice = choose_preset(sizes, measure_machine(device), preset)
    is_small = sum(sizes.values()) < SMALL_MODEL_BYTES
    if not is_small:
        announce(str(name), choice, device, dtype)
    with _quiet_loading(logging.getLogger("fluxsae").getEffectiveLevel() > logging.INFO):
        pipe = _open_folder(folder, dtype=dtype, quantization_config=_quantisation(choice.preset, dtype))
    pipe.generation_settings = read_settings(folder)
    pipe.set_progress_bar_config(disable=True)
    if choice.preset == "offload":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    placed: FluxPipeline = pipe.to(device)
    return placed


def _open_folder(folder: Path, **arguments: Any) -> FluxPipeline:
    if not (folder / "transformer").is_dir():
        raise FluxSaeError(f"{folder} has no transformer folder, so it is not FLUX. Give a FLUX.1 model.")
    check_channels(_read_config(folder / "transformer" / "config.json"))
    try:
        pipe: FluxPipeline = FluxPipeline.from_pretrained(folder, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FluxSaeError(
            f"{folder} could not be opened as FLUX: {first_line} Fetch or save the model again."
        ) from error
    if not isinstance(pipe.transformer, diffusers.FluxTransformer2DModel):
        kind = type(pipe.transformer).__name__
        raise FluxSaeError(f"{folder} holds a {kind}, not FLUX's transformer. Give a FLUX.1 model.")
    return pipe


def _read_config(path: Path) -> dict[str, Any]:
    """What a component's configuration says; nothing where it cannot be read, which diffusers then reports."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _quantisation(preset: Preset, dtype: torch.dtype) -> Any:
    """The quantisation of the transformer and the large text encoder that a preset asks for, or None."""
    if preset not in ("int8", "nf4"):
        return None
    require_quantiser()
    arguments: dict[str, Any] = {"load_in_8bit": True}
    if preset == "nf4":
        arguments = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return diffusers.PipelineQuantizationConfig(
        quant_backend="bitsandbytes_8bit" if preset == "int8" else "bitsandbytes_4bit",
        quant_kwargs=arguments,
        components_to_quantize=["transformer", "text_encoder_2"],
    )


@contextmanager
def _quiet_loading(is_quiet: bool) -> Iterator[None]:
    """While open (if `is_quiet`), diffusers and transformers show neither bars nor remarks on what they load."""
    if not is_quiet:
        yield
        return
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    for logger in loggers:
        logger.set_verbosity(logging.ERROR)
        logger.disable_progress_bar()
    try:
        yield
    finally:
        for logger, verbosity, has_bars in before:
            logger.set_verbosity(verbosity)
            if has_bars:
                logger.enable_progress_bar()


def compile_blocks(pipe: diffusers.FluxPipeline, **options: Any) -> None:
    """Compiles the transformer block by block (once for each kind), as `torch.compile` with these options would.

    Blocks tapped by `block_hooks`, `capture` or `steer` run eager while tapped, so hooks keep working.
    """
    pipe.transformer.compile_repeated_blocks(**{"fullgraph": True, **options})


def hookpoint_width(pipe: diffusers.FluxPipeline, hookpoint: HookPoint) -> int:
    """d_model of the activations at a hook point: 4 times the residual width at `proj_mlp`, else that width.

    Raises:
        FluxSaeError: this model has no such block.
    """
    return find_width(pipe, hookpoint)


def default_settings(pipe: diffusers.FluxPipeline) -> GenerationSettings:
    """What this model generates with unless told otherwise: its folder's settings, else its family's.

    Models without a guidance embedding are the distilled few-step ones (FLUX.1-schnell: 4 steps, 256 text tokens).
    """
    own: GenerationSettings | None = getattr(pipe, "generation_settings", None)
    if own is not None:
        return own
    side = pipe.default_sample_size * pipe.vae_scale_factor
    if pipe.transformer.config.guidance_embeds:
        guidance = _GUIDANCE.get(flux_identity(pipe).flux_id.lower(), 3.5)
        return GenerationSettings(height=side, width=side, guidance_scale=guidance)
    return GenerationSettings(
        height=side, width=side, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
    )
