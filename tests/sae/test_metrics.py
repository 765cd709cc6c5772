"""Metrics by hand, and streaming sums that equal one pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.metrics import (
    FiringSums,
    ReconstructionSums,
    density,
    density_histogram,
    fvu,
    l0,
)


def test_fvu_by_hand() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 4.0]])
    # Means per dimension [1, 2]: deviations 1 + 4 + 1 + 4 = 10; errors 1 + 0 + 0 + 4 = 5.
    assert fvu(x, torch.tensor([[1.0, 0.0], [2.0, 2.0]])) == pytest.approx(0.5)
    assert fvu(x, x) == 0
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1.0)


def test_fvu_takes_the_mean_of_each_dimension_and_not_of_each_token() -> None:
    x = torch.tensor([[1.0, 101.0], [3.0, 103.0]])
    assert fvu(x, torch.tensor([[2.0, 102.0], [2.0, 102.0]])) == pytest.approx(1.0)


def test_fvu_of_tokens_that_do_not_vary_is_an_error() -> None:
    with pytest.raises(FluxSaeError, match="vary"):
        fvu(torch.ones(4, 3), torch.zeros(4, 3))


@given(
    sizes=st.lists(st.integers(0, 9), min_size=2, max_size=5),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_merged_sums_equal_one_pass(sizes: list[int], offset: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes) + 2
    x = torch.randn(total, 4, generator=generator, dtype=torch.float64) + offset
    x_hat = x + 0.1 * torch.randn(total, 4, generator=generator, dtype=torch.float64)
    acts = torch.randn(total, 6, generator=generator).relu()
    merged, firing = ReconstructionSums.empty(4), FiringSums.empty(6)
    start = 0
    for size in [*sizes, 2]:
        part, counts = ReconstructionSums.empty(4), FiringSums.empty(6)
        if size:
            part.update(x[start : start + size], x_hat[start : start + size])
            counts.update(SparseActs.from_dense(acts[start : start + size]))
        merged.merge(part)
        firing.merge(counts)
        start += size
    whole = ReconstructionSums.empty(4)
    whole.update(x, x_hat)
    assert merged.n_tokens == whole.n_tokens == total
    assert merged.fvu() == pytest.approx(whole.fvu(), rel=1e-9)
    assert torch.equal(firing.density(), density(acts))
    assert firing.l0() == pytest.approx(l0(acts))
    assert firing.dead_share() == pytest.approx(float((density(acts) == 0).double().mean()))


def test_the_density_histogram_counts_every_feature_once() -> None:
    histogram = density_histogram(torch.tensor([0.0, 0.0, 2e-6, 5e-4, 0.05, 0.5, 1.0]))
    assert histogram["silent"] == 2
    assert histogram["counts"] == [0, 1, 0, 1, 0, 1, 2]
    assert len(histogram["edges"]) == 8  # type: ignore[arg-type]
