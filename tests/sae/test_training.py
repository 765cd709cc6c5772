"""Training: exact resume, feeding, faults, held-out images, several processes."""

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
from training_data import D_MODEL, N_FEATURES, MemorySource, sae_config, sparse_rows

from fluxsae.errors import FluxSaeError
from fluxsae.files import load_tensors
from fluxsae.sae.config import ARCHITECTURES, Architecture
from fluxsae.sae.metrics import fvu
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import HeldOut, TrainConfig, loop, train
from fluxsae.sae.training.checkpoints import CHECKPOINT_NAME, LOG_NAME

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
from training_data import MemorySource, sae_config, sparse_rows
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


def test_an_sae_that_skipped_most_of_its_batches_is_not_returned() -> None:
    rows = sparse_rows(320)
    rows[64:] = torch.nan
    with pytest.raises(FluxSaeError, match=r"skipped \d+ of \d+ batches: they or their gradients hold NaN"):
        train({"a": sae_config()}, MemorySource(rows), TrainConfig(init_rows=64, on_nan="skip"))
