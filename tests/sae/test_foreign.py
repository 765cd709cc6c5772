"""SAEs by their files: layouts as each tool writes them, and reconstructions by each tool's own formula."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import Tool
from fluxsae.sae.foreign import Told, find_tool, read_foreign

D, F, K = 12, 40, 5
ROWS = nn.functional.normalize(torch.randn(F, D, generator=torch.Generator().manual_seed(0)), dim=1)
W_ENC = ROWS + 0.2 * torch.randn(F, D, generator=torch.Generator().manual_seed(1))
B_ENC = 0.3 * torch.randn(F, generator=torch.Generator().manual_seed(2))
B_DEC = torch.randn(D, generator=torch.Generator().manual_seed(3))
X = 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(4)) + 1


def top_k(acts: Tensor, k: int = K) -> Tensor:
    best = acts.topk(k, dim=-1)
    return torch.zeros_like(acts).scatter(-1, best.indices, best.values)


@dataclass(frozen=True)
class Layout:
    """Files as a tool writes them, and what the tool would reconstruct."""

    tool: Tool
    write: Callable[[Path], object]
    x_hat: Callable[[], Tensor]
    told: Told | None = None
    is_folder: bool = True


def saelens(config: dict[str, object], **tensors: Tensor) -> Callable[[Path], object]:
    weights = {"W_enc": W_ENC.T, "W_dec": ROWS, "b_enc": B_ENC, "b_dec": B_DEC, **tensors}

    def write(path: Path) -> None:
        (path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "sae_weights.safetensors")

    return write


def sparsify(**config: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        (path / "cfg.json").write_text(json.dumps({"num_latents": F, "k": K, "d_in": D, **config}))
        weights = {"encoder.weight": W_ENC, "encoder.bias": B_ENC, "W_dec": ROWS, "b_dec": B_DEC}
        save_file(weights, path / "sae.safetensors")

    return write


def checkpoint(content: object) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def plain(config: object = None, *, prefix: str = "", **changes: Tensor | None) -> dict[str, object]:
    state: dict[str, Tensor | None] = {
        "pre_bias": B_DEC, "encoder.weight": W_ENC, "encoder.bias": B_ENC, "decoder.weight": ROWS.T.contiguous(),
    }  # fmt: skip
    state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {f"{prefix}{name}": tensor for name, tensor in state.items() if tensor is not None}
    return {"model_state_dict": kept, "epoch": 3, "config": {} if config is None else config}


def overcomplete(encoder: str = "encoder.final_block.0.", **tensors: Tensor) -> dict[str, Tensor]:
    linear = {f"{encoder}weight": W_ENC, f"{encoder}bias": B_ENC}
    return {**linear, "dictionary._weights": 1.01 * ROWS, "dictionary.multiplier": torch.tensor(0.25), **tensors}


def pre(b_dec: Tensor = B_DEC) -> Tensor:
    return (X - b_dec) @ W_ENC.T + B_ENC


OLD_TOPK = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
SCALING = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(5))
OVERCOMPLETE_ROWS = torch.tensor(0.25).exp() * ROWS
RAW = X @ W_ENC.T + B_ENC

LAYOUTS = {
    "saelens 6, relu": Layout(
        "saelens", saelens({"architecture": "standard", "normalize_activations": "none"}),
        lambda: pre().relu() @ ROWS + B_DEC,
    ),
    "saelens 5, top k under the name of relu": Layout(
        "saelens", saelens(OLD_TOPK), lambda: top_k(pre().relu()) @ ROWS + B_DEC
    ),
    "saelens 5, b_dec not subtracted, normalisation off as false": Layout(
        "saelens", saelens({"apply_b_dec_to_input": False, "normalize_activations": False}),
        lambda: RAW.relu() @ ROWS + B_DEC,
    ),
    "saelens 5, scaled acts": Layout(
        "saelens", saelens({"finetuning_scaling_factor": True}, scaling_factor=SCALING),
        lambda: (pre().relu() * SCALING) @ ROWS + B_DEC,
    ),
    "sparsify": Layout("sparsify", sparsify(activation="topk"), lambda: top_k(pre().relu()) @ ROWS + B_DEC),
    "plain, top k by its config": Layout(
        "plain", checkpoint(plain({"input_dim": D, "hidden_dim": F, "use_topk": True, "k": K})),
        lambda: top_k(pre().relu()) @ ROWS + B_DEC, is_folder=False,
    ),
    "plain, relu by its config, of a wrapped module": Layout(
        "plain", checkpoint(plain({"use_topk": False, "k": K}, prefix="module.")),
        lambda: pre().relu() @ ROWS + B_DEC, is_folder=False,
    ),
    "plain, decoder with a bias, k told": Layout(
        "plain", checkpoint(plain(pre_bias=None, decoder__bias=B_DEC)),
        lambda: top_k(RAW.relu()) @ ROWS + B_DEC, Told(k=K), is_folder=False,
    ),
    "overcomplete TopKSAE": Layout(
        "overcomplete", checkpoint(overcomplete()), lambda: top_k(RAW.relu()) @ OVERCOMPLETE_ROWS, Told(k=K),
        is_folder=False,
    ),
    "overcomplete SAE, untied": Layout(
        "overcomplete", checkpoint(overcomplete("encoder.")), lambda: RAW.relu() @ OVERCOMPLETE_ROWS,
        Told(arch="l1"), is_folder=False,
    ),
    "overcomplete BatchTopKSAE": Layout(
        "overcomplete", checkpoint(overcomplete()), lambda: (RAW.relu() * (RAW >= 2.0)) @ OVERCOMPLETE_ROWS,
        Told(arch="batchtopk", k=K, threshold=2.0), is_folder=False,
    ),
    "overcomplete JumpSAE": Layout(
        "overcomplete", checkpoint(overcomplete(thresholds=SCALING)),
        lambda: (RAW.relu() * (SCALING.exp() <= RAW)) @ OVERCOMPLETE_ROWS, is_folder=False,
    ),
}  # fmt: skip


def written(layout: Layout, folder: Path) -> Path:
    path = folder if layout.is_folder else folder / "sae_best.pt"
    layout.write(path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_reconstructions_are_those_of_the_tools_own_formula(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    path = written(layout, tmp_path)
    assert find_tool(path) == layout.tool
    sae = read_foreign(path, told=layout.told)
    torch.testing.assert_close(sae(X).x_hat, layout.x_hat(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(F))
    assert 0 < int((sae.encode(X) > 0).sum()) < X.shape[0] * F


class Module(nn.Module):
    """What `torch.save(sae)` pickles: code of somebody else."""


REFUSED = {
    "hook_z": (saelens({"hook_name": "blocks.0.attn.hook_z"}), "reshape_activations 'hook_z'", True),
    "normalised": (saelens({"normalize_activations": True}), "normalize_activations 'expected_average_only_in'", True),
    "tanh": (saelens({"activation_fn_str": "tanh-relu"}), "activation_fn 'tanh-relu'", True),
    "signed": (sparsify(signed=True), "has signed", True),
    "skip": (sparsify(skip_connection=True), "has skip_connection", True),
    "scaled in a way unknown": (saelens({"input_scale": 2.0}), r"input_scale 2\.0, which may change", True),
    "tensor of a skip": (saelens({}, W_skip=W_ENC), "holds W_skip beside the encoder", True),
    "thresholds of relu": (saelens({}, threshold=SCALING), "holds threshold beside", True),
    "scaling that its config denies": (saelens({}, scaling_factor=SCALING), "holds scaling_factor beside", True),
    "sparsify, normalised in a way unknown": (sparsify(normalize_io=True), "normalize_io True, which may change", True),
    "plain, normalised": (checkpoint(plain({"k": K, "normalize_input": True})), "normalize_input True", False),
    "plain, statistics beside": (checkpoint({**plain({"k": K}), "input_mean": B_DEC}), "input_mean 'Tensor'", False),
    "plain, another activation": (checkpoint(plain({"k": K, "activation": "jumprelu"})), "says 'jumprelu'", False),
    "plain, batchtopk": (checkpoint(plain({"k": K, "arch": "BatchTopK"})), "--arch batchtopk --k K --thr", False),
    "groupmax": (sparsify(activation="groupmax"), "has groupmax", True),
    "pickled module": (checkpoint(Module()), "pickled module can run code", False),
    "a list": (checkpoint([1, 2]), "holds a list", False),
    "no k": (checkpoint(plain()), "does not say how its features compete. Say it: --arch l1", False),
    "overcomplete without k": (checkpoint(overcomplete()), "does not say how its features compete", False),
    "timestep": (checkpoint(plain({"k": K}, time_mlp__0__weight=B_DEC)), "conditioned on the timestep", False),
    "deep encoder": (
        checkpoint(overcomplete(**{"encoder.mlp_blocks.0.0.weight": W_ENC})), "more than an encoder of one", False,
    ),
    "long rows": (checkpoint(overcomplete(**{"dictionary._weights": 3 * ROWS})), "norms from 3 to 3", False),
    "two biases": (checkpoint(plain({"k": K}, decoder__bias=B_DEC)), "needs pre_bias or decoder.bias", False),
    "rows that decide who wins": (
        checkpoint(plain({"k": K}, decoder__weight=(ROWS * SCALING[:, None]).T.contiguous())), "compete in topk", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_read_wrongly_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    write, message, is_folder = REFUSED[name]
    path = tmp_path if is_folder else tmp_path / "sae.pt"
    write(path)
    with pytest.raises(FluxSaeError, match=message):
        read_foreign(path)


def test_settings_of_the_training_and_those_that_are_off_are_no_hindrance(tmp_path: Path) -> None:
    saelens(
        {
            "normalize_sae_decoder": True,
            "lp_norm": 1.0,
            "dead_threshold": 0.1,
            "input_scale": None,
            "center_input": False,
        }
    )(tmp_path)
    torch.testing.assert_close(read_foreign(tmp_path)(X).x_hat, pre().relu() @ ROWS + B_DEC, atol=1e-5, rtol=1e-5)


def test_a_folder_of_no_tool_is_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=r"holds the files of no tool .*saelens: cfg.json, sae_weights.safetensors"):
        read_foreign(tmp_path)
