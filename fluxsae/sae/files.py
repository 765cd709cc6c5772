"""The two files of an SAE, on disk or Hub, checked to the last key and number."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.files import read_header
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.fingerprint import WEIGHTS_NAME

CONFIG_NAME = "config.json"


def find_sae_folder(path_or_repo: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The local folder with the SAE's two files; those of a Hub repository are downloaded into the Hub's cache.

    Raises:
        FluxSaeError: neither a folder nor a repository that can be read.
    """
    local = Path(path_or_repo)
    if local.is_dir():
        return local / subfolder if subfolder else local
    name = str(path_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FluxSaeError(
            f"{name!r} is neither a folder nor a Hub repository. Give an existing folder, or owner/name."
        )
    return _download(name, subfolder, revision)


def _download(repo: str, subfolder: str | None, revision: str | None) -> Path:
    from fluxsae.hub import transfer

    prefix = f"{subfolder}/" if subfolder else ""
    found = transfer.download(repo, revision=revision, patterns=[prefix + CONFIG_NAME, prefix + WEIGHTS_NAME])
    return found.folder / prefix


def load_sae_config(folder: str | Path) -> SaeConfig:
    """The checked `config.json` of an SAE folder, without its weights.

    Raises:
        FluxSaeError: missing, not JSON, doubled or unknown or missing fields, a newer schema, values out of range.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Give the folder of an SAE (sae/<hookpoint> of a run).")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_of_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, _DoubledKeyError) as error:
        raise FluxSaeError(
            f"{path} is not a whole JSON file ({error}). Fetch it again or train the SAE again."
        ) from error
    if not isinstance(values, dict):
        raise FluxSaeError(f"{path} must hold a JSON object, not {type(values).__name__}.")
    try:
        return SaeConfig.from_dict(values)
    except FluxSaeError as error:
        raise FluxSaeError(f"{path}: {error}") from error


class _DoubledKeyError(ValueError):
    pass


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubledKeyError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def load_checked_tensors(path: Path, config: SaeConfig) -> dict[str, Tensor]:
    """The tensors of an SAE's weights file.

    Raises:
        FluxSaeError: anything but exactly the tensors that the config announces, finite and float32.
    """
    header = read_header(path)
    _check_doubled_tensors(path)
    shapes = config.tensor_shapes()
    missing, extra = sorted(set(shapes) - set(header.shapes)), sorted(set(header.shapes) - set(shapes))
    if missing or extra:
        problem = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(extra)}"] * bool(extra)
        raise FluxSaeError(
            f"{path} {' and '.join(problem)}. An SAE of architecture {config.architecture} holds exactly "
            f"{', '.join(sorted(shapes))}."
        )
    for name, (dtype, shape) in header.shapes.items():
        if dtype != "F32" or shape != shapes[name]:
            raise FluxSaeError(
                f"{path}: {name} is {dtype} {list(shape)}. Its config asks for F32 {list(shapes[name])}."
            )
    tensors = load_file(path)
    for name, tensor in tensors.items():
        check_finite_weights(name, tensor, where=str(path))
    if not float(tensors["input_scale"]) > 0:
        raise FluxSaeError(f"{path}: input_scale is {float(tensors['input_scale'])}. It must be greater than 0.")
    return tensors


def _check_doubled_tensors(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=_object_of_unique_keys)
    except _DoubledKeyError as error:
        raise FluxSaeError(f"{path} is damaged: {error}. Fetch it again or train the SAE again.") from error


def check_finite_weights(name: str, tensor: Tensor, *, where: str) -> None:
    """Raises a FluxSaeError for a tensor with NaN or infinite values."""
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise FluxSaeError(
            f"{where}: {name} holds {wrong} values that are NaN or infinite. Fetch it again or train the SAE again."
        )
