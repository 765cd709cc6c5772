"""Every way to compute equals the plain dense one, in float64 where rounding would hide a mistake."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxsae.sae.kernels import (
    PairsByFeature,
    agreement,
    bag_sums,
    cuda,
    exact_sum_product,
    lowered,
    pair_products,
    plain,
    private_torch,
    product,
    sparse_decode,
    sparse_pays,
    topk,
    topk_acts,
)
from fluxsae.sae.kernels.adam import AdamStep, adam_
from fluxsae.sae.kernels.agreement import CHECKS, agrees


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _stable_topk(rows: Tensor, k: int) -> Tensor:
    """The k largest by a stable sort: equal entries stay in the order of their indices."""
    return rows.sort(dim=-1, descending=True, stable=True).indices[..., :k].sort(-1).values


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_topk_gives_ties_to_the_lower_index(data: st.DataObject) -> None:
    n_features = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, n_features))
    # Few distinct values, so that almost every row has ties at its boundary.
    rows = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=n_features, max_size=n_features),
                min_size=1,
                max_size=4,
            )
        )
    )
    rows = rows.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    values, indices = topk(rows, k)
    assert torch.equal(indices.sort(-1).values, _stable_topk(rows, k))
    assert torch.equal(values, rows.gather(-1, indices))
    dense = torch.zeros_like(rows).scatter(-1, indices, values.relu())
    assert torch.equal(topk_acts(rows, k), dense)


def test_topk_keeps_leading_dimensions() -> None:
    pre_acts = _random(2, 3, 40)
    values, indices = topk(pre_acts, 5)
    assert values.shape == indices.shape == (2, 3, 5)
    assert torch.equal(indices.sort(-1).values, _stable_topk(pre_acts, 5))


def test_topk_in_bfloat16_keeps_exactly_k_where_many_entries_are_equal() -> None:
    pre_acts = _random(64, 1000).bfloat16()
    for find in (topk, plain.topk_by_repair):
        indices = find(pre_acts, 100)[1]
        assert torch.equal(indices.sort(-1).values, _stable_topk(pre_acts, 100))
    assert (pre_acts >= pre_acts.gather(1, indices).amin(1, keepdim=True)).sum() > 64 * 100, "no ties: tests nothing"


def test_bag_sums_equal_the_dense_product() -> None:
    weights, rows, source = _random(9), torch.tensor([3, 1, 1, 0, 4, 2, 2, 3, 0]), _random(5, 7, seed=1)
    starts = torch.tensor([0, 2, 2, 6])  # the second bag is empty
    dense = torch.zeros(4, 5, dtype=torch.float64)
    for pair, bag in enumerate([0, 0, 2, 2, 2, 2, 3, 3, 3]):
        dense[bag, rows[pair]] += weights[pair]
    torch.testing.assert_close(bag_sums(weights, rows, starts, source), dense @ source)


def test_pair_products_equal_entries_of_the_dense_product() -> None:
    left, right = _random(6, 8), _random(11, 8, seed=1)
    left_rows, right_rows = torch.tensor([0, 5, 2, 2, 3]), torch.tensor([10, 0, 4, 4, 1])
    torch.testing.assert_close(
        pair_products(left, left_rows, right, right_rows), (left @ right.T)[left_rows, right_rows]
    )


@pytest.mark.parametrize("rows", [slice(0, 13), slice(0, 5), slice(5, 13), slice(12, 13)])
def test_feature_sums_of_a_block_equal_the_dense_weight_gradient(rows: slice) -> None:
    n_tokens, n_features, k = 10, 13, 3
    acts = _random(n_tokens, n_features)
    values, indices = topk(acts, k)
    tokens = torch.arange(n_tokens).repeat_interleave(k)
    source = _random(n_tokens, 6, seed=2)
    pairs = PairsByFeature(tokens, indices.reshape(-1), n_features)
    dense = torch.zeros_like(acts).scatter_(1, indices, values).T @ source
    found = pairs.feature_sums(values.reshape(-1)[pairs.order], source, rows, pairs.tokens)
    torch.testing.assert_close(found, dense[rows])


def test_sparse_decode_and_its_gradients_equal_the_dense_product() -> None:
    tokens = torch.tensor([1, 1, 1, 2, 5, 5])  # tokens 0, 3, 4, 6 and 7 have no pairs
    features = torch.tensor([8, 0, 3, 3, 1, 8])
    values, W_dec = _random(6).requires_grad_(), _random(9, 5, seed=1).requires_grad_()
    dense = torch.zeros(8, 9, dtype=torch.float64).index_put((tokens, features), values) @ W_dec
    weight = _random(8, 5, seed=3)
    expected = torch.autograd.grad((dense * weight).sum(), (values, W_dec))
    found = sparse_decode(tokens, features, values, W_dec, n_tokens=8)
    torch.testing.assert_close(found, dense)
    for gradient, reference in zip(torch.autograd.grad((found * weight).sum(), (values, W_dec)), expected, strict=True):
        torch.testing.assert_close(gradient, reference)


@pytest.mark.parametrize("is_exact", [True, False])
def test_bfloat16_products_add_up_in_float32(is_exact: bool) -> None:
    a, b = _random(64, 2048).float(), _random(2048, 32, seed=1).float()
    exact = a.double() @ b.double()
    found = exact_sum_product(a, b, "bfloat16") if is_exact else product(lowered(a, "bfloat16"), lowered(b, "bfloat16"))
    assert found.dtype == torch.float32
    # Two factors of 8 significant bits, errors of 2048 terms adding up at random.
    assert (found - exact).abs().max() < 3 * 2**-8 * 2048**0.5


def test_float64_is_multiplied_in_float64_whatever_the_precision() -> None:
    a, b = _random(5, 7), _random(7, 3, seed=1)
    assert torch.equal(exact_sum_product(a, b, "bfloat16"), a @ b)
    assert torch.equal(product(lowered(a, "bfloat16"), lowered(b, "bfloat16")), a @ b)


def test_a_product_leaves_the_process_wide_precision_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    exact_sum_product(torch.ones(4, 4), torch.ones(4, 4), "bfloat16")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("is_unit", [False, True])
def test_adam_is_torch_adam_with_unit_rows_turned_only(is_unit: bool) -> None:
    weights = torch.nn.functional.normalize(_random(6, 9), dim=1)
    gradient = _random(6, 9, seed=1)
    reference = torch.nn.Parameter(weights.clone())
    optimiser = torch.optim.Adam([reference], lr=0.02, betas=(0.8, 0.99), eps=1e-6)
    mean, square = torch.zeros_like(weights), torch.zeros_like(weights)
    for count in range(1, 4):
        reference.grad = gradient / 2
        if is_unit:
            reference.grad -= (reference.grad * reference).sum(1, keepdim=True).detach() * reference.detach()
        optimiser.step()
        if is_unit:
            reference.data /= reference.data.norm(dim=1, keepdim=True)
        step = AdamStep(torch.tensor(float(count)), 0.02, 0.8, 0.99, 1e-6, torch.tensor(2.0), torch.tensor(0.0))
        adam_(weights, gradient.clone(), mean, square, step=step, is_unit=is_unit)
        torch.testing.assert_close(weights, reference.data)


def test_a_skipped_adam_step_changes_nothing() -> None:
    weights, mean, square = torch.eye(3), torch.ones(3, 3), torch.ones(3, 3)
    step = AdamStep(torch.tensor(1.0), 0.1, 0.9, 0.999, 1e-8, torch.tensor(1.0), torch.tensor(1.0))
    adam_(weights, torch.full((3, 3), torch.nan), mean, square, step=step, is_unit=True)
    assert torch.equal(weights, torch.eye(3))
    assert torch.equal(mean, square)


def test_sparse_products_are_chosen_for_small_k_alone() -> None:
    cpu = torch.device("cpu")
    assert sparse_pays(64, 12_288, cpu)
    assert not sparse_pays(1200, 12_288, cpu)
    assert not sparse_pays(1200, 12_288, torch.device("cuda"))


@pytest.mark.gpu
def test_triton_kernels_equal_plain_torch() -> None:
    rows = _random(33, 12_288).float()
    rows[:, 5:900:7] = rows[:, :1]  # ties
    values, indices = topk(rows.cuda(), 64)
    assert torch.equal(indices.cpu().sort(-1).values, _stable_topk(rows, 64))
    assert torch.equal(values.cpu(), rows.gather(1, indices.cpu()))
    W_dec = _random(12_288, 384, seed=1).float()
    tokens = torch.arange(33).repeat_interleave(64)
    flat = indices.reshape(-1), values.reshape(-1)
    found = sparse_decode(tokens.cuda(), *flat, W_dec.cuda(), n_tokens=33)
    expected = sparse_decode(tokens, *(part.cpu() for part in flat), W_dec, n_tokens=33)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-4)
    gradient = _random(33, 384, seed=2).float()
    products = pair_products(gradient.cuda(), tokens.cuda(), W_dec.cuda(), indices.reshape(-1))
    expected = pair_products(gradient, tokens, W_dec, indices.cpu().reshape(-1))
    torch.testing.assert_close(products.cpu(), expected, atol=1e-3, rtol=1e-4)


def test_this_torch_still_has_what_it_offers_under_private_names() -> None:
    assert private_torch.has_pair_products()
    assert private_torch.has_bfloat16_switch()


def test_the_plain_ways_say_what_the_private_ones_say(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = _random(7, 5), _random(9, 5, seed=1)
    rows = torch.tensor([0, 0, 3, 6]), torch.tensor([8, 2, 2, 1])
    private = private_torch.pair_products(left, rows[0], right, rows[1])
    a, b = left.float(), right.float().T
    switched = private_torch.bfloat16_product(a, b)
    monkeypatch.setattr(private_torch, "has_pair_products", lambda: False)
    monkeypatch.setattr(private_torch, "has_bfloat16_switch", lambda: False)
    torch.testing.assert_close(private_torch.pair_products(left, rows[0], right, rows[1]), private)
    # Small products may stay in float32: one rounding of either factor is 2**-9 at most.
    torch.testing.assert_close(private_torch.bfloat16_product(a, b), switched, rtol=2**-6, atol=2**-6)


def test_the_kernel_that_finds_the_top_k_does_not_cost_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A double of the CUDA kernel: right values without a gradient, in the order of their indices."""

    def kernel(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        indices = rows.topk(k).indices.sort(-1).values
        return rows.gather(1, indices).detach(), indices

    pre_acts = _random(3, 10).float().requires_grad_()
    expected = torch.autograd.grad(topk_acts(pre_acts, 4).square().sum(), pre_acts)
    monkeypatch.setattr(cuda, "serves", lambda kernel, rows: True)
    monkeypatch.setattr(cuda, "topk", kernel)
    values, _ = topk(pre_acts, 4)
    assert values.requires_grad
    assert torch.equal(torch.autograd.grad(topk_acts(pre_acts, 4).square().sum(), pre_acts)[0], expected[0])


def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    launched: list[str] = []
    names = ("topk", "topk_acts", "bag_sums", "pair_products", "adam_")

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield
        entered.pop()

    def launch(name: str) -> Callable[..., None]:
        return lambda *_, **__: launched.append(f"{name} on {entered[-1]}")

    monkeypatch.setattr(torch.cuda, "device", device)
    kernels = SimpleNamespace(**{name: launch(name) for name in names})
    monkeypatch.setitem(sys.modules, "fluxsae.sae.kernels.triton_kernels", kernels)
    rows, numbers = torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64)
    cuda.topk(rows, 1)
    cuda.topk_acts(rows, 1, torch.float32)
    cuda.bag_sums(numbers, numbers, numbers, rows)
    cuda.pair_products(rows, numbers, rows, numbers)
    step = AdamStep(torch.ones(()), 1e-3, 0.9, 0.99, 1e-8, torch.ones(()), torch.zeros(()))
    cuda.adam_(rows, rows, rows, rows, step=step, is_unit=False)
    assert launched == [f"{name} on meta" for name in names]


# The Triton kernels


@pytest.fixture(scope="module")
def interpreted() -> dict[str, bool]:
    """What each kernel's check says in Triton's interpreter."""
    pytest.importorskip("triton")
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder.parents[1])}
    command = [sys.executable, str(folder / "interpreted_kernels.py")]
    found: dict[str, bool] = json.loads(
        subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    )
    return found


@pytest.mark.parametrize("kernel", list(CHECKS))
def test_the_kernel_agrees_with_plain_torch_in_the_interpreter(kernel: str, interpreted: dict[str, bool]) -> None:
    said = {case: agrees for case, agrees in interpreted.items() if case.split()[0] == kernel}
    assert said
    assert all(said.values()), said


def test_the_top_k_is_checked_at_the_width_of_a_large_dictionary(interpreted: dict[str, bool]) -> None:
    assert {case.split()[0] for case in interpreted if case.endswith(" 49152")} == {"topk", "topk_acts"}


def _right(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = plain.topk(rows, k)
    return values.float(), indices


def _wrong(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Equal entries go to the higher index."""
    indices = rows.shape[1] - 1 - plain.topk(rows.flip(1), k)[1]
    return rows.gather(1, indices), indices


def _broken(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    raise RuntimeError("PTX was not assembled\nand a page of why")


@pytest.mark.parametrize(
    ("kernel", "reason"), [(_right, ""), (_wrong, "other numbers"), (_broken, "RuntimeError: PTX was not assembled;")]
)
def test_a_kernel_is_used_only_where_it_agreed_and_one_line_says_so(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    agrees.cache_clear()
    monkeypatch.setitem(sys.modules, "fluxsae.sae.kernels.triton_kernels", SimpleNamespace(topk=kernel))
    found = [agrees("topk", torch.device("cpu"), torch.float32, 400) for _ in range(3)]
    agrees.cache_clear()
    assert found == [not reason] * 3
    assert len(caplog.messages) == bool(reason)
    assert all(reason in line and "topk is not used on cpu" in line and "\n" not in line for line in caplog.messages)


def test_only_what_a_kernel_is_made_for_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(agreement, "agrees", lambda kernel, device, dtype, width: asked.append((kernel, width)) or True)
    monkeypatch.setattr(cuda, "_has_triton", lambda: True)

    def on_cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape, ndim=len(shape), device=torch.device("cuda:1"))

    assert not cuda.serves("topk", torch.zeros(2, 8))
    for kernel, tensor, is_served in (
        ("topk", on_cuda(2, 49_152), True), ("topk", on_cuda(2, 98_304), False), ("adam_", on_cuda(98_304), False),
        ("adam_", on_cuda(4, 3072), True), ("bag_sums", on_cuda(4, 8, dtype=torch.float64), False),
    ):  # fmt: skip
        assert cuda.serves(kernel, tensor) == is_served
    assert asked == [("topk", 49_152), ("adam_", 3072)]
