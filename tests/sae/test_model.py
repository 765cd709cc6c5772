"""Sparse autoencoders: their arithmetic by hand, exact features, and files that are right or refused."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fluxsae.errors import FluxSaeError
from fluxsae.flux.ground import Ground
from fluxsae.flux.identity import FluxIdentity
from fluxsae.sae.config import ARCHITECTURES, Architecture, SaeConfig, TrainedOn
from fluxsae.sae.fingerprint import file_fingerprint
from fluxsae.sae.model import SparseAutoencoder

GROUND = TrainedOn(
    flux_id="miniature", hookpoint="transformer_blocks.3.ff", steps=(2, 6), sigmas=(0.9, 0.7), height=128, width=128,
    guidance_scale=3.5, n_tokens=256, dataset_hash="abc",
)  # fmt: skip


def build_config(architecture: Architecture = "topk", **changes: object) -> SaeConfig:
    k = None if architecture in ("l1", "jumprelu") else 4
    values = {"d_model": 8, "n_features": 24, "k": k, "trained_on": GROUND} | changes
    return SaeConfig(architecture=architecture, **values)  # type: ignore[arg-type]


def build_sae(architecture: Architecture = "topk", **changes: object) -> SparseAutoencoder:
    """An SAE in which every tensor matters."""
    sae = SparseAutoencoder(build_config(architecture, **changes))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sae.state_dict().items():
        if name not in ("W_dec", "input_scale"):
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3)
    sae.input_scale.fill_(1.7)
    return sae


def test_encode_and_decode_by_hand() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=2, n_features=3, k=1), seed=None)
    sae.W_enc.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    sae.W_dec.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    sae.b_enc.data, sae.b_dec.data = torch.tensor([0.0, 0.5, -1.0]), torch.tensor([1.0, 0.0])
    sae.input_mean.copy_(torch.tensor([2.0, 4.0]))
    sae.input_scale.fill_(2.0)
    # x~ = ([8, 6] - [2, 4]) / 2 = [3, 1];  less b_dec: [2, 1];  pre = [2, 1 + 0.5, 3 - 1] = [2, 1.5, 2]
    out = sae(torch.tensor([[8.0, 6.0]]))
    assert out.pre_acts.tolist() == [[2.0, 1.5, 2.0]]
    # Features 0 and 2 are equal: the lower index wins.
    assert out.acts.tolist() == [[2.0, 0.0, 0.0]]
    # x~_hat = 2 * [1, 0] + [1, 0] = [3, 0];  x_hat = [3, 0] * 2 + [2, 4]
    assert out.x_hat.tolist() == [[8.0, 4.0]]


def test_a_threshold_is_to_be_exceeded() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="jumprelu", d_model=1, n_features=2), seed=None)
    sae.threshold.data = torch.tensor([1.0, 2.0])
    assert sae.activate(torch.tensor([[1.0, 2.5], [1.5, -3.0]])).tolist() == [[0.0, 2.5], [1.5, 0.0]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sparse_and_dense_ways_agree(architecture: Architecture) -> None:
    sae, x = build_sae(architecture), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    out, acts = sae(x), sae.encode(x)
    assert out.acts.shape == (3, 5, 24)
    assert (acts >= 0).all()
    torch.testing.assert_close(out.acts, acts)
    torch.testing.assert_close(sae.decode(acts), out.x_hat)
    sparse = sae.encode_sparse(x)
    assert torch.equal(sparse.dense(), acts)
    torch.testing.assert_close(sae.decode_sparse(sparse), out.x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_batch_architectures_encode_a_token_without_its_batch(architecture: Architecture) -> None:
    sae, x = build_sae(architecture), torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    sae.train()
    torch.testing.assert_close(sae.encode(x)[3], sae.encode(x[3]), atol=1e-6, rtol=0)


@given(
    architecture=st.sampled_from(ARCHITECTURES),
    features=st.lists(st.integers(0, 23), max_size=12),
    seed=st.integers(0, 5),
    n_levels=st.sampled_from([0, 2]),
)
@settings(max_examples=60, deadline=None)
def test_features_encoded_alone_equal_the_full_encoding(
    architecture: Architecture, features: list[int], seed: int, n_levels: int
) -> None:
    sae = build_sae(architecture)
    if n_levels:  # equal encoder rows: ties at the gate
        sae.W_enc.data[:] = sae.W_enc.data[:n_levels].repeat(12, 1)
        sae.b_enc.data.fill_(0.1)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
    expected = sae.encode(x)[:, features]
    torch.testing.assert_close(sae.encode_features(x, features), expected, atol=1e-6, rtol=0)


def test_pre_acts_of_bfloat16_tokens_are_float32() -> None:
    sae, x = build_sae().bfloat16(), torch.randn(4, 8).bfloat16()
    assert sae(x).pre_acts.dtype == torch.float32
    assert (sae.encode(x) > 0).sum(-1).max() <= 4


def test_gradients_flow_through_sparse_decoding() -> None:
    sae = build_sae(n_features=512, k=2)
    x = torch.randn(4, 8, requires_grad=True)
    sae(x).x_hat.square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_wrong_widths_and_features_are_named() -> None:
    sae = build_sae()
    with pytest.raises(FluxSaeError, match=r"width 9.*width 8"):
        sae.encode(torch.zeros(2, 9))
    for features in ([24], [-1]):
        with pytest.raises(FluxSaeError, match="0 to 23"):
            sae.encode_features(torch.zeros(2, 8), features)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 25}, r"k is 25.*1 to 24"), ({"k": None}, "k is None"), ({"k": 0}, "k is 0"), ({"d_model": 0}, "d_model"),
        ({"auxk_coeff": float("nan")}, "auxk_coeff"), ({"prefixes": (12, 24)}, "matryoshka"),
    ],
)  # fmt: skip
def test_configurations_out_of_range_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(FluxSaeError, match=message):
        build_config(**changes)


def test_k_is_refused_where_there_is_none() -> None:
    with pytest.raises(FluxSaeError, match="l1 has no k"):
        build_config("l1", k=3)
    with pytest.raises(FluxSaeError, match="architecture is 'gated'"):
        SaeConfig(architecture="gated", d_model=2, n_features=2)  # type: ignore[arg-type]


# The ground an SAE was trained on


def test_use_elsewhere_is_refused_or_shown() -> None:
    sae = build_sae()
    assert sae.require_ground(Ground(height=128, flux=FluxIdentity("miniature"))) == {}
    elsewhere = Ground(height=256, width=64, guidance_scale=1.0)
    with pytest.raises(FluxSaeError, match=r"images are 256 x 64 pixels, not 128 x 128.*guidance_scale is 1.0"):
        sae.require_ground(elsewhere)
    with pytest.raises(FluxSaeError, match=r"name: guidance_scale \("):
        sae.require_ground(elsewhere, allow_mismatch=["size"])
    assert set(sae.require_ground(elsewhere, allow_mismatch=["size", "guidance_scale"])) == {"size", "guidance_scale"}
    with pytest.raises(FluxSaeError, match="allow_mismatch='everything': allowed is a list of flux, "):
        sae.require_ground(elsewhere, allow_mismatch=["everything"])  # type: ignore[list-item]
    for wrong in ("size", True):
        with pytest.raises(FluxSaeError, match=f"allow_mismatch='{wrong}': allowed is a list of flux, "):
            sae.require_ground(elsewhere, allow_mismatch=wrong)  # type: ignore[arg-type]
    with pytest.raises(FluxSaeError, match="does not say"):
        SparseAutoencoder(build_config(trained_on=None)).require_ground(Ground(height=128))


# Precision


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_features_fire_under_autocast_and_after_half_precision_is_saved(
    architecture: Architecture, tmp_path: Path
) -> None:
    sae, x = build_sae(architecture), torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    plain, chosen = sae(x), sae.encode_features(x, [3, 7])
    with torch.autocast("cpu", torch.bfloat16):
        cast = sae(x)
        assert torch.equal(sae.encode_features(x, [3, 7]), chosen)
    assert torch.equal(cast.acts, plain.acts)
    torch.testing.assert_close(cast.x_hat, plain.x_hat)
    half = sae.bfloat16()
    half.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(again.encode(x) > 0, half.encode(x) > 0)
    torch.testing.assert_close(again.encode(x), half.encode(x).float())


# Files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_and_load_is_bit_identical(tmp_path: Path, architecture: Architecture) -> None:
    sae = build_sae(architecture)
    sae.save_pretrained(tmp_path / "a")
    again = SparseAutoencoder.from_pretrained(tmp_path, subfolder="a")
    assert again.config == sae.config
    assert set(again.state_dict()) == set(sae.config.tensor_shapes())
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_sae("batchtopk").save_pretrained(tmp_path)
    return tmp_path


def _edit_tensors(folder: Path, **changes: object) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_dec": torch.zeros(24, 7)}, r"W_dec is F32 \[24, 7\].*F32 \[24, 8\]"),
        ({"b_dec": torch.zeros(8).bfloat16()}, r"b_dec is BF16"),
        ({"b_enc": torch.full((24,), torch.nan)}, "b_enc holds 24 values that are NaN"),
        ({"threshold": torch.tensor(torch.inf)}, "threshold holds 1 values that are NaN or infinite"),
        ({"extra": torch.zeros(1)}, "has unknown extra"),
        ({"threshold": None}, "lacks threshold"),
        ({"input_scale": torch.tensor(0.0)}, "input_scale is 0.0"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, changes: dict[str, object], message: str) -> None:
    _edit_tensors(saved, **changes)
    with pytest.raises(FluxSaeError, match=message):
        SparseAutoencoder.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version is 99, written by a newer fluxsae"),
        ({"schema_version": "absent"}, "schema_version is None"),
        ({"k": "absent"}, "lacks k"),
        ({"colour": 1}, "colour is unknown"),
        ({"n_features": "24"}, "n_features is '24'"),
        ({"n_features": 25}, r"F32 \[24, 8\].*F32 \[25, 8\]"),
        ({"architecture": "l1", "k": None}, "has unknown threshold"),
        ({"trained_on": {"flux_id": "x"}}, "trained_on: .*hookpoint is missing"),
        ({"trained_on": {**asdict(GROUND), "height": "128"}}, "trained_on: height is '128'"),
        ({"trained_on": {**asdict(GROUND), "hookpoint": 3}}, "trained_on: hookpoint is 3. It must be a valid string"),
        (
            {"trained_on": {**asdict(GROUND), "sigmas": [0.9, float("nan")]}},
            r"sigmas.1 is nan. It must be a finite",
        ),
    ],
)
def test_configs_that_do_not_fit_are_named(saved: Path, changes: dict[str, object], message: str) -> None:
    _edit_config(saved, **changes)
    with pytest.raises(FluxSaeError, match=message):
        SparseAutoencoder.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, -1])
def test_truncated_files_are_refused(saved: Path, name: str, keep: int) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes().rstrip()[:keep])
    with pytest.raises(FluxSaeError, match=name):
        SparseAutoencoder.from_pretrained(saved)


def test_doubled_keys_are_refused(saved: Path) -> None:
    config = (saved / "config.json").read_text()
    (saved / "config.json").write_text(config.replace('"k": 4,', '"k": 4, "k": 5,'))
    with pytest.raises(FluxSaeError, match="'k' stands there twice"):
        SparseAutoencoder.from_pretrained(saved)
    (saved / "config.json").write_text(config)
    content = (saved / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, doubled = content[8 : 8 + size].rstrip(), b',"b_dec":{"dtype":"F32","shape":[8],"data_offsets":[0,32]}}'
    header = header[:-1] + doubled
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    with pytest.raises(FluxSaeError, match=r"b_dec.*twice|not a whole safetensors"):
        SparseAutoencoder.from_pretrained(saved)


def test_missing_files_and_folders_say_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=r"config.json does not exist"):
        SparseAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(FluxSaeError, match="neither a folder nor a Hub repository"):
        SparseAutoencoder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FluxSaeError, match="Could not download someone/something"):
        SparseAutoencoder.from_pretrained("someone/something", subfolder="sae/x")


def test_nan_is_never_saved(tmp_path: Path) -> None:
    sae = build_sae()
    sae.b_enc.data[3] = torch.nan
    with pytest.raises(FluxSaeError, match="b_enc holds 1 values"):
        sae.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_fingerprint_is_of_the_tensors_whether_in_memory_or_in_a_file(tmp_path: Path) -> None:
    config = SaeConfig(architecture="topk", d_model=16, n_features=32, k=4)
    first, other = (SparseAutoencoder(config, seed=seed) for seed in (0, 1))
    assert first.fingerprint != other.fingerprint
    assert file_fingerprint(tmp_path) is None
    first.save_pretrained(tmp_path)
    assert file_fingerprint(tmp_path) == first.fingerprint == SparseAutoencoder.from_pretrained(tmp_path).fingerprint
    assert first.half().fingerprint is None
    other.reference_acts[0] = 1.0
    assert other.fingerprint != SparseAutoencoder(config, seed=1).fingerprint
