"""`python -m train.benchmarks NAME`: one entry to every benchmark."""

import re

import pytest

from fluxsae.errors import FluxSaeError
from train.benchmarks.__main__ import NAMES, main


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert f"Benchmarks: {', '.join(NAMES)}" in capsys.readouterr().out
    assert {
        "causes",
        "collection",
        "feeding",
        "gpu",
        "memory",
        "quality",
        "rehearsal",
        "sigmas",
        "steering",
        "training",
    } <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_tells_its_own_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"python -m train.benchmarks {name}" in said.splitlines()[0]
    assert len(set(re.findall(r"--[a-z][a-z-]+", said))) >= 3, "options of its own beside --help"


def test_an_unknown_benchmark_is_refused_with_what_there_is() -> None:
    with pytest.raises(FluxSaeError, match=f"no benchmark 'speed'; there are {NAMES[0]}, {NAMES[1]}"):
        main(["speed"])
