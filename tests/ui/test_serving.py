"""The services behind the page: the lane, jobs, cache, visitors, errors, and runs that cannot be served."""

import asyncio
import contextlib
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr
import page_server
import pytest
import starlette.requests
import whole_run
from desk_data import LATE, reading

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature.scenes import ATTRIBUTES, vocabulary
from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.kit.shell import with_progress
from fluxsae.ui.serve.guard import guarded, visitor_of, without_folders
from fluxsae.ui.serve.kept import ResultCache
from fluxsae.ui.serve.lane import Cancelled, Done, FluxLane, Pending, StepDone, Waiting
from fluxsae.ui.serve.session import ReadJob, Workbench
from fluxsae.ui.serve.shelf import open_shelf
from fluxsae.ui.serve.visitors import MAX_PENDING, WINDOW, VisitorLimits
from fluxsae.ui.tabs.gallery.desk import GalleryDesk
from fluxsae.ui.tabs.steer.job import SteerJob


def test_a_users_mistake_is_shown_and_ours_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as shown:
        guarded(fail)(FluxSaeError("<b>seed</b> is -1"))
    assert "&lt;b&gt;seed&lt;/b&gt; is -1" in shown.value.message
    with pytest.raises(gr.Error) as hidden:
        guarded(fail)(RuntimeError("/secret/path token=abc"))
    reference = hidden.value.message.rsplit(" ", 1)[1].rstrip(".")
    assert "secret" not in hidden.value.message
    assert reference in caplog.text


@dataclass(frozen=True)
class Counting:
    """A job of steps that notes what it does."""

    n_steps: int
    seen: list[Any]
    before_step: Callable[[int], None] = lambda step: None
    n_pictures: int = 1

    def run(self, bench: Any, on_step: Callable[[int, int], None]) -> str:
        self.seen.append("in")
        try:
            for step in range(self.n_steps):
                self.before_step(step)
                self.seen.append(step)
                on_step(step, self.n_steps)
            return "whole"
        finally:
            self.seen.append("out")


def told(events: Iterable[Any]) -> list[Any]:
    """What is told, without the pauses."""
    return [event for event in events if not isinstance(event, Pending)]


def test_the_lane_tells_each_step_and_then_the_result() -> None:
    events = told(FluxLane().stream(Counting(3, []), None))
    assert events == [StepDone(1, 3), StepDone(2, 3), StepDone(3, 3), Done("whole")]


def test_a_cancelled_job_ends_within_one_step_and_the_next_one_is_whole() -> None:
    lane, gate, seen = FluxLane(), threading.Semaphore(1), []
    stream = lane.stream(Counting(20, seen, lambda step: gate.acquire(timeout=5) and None), None)
    assert next(event for event in stream if not isinstance(event, Pending)) == StepDone(1, 20)
    stream.close()
    gate.release(20)
    assert list(lane.stream(Counting(2, []), None))[-1] == Done("whole")
    assert [item for item in seen if isinstance(item, int)] in ([0], [0, 1])
    assert seen[-1] == "out"


def test_an_error_in_a_job_reaches_the_visitor_and_the_lane_goes_on() -> None:
    lane = FluxLane()

    def explode(step: int) -> None:
        raise FluxSaeError("no")

    with pytest.raises(FluxSaeError, match="no"):
        list(lane.stream(Counting(1, [], explode), None))
    assert list(lane.stream(Counting(1, []), None))[-1] == Done("whole")


def test_cancelled_is_no_error_that_a_handler_could_swallow() -> None:
    assert not issubclass(Cancelled, Exception)


def test_jobs_and_results_can_be_sent_to_another_process(bench: Workbench) -> None:
    edit = SteeringEdit(HookPoint.parse(LATE), 3, "add", 1.0)
    for job in (ReadJob("a circle", 0, 20), SteerJob(((), (edit,)), "a circle", 0, 20, -1)):
        assert pickle.loads(pickle.dumps(job)) == job
        assert hash(job) == hash(pickle.loads(pickle.dumps(job)))
        assert job.n_passes(bench) >= 20 * job.n_pictures
    assert pickle.loads(pickle.dumps(reading())).prompt == "a circle"


def test_the_cache_keeps_the_latest_within_its_bound() -> None:
    cache = ResultCache(max_bytes=100, max_entries=3)
    for key in "abcd":
        cache.put(key, key, n_bytes=10)
    assert (cache.get("a"), cache.get("d"), len(cache)) == (None, "d", 3)
    cache.put("large", "large", n_bytes=95)
    assert len(cache) == 1


def test_visitors_share_flux_and_the_share_comes_back() -> None:
    now = [0.0]
    limits = VisitorLimits(2, clock=lambda: now[0])
    for visitor, images in (("ann", 2), ("bob", 1)):
        with limits.share(visitor, images) as share:
            share.made(1.0)
    with limits.share("bob"):
        pass
    with pytest.raises(FluxSaeError, match="You can continue in 600 s"), limits.share("ann"):
        pass
    now[0] = WINDOW + 1
    with limits.share("ann"):
        pass


def test_work_that_was_stopped_counts_as_far_as_it_was_made() -> None:
    limits = VisitorLimits(10)
    with limits.share("ann", 8) as share:
        share.made(0.3)  # the third of eight was begun
    with limits.share("ann", 7):
        pass
    with pytest.raises(FluxSaeError, match="You made 3 images"), limits.share("ann", 8):
        pass


def test_what_waits_counts_and_is_bounded_for_one_visitor_and_not_for_others() -> None:
    limits = VisitorLimits(10)
    with contextlib.ExitStack() as waiting:
        waiting.enter_context(limits.share("ann", 6))
        with pytest.raises(FluxSaeError, match="this is 5 more"):
            waiting.enter_context(limits.share("ann", 5))
        for _ in range(MAX_PENDING - 1):
            waiting.enter_context(limits.share("ann"))
        with pytest.raises(FluxSaeError, match="4 of your requests wait for FLUX"):
            waiting.enter_context(limits.share("ann"))
        waiting.enter_context(limits.share("bob", 10))
    with limits.share("ann", 10):
        pass


def test_who_waits_is_told_the_place_and_leaves_at_once() -> None:
    lane, gate = FluxLane(), threading.Semaphore(0)
    first = lane.stream(Counting(1, [], lambda step: gate.acquire(timeout=5) and None), None)
    next(first)
    streams = [lane.stream(Counting(1, []), None) for _ in range(2)]
    assert [next(stream) for stream in streams] == [Waiting(1), Waiting(2)]
    streams[0].close()
    assert next(streams[1]) == Waiting(1)
    gate.release()
    assert told(first)[-1] == told(streams[1])[-1] == Done("whole")


def test_a_generator_that_waits_holds_no_thread_and_hears_a_cancel_at_once() -> None:
    lane, gate = FluxLane(), threading.Event()
    job = Counting(1, [], lambda step: gate.wait(10) and None)

    @guarded
    def work() -> Iterator[Any]:
        yield from lane.stream(job, None)

    async def scenario() -> int:
        asked = [work() for _ in range(5)]
        tasks = [asyncio.ensure_future(anext(one)) for one in asked]
        await asyncio.sleep(0.2)
        busy = anyio.to_thread.current_default_thread_limiter().borrowed_tokens
        for task in tasks:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 2)
        gate.set()
        return int(busy)

    assert page_server.in_a_thread(asyncio.run, scenario()) == 0


@pytest.mark.parametrize(
    ("proxies", "lines", "visitor"),
    [
        ("0", ["6.6.6.6"], "10.0.0.9"),
        ("1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        ("1", ["6.6.6.6", "1.2.3.4"], "1.2.3.4"),
        ("2", ["6.6.6.6, 1.2.3.4, 10.0.0.7"], "1.2.3.4"),
        ("2", ["1.2.3.4"], "10.0.0.9"),
        ("1", [], "10.0.0.9"),
    ],
)
def test_a_visitor_is_who_the_outermost_trusted_proxy_saw(
    monkeypatch: pytest.MonkeyPatch, proxies: str, lines: list[str], visitor: str
) -> None:
    monkeypatch.setenv("FLUXSAE_PROXIES", proxies)
    headers = [(b"x-forwarded-for", line.encode()) for line in lines]
    scope = {"type": "http", "headers": headers, "client": ("10.0.0.9", 1)}
    assert visitor_of(gr.Request(starlette.requests.Request(scope))) == visitor


@dataclass(frozen=True)
class Sized:
    """A job of some passes, refused where it says so."""

    passes: int
    n_pictures: int = 0
    refusal: str = ""

    def n_passes(self, bench: Any) -> int:
        return self.passes

    @property
    def n_bytes(self) -> int:
        return 1

    def run(self, bench: Any, on_step: Callable[[int, int], None]) -> "Sized":
        if self.refusal:
            raise FluxSaeError(self.refusal)
        return self


def test_what_is_made_counts_by_its_passes_and_what_is_kept_or_refused_does_not(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "visitors", VisitorLimits(4))
    steps = bench.limits.default_steps
    with pytest.raises(FluxSaeError, match="no such step"):
        list(bench.cached(Sized(100 * steps, refusal="no such step")))
    for _ in range(3):
        list(bench.cached(Sized(3 * steps)))  # counts as three images, once
    list(bench.cached(Sized(1)))
    with pytest.raises(FluxSaeError, match="You made 4 images in ten minutes"):
        list(bench.cached(Sized(2)))
    assert list(bench.cached(Sized(1))) == [Done(Sized(1))]


def test_the_miniatures_words_are_told_and_anothers_are_not(bench: Workbench, tmp_path: Path) -> None:
    words = {word for words in bench.vocabulary.values() for word in words}
    assert words == {word for words in ATTRIBUTES.values() for word in words}
    assert set(" ".join(phrase for words in bench.vocabulary.values() for phrase in words.values()).split()) <= set(
        vocabulary()
    )
    assert Workbench(whole_run.build(tmp_path / "run", flux_id="someone/flux")).vocabulary == {}


def test_browsing_never_imports_diffusers(bench: Workbench) -> None:
    program = (
        "import sys\n"
        "from fluxsae.runs.folder import RunFolder\n"
        "from fluxsae.ui.serve.session import Workbench\n"
        "from fluxsae.ui.build import build_app\n"
        "from fluxsae.ui.serve.shelf import Shelf\n"
        "from fluxsae.ui.tabs.gallery.desk import GalleryDesk\n"
        "from fluxsae.ui.tabs.directions.desk import DirectionsDesk\n"
        f"bench = Workbench(RunFolder({str(bench.run.path)!r}))\n"
        "build_app(Shelf([bench]))\n"
        f"chosen = {{'hookpoint': {LATE!r}, 'feature': 3}}\n"
        "assert GalleryDesk(bench).page(chosen) and DirectionsDesk(bench).near(chosen)\n"
        f"assert DirectionsDesk(bench).map({LATE!r})\n"
        "loaded = [name for name in sys.modules if name.split('.')[0] == 'diffusers']\n"
        "assert not loaded, loaded[:3]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_a_run_whose_flux_is_not_here_can_be_browsed_and_says_once_what_cannot_be_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_run.build(tmp_path / "run", flux_id="black-forest-labs/FLUX.1-dev")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    shelf = open_shelf(str(tmp_path / "run"))
    assert list(shelf.runs) == ["run", "miniature"], "so that something can be painted"
    bench = shelf.first
    assert "needs a GPU" in bench.notice
    assert GalleryDesk(bench).gallery("", LATE, "any", False, "best")["cards"]
    with pytest.raises(FluxSaeError, match="needs a GPU"):
        next(bench.read("a circle", 0, 20))


@pytest.mark.parametrize("missing", ["no/such/folder/here", "/srv/runs/mine", "./mine", "mine"])
def test_a_folder_that_is_not_there_is_said_to_be_missing_and_not_sought_on_the_hub(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxsae.publishing.publish.pull_run", lambda *_: pytest.fail("the Hub was asked"))
    shelf = open_shelf(missing)
    assert shelf.first.is_miniature
    assert "no such folder" in shelf.first.notice
    assert "/srv" not in shelf.first.notice


def test_runs_stand_side_by_side_and_one_that_is_lost_is_told_on_the_first(tmp_path: Path) -> None:
    for folder in ("one", "other/one"):
        whole_run.build(tmp_path / folder, n_images=8)
    shelf = open_shelf(f"{tmp_path / 'one'}, {tmp_path / 'gone'}, {tmp_path / 'other/one'}")
    assert list(shelf.runs) == ["one", "one-2"]
    assert "gone cannot be shown here" in shelf.first.notice
    assert str(tmp_path) not in shelf.first.notice
    first, second = shelf.runs.values()
    assert second.lane is first.lane
    assert second.fluxes is first.fluxes
    assert shelf.pick(None) is first
    with pytest.raises(FluxSaeError, match="run is 'two'; give one of one, one-2"):
        shelf.pick("two")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/my runs/a/features.parquet lacks a column", "features.parquet lacks a column"),
        ("read ~/.cache/huggingface/hub/x.json, or /tmp/y/z", "read x.json, or z"),
        ("see https://huggingface.co/a/b and /steer", "see https://huggingface.co/a/b and /steer"),
        ("transformer_blocks.3.ff of user/name", "transformer_blocks.3.ff of user/name"),
    ],
)
def test_no_folder_of_this_machine_is_shown(text: str, shown: str) -> None:
    assert without_folders(text) == shown


def test_progress_names_what_is_dimmed_until_it_is_made() -> None:
    told = [status for status, _ in with_progress([StepDone(1, 2), StepDone(2, 2), Done("made")], makes="steer-result")]
    assert [status.get("makes") for status in told] == ["steer-result", "steer-result", None]
    assert [status["state"] for status in told] == ["working", "working", "idle"]
