import json
from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from fluxsae.features import CardIndex
from fluxsae.miniature import miniature_path
from fluxsae.runs import RunFolder
from train.explain import ExplainConfig, main

PROMPT = "a large red star on a black background"


def test_red_fires_because_of_the_word_red(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, run = tmp_path / "why.json", RunFolder(miniature_path("run"))
    red = CardIndex(run, run.hookpoints()[-1]).named()["red"][0]
    main(ExplainConfig(prompt=PROMPT, feature=red, limit=3, out=out))
    written = json.loads(out.read_text())
    assert written["words"][0]["word"] == "red"
    assert written["words"][0]["share"] > 0.5
    assert len(written["features"]) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index(next(line for line in printed if line.startswith("word "))) + 1].startswith("red ")


def test_half_a_patch_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="give both or neither"):
        main(ExplainConfig(prompt=PROMPT, feature=0, row=1))


def test_a_patch_outside_the_image_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="rows are 0 to 7, columns 0 to 7"):
        main(ExplainConfig(prompt=PROMPT, feature=0, row=8, column=0))
