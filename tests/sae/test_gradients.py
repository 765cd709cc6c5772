"""Gradients against autograd; what each architecture learns; dead features that come back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_data import D_MODEL, N_FEATURES, K, MemorySource, sae_config, sparse_rows

from fluxsae.sae.config import ARCHITECTURES, Architecture, SaeConfig
from fluxsae.sae.metrics import fvu
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig, train
from fluxsae.sae.training.checkpoints import LOG_NAME
from fluxsae.sae.training.gradients import Situation, _batch_topk, batch_gradients
from fluxsae.sae.training.initial import resample_dead
from fluxsae.sae.training.processes import Processes
from fluxsae.sae.training.trainer import SaeTrainer


def sae_in_float64(architecture: Architecture, **changes: object) -> SparseAutoencoder:
    sae = SparseAutoencoder(sae_config(architecture, auxk_coeff=0.5, **changes)).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if architecture == "jumprelu":
        sae.threshold.data.fill_(0.3)
    return sae


class _Jump(torch.autograd.Function):
    """Equations 11 and 12 of arXiv 2407.14435: pseudo-derivatives of pre * H(pre - theta) and of H(pre - theta)."""

    @staticmethod
    def forward(ctx, pre_acts, threshold, bandwidth, is_step):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.is_step = bandwidth, is_step
        gate = (pre_acts > threshold).to(pre_acts.dtype)
        return gate if is_step else pre_acts * gate

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        pre_acts, threshold = ctx.saved_tensors
        kernel = ((pre_acts - threshold).abs() < ctx.bandwidth / 2).to(gradient.dtype) / ctx.bandwidth
        for_pre = torch.zeros_like(gradient) if ctx.is_step else gradient * (pre_acts > threshold)
        for_threshold = -(1 if ctx.is_step else threshold) * kernel * gradient
        return for_pre, for_threshold.sum(0), None, None


def reference_loss(
    sae: SparseAutoencoder, x_tilde: Tensor, dead: Tensor | None, places: Tensor | None = None
) -> Tensor:
    """The loss of DESIGN's formulas, dense and differentiable, by term; `places`: tokens by levels of a table."""
    config = sae.config
    read = x_tilde if places is None else x_tilde * (places @ sae.sigma_scale) + places @ sae.sigma_shift
    pre = (read - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    penalty = x_tilde.new_zeros(())
    if config.architecture in ("batchtopk", "matryoshka"):
        flat = pre.detach().flatten()
        kept = torch.zeros_like(flat)
        kept[flat.topk(K * len(pre)).indices] = 1
        acts = pre.relu() * kept.view_as(pre)
    elif config.architecture == "topk":
        acts = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values.relu())
    elif config.architecture == "jumprelu":
        acts = _Jump.apply(pre, sae.threshold, config.bandwidth, False)
        penalty = config.l0_coeff * _Jump.apply(pre, sae.threshold, config.bandwidth, True).sum(1).mean()
    else:
        acts = pre.relu()
        penalty = config.l1_coeff * acts.sum(1).mean()
    sizes = config.nested_sizes
    errors = [x_tilde - acts[:, :size] @ sae.W_dec[:size] - sae.b_dec for size in sizes]
    loss = sum(error.square().mean() for error in errors) / len(sizes) + penalty
    if dead is not None:
        values, indices = pre[:, dead].topk(min(5, len(dead)))
        aux = torch.zeros_like(pre[:, dead]).scatter(1, indices, values.relu()) @ sae.W_dec[dead]
        scale = config.auxk_coeff * min(5, len(dead)) / 5
        loss = loss + scale * (errors[-1].detach() - aux).square().mean()
    return loss


def assert_gradients_equal_autograd(sae: SparseAutoencoder, *, is_sparse: bool, dead: Tensor | None) -> None:
    x_tilde = torch.randn(33, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = places = None
    if sae.config.sigma_table:  # of 0.25, 0.5, 1: on a level, between two, and beyond the ends
        sigmas = torch.tensor([0.25, 0.375, 0.5, 0.625, 1.0, 0.2, 1.02] * 5)[:33]
        of_level = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1], [1, 0, 0], [0, 0, 1]]
        places = torch.tensor(of_level * 5, dtype=torch.float64)[:33]
    loss = reference_loss(sae, x_tilde, dead, places)
    names = [name for name, _ in sae.named_parameters()]
    expected = dict(zip(names, torch.autograd.grad(loss, list(sae.parameters())), strict=True))
    found = batch_gradients(sae, x_tilde, Situation(n_tokens=33, is_sparse=is_sparse, dead=dead), sigmas)
    terms = [value for name, value in found.losses.items() if name != "l0"]
    torch.testing.assert_close(torch.stack(terms).sum(), loss.detach())
    blocks = [found.weight_rows(slice(low, high)) for low, high in [(0, 7), (7, 30), (30, 40)]]
    actual = found.small | {"W_enc": torch.cat([b[0] for b in blocks]), "W_dec": torch.cat([b[1] for b in blocks])}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dead", [None, torch.tensor([2, 8, 9]), torch.arange(3, 33)], ids=["alive", "few", "many"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_gradients_equal_autograd_in_float64(architecture: Architecture, dead: Tensor | None) -> None:
    assert_gradients_equal_autograd(sae_in_float64(architecture), is_sparse=False, dead=dead)
    conditioned = sae_in_float64(architecture, sigma_table=(0.25, 0.5, 1.0))
    assert_gradients_equal_autograd(conditioned, is_sparse=False, dead=dead)


@pytest.mark.parametrize("dead", [None, torch.tensor([2, 8, 9]), torch.arange(3, 33)], ids=["alive", "few", "many"])
def test_sparse_gradients_equal_autograd_in_float64(dead: Tensor | None) -> None:
    assert_gradients_equal_autograd(sae_in_float64("topk"), is_sparse=True, dead=dead)
    conditioned = sae_in_float64("topk", sigma_table=(0.25, 0.5, 1.0))
    assert_gradients_equal_autograd(conditioned, is_sparse=True, dead=dead)


@pytest.mark.parametrize("floor", [None, 0.0, 0.4, 100.0])
def test_batch_topk_keeps_the_largest_of_the_batch_whatever_the_guess(floor: float | None) -> None:
    pre_acts = torch.randn(20, 15, generator=torch.Generator().manual_seed(3))
    guess = None if floor is None else torch.tensor(floor)
    kept, smallest = _batch_topk(pre_acts, 30, Situation(n_tokens=20, selection_floor=guess))
    values, indices = pre_acts.flatten().topk(30)
    expected = torch.zeros(300, dtype=torch.bool)
    expected[indices] = True
    assert torch.equal(kept.flatten(), expected)
    assert smallest == values[-1]


def test_batch_topk_gives_ties_to_the_earlier_entry_and_never_keeps_what_is_not_positive() -> None:
    pre_acts = torch.tensor([[1.0, 3.0, 1.0], [1.0, -1.0, 1.0]])
    kept, _ = _batch_topk(pre_acts, 3, Situation(n_tokens=2))
    assert kept.tolist() == [[True, True, True], [False, False, False]]
    kept, _ = _batch_topk(pre_acts, 6, Situation(n_tokens=2))
    assert kept.tolist() == [[True, True, True], [True, False, True]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns_and_its_decoder_stays_unit_norm(architecture: Architecture) -> None:
    rows = sparse_rows()
    config = TrainConfig(epochs=3, lr=5e-3, warmup_steps=10, sparsity_warmup_steps=50)
    sae = train({"a": sae_config(architecture, dead_after_tokens=2000)}, MemorySource(rows), config).saes["a"]
    held_out = sparse_rows(500, seed=1)
    assert fvu(held_out, sae(held_out).x_hat) < 0.5
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    normalised = sae.normalise(rows)
    assert float(normalised.square().sum(1).mean()) == pytest.approx(D_MODEL, rel=1e-3)
    torch.testing.assert_close(sae.input_mean, rows.mean(0), atol=1e-3, rtol=0)


def test_batchtopk_encodes_single_tokens_with_about_k_features_by_its_threshold() -> None:
    sae = train({"a": sae_config("batchtopk")}, MemorySource(sparse_rows()), TrainConfig(epochs=3, lr=5e-3)).saes["a"]
    rows = sparse_rows(400, seed=1)
    assert K * 0.7 < float((sae.encode(rows) > 0).sum(1).float().mean()) < K * 1.3
    torch.testing.assert_close(sae.encode(rows[:1]), sae.encode(rows)[:1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_sparse_and_dense_products_train_the_same_sae(clip: float | None) -> None:
    source = MemorySource(sparse_rows(640))
    config = TrainConfig(epochs=1, lr=1e-3, precision="float32", grad_clip=clip)
    saes = [train({"a": sae_config()}, source, replace(config, products=p)).saes["a"] for p in ("sparse", "dense")]
    for name, tensor in saes[0].state_dict().items():
        torch.testing.assert_close(tensor, saes[1].state_dict()[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize("products", ["dense", "sparse"])
def test_rounded_products_train_as_well_as_float32(products: str) -> None:
    source, rows = MemorySource(sparse_rows()), sparse_rows(seed=1)
    config = TrainConfig(epochs=8, lr=3e-3, warmup_steps=0, products=products)  # type: ignore[arg-type]
    unexplained = {}
    for precision in ("float32", "bfloat16"):
        sae = train({"a": sae_config()}, source, replace(config, precision=precision)).saes["a"]
        unexplained[precision] = float(fvu(rows, sae(rows).x_hat))
    assert unexplained["float32"] < 0.6
    assert unexplained["bfloat16"] < 1.05 * unexplained["float32"]


def test_the_parallel_gradient_does_not_reach_adam() -> None:
    trainer = SaeTrainer(SparseAutoencoder(sae_config()), TrainConfig(grad_clip=None), n_steps=10)
    before = trainer.sae.W_dec.clone()
    trainer.step(torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(0)), 0)
    mean_gradient = trainer.moments["W_dec"][0]
    parallel = (mean_gradient * before).sum(1)
    assert parallel.abs().max() < 1e-6 * mean_gradient.norm(dim=1).max() + 1e-9


def test_clipping_divides_every_gradient_by_the_same_number() -> None:
    x_tilde = 100 * torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(0))
    free = SaeTrainer(SparseAutoencoder(sae_config()), TrainConfig(grad_clip=None), n_steps=10)
    clipped = SaeTrainer(SparseAutoencoder(sae_config()), TrainConfig(grad_clip=0.5), n_steps=10)
    free.step(x_tilde, 0)
    norm = clipped.step(x_tilde, 0)["grad_norm"]
    assert norm > 0.5
    for name, (mean, _) in clipped.moments.items():
        torch.testing.assert_close(mean * norm / 0.5, free.moments[name][0])


def _trainer_with_silent_features(sae: SaeConfig, config: TrainConfig) -> tuple[SaeTrainer, Tensor]:
    """A trainer whose upper half of features never fires among the k largest, and 640 normalised rows."""
    trainer = SaeTrainer(SparseAutoencoder(sae), config, n_steps=1000)
    trainer.sae.W_enc.data[N_FEATURES // 2 :] *= 0.02
    rows = sparse_rows(640)
    trainer.sae.input_mean.copy_(rows.mean(0))
    trainer.sae.input_scale.copy_(rows.std())
    return trainer, trainer.sae.normalise(rows)


@pytest.mark.parametrize(("auxk_coeff", "revives"), [(1 / 4, True), (0.0, False)])
def test_auxk_revives_dead_features(auxk_coeff: float, revives: bool) -> None:
    sae = sae_config(auxk_coeff=auxk_coeff, dead_after_tokens=500)
    trainer, x_tilde = _trainer_with_silent_features(sae, TrainConfig(lr=1e-2, warmup_steps=0))
    for step in range(60):
        trainer.step(x_tilde, step)
    fired = (trainer.sae.activate((x_tilde - trainer.sae.b_dec) @ trainer.sae.W_enc.T + trainer.sae.b_enc) > 0).any(0)
    assert (int(fired[N_FEATURES // 2 :].sum()) > 10) == revives


def test_resampling_points_dead_features_at_tokens_and_forgets_their_moments() -> None:
    sae = sae_config("l1", l1_coeff=0.3, dead_after_tokens=500)
    trainer, x_tilde = _trainer_with_silent_features(sae, TrainConfig())
    trainer.sae.b_enc.data[N_FEATURES // 2 :] = -50
    for step in range(2):
        trainer.step(x_tilde, step)
    for moment in trainer.moments["W_enc"]:
        moment.fill_(1.0)
    assert resample_dead(trainer, x_tilde, step=2, processes=Processes()) == N_FEATURES // 2
    encoded = (x_tilde - trainer.sae.b_dec) @ trainer.sae.W_enc.T + trainer.sae.b_enc
    assert (encoded > 0).any(0)[N_FEATURES // 2 :].all()
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(N_FEATURES))
    for moment in trainer.moments["W_enc"]:
        assert (moment[N_FEATURES // 2 :] == 0).all()
        assert (moment[: N_FEATURES // 2] == 1).all()


def test_resampling_passes_over_tokens_that_are_not_finite() -> None:
    trainer, x_tilde = _trainer_with_silent_features(sae_config("l1", dead_after_tokens=1), TrainConfig())
    trainer.tokens_since_fired[:5] = 7
    x_tilde[:630] = torch.nan
    x_tilde[630] = torch.inf
    assert resample_dead(trainer, x_tilde, step=2, processes=Processes()) == 5
    assert all(torch.isfinite(parameter).all() for parameter in trainer.sae.parameters())


def test_l1_training_resamples_at_the_steps_of_its_config(tmp_path: Path) -> None:
    loop = TrainConfig(epochs=2, resample_every=4, resample_until=0.5)
    train({"a": sae_config("l1")}, MemorySource(sparse_rows(640)), loop, folder=tmp_path)
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [event["step"] for event in events if event.get("event") == "resampled"] == [4, 8]
