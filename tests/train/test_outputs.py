from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from train import explain, heatmap, pipeline, render, select, steer
from train.outputs import check_png_path


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.pngx"])
def test_a_name_that_is_no_png_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FluxSaeError, match=r"Let the name end in \.png"):
        check_png_path(tmp_path / name)


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_refused(tmp_path: Path) -> None:
    check_png_path(tmp_path / "new" / "deep" / "picture.PNG")
    assert list((tmp_path / "new" / "deep").iterdir()) == []
    (tmp_path / "file").touch()
    for wrong in ("file/picture.png", "a" * 300 + ".png"):
        with pytest.raises(FluxSaeError, match="no file can be written there"):
            check_png_path(tmp_path / wrong)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FluxSaeError, match="is a folder"):
        check_png_path(tmp_path / "folder.png")


@pytest.mark.parametrize(
    ("script", "config"),
    [
        (heatmap, heatmap.HeatmapConfig(prompt="a red star", out=Path("picture.jpg"))),
        (steer, steer.SteerConfig(prompt="a red star", out=Path("picture.jpg"))),
        (explain, explain.ExplainConfig(prompt="a red star", feature=1, out=Path(__file__).parent)),
        (render, render.RenderConfig(overlays=Path(__file__))),
    ],
)
def test_scripts_refuse_the_path_before_any_work(script, config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsae.runs.folder.RunFolder", lambda path: pytest.fail("work began"))
    with pytest.raises(FluxSaeError, match=r"--out|--overlays"):
        script.main(config)


def test_an_export_onto_a_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FluxSaeError, match="holds something that is no run"):
        pipeline.check_export(tmp_path / "file")


@pytest.mark.parametrize("content", [None, "striped".encode("utf-16")], ids=["missing", "not UTF-8"])
def test_a_vocabulary_that_cannot_be_read_is_refused_in_words(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FluxSaeError, match=r"words\.txt cannot be read as text"):
        select._phrases([], select.SelectConfig(vocabulary=path))
