"""SAEs of other tools by what their files hold: folders of `interop`'s tools, overcomplete's state dicts, plain `.pt`.

overcomplete:  z = relu(x W_enc^T + b_enc), its top k or those above a threshold;   x_hat = exp(m) z D,  rows of D unit
plain `.pt`:   acts = relu(W_enc (x - pre_bias) + b_enc), or the top k of it;        x_hat = W_dec^T acts + pre_bias
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import Architecture, Tool
from fluxsae.sae.interop import (
    build_sae,
    from_dictionary_learning,
    from_saelens,
    from_sparsify,
    load_plain,
    refuse_settings,
    require_tensors,
)
from fluxsae.sae.model import SparseAutoencoder

_FILES: dict[Tool, tuple[str, ...]] = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
}
_PREFIXES = ("module.", "_orig_mod.")
_OFF_NORM = 0.1


@dataclass(frozen=True)
class Told:
    """What a file does not say of its SAE, as somebody told us."""

    arch: Architecture | None = None
    k: int | None = None
    threshold: float | None = None


def find_tool(path: str | Path) -> Tool:
    """The tool whose files lie at `path`.

    Raises:
        FluxSaeError: none that can be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [tool for tool, names in _FILES.items() if all((path / name).is_file() for name in names)]
        if len(found) == 1:
            return found[0]
        layouts = "; ".join(f"{tool}: {', '.join(names)}" for tool, names in _FILES.items())
        raise FluxSaeError(
            f"{path} holds the files of no tool that can be read ({layouts}). A .pt file is given itself."
        )
    return "overcomplete" if "dictionary._weights" in _state(load_plain(path), path)[0] else "plain"


def read_foreign(path: str | Path, *, tool: Tool | None = None, told: Told | None = None) -> SparseAutoencoder:
    """The SAE at `path`, with unit decoder rows; its reconstructions are those of the tool's own formula.

    Raises:
        FluxSaeError: no tool's files, something that changes the arithmetic and has no equal here, or something that
            neither the files nor `told` say.
    """
    readers: dict[Tool, Callable[[Path], SparseAutoencoder]] = {
        "saelens": from_saelens,
        "sparsify": from_sparsify,
        "dictionary_learning": from_dictionary_learning,
        "overcomplete": lambda file: from_overcomplete(file, told=told or Told()),
        "plain": lambda file: from_plain(file, told=told or Told()),
    }
    assert set(readers) == set(get_args(Tool))
    return readers[tool or find_tool(path)](Path(path))


def from_overcomplete(path: str | Path, *, told: Told) -> SparseAutoencoder:
    """The SAE of a state dict that overcomplete's `SAE`, `TopKSAE`, `BatchTopKSAE` or `JumpSAE` gave.

    The file holds no k, and no threshold but those of `JumpSAE`.

    Raises:
        FluxSaeError: an encoder of more than one linear layer, rows that are not unit, or `told` lacks something.
    """
    path = Path(path)
    tensors, _ = _state(load_plain(path), path)
    require_tensors(tensors, ["dictionary._weights"], path)
    linear = "encoder.final_block.0." if "encoder.final_block.0.weight" in tensors else "encoder."
    others = {f"{linear}weight", f"{linear}bias", "dictionary._weights", "dictionary.multiplier", "thresholds"}
    _refuse_others(tensors, others, path, kind="an encoder of one linear layer")
    require_tensors(tensors, [f"{linear}weight"], path)
    rows = tensors["dictionary._weights"]
    norms = rows.norm(dim=1)
    if float((norms - 1).abs().max()) > _OFF_NORM:
        raise FluxSaeError(
            f"{path}: the dictionary's rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}. "
            "overcomplete makes them unit by itself only with its normalization 'l2', the only one that can be read."
        )
    scale = tensors.get("dictionary.multiplier", torch.zeros(())).exp()
    W_enc = tensors[f"{linear}weight"]
    parts = {
        "W_enc": W_enc,
        "b_enc": tensors.get(f"{linear}bias", torch.zeros(len(W_enc))),
        "W_dec": scale * rows / (norms[:, None] + 1e-8),  # as overcomplete does when it is switched to evaluation
        "b_dec": torch.zeros(rows.shape[1]),
    }
    if "thresholds" in tensors:
        parts["threshold"] = tensors["thresholds"].exp()
        return build_sae("jumprelu", None, parts, path=path, gates_on_norms=True)
    return _built(told, told.k, parts, path)


def from_plain(path: str | Path, *, told: Told) -> SparseAutoencoder:
    """The SAE of a `.pt` checkpoint with `encoder`, `decoder` and one bias, whose config may say which k it has.

    Raises:
        FluxSaeError: other tensors, such as those of a timestep-conditioned SAE, or neither the file nor `told` says
            whether the top k are taken.
    """
    path = Path(path)
    tensors, config = _state(load_plain(path), path)
    named = {"encoder.weight", "encoder.bias", "decoder.weight", "pre_bias", "decoder.bias"}
    _refuse_others(tensors, named, path, kind="one encoder, one decoder and one bias")
    biases = [name for name in ("pre_bias", "decoder.bias") if name in tensors]
    require_tensors(tensors, ["encoder.weight", "encoder.bias", "decoder.weight"], path)
    if len(biases) != 1:
        raise FluxSaeError(
            f"{path} holds {' and '.join(biases) or 'no bias of its output'}; it needs pre_bias or decoder.bias."
        )
    W_enc, b_dec = tensors["encoder.weight"], tensors[biases[0]]
    parts = {
        "W_enc": W_enc,
        # An encoder beside decoder.bias reads x itself; one beside pre_bias reads x - pre_bias, as ours does.
        "b_enc": tensors["encoder.bias"] + (W_enc @ b_dec if biases == ["decoder.bias"] else 0),
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": b_dec,
    }
    arch, k = _said(config, path)
    return _built(Told(told.arch or arch, told.k, told.threshold), told.k or k, parts, path)


def _built(told: Told, k: int | None, parts: Mapping[str, Tensor], path: Path) -> SparseAutoencoder:
    arch = told.arch or ("topk" if told.k else None)
    if (
        arch is None
        or (arch in ("topk", "batchtopk") and k is None)
        or (arch == "batchtopk" and told.threshold is None)
    ):
        raise FluxSaeError(
            f"{path} does not say how its features compete. Say it: --arch l1 (every positive activation counts), "
            "--arch topk --k K, or --arch batchtopk --k K --threshold T (its threshold in evaluation)."
        )
    if arch in ("jumprelu", "matryoshka"):
        raise FluxSaeError(f"{path} holds no thresholds of {arch}. Allowed are --arch l1, topk and batchtopk.")
    if arch == "batchtopk":
        assert told.threshold is not None
        parts = {**parts, "threshold": torch.full((len(parts["W_enc"]),), told.threshold)}
    return build_sae(arch, k, parts, path=path, gates_on_norms=arch == "l1")


def _said(config: Mapping[str, Any], path: Path) -> tuple[Architecture | None, int | None]:
    """Architecture and k as the configs of plain checkpoints say them, under any of the usual names.

    Raises:
        FluxSaeError: another activation than one that can be read.
    """
    values = {name.lower(): value for name, value in config.items()}
    counts = [values.get(name) for name in ("k", "top_k", "topk", "topk_k", "k_sparse")]
    k = next((value for value in counts if isinstance(value, int) and not isinstance(value, bool) and value > 0), None)
    flags = [values[name] for name in ("use_topk", "use_top_k", "topk", "top_k") if isinstance(values.get(name), bool)]
    names = ("activation", "activation_fn", "arch", "architecture")
    said = next((str(values[name]) for name in names if values.get(name)), "")
    kind = re.sub("[_ -]|sparse|autoencoder|sae", "", said.lower())
    if kind == "batchtopk":
        return "batchtopk", k
    if kind not in ("", "topk", "relu", "l1", "standard", "vanilla"):
        raise FluxSaeError(
            f"The config in {path} says {said[:60]!r}. What can be read of a plain checkpoint is relu (l1), topk and "
            "batchtopk; another activation would change which features fire."
        )
    if any(flags) or (not flags and (kind == "topk" or (k is not None and kind != "relu"))):
        return "topk", k
    return ("l1", None) if flags or kind in ("relu", "l1") else (None, None)


def _state(content: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The tensors of a checkpoint under their names in the module, and the config beside them."""
    found = next((content[name] for name in ("model_state_dict", "state_dict") if name in content), content)
    if not isinstance(found, Mapping) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise FluxSaeError(
            f"{path} holds no table of tensors, also not as model_state_dict. It has {', '.join(content)}."
        )
    tensors = {}
    for name, tensor in found.items():
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901
        tensors[name] = tensor.float()
    config = content.get("config")
    config = config if isinstance(config, Mapping) and found is not content else {}
    beside = {
        name: value if value is None or isinstance(value, bool | int | float | str) else type(value).__name__
        for name, value in content.items()
        if found is not content
    }
    for settings in (beside, config):  # also statistics that lie beside the weights
        refuse_settings(settings, {"activation_fn"}, path)
    return tensors, config


def _refuse_others(tensors: Mapping[str, Tensor], known: set[str], path: Path, *, kind: str) -> None:
    others = sorted(set(tensors) - known)
    if any(name.startswith(("time_mlp", "mod_linear")) for name in others):
        raise FluxSaeError(
            f"{path} is conditioned on the timestep ({', '.join(others)}). Read its tensors with "
            "fluxsae.sae.interop.from_timestep_conditioned."
        )
    if others:
        raise FluxSaeError(f"{path} holds {', '.join(others)}, so it is more than {kind}, and would be read wrongly.")
