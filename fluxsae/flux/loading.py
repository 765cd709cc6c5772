"""FLUX opened from a folder or the Hub, on the device and in the preset that fit."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from fluxsae.errors import FluxSaeError
from fluxsae.flux.families import FAMILIES, KNOWN, family_of
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.hooks import find_module
from fluxsae.flux.identity import flux_identity
from fluxsae.flux.models import component_bytes, find_model, read_settings
from fluxsae.flux.pipelines import PIPELINES, AnyFlux
from fluxsae.flux.presets import (
    SMALL_MODEL_BYTES,
    Preset,
    announce,
    choose_device,
    choose_dtype,
    choose_preset,
    measure_machine,
    quantised_parts,
    require_quantiser,
)
from fluxsae.flux.requests import check_channels
from fluxsae.flux.settings import GenerationSettings


def load_flux(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    preset: Preset | None = None,
) -> AnyFlux:
    """A pipeline of diffusers from `"miniature"`, a local folder or a Hub repository: FLUX.1 (dev, schnell, Krea) or
    FLUX.2 (klein, dev).

    Device, dtype and preset are chosen by what the machine has (for models above 1 GB the choice is printed with its
    reason): `full`, or `offload` (each part on the GPU only in its turn), both exact; `int8` or `nf4`, which change the
    activations (`is_exact`). Small models run in float32.

    Raises:
        FluxSaeError: no such model, no access to it (with the steps to get it), no room, or a model that needs more
            than a prompt (FLUX.1 Fill, Depth, Canny; FLUX.2 klein KV).
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
        pipe = _open_folder(folder, dtype=dtype, quantization_config=_quantisation(choice.preset, dtype, sizes))
    pipe.generation_settings = read_settings(folder)
    pipe.set_progress_bar_config(disable=True)
    if choice.preset == "offload":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    placed: AnyFlux = pipe.to(device)
    return placed


def _open_folder(folder: Path, **arguments: Any) -> AnyFlux:
    if not (folder / "transformer").is_dir():
        raise FluxSaeError(f"{folder} has no transformer folder, so it is not FLUX. {KNOWN}")
    config = _read_config(folder / "transformer" / "config.json")
    check_channels(config)
    pipeline = _pipeline_class(folder, config)
    try:
        pipe: AnyFlux = pipeline.from_pretrained(folder, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FluxSaeError(
            f"{folder} could not be opened as FLUX: {first_line} Fetch or save the model again."
        ) from error
    family_of(pipe)
    return pipe


def _pipeline_class(folder: Path, config: Mapping[str, Any]) -> type[AnyFlux]:
    """The pipeline of the transformer's family that the folder names. FLUX.1's transformers all run in one."""
    family = next((family for family in FAMILIES if family.transformer == config.get("_class_name")), FAMILIES[0])
    known = PIPELINES[family.name]
    named = _read_config(folder / "model_index.json").get("_class_name")
    if len(known) > 1 and named not in known:
        raise FluxSaeError(
            f"{folder} is a {named}, which needs more than a prompt. Allowed for {family.name} are "
            f"{', '.join(known)}, for example black-forest-labs/FLUX.2-klein-4B."
        )
    return known.get(str(named), next(iter(known.values())))


def _read_config(path: Path) -> dict[str, Any]:
    """What a component's configuration says; nothing where it cannot be read, which diffusers then reports."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _quantisation(preset: Preset, dtype: torch.dtype, sizes: Mapping[str, int]) -> Any:
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
        components_to_quantize=list(quantised_parts(sizes)),
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


def compile_blocks(pipe: Any, **options: Any) -> None:
    """Compiles the transformer block by block (once for each kind), as `torch.compile` with these options would.

    Blocks tapped by `block_hooks`, `capture` or `steer` run eager while tapped, so hooks keep working.
    """
    pipe.transformer.compile_repeated_blocks(**{"fullgraph": True, **options})


def hookpoint_width(pipe: Any, hookpoint: HookPoint) -> int:
    """d_model of the activations at a hook point: 4 times the residual width at FLUX.1's `proj_mlp`, else that width.

    Raises:
        FluxSaeError: this model has no such block.
    """
    find_module(pipe, hookpoint)
    return family_of(pipe).width(pipe, hookpoint)


def default_settings(pipe: Any) -> GenerationSettings:
    """What this model generates with unless told otherwise: its folder's settings, else its family's."""
    own: GenerationSettings | None = getattr(pipe, "generation_settings", None)
    if own is not None:
        return own
    return family_of(pipe).default_settings(pipe, flux_id=flux_identity(pipe).flux_id)
