import json

import pytest

from fluxsae.errors import FluxSaeError
from train.explain import ExplainConfig, main

PROMPT = "a large purple dotted cross on the right and a large red striped triangle on a brown background"
RED = ExplainConfig(prompt=PROMPT, seed=1000222, feature=504)


def test_red_fires_because_of_the_word_red(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "why.json"
    main(ExplainConfig(prompt=RED.prompt, seed=RED.seed, feature=RED.feature, limit=3, out=out))
    written = json.loads(out.read_text())
    assert written["words"][0]["word"] == "red"
    assert written["words"][0]["share"] > 0.5
    assert len(written["features"]) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[printed.index(next(line for line in printed if line.startswith("word "))) + 1].startswith("red ")


def test_half_a_patch_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="give both or neither"):
        main(ExplainConfig(prompt=PROMPT, feature=504, row=1))


def test_a_patch_outside_the_image_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="rows are 0 to 7, columns 0 to 7"):
        main(ExplainConfig(prompt=PROMPT, feature=504, row=8, column=0))
