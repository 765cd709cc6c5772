"""Killed at random moments by `kill -9`, long stages end with the bytes of an uninterrupted run (`-m bench`)."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxsae.runs.folder import RunFolder

pytestmark = pytest.mark.bench

N_KILLS = int(os.environ.get("FLUXSAE_KILLS", "20"))
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train.collect", "train.fit", "train.score", "fluxsae.features.scoring"])


def _collect(values: dict[str, Any]) -> None:
    from train import collect

    options = {"images": 40, "images_per_shard": 4, "batch_size": 4, "steps": (1, 3)}
    collect.main(collect.CollectConfig(**values, **options))


def _fit(values: dict[str, Any]) -> None:
    from train import fit

    options = {"epochs": 12, "batch_size": 64, "k": (4,), "n_features": 64, "init_rows": 64}
    options |= {"checkpoint_minutes": 0, "log_every": 7}
    fit.main(fit.FitConfig(run=values["run"], **options))


def _score(values: dict[str, Any]) -> None:
    from train import score

    score.main(score.ScoreConfig(**values, images=40, images_per_part=4, batch_size=4, n_top=3))


STAGES: dict[str, Callable[[dict[str, Any]], None]] = {"collect": _collect, "fit": _fit, "score": _score}


def run_stage(name: str, values: dict[str, Any], *, kill_after: float | None = None) -> tuple[float, bool]:
    """Runs a stage in its own process, killed after some seconds if asked; how long it took, whether it was killed."""
    process = _FORKS.Process(target=STAGES[name], args=(values,))
    start = time.perf_counter()
    process.start()
    process.join(kill_after)
    is_killed = process.is_alive()
    if is_killed:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    else:
        assert process.exitcode == 0
    return time.perf_counter() - start, is_killed


def contents(run: Path) -> dict[str, bytes]:
    """Every file but run.json (which holds seconds) and what belongs to work in progress."""
    files = (file for file in run.rglob("*") if file.is_file() and file.name not in ("run.json", "config.json"))
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(files) if ".work" not in file.parts}


@pytest.fixture(scope="module")
def whole(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an uninterrupted run, as each stage left it."""
    root = tmp_path_factory.mktemp("survival")
    prompts = root / "prompts.txt"
    prompts.write_text("\n".join(f"a {word} star" for word in ("red", "blue", "green", "pink")))
    folders = {"start": root / "start"}
    (root / "start").mkdir()
    for name, before in zip(STAGES, ["start", *STAGES], strict=False):
        folders[name] = root / name
        shutil.copytree(folders[before], folders[name])
        values = {"flux": str(tiny_flux_folder), "run": folders[name], "prompts": prompts}
        run_stage(name, values)
    return folders


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(STAGES))
def test_a_killed_stage_ends_with_the_bytes_of_an_uninterrupted_one(
    name: str, whole: dict[str, Path], tiny_flux_folder: Path, tmp_path: Path
) -> None:
    before = {"collect": "start", "fit": "collect", "score": "fit"}[name]
    values = {"flux": str(tiny_flux_folder), "run": tmp_path / "run", "prompts": whole["start"].parent / "prompts.txt"}
    shutil.copytree(whole[before], values["run"])
    seconds, _ = run_stage(name, values)
    expected, moments = contents(whole[name]), random.Random(0)
    assert contents(values["run"]) == expected
    n_killed = unfinished = 0
    while n_killed < N_KILLS:
        shutil.rmtree(values["run"])
        shutil.copytree(whole[before], values["run"])
        took, is_killed = run_stage(name, values, kill_after=moments.uniform(0.1, 1.0) * seconds)
        if not is_killed:
            seconds = took  # a busy machine made the earlier run slow
            continue
        n_killed += 1
        unfinished += name not in RunFolder(values["run"]).load_info().stages if _has_info(values["run"]) else 1
        run_stage(name, values)
        assert contents(values["run"]) == expected
    print(f"{name}: killed {N_KILLS} times, {unfinished} of them unfinished; {len(expected)} files equal every time")
    assert unfinished > N_KILLS // 3


def _has_info(run: Path) -> bool:
    return (run / "run.json").is_file()
