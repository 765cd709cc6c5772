"""Sparse acts cost what fires, and nothing of size tokens x features is held beyond a chunk of tokens."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from largest_tensor import LargestTensor
from test_model import build_sae
from torch import Tensor

from fluxsae.features.scores import max_over_tokens
from fluxsae.sae import acts as acts_module
from fluxsae.sae.acts import SparseActs, tokens_at_once
from fluxsae.sae.config import ARCHITECTURES, Architecture
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.measurements import TokenLimits, norm_and_residual

CPU = torch.device("cpu")
N_FEATURES, CHUNK = 512, 8


@st.composite
def dense_acts(draw: st.DrawFn) -> Tensor:
    """Acts (images, tokens, features), most of them 0."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)


@given(dense_acts(), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_triples_split_and_joined_are_the_acts_again(dense: Tensor, size: int) -> None:
    acts = SparseActs.from_dense(dense)
    assert torch.equal(acts.dense(), dense)
    assert torch.equal(acts.active, (dense > 0).sum(-1))
    parts = list(acts.split(size))
    assert [part.n_tokens for part in parts] == [len(rows) for rows in dense.flatten(0, 1).split(size)]
    assert all(
        torch.equal(part.dense(), rows) for part, rows in zip(parts, dense.flatten(0, 1).split(size), strict=True)
    )
    assert torch.equal(SparseActs.joined(parts, acts.shape).dense(), dense)


def test_chunks_follow_the_free_memory_and_are_powers_of_two() -> None:
    gib = 1 << 30
    sizes = [tokens_at_once(12_288, CPU, free_bytes=free) for free in (0, gib // 8, gib, 100 * gib)]
    assert sizes == [1, 256, 2048, 4096]  # an eighth of what is free, at most 2^28 bytes of 4 * 12,288 a token
    assert tokens_at_once(49_152, CPU, free_bytes=100 * gib) == 1024


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of `CHUNK` tokens."""
    monkeypatch.setattr(acts_module, "CHUNK_BYTES", 4 * N_FEATURES * CHUNK)


def wide(architecture: Architecture) -> tuple[SparseAutoencoder, Tensor]:
    """An SAE of many features, and tokens for many chunks of it; one token is far larger than the others."""
    sae = build_sae(architecture, n_features=N_FEATURES)
    if sae.config.has_threshold:
        sae.threshold.data.fill_(4.0)
    x = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
    x[0, 7] *= 50
    return sae, x


WORKS: dict[str, Callable[[SparseAutoencoder, Tensor], object]] = {
    "encode_sparse": lambda sae, x: sae.encode_sparse(x),
    "encode_features": lambda sae, x: sae.encode_features(x, [1, 2, 3]),
    "many encode_features": lambda sae, x: sae.encode_features(x, range(12)),
    "decode_sparse": lambda sae, x: sae.decode_sparse(sae.encode_sparse(x)),
    "reconstruct": lambda sae, x: sae.reconstruct(x),
    "scores": lambda sae, x: max_over_tokens(sae.encode_sparse(x)),
    "residual norms": lambda sae, x: norm_and_residual(x, sae),
    "recording an edit": lambda sae, x: TokenLimits((0.5,), (0.0,), (9.0,), (9.0,)).is_outside(x, sae, sigma=0.5),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
@pytest.mark.parametrize("work", WORKS)
def test_acts_of_all_features_are_held_for_a_chunk_alone(work: str, architecture: Architecture) -> None:
    sae, x = wide(architecture)
    with torch.no_grad(), LargestTensor() as largest:
        WORKS[work](sae, x)
    # The encoder has 8 * 512 entries, too; a topk looks at one entry a feature more, and triples are few.
    assert largest.n_entries <= 2 * CHUNK * N_FEATURES
    assert x[..., 0].numel() * N_FEATURES > 10 * largest.n_entries


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_change_no_result_and_keep_the_gradient(architecture: Architecture) -> None:
    sae, x = wide(architecture)
    x.requires_grad_()
    whole = sae(x)
    for found, expected in (
        (sae.encode(x), whole.acts), (sae.encode_sparse(x).dense(), whole.acts), (sae.reconstruct(x), whole.x_hat),
        (sae.decode_sparse(sae.encode_sparse(x)), whole.x_hat),
        (sae.encode_features(x, [5, 9]), whole.acts[..., [5, 9]]),
    ):  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
        wanted = [x, sae.W_enc]
        gradients = [torch.autograd.grad(each.square().sum(), wanted, retain_graph=True) for each in (found, expected)]
        torch.testing.assert_close(*gradients, atol=1.0, rtol=1e-3)


def test_a_busy_token_costs_its_own_entries_only() -> None:
    sae, x = wide("batchtopk")
    acts = sae.encode_sparse(x)
    assert acts.active[0, 7] > 20 * acts.active.median()
    assert len(acts.values) == int((sae.encode(x) > 0).sum())
