"""Other tools' checkpoints: what they hold, round trips, and the real libraries reading ours."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import ARCHITECTURES, Architecture, SaeConfig
from fluxsae.sae.interop import (
    from_dictionary_learning,
    from_saelens,
    from_sparsify,
    from_timestep_conditioned,
    to_dictionary_learning,
    to_saelens,
    to_sparsify,
)
from fluxsae.sae.model import SparseAutoencoder

Writer = Callable[[SparseAutoencoder, Path], None]
Reader = Callable[[Path], SparseAutoencoder]


def build_sae(architecture: Architecture) -> SparseAutoencoder:
    """An SAE in which every tensor matters: a mean, a scale, biases, an untied encoder, thresholds."""
    k = None if architecture in ("l1", "jumprelu") else 5
    sae = SparseAutoencoder(SaeConfig(architecture=architecture, d_model=16, n_features=48, k=k))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sae.state_dict().items():
        if name not in ("W_dec", "input_scale", "threshold", "reference_acts"):
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.3)
    sae.input_scale.fill_(2.5)
    if sae.config.has_threshold:
        sae.state_dict()["threshold"].copy_(0.4 + 0.2 * torch.rand(sae.threshold.shape, generator=generator))
    return sae


def raw_tokens() -> Tensor:
    return 3 * torch.randn(64, 16, generator=torch.Generator().manual_seed(2)) + 1


PAIRS = [
    *((to_saelens, from_saelens, architecture) for architecture in ARCHITECTURES),
    (to_sparsify, from_sparsify, "topk"),
    *((to_dictionary_learning, from_dictionary_learning, architecture) for architecture in ARCHITECTURES),
]


@pytest.mark.parametrize(("write", "read", "architecture"), PAIRS)
def test_a_round_trip_reconstructs_and_fires_the_same(
    tmp_path: Path, write: Writer, read: Reader, architecture: Architecture
) -> None:
    sae, x = build_sae(architecture), raw_tokens()
    write(sae, tmp_path)
    again = read(tmp_path)
    expected, found = sae(x), again(x)
    torch.testing.assert_close(found.x_hat, expected.x_hat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.acts, expected.acts * sae.input_scale, atol=1e-5, rtol=1e-5)
    assert (expected.acts > 0).any(), "a silent SAE tests nothing"
    torch.testing.assert_close(again.W_dec.norm(dim=1), torch.ones(48))


def test_saelens_files_hold_what_saelens_6_reads(tmp_path: Path) -> None:
    to_saelens(build_sae("jumprelu"), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (16, 48), "W_dec": (48, 16), "b_enc": (48,), "b_dec": (16,), "threshold": (48,)}
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"


def test_sparsify_has_topk_alone(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match="sparsify has no l1"):
        to_sparsify(build_sae("l1"), tmp_path)
    assert not list(tmp_path.iterdir())


def _scale_decoder_rows(folder: Path) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"] = tensors["W_dec"] * torch.linspace(1, 3, 48)[:, None]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")


def test_decoder_norms_fold_into_the_acts_where_features_do_not_compete(tmp_path: Path) -> None:
    to_saelens(build_sae("l1"), tmp_path)
    _scale_decoder_rows(tmp_path)
    tensors, x = load_file(tmp_path / "sae_weights.safetensors"), raw_tokens()
    acts = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    expected = acts @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(from_saelens(tmp_path)(x).x_hat, expected, atol=1e-4, rtol=1e-5)


def test_decoder_norms_that_decide_who_wins_are_refused(tmp_path: Path) -> None:
    to_saelens(build_sae("topk"), tmp_path)
    _scale_decoder_rows(tmp_path)
    with pytest.raises(FluxSaeError, match="norms from 1 to 3"):
        from_saelens(tmp_path)


def test_pickles_with_anything_but_tensors_are_refused(tmp_path: Path) -> None:
    to_dictionary_learning(build_sae("topk"), tmp_path)
    torch.save({"encoder.weight": Path("evil")}, tmp_path / "ae.pt")
    with pytest.raises(FluxSaeError, match="no plain table of tensors"):
        from_dictionary_learning(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"normalize_activations": "layer_norm"}, "layer_norm"), ({"architecture": "gated"}, "'gated'")],
)
def test_what_has_no_equal_here_is_refused_by_name(tmp_path: Path, change: dict[str, str], message: str) -> None:
    to_saelens(build_sae("l1"), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FluxSaeError, match=message):
        from_saelens(tmp_path)


@pytest.mark.parametrize("is_tensor", [True, False])
def test_dictionary_learning_leaves_nothing_out(tmp_path: Path, is_tensor: bool) -> None:
    to_dictionary_learning(build_sae("topk"), tmp_path)
    if is_tensor:
        torch.save({**torch.load(tmp_path / "ae.pt"), "r_mag": torch.ones(48)}, tmp_path / "ae.pt")
    else:
        path, config = tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text())
        path.write_text(json.dumps({**config, "trainer": {**config["trainer"], "input_scaling": 2.0}}))
    with pytest.raises(FluxSaeError, match="r_mag" if is_tensor else "input_scaling 2"):
        from_dictionary_learning(tmp_path)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    to_sparsify(build_sae("topk"), tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    del tensors["b_dec"]
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(FluxSaeError, match="lacks b_dec"):
        from_sparsify(tmp_path)


# With the real libraries, in the environment that `train.benchmarks training` builds

_READ_WITH_LIBRARY = {
    "saelens": """
from sae_lens import SAE
sae = SAE.load_from_disk(folder, device="cpu")
x_hat = sae.decode(sae.encode(x))
""",
    "sparsify": """
from sparsify import SparseCoder
x_hat = SparseCoder.load_from_disk(folder, device="cpu")(x).sae_out
""",
    "dictionary_learning": """
from dictionary_learning.utils import load_dictionary
sae, _ = load_dictionary(folder, "cpu")
x_hat = sae(x)
""",
}
_WRITERS: dict[str, Writer] = {
    "saelens": to_saelens, "sparsify": to_sparsify, "dictionary_learning": to_dictionary_learning,
}  # fmt: skip


@pytest.mark.bench
@pytest.mark.parametrize(
    ("library", "architecture"),
    [("sparsify", "topk"), *((lib, a) for lib in ("saelens", "dictionary_learning") for a in ARCHITECTURES)],
)
def test_the_real_library_reconstructs_what_we_do(tmp_path: Path, library: str, architecture: Architecture) -> None:
    from train.benchmarks.training import build_environment

    sae, x = build_sae(architecture), raw_tokens()
    _WRITERS[library](sae, tmp_path)
    torch.save(x, tmp_path / "x.pt")
    code = "import sys, torch\nfolder = sys.argv[1]\nx = torch.load(folder + '/x.pt')\nwith torch.no_grad():\n"
    code += "".join(f"    {line}\n" for line in _READ_WITH_LIBRARY[library].strip().splitlines())
    code += "torch.save(x_hat.detach().float(), folder + '/x_hat.pt')\n"
    environment = os.environ | {"SPARSIFY_DISABLE_TRITON": "1"}  # its Triton kernels need a GPU
    subprocess.run([str(build_environment()), "-c", code, str(tmp_path)], check=True, timeout=600, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "x_hat.pt"), sae(x).x_hat.detach(), atol=1e-5, rtol=1e-5)


class _TimestepConditioned(torch.nn.Module):
    """arXiv 2606.15796, as its authors' code has it: modulation by the timestep, ReLU, linear decoder."""

    def __init__(self, d_model: int, n_features: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.time_mlp = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.SiLU(), torch.nn.Linear(width, width), torch.nn.SiLU()
        )
        self.mod_linear = torch.nn.Linear(width, 2 * d_model)
        self.encoder, self.decoder = torch.nn.Linear(d_model, n_features), torch.nn.Linear(n_features, d_model)

    def forward(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        embedding = get_timestep_embedding(torch.tensor([t]), self.width)
        scale, shift = self.mod_linear(self.time_mlp(embedding)).chunk(2, dim=-1)
        z = self.encoder(x * (1 + scale) + shift).relu()
        return self.decoder(z), z


def test_a_timestep_conditioned_sae_becomes_a_table_over_noise_levels() -> None:
    torch.manual_seed(0)
    theirs, x = _TimestepConditioned(16, 48, 32), raw_tokens()
    sigmas = [1.0, 0.75, 0.5, 0.25]
    with torch.no_grad():
        theirs.mod_linear.weight.mul_(4)
        norms = theirs.decoder.weight.norm(dim=0)
        sae = from_timestep_conditioned(theirs.state_dict(), sigmas)
        assert sae.config.sigma_table == (0.25, 0.5, 0.75, 1.0)
        for sigma in sigmas:
            expected, z = theirs(x, sigma)
            found = sae(x, sigma=sigma)
            torch.testing.assert_close(found.x_hat, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found.acts, z * norms, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(sae(x, sigma=1.0).acts, sae(x, sigma=0.25).acts, atol=0.01)
    state = theirs.state_dict()
    del state["mod_linear.bias"]
    with pytest.raises(FluxSaeError, match=r"lacks mod_linear\.bias"):
        from_timestep_conditioned(state, sigmas)
    with pytest.raises(FluxSaeError, match="sigmas is empty"):
        from_timestep_conditioned(theirs.state_dict(), [])


@pytest.mark.parametrize("write", [to_saelens, to_dictionary_learning, to_sparsify])
def test_a_table_over_noise_levels_is_never_dropped_in_an_export(tmp_path: Path, write: Writer) -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=16, n_features=48, k=5, sigma_table=(0.2, 0.8)))
    with pytest.raises(FluxSaeError, match="no other tool's format can hold"):
        write(sae, tmp_path)
