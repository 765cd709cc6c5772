"""Training: gradients against autograd, exact resume, faults, processes, and `train.fit` as a user runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsae.activations.shards import ActivationManifest, ShardWriter
from fluxsae.errors import FluxSaeError
from fluxsae.files import load_tensors
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.sae.config import ARCHITECTURES, Architecture, SaeConfig
from fluxsae.sae.metrics import fvu
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import HeldOut, TrainConfig, loop, train
from fluxsae.sae.training.checkpoints import CHECKPOINT_NAME, LOG_NAME
from fluxsae.sae.training.gradients import Situation, _batch_topk, batch_gradients
from fluxsae.sae.training.initial import resample_dead
from fluxsae.sae.training.processes import Processes
from fluxsae.sae.training.trainer import SaeTrainer
from train import fit
from train.fit import FitConfig, main

D_MODEL, N_FEATURES, K = 12, 40, 4


@dataclass
class MemorySource:
    """Rows in memory, in an order that is a pure function of (epoch, cursor); a share of each batch under torchrun."""

    rows: Tensor
    batch_size: int = 64
    seed: int = 0
    processes: Processes = field(default_factory=Processes)
    reads_ahead: bool = True
    levels: Tensor | None = None
    """The noise level of each row, for SAEs with a `sigma_table`."""

    @property
    def d_model(self) -> int:
        return self.rows.shape[1]

    @property
    def n_batches(self) -> int:
        return len(self.rows) // self.batch_size

    @property
    def order(self) -> str:
        return f"seed {self.seed}"

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        return self._dealt(self.rows, epoch, cursor)

    def sigmas(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        assert self.levels is not None, "a plain SAE asks for no noise levels"
        return self._dealt(self.levels, epoch, cursor)

    def _dealt(self, rows: Tensor, epoch: int, cursor: int) -> Iterator[Tensor]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        share = self.batch_size // self.processes.world_size
        for batch in range(cursor, self.n_batches):
            start = batch * self.batch_size + self.processes.rank * share
            yield rows[order[start : start + share]]


def sparse_rows(n_rows: int = 3200, *, d_model: int = D_MODEL, seed: int = 0) -> Tensor:
    """Sums of a few of 30 directions around a mean: what an SAE can take apart."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(30, d_model, generator=torch.Generator().manual_seed(99))
    is_on = torch.rand(n_rows, 30, generator=generator) < 0.08
    return (torch.rand(n_rows, 30, generator=generator) + 0.5) * is_on @ directions + 2


def sae_config(architecture: Architecture = "topk", **changes: object) -> SaeConfig:
    k = None if architecture in ("l1", "jumprelu") else K
    values = {"d_model": D_MODEL, "n_features": N_FEATURES, "k": k, "l1_coeff": 0.02, "auxk": 5} | changes
    return SaeConfig(architecture=architecture, **values)  # type: ignore[arg-type]


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


# Stopping and continuing


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / CHECKPOINT_NAME)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_stopped_anywhere_ends_with_the_same_bits(tmp_path: Path, architecture: Architecture) -> None:
    configs = {"a": sae_config(architecture, dead_after_tokens=500)}
    source = MemorySource(sparse_rows(640))
    config = TrainConfig(epochs=3, lr=2e-3, checkpoint_minutes=0, resample_every=6, log_every=3)
    whole = train(configs, source, config, folder=tmp_path / "whole").saes["a"]
    for stop_at in (1, 10, 17):
        interrupted = tmp_path / str(stop_at)

        def stop(done: int, total: int, stop_at: int = stop_at) -> None:
            if done == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        part = train(configs, source, config, folder=interrupted, on_step=stop)
        assert part.step == stop_at
        assert not part.is_finished
        rest = train(configs, source, config, folder=interrupted)
        assert rest.is_finished
        for name, tensor in rest.saes["a"].state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name]), name


def test_the_metrics_log_of_a_continued_run_has_every_interval_once(tmp_path: Path) -> None:
    source, config = MemorySource(sparse_rows(1280)), TrainConfig(epochs=2, checkpoint_minutes=0, log_every=5)
    train({"a": sae_config()}, source, replace(config, max_steps=None), folder=tmp_path)
    lines = (tmp_path / LOG_NAME).read_text().splitlines()
    # As a killed process leaves it: lines after the last checkpoint, the last of them cut off.
    (tmp_path / LOG_NAME).write_text("\n".join(lines) + '\n{"step": 45, "sae": "a"}\n{"step": 50, "sa')
    train({"a": sae_config()}, source, config, folder=tmp_path)
    steps = [json.loads(line)["step"] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40]


def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    source, config = MemorySource(sparse_rows(640)), TrainConfig()
    train({"a": sae_config()}, source, config, folder=tmp_path)
    with pytest.raises(FluxSaeError, match="beta1 differ"):
        train({"a": sae_config()}, source, replace(config, beta1=0.5), folder=tmp_path)
    with pytest.raises(FluxSaeError, match="SAE a"):
        train({"a": sae_config(k=5)}, source, config, folder=tmp_path)
    with pytest.raises(FluxSaeError, match="data_order differ"):
        train({"a": sae_config()}, replace(source, seed=1), config, folder=tmp_path)
    with pytest.raises(FluxSaeError, match="on_spike differ"):
        train({"a": sae_config()}, source, replace(config, on_spike="skip"), folder=tmp_path)


def test_training_that_stopped_at_a_bad_batch_continues_when_told_to_skip_it(tmp_path: Path) -> None:
    source, config = _with_bad_batch(float("nan")), TrainConfig(checkpoint_minutes=0, log_every=5, on_nan="stop")
    with pytest.raises(FluxSaeError, match="step 13"):
        train({"a": sae_config()}, source, config, folder=tmp_path)
    told = replace(config, on_nan="skip")
    rest = train({"a": sae_config()}, source, told, folder=tmp_path).saes["a"]
    whole = train({"a": sae_config()}, source, told).saes["a"]
    for name, tensor in rest.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    source = MemorySource(sparse_rows(640))
    train({"a": sae_config()}, source, TrainConfig(), folder=tmp_path)
    path = tmp_path / CHECKPOINT_NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FluxSaeError, match="safetensors"):
        train({"a": sae_config()}, source, TrainConfig(), folder=tmp_path)


def test_several_saes_in_one_pass_equal_each_alone() -> None:
    source, config = MemorySource(sparse_rows(640)), TrainConfig(lr=2e-3)
    configs = {"narrow": sae_config(k=2), "wide": sae_config(k=6), "l1": sae_config("l1")}
    together = train(configs, source, config).saes
    for name, one in configs.items():
        alone = train({name: one}, source, config).saes[name]
        for key, tensor in alone.state_dict().items():
            assert torch.equal(tensor, together[name].state_dict()[key]), (name, key)


def test_checkpoints_follow_the_clock_and_stand_at_a_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda folder, plan, step, states: saved.append(step))
    source, config = MemorySource(sparse_rows(640)), TrainConfig(epochs=2, log_every=4, checkpoint_minutes=0)
    train({"a": sae_config()}, source, config, folder=tmp_path)
    assert saved == [4, 8, 12, 16, 20]
    saved.clear()
    train({"a": sae_config()}, source, replace(config, checkpoint_minutes=10), folder=tmp_path)
    assert saved == [20]


# Feeding


@dataclass
class NotedSource(MemorySource):
    """Notes how many batches were assembled, and by which thread."""

    n_assembled: int = 0
    threads: set[str] = field(default_factory=set)

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        for batch in super().batches(epoch, cursor=cursor):
            self.n_assembled += 1
            self.threads.add(threading.current_thread().name)
            yield batch


def test_the_next_batch_is_assembled_while_a_step_runs() -> None:
    source = NotedSource(sparse_rows(640))

    def wait_for_the_next(done: int, total: int) -> None:
        deadline = time.monotonic() + 5
        while source.n_assembled < min(done + 1, total) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(source.n_assembled)

    seen: list[int] = []
    config = TrainConfig(init_rows=2)
    initial = 1
    train({"a": sae_config()}, source, config, on_step=lambda done, total: wait_for_the_next(done + initial, total + 1))
    assert seen == [min(done + 1, 10) + initial for done in range(1, 11)]


def test_a_source_that_does_not_read_ahead_is_read_by_the_thread_that_trains() -> None:
    source = NotedSource(sparse_rows(640), reads_ahead=False)
    train({"a": sae_config()}, source, TrainConfig())
    assert source.threads == {threading.current_thread().name}


def test_the_log_tells_which_share_of_the_time_steps_waited_for_data(tmp_path: Path) -> None:
    class Slow(MemorySource):
        def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
            for batch in super().batches(epoch, cursor=cursor):
                time.sleep(0.02)
                yield batch

    train({"a": sae_config()}, Slow(sparse_rows(640), reads_ahead=False), TrainConfig(log_every=5), folder=tmp_path)
    shares = [json.loads(line)["wait_share"] for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert all(0.3 < share <= 1 for share in shares)


# Faults


def _with_bad_batch(value: float) -> MemorySource:
    source = MemorySource(sparse_rows(1280))
    clean = source.batches

    def batches(epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        for position, batch in enumerate(clean(epoch, cursor=cursor), start=cursor):
            yield torch.where(torch.arange(len(batch))[:, None] == 3, value, batch) if position == 12 else batch

    source.batches = batches  # type: ignore[method-assign]
    return source


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_with_nan_is_skipped_and_reported_with_its_step(
    tmp_path: Path, architecture: Architecture, value: float
) -> None:
    # Resampled (l1) from that very batch, which is among the first rows too.
    config = TrainConfig(log_every=5, on_nan="skip", resample_every=13, resample_until=1.0)
    sae_configs = {"a": sae_config(architecture, dead_after_tokens=1)}
    sae = train(sae_configs, _with_bad_batch(value), config, folder=tmp_path).saes["a"]
    assert all(torch.isfinite(tensor).all() for tensor in sae.state_dict().values())
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    faults = [event for event in events if event.get("event") == "not finite"]
    assert [(fault["step"], fault["reaction"]) for fault in faults] == [(13, "skipped")]
    assert events[-1]["n_skipped"] == 1


def test_a_batch_with_nan_stops_training_where_so_configured() -> None:
    config = TrainConfig(init_rows=64, on_nan="stop")
    with pytest.raises(FluxSaeError, match="step 13"):
        train({"a": sae_config()}, _with_bad_batch(float("nan")), config)


@pytest.mark.parametrize(("reaction", "n_skipped"), [("report", 0), ("skip", 1)])
def test_a_loss_spike_is_reported_or_skipped(tmp_path: Path, reaction: str, n_skipped: int) -> None:
    config = TrainConfig(log_every=5, init_rows=64, on_spike=reaction)  # type: ignore[arg-type]
    train({"a": sae_config()}, _with_bad_batch(500.0), config, folder=tmp_path)
    events = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [event["step"] for event in events if event.get("event") == "spike"] == [13]
    assert events[-1]["n_skipped"] == n_skipped


def test_data_that_do_not_vary_are_refused() -> None:
    with pytest.raises(FluxSaeError, match="standard deviation"):
        train({"a": sae_config()}, MemorySource(torch.ones(640, D_MODEL)), TrainConfig())


def test_a_width_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FluxSaeError, match=r"d_model 12.*width 7"):
        train({"a": sae_config()}, MemorySource(sparse_rows(640, d_model=7)), TrainConfig())


@pytest.mark.parametrize(
    ("change", "name"), [({"epochs": 0}, "epochs"), ({"lr": -1.0}, "lr"), ({"spike_factor": 1.0}, "spike_factor")]
)
def test_settings_out_of_range_are_named(change: dict[str, float], name: str) -> None:
    with pytest.raises(FluxSaeError, match=name):
        TrainConfig(**change)  # type: ignore[arg-type]


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(lr=1.0, warmup_steps=10, decay_fraction=0.5)
    rates = [config.learning_rate(step, 100, 40) for step in range(100)]
    assert rates[0] < rates[5] < rates[10] == rates[40] == 1.0
    assert rates[50] == 1.0 > rates[60] > rates[99] > 0


# Held out


def test_reference_acts_are_the_99th_percentile_of_positive_acts() -> None:
    sae = SparseAutoencoder(sae_config("l1"))
    images = [sparse_rows(150, seed=seed) for seed in range(4)]
    held_out = HeldOut(sae)
    for image in images:
        held_out.add(image)
    measured = held_out.measure()
    acts = sae.encode(torch.cat(images))
    for feature in range(N_FEATURES):
        positive = acts[:, feature][acts[:, feature] > 0].sort().values
        expected = positive[-(-len(positive) * 99 // 100) - 1] if len(positive) else torch.tensor(0.0)
        torch.testing.assert_close(sae.reference_acts[feature], expected)
    assert measured["n_images"] == 4
    assert measured["n_tokens"] == 600
    assert measured["fvu"] == pytest.approx(fvu(torch.cat(images), sae(torch.cat(images)).x_hat), rel=1e-5)
    assert sum(measured["density_histogram"]["counts"]) + measured["density_histogram"]["silent"] == N_FEATURES


def test_no_held_out_images_is_an_error() -> None:
    with pytest.raises(FluxSaeError, match="held-out"):
        HeldOut(SparseAutoencoder(sae_config())).measure()


# Several processes

_WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, {tests!r})
from test_training import MemorySource, sae_config, sparse_rows
from fluxsae.sae.training import Processes, TrainConfig, train
dist.init_process_group("gloo")
torch.set_num_threads(1)
peers = Processes.current()
configs = {{a: sae_config(a, dead_after_tokens=150, sigma_table=(0.2, 0.8)) for a in ("topk", "matryoshka", "l1")}}
config = TrainConfig(lr=1e-3, precision="float32", resample_every=3)
source = MemorySource(sparse_rows(320), processes=peers, levels=torch.linspace(0.2, 0.8, 320))
saes = train(configs, source, config, processes=peers).saes
if peers.rank == 0:
    torch.save({{name: sae.state_dict() for name, sae in saes.items()}}, {out!r})
dist.destroy_process_group()
"""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_processes_train_what_one_process_trains(tmp_path: Path) -> None:
    out = tmp_path / "weights.pt"
    code = _WORKER.format(tests=str(Path(__file__).parent), out=str(out))
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    workers = [
        subprocess.Popen([sys.executable, "-c", code], env=environment | {"RANK": str(rank)}) for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    together = torch.load(out, weights_only=True)
    architectures: tuple[Architecture, ...] = ("topk", "matryoshka", "l1")
    configs = {a: sae_config(a, dead_after_tokens=150, sigma_table=(0.2, 0.8)) for a in architectures}
    config = TrainConfig(lr=1e-3, precision="float32", resample_every=3)
    source = MemorySource(sparse_rows(320), levels=torch.linspace(0.2, 0.8, 320))
    alone = train(configs, source, config).saes
    for architecture in architectures:
        for name, tensor in alone[architecture].state_dict().items():
            torch.testing.assert_close(
                together[architecture][name], tensor, atol=1e-3, rtol=1e-3,
                msg=lambda text, at=(architecture, name): f"{at}: {text}",
            )  # fmt: skip


# The command that a user runs


@pytest.fixture
def collected_run(tmp_path: Path) -> Path:
    return write_collected_run(tmp_path / "run")


def write_collected_run(path: Path) -> Path:
    """A run folder with the activations of 40 images, 16 tokens each, at two steps of one hook point."""
    generation = GenerationSettings(height=64, width=64, num_inference_steps=20, max_sequence_length=32)
    manifest = ActivationManifest(
        hookpoint="transformer_blocks.3.ff", d_model=D_MODEL, flux_id="tiny", flux_revision=None, settings=generation,
        steps=(2, 6), sigmas=(0.9, 0.7), n_tokens=16, tokens_per_image=16, n_images=40, images_per_shard=20,
        prompts_hash="p", seed=0,
    )  # fmt: skip
    run = RunFolder(path)
    writer = ShardWriter(run.activations_path / manifest.hookpoint, manifest)
    for shard in range(manifest.n_shards):
        tokens = sparse_rows(20 * 2 * 16, seed=shard).reshape(20, 2, 16, D_MODEL).bfloat16()
        writer.write(shard, tokens, torch.arange(16).expand(20, 2, 16))
    run.save_info(RunInfo(flux_id="tiny", settings=generation, hookpoints=(manifest.hookpoint,)))
    return run.path


def test_fit_writes_an_sae_that_knows_its_ground_and_skips_what_is_complete(collected_run: Path) -> None:
    config = FitConfig(
        run=collected_run, hookpoints=("layer3",), steps=(6,), k=(3, 5), batch_size=64, epochs=3, device="cpu"
    )
    assert main(config).word == "done"
    sae = SparseAutoencoder.from_pretrained(collected_run, subfolder="sae/transformer_blocks.3.ff@topk-3")
    assert sae.config.k == 3
    assert (sae.reference_acts > 0).any()
    ground = sae.config.trained_on
    assert ground is not None
    assert (ground.flux_id, ground.steps, ground.sigmas, ground.n_tokens) == ("tiny", (6,), (0.7,), 16)
    measured = RunFolder(collected_run).load_metrics("layer3@topk-3")
    assert measured["n_images"] == 4, "every tenth image is held out"
    assert measured["n_tokens"] == 64, "one step of the two"
    assert measured["l0"] == 3
    assert main(config).word == "skipped"
    with pytest.raises(FluxSaeError, match="other settings"):
        main(replace(config, lr=0.1))


class Apart(Processes):
    """A process of several that never has to talk to the others."""

    def wait(self) -> None:
        pass

    def sum_(self, tensor: Tensor) -> Tensor:
        raise AssertionError("SAEs that were dealt share nothing")


def test_saes_of_a_sweep_are_dealt_to_the_processes_and_come_out_the_same(tmp_path: Path) -> None:
    alone, dealt = (RunFolder(write_collected_run(tmp_path / name)) for name in ("alone", "dealt"))
    config = FitConfig(run=alone.path, k=(3, 5, 7), batch_size=64, epochs=2, device="cpu")
    main(config)
    for rank in (1, 0):
        peers = Apart(rank, 2)
        own = replace(config, run=dealt.path)
        place = HookPoint.parse("layer3")
        fit._fit(own, dealt, fit._from_disk(own, place, peers), fit._asked(own, dealt, None), peers)
    for name in ("layer3@topk-3", "layer3@topk-5", "layer3@topk-7"):
        one, other = (load_tensors(run.sae_path(name) / "model.safetensors") for run in (alone, dealt))
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)
        assert dealt.load_metrics(name) == alone.load_metrics(name)


def test_fit_refuses_what_cannot_be_trained(collected_run: Path) -> None:
    config = FitConfig(run=collected_run, batch_size=64, device="cpu")
    with pytest.raises(FluxSaeError, match="k is 500"):
        main(replace(config, k=(500,)))
    with pytest.raises(FluxSaeError, match="13"):
        main(replace(config, steps=(13,)))
    with pytest.raises(FluxSaeError, match="l1 has no k"):
        main(replace(config, arch="l1", k=(5,)))
    with pytest.raises(FluxSaeError, match="collect"):
        main(replace(config, hookpoints=("layer2",)))
    with pytest.raises(FluxSaeError, match="no activations"):
        main(replace(config, run=collected_run.parent / "elsewhere"))


@pytest.mark.bench
def test_speed_is_not_bought_with_quality() -> None:
    from train.benchmarks.options import QualityConfig
    from train.benchmarks.quality import final_ratio
    from train.benchmarks.quality import main as compare

    assert final_ratio(compare(QualityConfig())) < 1.01


@pytest.mark.bench
def test_training_is_faster_than_every_other_tool(tmp_path: Path) -> None:
    from train.benchmarks.options import TrainingConfig
    from train.benchmarks.training import Shape
    from train.benchmarks.training import main as benchmark

    results = benchmark(TrainingConfig(output=tmp_path / "results.json"))
    best: dict[tuple[Shape, bool], float] = {}
    for result in results:
        key = (result.shape, result.tool == "fluxsae")
        best[key] = min(best.get(key, float("inf")), result.median)
    ratios = {shape: best[shape, False] / best[shape, True] for shape, _ in best}
    print("\n".join(f"{shape}: {ratio:.2f} times the fastest other tool" for shape, ratio in ratios.items()))
    assert all(ratio > 1 for ratio in ratios.values())


def test_an_sae_that_skipped_most_of_its_batches_is_not_returned() -> None:
    rows = sparse_rows(320)
    rows[64:] = torch.nan
    with pytest.raises(FluxSaeError, match=r"skipped \d+ of \d+ batches: they or their gradients hold NaN"):
        train({"a": sae_config()}, MemorySource(rows), TrainConfig(init_rows=64, on_nan="skip"))
