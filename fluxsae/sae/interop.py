"""Checkpoints of SAELens, sparsify and dictionary_learning, written and read without those libraries.

The input normalisation folds away: with B = b_dec * input_scale + input_mean and pre' = input_scale * pre,

    pre'  = (x - B) W_enc^T + input_scale * b_enc        x_hat = acts' W_dec + B

so the others' acts are ours times input_scale, decoder rows stay unit, and thresholds scale along. Read back, B is
b_dec, and input_mean and input_scale are 0 and 1. batchtopk and matryoshka become what they are outside training: a
threshold.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fluxsae.errors import FluxSaeError
from fluxsae.files import atomic_path, read_header, read_json, save_tensors, write_json
from fluxsae.sae.config import Architecture, SaeConfig
from fluxsae.sae.model import SparseAutoencoder

_SAELENS_VERSION = "6.0.0"
_EQUAL_NORMS = 1e-4
_ARITHMETIC = re.compile(
    "norm|scal|skip|b_dec|activation_f|nonlinear|thresh|gate|signed|transcod|shift|cent(er|re)|subtract|whiten|rms|rotat|"
    "reshape|temperature|jump|(^|_)(mean|std|var)$",
    re.IGNORECASE,
)
"""Names of settings that change what weights compute, whichever tool has them."""
_TRAINING = re.compile(
    "dead|loss|grad|penalty|init|bandwidth|threshold_(beta|start_step|lr)|scaler|lp_norm|noise_scale|tanh_scale|"
    "max_activation_norm_multiple|normalize_(sae_)?decoder",
    re.IGNORECASE,
)
"""Names like those that shape the training alone."""


def to_saelens(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes `cfg.json` and `sae_weights.safetensors`, which `sae_lens.SAE.load_from_disk` reads (SAELens 6)."""
    folded = _folded(sae)
    tensors = {"W_enc": folded["W_enc"].T, "W_dec": folded["W_dec"], "b_enc": folded["b_enc"], "b_dec": folded["b_dec"]}
    names: dict[Architecture, str] = {"l1": "standard", "topk": "topk"}
    config: dict[str, Any] = {
        "architecture": names.get(sae.config.architecture, "jumprelu"),
        "d_in": sae.config.d_model,
        "d_sae": sae.config.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _SAELENS_VERSION, **_origin(sae)},
    }
    if sae.config.architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    if sae.config.has_threshold:
        tensors["threshold"] = folded["threshold"]
    save_tensors(Path(folder) / "sae_weights.safetensors", _contiguous(tensors))
    write_json(Path(folder) / "cfg.json", config)


def from_saelens(folder: str | Path) -> SparseAutoencoder:
    """The SAE in a folder that SAELens wrote, 6 or older: `standard`, `topk` or `jumprelu`.

    Raises:
        FluxSaeError: an architecture, normalisation or reshaping that has no equal here, tensors that do not fit.
    """
    path = Path(folder)
    config = _modern_saelens(read_json(path / "cfg.json"))
    _check_saelens(config, path)
    tensors = _read(path / "sae_weights.safetensors")
    if config.get("finetuning_scaling_factor"):  # acts are scaled where they are decoded, so rows may be as well
        require_tensors(tensors, ["scaling_factor"], path)
        tensors["W_dec"] = tensors["W_dec"] * tensors.pop("scaling_factor")[:, None]
    elif bool((tensors.get("scaling_factor", torch.zeros(1)) == 1).all()):  # as SAELens wrote for a while
        del tensors["scaling_factor"]
    kinds: dict[str, Architecture] = {"standard": "l1", "topk": "topk", "jumprelu": "jumprelu"}
    architecture = _one_of(kinds, config.get("architecture"), path)
    names = ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if architecture == "jumprelu" else [])]
    require_tensors(tensors, names, path)
    refuse_tensors(tensors, set(names), path)
    parts = {**tensors, "W_enc": tensors["W_enc"].T}
    if not config.get("apply_b_dec_to_input", True):
        parts["b_enc"] = parts["b_enc"] + parts["W_enc"] @ parts["b_dec"]
    rescales = bool(config.get("rescale_acts_by_decoder_norm", False))
    return build_sae(architecture, config.get("k"), parts, path=path, gates_on_norms=rescales or architecture != "topk")


def _modern_saelens(config: dict[str, Any]) -> dict[str, Any]:
    """The config under the names of SAELens 6, as SAELens itself reads older ones."""
    renamed = {"activation_fn_str": "activation_fn", "hook_point": "hook_name"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    config = {"architecture": "standard", "activation_fn": "relu", **config}
    if config["activation_fn"] == "topk" and config["architecture"] == "standard":
        k = (config.get("activation_fn_kwargs") or {}).get("k")
        config |= {"architecture": "topk", "activation_fn": "relu", "k": k}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    if "hook_z" in str(config.get("hook_name", "")):
        config.setdefault("reshape_activations", "hook_z")
    return config


def _check_saelens(config: Mapping[str, Any], path: Path) -> None:
    folded = {"apply_b_dec_to_input", "finetuning_scaling_factor", "rescale_acts_by_decoder_norm"}
    plain: dict[str, tuple[Any, ...]] = {
        "normalize_activations": ("none", None),
        "reshape_activations": ("none", None),
        "activation_fn": ("relu", None, *(["topk"] if config["architecture"] == "topk" else [])),
    }
    for name, allowed in plain.items():
        if config.get(name) not in allowed:
            raise FluxSaeError(
                f"{path} has {name} {config[name]!r}, which changes what its weights compute. Only {allowed[0]!r} can "
                "be read; fold it into the weights with SAELens first, or train the SAE without it."
            )
    refuse_settings(config, folded | set(plain) | {"activation_fn_kwargs"}, path)


def to_sparsify(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes `cfg.json` and `sae.safetensors`, which `sparsify.SparseCoder.load_from_disk` reads.

    Raises:
        FluxSaeError: any architecture but topk, the only one that sparsify has.
    """
    if sae.config.architecture != "topk":
        raise FluxSaeError(
            f"sparsify has no {sae.config.architecture} SAEs. Export topk, or export to SAELens or dictionary_learning."
        )
    folded = _folded(sae)
    tensors = {
        "encoder.weight": folded["W_enc"], "encoder.bias": folded["b_enc"], "W_dec": folded["W_dec"],
        "b_dec": folded["b_dec"],
    }  # fmt: skip
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.config.n_features // sae.config.d_model),
        "normalize_decoder": True,
        "num_latents": sae.config.n_features,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.config.d_model,
    }
    save_tensors(Path(folder) / "sae.safetensors", _contiguous(tensors))
    write_json(Path(folder) / "cfg.json", config)


def from_sparsify(folder: str | Path) -> SparseAutoencoder:
    """The SAE in a folder that sparsify wrote.

    Raises:
        FluxSaeError: a transcoder, a skip connection, another activation than topk, tensors that do not fit.
    """
    path = Path(folder)
    config = read_json(path / "cfg.json")
    unlike = [name for name in ("skip_connection", "transcode", "signed") if config.get(name)]
    if unlike or config.get("activation", "topk") != "topk":
        raise FluxSaeError(
            f"{path} has {', '.join(unlike) or config['activation']}. Only plain topk SAEs have an equal here: acts "
            "are never negative, and the output is built from features alone."
        )
    refuse_settings(config, set(), path)
    tensors = _read(path / "sae.safetensors")
    names = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"]
    require_tensors(tensors, names, path)
    refuse_tensors(tensors, set(names), path)
    parts = {
        "W_enc": tensors["encoder.weight"], "b_enc": tensors["encoder.bias"], "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }  # fmt: skip
    return build_sae("topk", config.get("k"), parts, path=path, gates_on_norms=False)


def to_dictionary_learning(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Writes `ae.pt` and `config.json`, which `dictionary_learning.utils.load_dictionary` reads."""
    folded, config = _folded(sae), sae.config
    linear = {"encoder.weight": folded["W_enc"], "encoder.bias": folded["b_enc"], "decoder.weight": folded["W_dec"].T}
    class_name = _DICTIONARY_CLASSES[config.architecture]
    tensors: dict[str, Tensor]
    if config.architecture == "l1":
        tensors = {"bias": folded["b_dec"], **linear}
    elif config.architecture == "jumprelu":
        tensors = {name: folded[name] for name in ("W_dec", "b_dec", "threshold")}
        # Its encoder does not subtract b_dec unless told so by a flag that is not saved.
        tensors |= {"W_enc": folded["W_enc"].T, "b_enc": folded["b_enc"] - folded["W_enc"] @ folded["b_dec"]}
    else:
        threshold = folded["threshold"][0] if config.has_threshold else torch.tensor(-1.0)
        tensors = {"b_dec": folded["b_dec"], "k": torch.tensor(config.k), "threshold": threshold, **linear}
    trainer = {
        "dict_class": class_name,
        "trainer_class": _TRAINER_CLASSES[config.architecture],
        "activation_dim": config.d_model,
        "dict_size": config.n_features,
        "k": config.k,
        **_origin(sae),
    }
    with atomic_path(Path(folder) / "ae.pt") as temporary:
        torch.save(_contiguous(tensors), temporary)
    write_json(Path(folder) / "config.json", {"trainer": trainer, "buffer": {}})


_DICTIONARY_CLASSES: dict[Architecture, str] = {
    "l1": "AutoEncoder", "topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE", "matryoshka": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
}  # fmt: skip
_TRAINER_CLASSES: dict[Architecture, str] = {
    "l1": "StandardTrainer", "topk": "TopKTrainer", "batchtopk": "BatchTopKTrainer", "matryoshka": "BatchTopKTrainer",
    "jumprelu": "JumpReluTrainer",
}  # fmt: skip


def from_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """The SAE in a folder that dictionary_learning wrote: `AutoEncoder`, `AutoEncoderTopK`, `BatchTopKSAE` or jumprelu.

    Raises:
        FluxSaeError: another class, a file that is no plain table of tensors, tensors that do not fit.
    """
    path = Path(folder)
    config = read_json(path / "config.json")
    trainer = config.get("trainer", {})
    kinds: dict[str, Architecture] = {
        "AutoEncoder": "l1", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk", "JumpReluAutoEncoder": "jumprelu",
    }  # fmt: skip
    architecture = _one_of(kinds, trainer.get("dict_class"), path)
    for settings in (trainer, config.get("buffer") or {}):
        refuse_settings(settings, set(), path)
    tensors = read_tensors(path / "ae.pt")
    linear = {"encoder.weight", "encoder.bias", "decoder.weight", "bias", "b_dec", "k", "threshold"}
    refuse_tensors(tensors, {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} if "W_enc" in tensors else linear, path)
    if architecture == "jumprelu":
        require_tensors(tensors, ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"], path)
        encoder = tensors["W_enc"].T
        parts = {**tensors, "W_enc": encoder, "b_enc": tensors["b_enc"] + encoder @ tensors["b_dec"]}
        return build_sae(architecture, None, parts, path=path, gates_on_norms=True)
    bias = "bias" if architecture == "l1" else "b_dec"
    require_tensors(tensors, ["encoder.weight", "encoder.bias", "decoder.weight", bias], path)
    parts = {
        "W_enc": tensors["encoder.weight"], "b_enc": tensors["encoder.bias"], "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors[bias],
    }  # fmt: skip
    if architecture == "batchtopk":
        require_tensors(tensors, ["threshold"], path)
        parts["threshold"] = tensors["threshold"]
    k = int(tensors["k"]) if "k" in tensors else trainer.get("k")
    return build_sae(architecture, k, parts, path=path, gates_on_norms=architecture == "l1")


def from_timestep_conditioned(tensors: Mapping[str, Tensor], sigmas: Sequence[float]) -> SparseAutoencoder:
    """The SAE whose state dict DifFRACT (Mazur et al. 2026, arXiv 2606.15796) wrote, as a table over noise levels.

    acts = relu(W_enc (x (1 + scale(t)) + shift(t)) + b_enc), (scale, shift) = mod_linear(time_mlp(embedding of t)), and
    t = sigma in FLUX. At the given noise levels, those of the schedule in use, the table is exact; in between it is
    interpolated. Their transcoders have the same tensors, but write another activation than they read: no SAEs.

    Raises:
        FluxSaeError: tensors are missing or do not fit, or no noise levels.
    """
    path = Path("a state dict of DifFRACT")
    linears = ("time_mlp.0", "time_mlp.2", "mod_linear", "encoder", "decoder")
    require_tensors(tensors, [f"{name}.{part}" for name in linears for part in ("weight", "bias")], path)
    if not sigmas:
        raise FluxSaeError(
            "sigmas is empty. Give the noise levels of the schedule (`schedule_sigmas(pipe, settings)`)."
        )
    own = {name: tensor.float() for name, tensor in tensors.items()}
    W_enc, b_dec = own["encoder.weight"], own["decoder.bias"]
    parts = {
        "W_enc": W_enc, "b_enc": own["encoder.bias"] + W_enc @ b_dec, "W_dec": own["decoder.weight"].T, "b_dec": b_dec,
    }  # fmt: skip
    plain = build_sae("l1", None, parts, path=path, gates_on_norms=True)
    sae = SparseAutoencoder(replace(plain.config, sigma_table=tuple(sorted(set(sigmas)))), seed=None)
    scale, shift = _modulation(own, torch.tensor(sae.config.sigma_table)).chunk(2, dim=1)
    sae.load_state_dict({**plain.state_dict(), "sigma_scale": 1 + scale, "sigma_shift": shift})
    return sae


def _modulation(tensors: Mapping[str, Tensor], sigmas: Float[Tensor, " n_sigmas"]) -> Float[Tensor, "n_sigmas both"]:
    """Their network from noise levels to (scale, shift); its frequencies are the defaults of diffusers."""

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    half = tensors["time_mlp.0.weight"].shape[1] // 2
    angles = sigmas[:, None] * 10_000 ** -(torch.arange(half) / (half - 1))
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    hidden = functional.silu(linear(embedding, "time_mlp.0"))
    return linear(functional.silu(linear(hidden, "time_mlp.2")), "mod_linear")


def _folded(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The tensors without input normalisation; a threshold for each feature where there is one."""
    if sae.config.is_sigma_conditioned:
        raise FluxSaeError(
            "This SAE reads each noise level in its own way (sigma_table), which no other tool's format can hold. "
            "Publish it with `push_to_hub`, or train a plain SAE for export."
        )
    scale, state = sae.input_scale.double(), {name: t.detach().double().cpu() for name, t in sae.state_dict().items()}
    scale = scale.cpu()
    folded = {
        "W_enc": state["W_enc"],
        "W_dec": state["W_dec"],
        "b_enc": state["b_enc"] * scale,
        "b_dec": state["b_dec"] * scale + state["input_mean"],
    }
    if sae.config.has_threshold:
        folded["threshold"] = (state["threshold"] * scale).expand(sae.config.n_features)
    return {name: tensor.float() for name, tensor in folded.items()}


def build_sae(
    architecture: Architecture, k: int | None, parts: Mapping[str, Tensor], *, path: Path, gates_on_norms: bool
) -> SparseAutoencoder:
    """The SAE with unit decoder rows; `gates_on_norms`: features may be rescaled without changing which are active."""
    n_features, d_model = parts["W_dec"].shape
    config = SaeConfig(
        architecture=architecture, d_model=d_model, n_features=n_features,
        k=k if architecture in ("topk", "batchtopk") else None,
    )  # fmt: skip
    norms = parts["W_dec"].double().norm(dim=1)
    are_equal = float((norms / norms.mean() - 1).abs().max()) < _EQUAL_NORMS
    if not are_equal and not gates_on_norms:
        raise FluxSaeError(
            f"{path}: the decoder rows have norms from {float(norms.min()):.3g} to {float(norms.max()):.3g}. Features "
            f"compete in {architecture}, so making them unit would change the SAE. Normalise it where it is from."
        )
    sae = SparseAutoencoder(config, seed=None)
    tensors = {
        "W_enc": parts["W_enc"] * norms[:, None],
        "W_dec": parts["W_dec"] / norms.clamp(min=1e-12)[:, None],
        "b_enc": parts["b_enc"] * norms,
        "b_dec": parts["b_dec"],
    }
    if config.has_threshold:
        scaled = parts["threshold"] * norms
        tensors["threshold"] = scaled if architecture == "jumprelu" else scaled.mean()
    for name, tensor in tensors.items():
        own = sae.state_dict()[name]
        if own.shape != tensor.shape or not bool(torch.isfinite(tensor).all()):
            raise FluxSaeError(
                f"{path}: {name} has shape {tuple(tensor.shape)}; expected are {tuple(own.shape)} finite numbers."
            )
        own.copy_(tensor)
    return sae


def _origin(sae: SparseAutoencoder) -> dict[str, Any]:
    ground = sae.config.trained_on
    return {} if ground is None else {"model_name": ground.flux_id, "hook_name": ground.hookpoint}


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Tensor]:
    read_header(path)
    return {name: tensor.float() for name, tensor in load_file(path).items()}


def load_plain(path: Path) -> dict[str, Any]:
    """What a `.pt` file holds, as long as that is tensors, numbers, texts and tables of them: no code is ever run.

    Raises:
        FluxSaeError: there is no such file, or it holds anything else, such as a pickled module.
    """
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Give the file or folder that the other tool wrote.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FluxSaeError(
            f"{path} is no plain table of tensors ({type(error).__name__}); nothing else is read, since a pickled "
            "module can run code. Save the state dict (torch.save(sae.state_dict(), ...)) where the SAE is from."
        ) from error
    if not isinstance(content, dict):
        raise FluxSaeError(f"{path} holds a {type(content).__name__}, no table of tensors; nothing else is read.")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A `.pt` file that holds tensors alone, in fp32."""
    content = load_plain(path)
    if not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise FluxSaeError(f"{path} is no plain table of tensors; nothing else is read.")
    return {name: tensor.float() for name, tensor in content.items()}


def _one_of(kinds: Mapping[str, Architecture], name: object, path: Path) -> Architecture:
    if name not in kinds:
        raise FluxSaeError(f"{path} holds a {name!r}. What can be read is {', '.join(kinds)}.")
    return kinds[str(name)]


def refuse_settings(settings: Mapping[str, Any], read: set[str], path: Path) -> None:
    """Refuses settings that sound as if they changed what the weights compute, and that are on, but are not `read`."""
    unread = {
        name: value
        for name, value in settings.items()
        if name not in read and _ARITHMETIC.search(name) and not _TRAINING.search(name) and value and value != "none"
    }
    if unread:
        named = ", ".join(f"{name} {value!r}"[:60] for name, value in unread.items())
        raise FluxSaeError(
            f"{path} has {named}, which may change what its weights compute and is not known here. Fold it into the "
            "weights where the SAE is from, or take it out of the config if it changes nothing after training."
        )


def refuse_tensors(tensors: Mapping[str, Tensor], read: set[str], path: Path) -> None:
    """Refuses tensors that would be left out."""
    unread = sorted(set(tensors) - read)
    if unread:
        raise FluxSaeError(
            f"{path} holds {', '.join(unread)} beside the encoder and the decoder, and would be read wrongly without."
        )


def require_tensors(tensors: Mapping[str, Tensor], names: list[str], path: Path) -> None:
    """Refuses a table without some tensors, and says what it holds."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise FluxSaeError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors))}.")
