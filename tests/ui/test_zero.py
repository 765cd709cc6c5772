"""ZeroGPU without a GPU: jobs in another process, by a double of the `spaces` package."""

import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from doubles import spaces

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.serve import session, zero
from fluxsae.ui.serve.guard import guarded
from fluxsae.ui.serve.lane import Done, StepDone
from fluxsae.ui.serve.schemas import DirectionsRequest, ExplainRequest
from fluxsae.ui.serve.session import ReadJob, Workbench
from fluxsae.ui.tabs.directions.desk import DirectionsDesk
from fluxsae.ui.tabs.heatmap.why import ExplainJob
from fluxsae.ui.tabs.steer.job import SteerJob
from fluxsae.ui.tabs.steer.swap import SwapJob

PROMPT = "a large red circle on a black background"
LATE = "transformer_blocks.3"


class GuardedWorkbench(Workbench):
    """A workbench whose models belong to the processes that have the GPU, once it is served."""

    is_served_by = 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("pipe", "saes", "distance") and object.__getattribute__(self, "is_served_by") == os.getpid():
            raise AssertionError(f"{name} was touched outside of a GPU function")
        return super().__getattribute__(name)


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line for each time that CLIP or the distance was loaded, in whatever process."""
    return tmp_path_factory.mktemp("loads") / "log.txt"


@contextmanager
def lent_bench(loads: Path) -> Iterator[Workbench]:
    """The embedded run on a Space that borrows its GPU."""

    def noted(load: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            note(loads, load.__name__)
            return load(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "spaces", spaces)
        for name in ("load_embedder", "load_distance"):
            patch.setattr(session, name, noted(getattr(session, name)))
        bench = GuardedWorkbench(RunFolder(miniature_path("run")), source="embedded")
        zero.serve(bench)
        bench.is_served_by = os.getpid()
        yield bench
    spaces.end_workers()


@pytest.fixture(scope="module")
def bench(loads: Path) -> Iterator[Workbench]:
    with lent_bench(loads) as found:
        yield found


def note(log: Path, word: str) -> None:
    with log.open("a") as file:
        file.write(f"{word}\n")


def value(bench: Workbench, job: Any) -> Any:
    last = list(bench.lane.stream(job, bench))[-1]
    assert isinstance(last, Done)
    return last.value


@dataclass(frozen=True)
class Sized:
    """How much a job asks for."""

    passes: int = 1
    n_pictures: int = 1

    def n_passes(self, bench: Workbench) -> int:
        return self.passes


@dataclass(frozen=True)
class Raising(Sized):
    """Fails."""

    error: Exception | None = None

    def run(self, bench: Workbench, on_step: Callable[[int, int], None]) -> None:
        assert self.error is not None
        raise self.error


@dataclass(frozen=True)
class Noting(Sized):
    """Takes a while to begin a step and to clear up, and notes both ends."""

    log: Path = Path()

    def run(self, bench: Workbench, on_step: Callable[[int, int], None]) -> None:
        note(self.log, "in")
        try:
            for step in range(3):
                time.sleep(0.05)
                on_step(step, 3)
        finally:
            time.sleep(0.2)
            note(self.log, "out")


def steer_job(strength: float) -> SteerJob:
    edit = SteeringEdit(HookPoint.parse(LATE), 0, "scale", strength)
    return SteerJob(((), (edit,)), PROMPT, 0, 20)


def test_an_image_is_made_in_another_process_and_is_the_one_of_this_process(bench: Workbench) -> None:
    plain, job = Workbench(RunFolder(miniature_path("run")), source="embedded"), ReadJob(PROMPT, 0, 20)
    expected, found = job.run(plain, lambda *_: None), value(bench, job)
    assert found.image.tobytes() == expected.image.tobytes()
    for name, maps in expected.maps.items():
        np.testing.assert_array_equal(found.maps[name].values, maps.values)


def compare_explanations(loads: str) -> None:
    """One of another process beside one of this process, which must not have taken any gradient before it forks."""
    with lent_bench(Path(loads)) as bench:
        red = bench.cards[LATE].named()["red"][0]
        job = ExplainJob(ExplainRequest.parse(bench.limits, prompt=PROMPT, feature=red, limit=2))
        found, passes = value(bench, job), list[tuple[int, int]]()
        plain = Workbench(RunFolder(miniature_path("run")), source="embedded")
        expected = job.run(plain, lambda step, n_steps, view=None: passes.append((step, n_steps)))
        assert found.explanation.to_dict() == expected.explanation.to_dict()
        assert [n for n, _ in passes] == list(range(passes[0][1]))
        assert b"torch" not in pickle.dumps(found), "results hold no tensors"


def test_an_explanation_is_made_in_another_process_and_is_the_one_of_this_process(tmp_path: Path) -> None:
    code = f"import test_zero; test_zero.compare_explanations({str(tmp_path / 'loads.txt')!r})"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parent, *Path(__file__).parents[1:3]])),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_refusal_keeps_its_words(bench: Workbench) -> None:
    with pytest.raises(FluxSaeError, match=r"^seed is -1; give another\.$"):
        value(bench, Raising(error=FluxSaeError("seed is -1; give another.")))


def test_a_fault_is_an_apology_whose_reference_leads_to_its_traceback(
    bench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(gr.Error) as shown:
        guarded(value)(bench, Raising(error=RuntimeError("/secret/path")))
    reference = shown.value.message.rsplit(" ", 1)[1].rstrip(".")
    assert "secret" not in shown.value.message
    assert reference in caplog.text
    assert "in run\n    raise self.error" in caplog.text
    assert "RuntimeError: /secret/path" in caplog.text


def test_a_stopped_job_has_ended_when_the_next_one_begins(bench: Workbench, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    stream = bench.lane.stream(Noting(log=log), bench)
    assert next(stream) == StepDone(1, 3)
    stream.close()
    value(bench, Noting(log=log))
    assert log.read_text().split() == ["in", "out", "in", "out"]


def test_clip_and_the_distance_are_loaded_once_for_all_processes(bench: Workbench, loads: Path) -> None:
    before = loads.read_text()
    assert sorted(before.split()) == ["load_distance", "load_embedder"]
    for strength in (2.0, 3.0):
        steered = value(bench, steer_job(strength))
        assert steered.measurements[1]["clip_change"] is not None
        assert b"torch" not in pickle.dumps(steered), "results hold no tensors"
    assert loads.read_text() == before


def test_a_lock_that_is_held_while_the_process_forks_is_not_waited_for(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spaces, "PATIENCE", 20.0)
    lent = spaces.GPU(duration=zero.seconds_of)(zero.run_job)  # a process of its own, forked now
    with bench._embedder_lock:
        *_, last = lent(bench.source, steer_job(2.0))
    assert isinstance(last, Done)


def test_browsing_touches_no_model_of_the_gpus(bench: Workbench) -> None:
    request = DirectionsRequest.parse(bench.limits, hookpoint=LATE, feature=0, n_neighbours=50)
    found, _ = DirectionsDesk(bench).directions(request)
    assert len(found) == 50, "more than the run has stored"


def test_the_seconds_asked_for_follow_the_work(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces.requested.clear()
    value(bench, steer_job(2.0))
    sweep = replace(steer_job(2.0), variants=steer_job(2.0).variants * 4)
    swap = SwapJob(LATE, "red", "blue", (0,), (1,), (), PROMPT, 0, 20)
    jobs = [ReadJob(PROMPT, 0, 20), steer_job(2.0), sweep, swap]
    seconds = [zero.seconds_of(bench.source, job) for job in jobs]
    assert seconds == sorted(set(seconds)), "an image, two, eight, ten"
    assert spaces.requested == [seconds[1]]
    dev = replace(zero._served[bench.source], start_seconds=10.0, pass_seconds=0.6)
    monkeypatch.setitem(zero._served, bench.source, dev)
    assert zero.seconds_of(bench.source, ReadJob(PROMPT, 0, 28)) == math.ceil(10 + 28 * 0.6 + 1)
    assert zero.seconds_of(bench.source, sweep) == math.ceil(10 + 8 * (20 + 2) * 0.6 + 8)


def test_a_pass_is_counted_as_in_the_benchmark() -> None:
    # FLUX.1-dev at 1024 x 1024: N = 4096 + 512 = 4608, C = 3072: 57 * (24 * 3072^2 * 4608 + 4 * 4608^2 * 3072)
    transformer = SimpleNamespace(transformer_blocks=[0] * 19, single_transformer_blocks=[0] * 38, inner_dim=3072)
    info = SimpleNamespace(rows=64, cols=64, settings=GenerationSettings())
    bench: Any = SimpleNamespace(pipe=SimpleNamespace(transformer=transformer), info=info)
    assert zero.pass_operations(bench) == pytest.approx(74.36e12, rel=1e-3)
    info.settings = GenerationSettings(true_cfg_scale=4.0)
    assert zero.pass_operations(bench) == pytest.approx(2 * 74.36e12, rel=1e-3)


def test_a_refusal_for_want_of_quota_says_what_it_means(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(spaces.QUOTA, "2")
    with pytest.raises(FluxSaeError, match=r"yours are used up.*Gallery, Directions.*requested vs\. 2s left"):
        value(bench, ReadJob(PROMPT, 1, 20))
