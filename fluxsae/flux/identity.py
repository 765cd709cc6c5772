"""Which FLUX computes: its Hub id, the hash of its weights, and what makes its activations differ from theirs."""

import hashlib
import re
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fluxsae.miniature import miniature_path

UNKNOWN = "unknown"

_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors")
_SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADAPTED = ("transformer", "text_encoder", "text_encoder_2")
# Of each matrix of an adapter: enough to tell two apart, and cheap to fetch from a GPU.
_VALUES_HASHED = 64


class FluxIdentity(NamedTuple):
    """Which FLUX this is, as runs and SAEs record it."""

    flux_id: str
    """Full Hub id, `miniature`, or the name of a local folder; `unknown` where the pipeline does not say."""
    revision: str | None = None
    """Commit on the Hub; of a local folder the first digits of `weights`."""
    weights: str | None = None
    """SHA-256 over the transformer's weight files; None where it was not opened from files, or in older records."""
    adapters: tuple[str, ...] | None = ()
    """Hashes of the adapters (LoRAs) that are active or fused; None in older records, which do not say."""
    is_exact: bool | None = True
    """False where the transformer is quantised or skips work by a cache; None in older records."""

    def is_same_model(self, other: "FluxIdentity") -> bool:
        """Whether the weights are the same, as far as both say: by hash, else by revision, else by name."""
        if self.weights is not None and other.weights is not None:
            return self.weights == other.weights
        if self.revision is not None and other.revision is not None:
            return self.revision == other.revision
        return self.flux_id == other.flux_id or UNKNOWN in (self.flux_id, other.flux_id)

    def __str__(self) -> str:
        revision = f"revision {self.revision[:12]}, " if self.revision else ""
        return f"{self.flux_id} ({revision}weights {(self.weights or UNKNOWN)[:12]})"


IdentityMismatch = Literal["flux", "adapters", "is_exact"]


def identity_differences(recorded: FluxIdentity, here: FluxIdentity) -> dict[IdentityMismatch, str]:
    """What differs between the FLUX of a record and this one, in words; what a record lacks is no difference."""
    found: dict[IdentityMismatch, str] = {}
    if not recorded.is_same_model(here):
        found["flux"] = f"FLUX is {here}, not {recorded}"
    if None not in (recorded.adapters, here.adapters) and recorded.adapters != here.adapters:
        found["adapters"] = f"adapters are {_listed(here.adapters)}, not {_listed(recorded.adapters)}"
    if None not in (recorded.is_exact, here.is_exact) and recorded.is_exact != here.is_exact:
        found["is_exact"] = f"is_exact is {here.is_exact}, not {recorded.is_exact} (a quantised or cached FLUX)"
    return found


def _listed(adapters: tuple[str, ...] | None) -> str:
    return ", ".join(adapters or ()) or "none"


def flux_identity(pipe: Any) -> FluxIdentity:
    """Which FLUX a pipeline runs, whoever opened it: read off its transformer's folder and the adapters it carries."""
    source = str(pipe.transformer.config.get("_name_or_path") or "")
    adapters, exact = find_adapters(pipe), is_exact(pipe)
    if not source or not Path(source).is_dir():
        flux_id = source or str(pipe.config.get("_name_or_path") or UNKNOWN)
        return FluxIdentity(flux_id, adapters=adapters, is_exact=exact)
    folder = Path(source).absolute()
    weights, model = weights_hash(folder), folder.resolve().parent
    cached = _SNAPSHOT.fullmatch(folder.parents[2].name) if len(folder.parents) > 2 else None
    if cached:
        return FluxIdentity(f"{cached['owner']}/{cached['name']}", model.name, weights, adapters, exact)
    is_miniature = model == Path(miniature_path("flux")).resolve()
    return FluxIdentity("miniature" if is_miniature else model.name, weights and weights[:12], weights, adapters, exact)


def weights_hash(folder: Path) -> str | None:
    """SHA-256 over the SHA-256 of a transformer folder's weight files, in order of name; None without such files."""
    files = sorted(folder.glob("*.safetensors"))
    files = [file for file in files if _WEIGHTS.fullmatch(file.name)] or files
    if not files:
        return None
    return hashlib.sha256(b"".join(bytes.fromhex(_file_hash(file)) for file in files)).hexdigest()


def _file_hash(file: Path) -> str:
    # The Hub's cache names a large file by its published SHA-256, against which the download was checked.
    content = file.resolve()
    if content.parent.name == "blobs" and _SHA256.fullmatch(content.name):
        return content.name
    status = content.stat()
    return _hash_of(content, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_of(file: Path, size: int, modified: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def find_adapters(pipe: Any) -> tuple[str, ...]:
    """What changes the weights beside their files: a hash for each adapter that is active or fused, sorted.

    The hash covers an adapter's matrices and its scale, not the name it was loaded under.
    """
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for component in _ADAPTED:
        module = getattr(pipe, component, None)
        for layer in module.modules() if isinstance(module, nn.Module) else ():
            for name in _acting_adapters(layer):
                parts[name] += _adapter_values(layer, name)
    content = {name: torch.cat(values).float().cpu().numpy().tobytes() for name, values in parts.items()}
    found = {name: f"adapter {hashlib.sha256(values).hexdigest()[:12]}" for name, values in content.items()}
    # Once its layers are unloaded, a fused adapter is known to the pipeline by name alone.
    fused = {f"fused adapter {name}" for name in getattr(pipe, "fused_loras", ()) if name not in found}
    image = {"image prompt adapter"} if getattr(pipe.transformer, "encoder_hid_proj", None) is not None else set()
    return tuple(sorted({*found.values(), *fused, *image}))


def _acting_adapters(layer: nn.Module) -> set[str]:
    """The adapters of a layer of peft that change what it computes."""
    if not hasattr(layer, "adapter_layer_names"):
        return set()
    return {*(() if layer.disable_adapters else layer.active_adapters), *layer.merged_adapters}  # type: ignore[misc]


def _adapter_values(layer: Any, name: str) -> list[Tensor]:
    containers = [getattr(layer, attribute) for attribute in layer.adapter_layer_names]
    held = [container[name] for container in containers if name in container]
    tensors = [p for part in held for p in (part.parameters() if isinstance(part, nn.Module) else [part])]
    # Rounded, so that an adapter loaded in float32 and in bfloat16 is the same one.
    values = [tensor.detach().flatten()[:_VALUES_HASHED].to(torch.bfloat16) for tensor in tensors]
    scale = torch.tensor([getattr(layer, "scaling", {}).get(name, 1.0)], dtype=torch.bfloat16)
    return [*values, *([scale.to(values[0].device)] if values else [])]


def is_exact(pipe: Any) -> bool:
    """Whether the transformer computes the model's own activations: neither quantised nor skipping by a cache."""
    return why_inexact(pipe) is None


def why_inexact(pipe: Any) -> str | None:
    """What makes the activations differ from the model's own, in words, or None."""
    transformer = pipe.transformer
    if getattr(transformer, "is_cache_enabled", False):
        return "a step cache is enabled, which reuses earlier results"
    narrow = {p.dtype for p in transformer.parameters() if p.dtype.itemsize == 1}
    if narrow or getattr(transformer, "hf_quantizer", None) is not None:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        return f"the transformer is quantised ({kinds or type(transformer.hf_quantizer).__name__})"
    return None
