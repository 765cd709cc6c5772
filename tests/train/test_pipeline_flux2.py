"""FLUX.2 from prompts to the page: every stage on the random tiny klein, then an image read and steered there."""

from pathlib import Path

import numpy as np
import pytest
from test_pipeline import OPTIONS, words
from tiny_flux2 import build_tiny_flux2

from fluxsae.runs.folder import RunFolder
from fluxsae.ui.build import build_app
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.schemas import HeatmapRequest, SteerRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk
from fluxsae.ui.tabs.steer.desk import SteerDesk
from train.pipeline import PipelineConfig, main

PLACES = ("layer1", "single_transformer_blocks.1")


def test_a_run_of_flux2_is_made_and_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_flux2().save_pretrained(tmp_path / "klein")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {colour} star" for colour in ("red", "blue", "green", "pink", "cyan")))
    config = PipelineConfig(
        flux=str(tmp_path / "klein"), run=tmp_path / "run", prompts=prompts, hookpoints=PLACES, steps=(1, 3),
        set=OPTIONS, skip=("embed", "select", "render", "demos"),
    )  # fmt: skip
    assert set(words(main(config)).values()) == {"done"}
    run = RunFolder(tmp_path / "run")
    info = run.load_info()
    assert (info.rows, info.cols, info.settings.num_inference_steps) == (4, 6, 4)
    assert all(run.load_metrics(place)["fvu"] < 1 for place in run.hookpoints())

    monkeypatch.setenv("FLUXSAE_FLUX", str(tmp_path / "klein"))
    bench = Workbench(run)
    build_app(Shelf([bench]))
    request = HeatmapRequest.parse(bench.limits, prompt="a red star")
    *_, done = HeatmapDesk(bench).answers()[HeatmapRequest](request)
    assert isinstance(done, Done)
    image, ranked, overlays = done.value
    assert image.size == (48, 32)
    assert ranked
    assert overlays
    place = str(run.hookpoints()[-1])
    known = bench.saes[place].reference_acts > 0
    feature = next(fired["feature"] for fired in ranked if known[fired["feature"]])
    edit = {"hookpoint": place, "feature": feature, "mode": "scale", "strength": -4.0, "steps": [0, 4]}
    for above, is_same in ((0, False), (100, True)):
        edits = [{**edit, "when": {"features": [feature], "above": above}}]
        *_, done = SteerDesk(bench).steer(SteerRequest.parse(bench.limits, prompt="a red star", edits=edits))
        before, after, facts = done.value
        assert np.array_equal(before, after) == is_same
        assert facts["recipe"]["batch"][1][0]["when"]["above"] == above
