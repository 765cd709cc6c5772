"""The rehearsal at true widths: what it builds, how it goes on after a stop, and the whole of it on a small model."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from train.benchmarks import feeding
from train.benchmarks.gpu.models import DEV, TINY, parameter_count
from train.benchmarks.options import FeedingConfig, RehearsalConfig
from train.benchmarks.rehearsal import __main__ as rehearsal
from train.benchmarks.rehearsal.clock import Timing, timed_program
from train.benchmarks.rehearsal.models import SCALES, known_words


def test_the_rehearsed_flux_has_the_true_widths_and_two_blocks_of_a_kind() -> None:
    scale = SCALES["flux1-dev"]
    shorter = {"num_layers": 2, "num_single_layers": 2}
    assert scale.transformer == DEV.transformer | shorter
    assert (scale.vae, scale.clip) == (DEV.vae, DEV.clip)
    assert (scale.d_model, scale.t5["d_model"], scale.n_features) == (3072, 4096, 12_288)
    assert scale.settings.height != scale.settings.width
    assert 0.9e9 < parameter_count(scale) < 1.1e9
    assert len(known_words(SCALES["tiny"])) == TINY.t5["vocab_size"] - 6


def test_a_stopped_rehearsal_goes_on_and_clears_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def parts(config: RehearsalConfig, folder: Path) -> rehearsal.Parts:
        def work(name: str) -> list[Timing]:
            ran.append(name)
            if ran == ["build", "collect"]:
                raise FluxSaeError("the disk is full")
            return [Timing(name, 61.25, 3.0, "a note")]

        return {name: lambda name=name: work(name) for name in ("build", "collect", "page")}  # type: ignore[misc]

    monkeypatch.setattr(rehearsal, "_parts", parts)
    config = RehearsalConfig(folder=tmp_path / "scratch", out=tmp_path / "table.md")
    with pytest.raises(FluxSaeError, match="disk is full"):
        rehearsal.main(config)
    with pytest.raises(FluxSaeError, match="holds a rehearsal of"):
        rehearsal.main(replace(config, n_images=17))
    timings = rehearsal.main(config)
    assert ran == ["build", "collect", "collect", "page"]
    assert [timing.name for timing in timings] == ["build", "collect", "page"]
    assert not (tmp_path / "scratch").exists()
    assert "| collect | 61.2 | 3.0 | a note |" in (tmp_path / "table.md").read_text()
    assert "build: done before" in capsys.readouterr().out


def test_too_few_images_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match="n_images is 9; give at least 10"):
        rehearsal.main(RehearsalConfig(folder=tmp_path / "scratch", n_images=9))
    assert not (tmp_path / "scratch").exists()


def test_a_program_is_timed_from_outside_and_its_failure_is_told() -> None:
    timing = timed_program("help", "json.tool", ["--help"])
    assert timing.seconds > 0
    assert timing.peak_gb is not None
    assert timing.peak_gb > 0.001
    with pytest.raises(FluxSaeError, match="wrong ended with 2"):
        timed_program("wrong", "json.tool", ["--no-such-option"])


def test_feeding_is_measured_on_a_small_scale() -> None:
    config = FeedingConfig(
        d_model=8, tokens_per_image=16, n_images=16, batch_size=16, world_size=4, n_features=32, k=2, steps=8, repeats=1
    )
    found = feeding.main(config)
    assert found.whole_seconds.keys() == found.share_seconds.keys()
    assert found.wait_share is not None
    assert 0 <= found.wait_share <= 1


@pytest.mark.bench
def test_the_whole_rehearsal_runs_on_a_small_model(tmp_path: Path) -> None:
    options = ["--model", "tiny", "--n-images", "12", "--folder", tmp_path / "scratch", "--out", tmp_path / "table.md"]
    subprocess.run([sys.executable, "-m", "train.benchmarks", "rehearsal", *map(str, options)], check=True)
    table = (tmp_path / "table.md").read_text()
    for stage in ("build", "collect", "fit", "score", "select", "directions", "page: first click", "steer"):
        assert f"\n| {stage} |" in table
