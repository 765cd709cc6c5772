"""Runs with damaged or missing files: the page says what is left out and shows the rest."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import whole_run
from desk_data import EARLY, LATE

from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import FeatureTable
from fluxsae.sae.fingerprint import file_fingerprint
from fluxsae.ui.build import build_app
from fluxsae.ui.kit.header import header_html
from fluxsae.ui.serve.shelf import Shelf, open_shelf
from fluxsae.ui.tabs.directions.desk import DirectionsDesk
from fluxsae.ui.tabs.gallery.desk import GalleryDesk
from fluxsae.ui.tabs.steer.desk import SteerDesk


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return whole_run.build(tmp_path_factory.mktemp("whole") / "run", n_images=12)


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(whole.path, tmp_path / "run"))


def cut(path: Path) -> None:
    """Half of a file, as after a broken copy."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


OPTIONAL: dict[str, Callable[[RunFolder], None]] = {
    "demos.jsonl": lambda run: run.demos_path(LATE).write_text('{"feature": 3, "ima'),
    "metrics.json": lambda run: run.metrics_path(LATE).write_text("[]"),
    "model.safetensors": lambda run: cut(run.sae_path(LATE) / "model.safetensors"),
    "heatmaps.safetensors": lambda run: cut(run.heatmaps_path(LATE)),
    f"{LATE}.safetensors": lambda run: cut(run.directions_path(LATE)),
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_damaged_file_that_can_be_missed_is_told_and_the_rest_is_shown(run: RunFolder, name: str) -> None:
    OPTIONAL[name](run)
    shelf = open_shelf(str(run.path))
    bench = shelf.first
    build_app(shelf)
    assert list(shelf.runs) == ["run"]
    assert name in header_html(shelf, bench)
    assert str(run.path.parent) not in header_html(shelf, bench)
    assert GalleryDesk(bench).gallery("", LATE, "any", False, "best")["cards"]
    assert GalleryDesk(bench).page({"hookpoint": LATE, "feature": 3})["facts"]
    assert SteerDesk(bench).start()
    assert DirectionsDesk(bench).near({"hookpoint": EARLY, "feature": 3})


def test_a_demo_that_says_nothing_is_passed_over(run: RunFolder) -> None:
    run.save_demos(LATE, [json.dumps({"score": []}), json.dumps({"feature": 3})])
    assert SteerDesk(open_shelf(str(run.path)).first).start()["starters"] == []


def test_maps_of_another_size_are_left_out(run: RunFolder) -> None:
    values = json.loads(run.info_path.read_text())
    run.info_path.write_text(json.dumps({**values, "rows": 8, "cols": 8}))
    shelf = open_shelf(str(run.path))
    assert "maps of 16 x 16 patches" in header_html(shelf, shelf.first)
    feature = shelf.first.cards[LATE].ranked[0]
    assert GalleryDesk(shelf.first).page({"hookpoint": LATE, "feature": feature})["pictures"][0]["map"] is None


def test_an_sae_of_another_size_than_what_is_described_is_told_and_left_out(run: RunFolder) -> None:
    path = run.sae_path(EARLY) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_features": 5}))
    shelf = open_shelf(str(run.path))
    assert shelf.first.hookpoints == [LATE]
    assert f"The SAE of {EARLY} has 5 features, and " in header_html(shelf, shelf.first)


def test_an_sae_that_changed_after_scoring_is_told_with_the_remedy(run: RunFolder) -> None:
    whole_run.build_sae(run, EARLY, seed=7).save_pretrained(run.sae_path(EARLY))  # its table does not say of which SAE
    table, fingerprint = run.load_features(LATE).table, file_fingerprint(run.sae_path(LATE))
    assert fingerprint is not None
    told = {**table.schema.metadata, b"sae_fingerprint": fingerprint.encode()}
    run.save_features(LATE, FeatureTable(table.replace_schema_metadata(told)))
    shelf = open_shelf(str(run.path))
    assert "changed after scoring" not in header_html(shelf, shelf.first)
    whole_run.build_sae(run, LATE, seed=7).save_pretrained(run.sae_path(LATE))
    shelf = open_shelf(str(run.path))
    header = header_html(shelf, shelf.first)
    assert f"The SAE of {LATE} changed after scoring" in header
    assert "--force" in header


def test_a_hook_point_that_was_not_copied_is_left_out_and_the_page_has_one(run: RunFolder) -> None:
    shutil.rmtree(run.features_path(EARLY).parent)
    shelf = open_shelf(str(run.path))
    assert shelf.first.hookpoints == [LATE]
    assert "features.parquet" in header_html(shelf, shelf.first)
    build_app(shelf)


LOST: dict[str, Callable[[RunFolder], None]] = {
    "run.json": lambda run: cut(run.info_path),
    "run.json names no hook point": lambda run: run.info_path.write_text(
        json.dumps({**json.loads(run.info_path.read_text()), "hookpoints": []})
    ),
    "images.parquet": lambda run: cut(run.images_path),
}


@pytest.mark.parametrize("words", LOST)
def test_a_run_that_cannot_be_opened_gives_the_miniature_and_says_why(run: RunFolder, words: str) -> None:
    LOST[words](run)
    shelf = open_shelf(str(run.path))
    assert shelf.first.is_miniature
    assert words in shelf.first.notice
    assert str(run.path.parent) not in shelf.first.notice


def test_a_run_without_its_sae_can_be_browsed(run: RunFolder) -> None:
    shutil.rmtree(run.sae_path(LATE))
    shelf = open_shelf(str(run.path))
    assert "holds no SAE" in shelf.first.notice
    assert GalleryDesk(shelf.first).gallery("", LATE, "any", False, "best")["cards"]


def test_a_run_of_one_hook_point_is_no_choice_and_names_in_any_script_are_kept(run: RunFolder) -> None:
    run.save_info(run.load_info().__class__.from_dict({**run.load_info().to_dict(), "hookpoints": [LATE]}))
    table = run.load_features(LATE)
    labels = [None, *["红色 圆 🔴"] * (len(table) - 1)]
    run.save_features(LATE, table.with_columns({"label": labels}))
    shelf: Shelf = open_shelf(str(run.path))
    found = GalleryDesk(shelf.first).gallery("红色", LATE, "any", False, "best")
    assert found["cards"][0]["label"] == "红色 圆 🔴"
    build_app(shelf)
