"""The run folder: whole files or none, the same bytes every time, and clear words about what is wrong."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from fluxsae import files
from fluxsae.errors import FluxSaeError
from fluxsae.files import (
    atomic_path,
    load_tensors,
    map_array,
    mapped_tensors,
    read_header,
    remove_leftovers,
    save_tensors,
    write_json,
)
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import SCHEMA_VERSION, RunFolder, RunInfo, StageRecord
from fluxsae.runs.tables import Embeddings, FeatureRow, FeatureTable, Heatmaps, ImageRow, encode_webp

INFO = RunInfo(
    flux_id="tiny",
    settings=GenerationSettings(height=32, width=32),
    hookpoints=("transformer_blocks.1.ff", "transformer_blocks.3.ff"),
    steps=(2, 6),
    sigmas=(0.9, 0.5),
)


def picture(level: int, size: tuple[int, int] = (16, 16)) -> bytes:
    return encode_webp(Image.new("RGB", size, (level, 255 - level, 30)), longest_side=16)


def feature_row(feature: int) -> FeatureRow:
    return FeatureRow(
        feature=feature, feature_class="rare", density=0.1, image_density=0.2, mean_act=1.0, max_act=2.0,
        quantiles=[0.5, 1.0], spatial_spread=0.7, step_profile=[0.1], histogram=[1, 2], top_images=[3],
        top_scores=[2.0], top_tokens=[5], neighbours=[1], neighbour_similarities=[0.3], family=-1,
    )  # fmt: skip


# Files


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def stop_half_way() -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        stop_half_way()
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_told_in_words_and_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(FluxSaeError, match="disk is full"):
        write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


@pytest.mark.parametrize("host", ["desk", "node-1.cluster.example"])
def test_leftovers_of_dead_processes_are_removed_and_those_of_living_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(files.socket, "gethostname", lambda: host)
    with atomic_path(tmp_path / "mine.bin") as living:
        living.write_bytes(b"1")
        dead = living.with_name(living.name.replace(f"-{os.getpid()}.", "-999999999."))
        dead.write_bytes(b"2")
        assert remove_leftovers(tmp_path) == [dead]
        assert living.is_file()


tensors = st.dictionaries(
    st.text("abcxyz_", min_size=1, max_size=5),
    st.tuples(
        st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.int32]),
        st.lists(st.integers(0, 4), min_size=0, max_size=3),
    ),
    min_size=1,
    max_size=4,
)


@given(tensors)
@settings(max_examples=30, deadline=None)
def test_tensor_files_read_back_equal_here_and_in_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("tensors") / "t.safetensors"
    values = {name: (torch.rand(shape) * 9).to(dtype) for name, (dtype, shape) in shapes.items()}
    save_tensors(path, values, metadata={"b": "2", "a": "1"})
    for loaded in (load_tensors(path), load_file(path)):
        assert loaded.keys() == values.keys()
        assert all(torch.equal(loaded[name], values[name]) for name in values)
    assert read_header(path).metadata == {"a": "1", "b": "2"}


def test_equal_tensors_give_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    a, b = torch.arange(3.0), torch.arange(4)
    save_tensors(tmp_path / "1", {"a": a, "b": b}, metadata={"x": "1", "y": "2"})
    save_tensors(tmp_path / "2", {"b": b, "a": a}, metadata={"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_mapped_tensors_give_the_bytes_of_a_file_written_at_once(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.float16).view(4, 3)
    with mapped_tensors(tmp_path / "1", {"v": ("F16", (4, 3))}, metadata={"k": "v"}) as arrays:
        assert not (tmp_path / "1").exists()
        for row in range(4):
            arrays["v"][row] = values[row].numpy()
    save_tensors(tmp_path / "2", {"v": values}, metadata={"k": "v"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert np.array_equal(map_array(tmp_path / "1", "v"), values.numpy())


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_cut_off_tensor_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FluxSaeError, match=r"not a whole safetensors file"):
        load_tensors(path)


# The run


def test_run_info_survives_the_disk(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    info = INFO.with_stage("collect", StageRecord({"n": 1}, 2.0, 3.0))
    run.save_info(info)
    assert run.load_info() == info
    assert [str(hookpoint) for hookpoint in run.hookpoints()] == list(INFO.hookpoints)
    assert json.loads(run.index_path.read_text())["hookpoints"] == list(INFO.hookpoints)


def test_a_run_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(replace(INFO, schema_version=SCHEMA_VERSION + 1))
    with pytest.raises(FluxSaeError, match="Update fluxsae"):
        run.load_info()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"schema_version": 1, "flux_id": "x"}'])
def test_a_damaged_run_json_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    run.info_path.write_text(content)
    with pytest.raises(FluxSaeError, match=r"run\.json"):
        run.load_info()


def test_unknown_hook_points_are_refused_with_those_that_exist(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(INFO)
    assert str(run.check_sae("layer3")) == "transformer_blocks.3.ff"
    with pytest.raises(FluxSaeError, match=r"it has transformer_blocks\.1\.ff, transformer_blocks\.3\.ff"):
        run.check_sae("layer2")


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match="no run folder"):
        RunFolder(tmp_path / "nothing").load_info()


@pytest.mark.parametrize("name", ["", ".hidden", "../outside", "a/b", "a\\b"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FluxSaeError, match="no file name"):
        RunFolder(tmp_path).sheet_path("layer1", name)


def test_activations_and_work_files_are_not_published(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(INFO)
    for path in (run.activations_folder("layer1") / "manifest.json", run.work_path("score") / "plan.json"):
        write_json(path, {})
    assert run.published_files() == ["config.json", "run.json"]


# Tables


def test_images_survive_the_disk_across_row_groups(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [ImageRow(i, f"prompt {i}", 1000 + i, picture(i)) for i in range(200)]
    run.save_images(rows)
    table = run.load_images()
    assert list(table) == rows
    assert table.picture(3).size == (16, 16)
    with pytest.raises(FluxSaeError, match="0 to 199"):
        table.thumbnail(200)


def test_the_hub_viewer_is_told_that_thumbnails_are_pictures(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_images([ImageRow(0, "p", 1, picture(9))])
    metadata = json.loads(pq.read_schema(run.images_path).metadata[b"huggingface"])
    assert metadata["info"]["features"]["thumbnail"] == {"_type": "Image"}


def test_large_images_shrink_to_the_thumbnail_side() -> None:
    data = encode_webp(Image.new("RGB", (64, 32)), longest_side=16)
    assert ImageRow(0, "p", 1, data).picture().size == (16, 8)


def test_features_survive_the_disk_and_take_new_columns(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    rows = [feature_row(i) for i in range(3)]
    table = FeatureTable.from_rows(rows, metadata={"steps": "[2]"})
    run.save_features("layer1", table.with_columns({"label": ["red", None, "star"], "novel": [1, 2, 3]}))
    loaded = run.load_features("layer1")
    assert loaded[0] == replace(rows[0], label="red", extra={"novel": 1})
    assert loaded[1].label is None
    assert loaded.steps == [2]
    assert loaded.column("density").tolist() == [0.1] * 3
    assert list(loaded.column("top_images")) == [[3]] * 3


def test_a_feature_table_with_a_row_missing_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="one row a feature"):
        FeatureTable.from_rows([feature_row(0), feature_row(2)])


def test_embeddings_survive_the_disk(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    vectors = np.eye(3, 4, dtype=np.float32)
    run.save_embeddings(Embeddings(vectors, "a model"))
    loaded = run.load_embeddings()
    assert loaded.model == "a model"
    assert np.array_equal(loaded.vectors, vectors)


def test_heatmaps_of_the_first_version_are_read_in_activation_units(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).heatmaps_path("layer1")
    save_tensors(
        path,
        {
            "features": torch.tensor([4, 7], dtype=torch.int32),
            "image_ids": torch.tensor([[9, 2], [5, -1]], dtype=torch.int32),
            "values": torch.tensor([[[0, 255], [51, 0]], [[0, 102], [0, 0]]], dtype=torch.uint8),
            "scale": torch.tensor([2.0, 5.0]),
        },
        metadata={"rows": "1", "cols": "2"},
    )
    maps = Heatmaps.load(path)
    assert {i: acts.tolist() for i, acts in maps.acts(4).items()} == {9: [0.0, 2.0], 2: pytest.approx([0.4, 0.0])}
    assert list(maps.acts(7)) == [5]
    assert maps.acts(5) == {}
    assert maps.fits()


def test_heatmaps_of_a_later_version_are_refused(tmp_path: Path) -> None:
    save_tensors(tmp_path / "h", {"features": torch.zeros(1)}, metadata={"schema_version": "3"})
    with pytest.raises(FluxSaeError, match="schema version 3; this program reads up to 2"):
        Heatmaps.load(tmp_path / "h")
