"""`torchrun` with two processes: the bytes of one process, and a process that dies is restarted (`-m bench`)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_survival import contents
from training_data import write_collected_run

from fluxsae.files import load_tensors
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.training.checkpoints import CHECKPOINT_NAME, LOG_NAME

pytestmark = pytest.mark.bench

PLACE = "transformer_blocks.3.ff"


def start(script: str, *options: object, processes: int) -> "subprocess.Popen[bytes]":
    """A script of `train`, by itself or under torchrun."""
    torchrun = f"torch.distributed.run --standalone --nproc-per-node {processes} --max-restarts 3 -m --".split()
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), f"train.{script}", *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2])


def finish(script: str, *options: object, processes: int) -> None:
    assert start(script, *options, processes=processes).wait(timeout=1800) == 0


def test_two_processes_collect_and_score_the_bytes_of_one(tiny_flux_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {word} star" for word in ("red", "blue", "green", "pink")))
    flux = ("--flux", tiny_flux_folder, "--prompts", prompts, "--device", "cpu", "--batch-size", 2)
    one, two = tmp_path / "one", tmp_path / "two"
    for run, processes in ((one, 1), (two, 2)):
        options = ("--images", 14, "--images-per-shard", 3, "--steps", 1, 3)
        finish("collect", "--run", run, *flux, *options, processes=processes)
    assert contents(one) == contents(two)
    finish("fit", "--run", one, "--k", 4, "--epochs", 2, "--batch-size", 64, "--device", "cpu", processes=1)
    shutil.rmtree(two)
    shutil.copytree(one, two)
    for run, processes in ((one, 1), (two, 2)):
        options = ("--images", 14, "--images-per-part", 3, "--n-top", 3)
        finish("score", "--run", run, *flux, *options, processes=processes)
    assert contents(one) == contents(two)
    assert RunFolder(two).images_path.is_file()


def test_a_process_killed_in_training_is_restarted_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed, whole = (write_collected_run(tmp_path / name) for name in ("killed", "whole"))
    options = (
        "--k",
        4,
        "--epochs",
        120,
        "--batch-size",
        64,
        "--checkpoint-minutes",
        0,
        "--log-every",
        25,
        "--device",
        "cpu",
    )
    training = start("fit", "--run", killed, *options, processes=2)
    work = RunFolder(killed).work_path("fit") / PLACE
    wait_for(work / CHECKPOINT_NAME, training)
    workers = psutil.Process(training.pid).children()
    (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    os.kill(second.pid, signal.SIGKILL)
    killed_at = time.time()
    assert training.wait(timeout=1800) == 0
    lines = [json.loads(line) for line in (work / LOG_NAME).read_text().splitlines()]
    assert lines[0]["time"] < killed_at < lines[-1]["time"], "continued, neither anew nor unharmed"
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    finish("fit", "--run", whole, *options, processes=2)
    weights = [load_tensors(RunFolder(run).sae_path(PLACE) / "model.safetensors") for run in (killed, whole)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    """Returns once the file is there and the process still runs."""
    deadline = time.monotonic() + 600
    while not path.is_file():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)
