"""What the Heatmap tab answers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from desk_data import EARLY, LATE, maps_of, reading

from fluxsae.features.cards import CardIndex
from fluxsae.features.firing import Fired
from fluxsae.features.vocabulary import has_name
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.opening import open_workbench
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk
from fluxsae.ui.tabs.heatmap.lab import opening_lab, with_alike


def test_a_surprise_is_an_image_of_the_run(bench: Workbench) -> None:
    found = {HeatmapDesk(bench).surprise() for _ in range(40)}
    assert found <= set(
        zip(bench.images.prompts, bench.images.seeds, [bench.limits.default_steps] * len(bench.images), strict=True)
    )
    assert len(found) > 5


def test_another_hook_points_example_is_what_its_patches_are_asked_of(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, example = HeatmapDesk(bench), {"seed": 4, "num_inference_steps": 20, "picture": None}
    monkeypatch.setattr(desk, "example", lambda name: {**example, "prompt": f"a circle at {name}", "hookpoint": name})
    nothing = {**desk.example_request(), "prompt": ""}
    assert desk.change_hookpoint(EARLY, nothing) == (None, {**nothing, "hookpoint": EARLY})
    page, values = desk.change_hookpoint(EARLY, {**nothing, "prompt": "a star"})
    assert (page["prompt"], page["seed"]) == (values["prompt"], values["seed"]) == (f"a circle at {EARLY}", 4)
    assert values["hookpoint"] == EARLY


def test_a_patch_tells_each_label_once_and_the_rest_of_it_behind(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = bench.cards[LATE]
    labels = [None, "red", "red", "red", "blue", *[None] * (len(cards) - 5)]
    monkeypatch.setattr(cards, "labels", labels)
    monkeypatch.setattr(cards, "features", cards.features.with_columns({"label": labels}))
    values, indices = np.full((1, 1, 4), 2.0), np.array([[[1, 2, 3, 4]]])
    maps = maps_of((4,), values, indices, len(cards))
    shown = replace(reading(), grid=TokenGrid(1, 1), maps={LATE: maps})
    monkeypatch.setattr(bench, "read", lambda *_, **__: iter([Done(shown)]))
    request = {"prompt": "a circle", "hookpoint": LATE, "seed": 0, "num_inference_steps": 20, "picture": None}
    *_, done = HeatmapDesk(bench).patch(request, {"row": 0, "column": 0, "step": None})
    told = [feature["label"] for feature in done.value["features"]]
    assert done.value["at"] > 0
    assert sorted(told[:2]) == ["blue", "red"]
    assert told[2:] == ["red", "red"]
    assert {key: done.value[key] for key in request} == request


def test_features_of_one_label_stand_together_behind_the_most_telling() -> None:
    labels = ["red", "star", None, "red", "blue", None, "red"]
    shown = with_alike([Fired(n, 1.0, 1.0, None, None, None, None, None, 1.0) for n in range(len(labels))], 3, labels)
    assert [each.feature for each in shown] == [0, 1, 2, 3, 6]


def test_the_ready_example_comes_from_the_run_alone() -> None:
    bench = open_workbench("")
    example = HeatmapDesk(bench).example(bench.limits.default_hookpoint)
    assert example is not None
    assert example["kind"] == "example"
    assert example["selected"] is None
    assert len(example["opening"]["pictures"]) == 7
    named = [feature["label"] for feature in example["features"]]
    assert named
    assert all(has_name(example["prompt"], name) for name in named)
    early = HeatmapDesk(bench).example(bench.hookpoints[0])  # of which nothing was recorded
    assert early is not None
    assert "opening" not in early
    assert early["selected"] in {feature["feature"] for feature in early["features"]}
    assert "pipe" not in vars(bench)


def test_a_damaged_opening_leaves_the_example(tmp_path: Path) -> None:
    own = RunFolder(shutil.copytree(miniature_path("run"), tmp_path / "run"))
    place = own.hookpoints()[-1]
    own.opening_path(place).write_text('{"turns": [0], "prompt": "a star"}')
    assert opening_lab(own, CardIndex(own, place)) is None
    example = HeatmapDesk(Workbench(own)).example(str(place))
    assert example is not None
    assert "opening" not in example


def test_a_new_prompt_gets_a_new_seed_unless_it_is_pinned_or_typed(bench: Workbench) -> None:
    desk, shown = HeatmapDesk(bench), {"prompt": "a star", "seed": 3}
    assert desk.seed_for(" a  star ", 3, False, shown) == 3
    assert len({desk.seed_for("a ring", 3, False, shown) for _ in range(9)}) > 1
    assert desk.seed_for("a ring", 3, True, shown) == 3
    assert desk.seed_for("a ring", 7, False, shown) == 7
