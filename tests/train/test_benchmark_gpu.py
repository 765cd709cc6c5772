"""The full-size benchmark: its program on a tiny model, its floors by hand, its shapes at full size without memory."""

import json
import time

import pytest
import torch

from fluxsae.errors import FluxSaeError
from train.benchmarks.gpu import flux_work
from train.benchmarks.gpu.__main__ import main
from train.benchmarks.gpu.clock import alternate
from train.benchmarks.gpu.floors import early_exit_share, step_operations, sweep_share, training_operations
from train.benchmarks.gpu.models import DEV, parameter_count
from train.benchmarks.options import GROUPS, GpuConfig


def test_every_group_runs_on_a_tiny_model_and_is_on_disk_with_its_floor(tmp_path):
    report = main(GpuConfig(out=tmp_path, tiny=True, repeats=1, compile_backend="eager"))
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["skipped"] == report.skipped == {}
    rows = {row["name"]: row for row in saved["rows"]}
    assert rows["one step, plain"]["value"] > rows["one step, plain"]["floor"] > 0
    assert {f"one step with one edit, {mode}" for mode in flux_work.MODES} <= set(rows)
    assert rows["same call twice, largest difference of latents"]["value"] == 0
    assert all(row["target"] == "" and row["is_met"] is None for row in saved["rows"]), "a tiny model meets no target"
    assert (tmp_path / "results.md").read_text().count("\n|") >= len(saved["rows"])


def test_a_spent_budget_skips_and_says_so(tmp_path):
    report = main(GpuConfig(out=tmp_path, tiny=True, budget_seconds=0.0))
    assert list(report.skipped) == list(GROUPS)
    assert "budget of 0 s" in (tmp_path / "results.md").read_text()


def test_a_fault_in_one_group_is_reported_and_costs_no_other(tmp_path, monkeypatch):
    def fail(bench):
        raise RuntimeError("out of luck\nsecond line")

    monkeypatch.setattr(flux_work, "measure_steps", fail)
    report = main(GpuConfig(out=tmp_path, tiny=True, repeats=1, only=("steps", "determinism")))
    assert report.skipped == {"steps": "RuntimeError: out of luck"}
    assert any("same call twice" in row.name for row in report.rows)


def test_an_unknown_group_and_a_missing_gpu_are_refused(tmp_path):
    with pytest.raises(FluxSaeError, match=r"Unknown groups speed\. Allowed are steps, "):
        main(GpuConfig(out=tmp_path, tiny=True, only=("speed",)))
    if not torch.cuda.is_available():
        with pytest.raises(FluxSaeError, match="CUDA device"):
            main(GpuConfig(out=tmp_path))


def test_flux_dev_has_twelve_billion_parameters_counted_without_memory():
    assert parameter_count(DEV) == 11_901_408_320


def test_floors_are_those_worked_out_by_hand():
    # N = 4096 + 512 = 4608, C = 3072: 57 * (24 * 3072^2 * 4608 + 4 * 4608^2 * 3072) = 74.4e12
    assert step_operations(DEV, n_text=512, n_image=4096) == pytest.approx(74.36e12, rel=1e-3)
    # (13 whole steps + 16 of 57 blocks) of 28 steps
    assert early_exit_share(DEV, step=13, block=15) == pytest.approx((13 + 16 / 57) / 28)
    # 14 shared steps and 7 * 14 own ones, of 7 * 28
    assert sweep_share(6, first_step=14, n_steps=28) == pytest.approx(112 / 196)
    # 10 * 3072 * 12288 = 377M operations a token
    assert training_operations(1, 3072, 12288) == pytest.approx(377e6, rel=2e-3)


def test_work_is_timed_by_turns_and_back_again():
    order: list[str] = []
    works = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = alternate(works, device=torch.device("cpu"), repeats=2)
    assert "".join(order) == "abc" + "abc" + "cba", "a run of each to warm up, then forwards, then backwards"
    assert all(len(timing.samples) == 2 for timing in timings.values())


def test_a_deadline_ends_the_rounds_after_a_whole_one():
    works = {name: (lambda: None) for name in "ab"}
    timings = alternate(works, device=torch.device("cpu"), repeats=50, deadline=time.monotonic() - 1)
    assert [len(timing.samples) for timing in timings.values()] == [1, 1]
