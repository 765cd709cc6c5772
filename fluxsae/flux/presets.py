"""How a FLUX of a given size fits the machine: device, dtype and preset, each with its reason."""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from fluxsae.errors import FluxSaeError

Preset = Literal["full", "offload", "int8", "nf4"]
PRESETS: tuple[Preset, ...] = get_args(Preset)

GB = 1_000_000_000
WORKING_BYTES = 4 * GB
"""Room beside the weights for one 1024 x 1024 image: the transformer's activations and the VAE's decode."""
SMALL_MODEL_BYTES = 1 * GB
"""Below this a model is kept whole and in float32, whatever the machine."""

# Bytes left of a bf16 weight: int8 with a scale a row; nf4 with one absolute maximum (itself 8-bit) a block of 64.
_QUANTISED_SHARE: dict[Preset, float] = {"int8": 0.51, "nf4": 0.27}


@dataclass(frozen=True)
class Machine:
    """A device and the memory that is free there and on its host, bytes."""

    device: torch.device
    free: int
    host_free: int


@dataclass(frozen=True)
class PresetChoice:
    """A preset and why it was chosen, in words for the user."""

    preset: Preset
    reason: str


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device asked for, else CUDA, Apple's MPS or the CPU, whichever is there first.

    Raises:
        FluxSaeError: no such device on this machine.
    """
    if device is None:
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise FluxSaeError(f"device={str(device)!r} is no device. Write cuda, cuda:1, mps or cpu.") from error
    is_missing = {"cuda": not torch.cuda.is_available(), "mps": not torch.backends.mps.is_available()}
    if is_missing.get(wanted.type, False):
        raise FluxSaeError(
            f"device={str(device)!r}: this machine has none, or torch was installed without it. Use cpu."
        )
    return wanted


def choose_dtype(device: torch.device, model_bytes: int) -> torch.dtype:
    """float32 for small models; else bfloat16, or float16 where the device has no bfloat16."""
    if model_bytes < SMALL_MODEL_BYTES:
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    if device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return torch.float16
    return torch.bfloat16


def measure_machine(device: torch.device) -> Machine:
    """What is free on this machine now."""
    import psutil

    host_free = int(psutil.virtual_memory().available)
    if device.type == "cuda":
        return Machine(device, int(torch.cuda.mem_get_info(device)[0]), host_free)
    if device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Machine(device, min(int(free), host_free), host_free)
    return Machine(device, host_free, host_free)


def quantised_parts(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The components that a quantised preset shrinks: the transformer and the largest text encoder."""
    encoders = [name for name in sizes if name.startswith("text_encoder")]
    return ("transformer", *([max(encoders, key=lambda name: sizes[name])] if encoders else []))


def required_bytes(preset: Preset, sizes: Mapping[str, int]) -> int:
    """Device memory that a preset needs for components of these sizes (bytes as they are loaded), with working room."""
    if preset == "offload":
        return max(sizes.values()) + WORKING_BYTES
    share, quantised = _QUANTISED_SHARE.get(preset, 1.0), quantised_parts(sizes)
    weights = sum(size * (share if name in quantised else 1.0) for name, size in sizes.items())
    return round(weights) + WORKING_BYTES


def choose_preset(sizes: Mapping[str, int], machine: Machine, preset: str | None = None) -> PresetChoice:
    """The preset asked for, or the first that fits, exact ones first: full, offload, int8, nf4.

    `sizes` maps components to bytes in the dtype they are loaded in.

    Raises:
        FluxSaeError: an unknown preset, one this device cannot run, or no room for any.
    """
    if preset is not None:
        return _check_preset(preset, machine.device)
    total = sum(sizes.values())
    if total < SMALL_MODEL_BYTES:
        return PresetChoice("full", f"the model is small ({total / GB:.2g} GB)")
    free, host = machine.free, machine.host_free
    for candidate in PRESETS:
        if candidate != "full" and machine.device.type != "cuda":
            break
        if required_bytes(candidate, sizes) <= free and (candidate != "offload" or total <= host):
            return PresetChoice(candidate, _reason(candidate, sizes, machine))
    allowed = PRESETS if machine.device.type == "cuda" else PRESETS[:1]
    needs = ", ".join(f"{name} {required_bytes(name, sizes) / GB:.0f} GB" for name in allowed)
    raise FluxSaeError(
        f"This FLUX does not fit: {free / GB:.1f} GB are free on {machine.device} ({host / GB:.1f} GB on the host), "
        f"and the presets need {needs}. Free some memory or use a larger GPU; the miniature runs anywhere."
    )


def _reason(preset: Preset, sizes: Mapping[str, int], machine: Machine) -> str:
    fits = f"{machine.free / GB:.1f} GB free on {machine.device}, {required_bytes(preset, sizes) / GB:.1f} GB needed"
    if preset == "full":
        return f"{fits}: everything stays on the device"
    tail = f"full would need {required_bytes('full', sizes) / GB:.1f} GB"
    if preset == "offload":
        return f"{fits}, {tail}: each part moves to the device when it is its turn; same activations, slower"
    return f"{fits}, {tail}: weights in {preset}, which CHANGES the activations; fit for previews, not for collection"


def _check_preset(preset: str, device: torch.device) -> PresetChoice:
    if preset not in PRESETS:
        raise FluxSaeError(f"preset={preset!r}: allowed are {', '.join(PRESETS)}, or none to choose by free memory.")
    if preset != "full" and device.type != "cuda":
        raise FluxSaeError(f"preset={preset!r} needs a CUDA device, not {device}. Use preset='full'.")
    return PresetChoice(preset, "as asked")


def require_quantiser() -> None:
    """Raises a FluxSaeError with the remedy where bitsandbytes, which holds int8 and nf4 weights, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FluxSaeError(
            "The presets int8 and nf4 need the package bitsandbytes, which is not installed. Run "
            "`python -m pip install bitsandbytes`, or use preset='offload'."
        )


def announce(name: str, choice: PresetChoice, device: torch.device, dtype: torch.dtype) -> None:
    """Tells the user on the error stream, beside progress bars, what was chosen and why."""
    kind = str(dtype).removeprefix("torch.")
    print(f"{name}: preset {choice.preset} on {device} in {kind} ({choice.reason})", file=sys.stderr)
