from dataclasses import replace
from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from train import heatmap, steer
from train.outputs import check_png_path


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.pngx"])
def test_a_name_that_is_no_png_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FluxSaeError, match=r"Let the name end in \.png"):
        check_png_path(tmp_path / name)


def test_a_missing_folder_is_made_and_one_that_cannot_be_is_refused(tmp_path: Path) -> None:
    check_png_path(tmp_path / "new" / "deep" / "picture.PNG")
    assert (tmp_path / "new" / "deep").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(FluxSaeError, match="its folder cannot be made"):
        check_png_path(tmp_path / "file" / "picture.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FluxSaeError, match="is a folder"):
        check_png_path(tmp_path / "folder.png")


@pytest.mark.parametrize(
    ("script", "config"),
    [(heatmap, heatmap.HeatmapConfig(prompt="a red star")), (steer, steer.SteerConfig(prompt="a red star"))],
)
def test_scripts_refuse_the_path_before_any_work(script, config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsae.runs.folder.RunFolder", lambda path: pytest.fail("work began"))
    with pytest.raises(FluxSaeError, match="--out"):
        script.main(replace(config, out=Path("picture.jpg")))
