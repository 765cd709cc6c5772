"""What tells one trained SAE from another of the same name and sizes, read in milliseconds."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fluxsae.files import read_header

WEIGHTS_NAME = "model.safetensors"


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str | None:
    """Of an SAE's tensors; None where they are not as its file has them (another type than float32)."""
    return _hash({name: tensor[:1] if tensor.ndim == 2 else tensor for name, tensor in tensors.items()})


def file_fingerprint(folder: str | Path) -> str | None:
    """Of the SAE in a folder; None where there is none.

    Raises:
        FluxSaeError: the file is damaged.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.is_file():
        return None
    shapes = read_header(path).shapes
    with safe_open(path, framework="pt") as file:
        heads = {
            name: file.get_slice(name)[:1] if len(shape) == 2 else file.get_tensor(name)
            for name, (_, shape) in shapes.items()
        }
    return _hash(heads)


def _hash(heads: Mapping[str, Tensor]) -> str | None:
    # Biases, thresholds and reference activations whole, of matrices the first row: no two trainings share these.
    if any(head.dtype != torch.float32 for head in heads.values()):
        return None
    digest = hashlib.sha256()
    for name, head in sorted(heads.items()):
        digest.update(name.encode() + head.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
