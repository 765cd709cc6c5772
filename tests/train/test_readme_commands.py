"""The README's list of commands, in its order, on the miniature with 32 images; and interrupted, then repeated."""

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fluxsae.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
RECIPE = """\
[flux]
flux = "miniature"

[pipeline]
hookpoints = ["transformer_blocks.1.ff", "transformer_blocks.3"]
steps = [16]

[collect]
images = 32
batch_size = 16

[[fit]]
hookpoints = ["transformer_blocks.1.ff"]
n_features = 64
k = 6
batch_size = 128
epochs = 4

[[fit]]
hookpoints = ["transformer_blocks.3"]
n_features = 128
k = 6
batch_size = 128
epochs = 8

[score]
images = 32
batch_size = 16
images_per_part = 16
n_top = 4
thumbnail_side = 64

[analyze]
features = { n_top_images = 4 }

[directions]
perplexity = 5.0

[render]
n_features = 2

[demos]
hookpoints = ["transformer_blocks.3"]
n_features = 1
search = { n_candidates = 1, n_limit_images = 2, n_natural_images = 4 }
swap = { n_images = 1, n_names = 1 }
"""
SMALLER = {
    "evaluate": "--settings.n-images 11 --settings.n-flow-images 4 --settings.n-transfer-images 1 --settings.draws 20",
    "steering_grids": "--n-features 1 --amplify 0.2 --suppress 0.0",
}
"""Options that make a command's work smaller; what it does stays."""


def commands(run: Path, recipe: Path) -> Iterator[tuple[str, list[str]]]:
    """Script and words of each command from the pipeline to the last one that needs no Hub."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = text[text.index("python -m train.pipeline --flux miniature") : text.index("python -m train.push")]
    for line in listed.splitlines():
        found = re.match(r"python -m (train\.(\w+))((?: [^ #]+)*)", line)
        if found is None:
            continue
        # One folder for the pipeline and for its stages one by one: they must agree about what is complete.
        words = re.sub(r"runs/\w+", str(run), found[3]).split() + SMALLER.get(found[2], "").split()
        yield found[1], words + (["--recipe", str(recipe)] if found[2] == "pipeline" else [])


def say(script: str, words: list[str]) -> None:
    """Runs a script as `python -m` does, without a new process."""
    before, sys.argv = sys.argv, [script, *words]
    try:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, bytes]]:
    """The run that the uninterrupted pipeline makes, and its files before any later command."""
    run = tmp_path_factory.mktemp("runs") / "mine"
    script, words = next(iter(commands(run, recipe)))
    say(script, words)
    return RunFolder(run), contents(RunFolder(run))


def contents(run: RunFolder) -> dict[str, bytes]:
    """The published files, those of demos without the name of the run; run.json holds seconds."""
    names = [name for name in run.published_files() if name not in ("run.json", "run.toml")]
    own = json.dumps(str(run.path)).encode()
    return {name: (run.path / name).read_bytes().replace(own, b"") for name in names}


def test_the_commands_follow_one_another(
    whole: tuple[RunFolder, dict[str, bytes]], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = whole
    listed = list(commands(run.path, recipe))
    assert len(listed) == 14
    said = {}
    for script, words in listed:
        say(script, words)
        said[script] = capsys.readouterr().out
    stages = ("collect", "fit", "score", "analyze", "embed", "select", "directions", "render", "find_demos")
    assert [name for name in stages if "complete, skipped" not in said[f"train.{name}"]] == []
    assert said["train.fit"].count("fit: complete, skipped") == 2  # once for each of the recipe's tables
    assert "files, hook points transformer_blocks.1.ff" in said["train.verify"]
    metrics = run.load_metrics("transformer_blocks.3")
    assert {"fvu", "fvu_by_step", "flow_loss_recovered", "concepts"} <= set(metrics)


def test_interrupted_and_repeated_the_run_is_the_same(
    whole: tuple[RunFolder, dict[str, bytes]], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace
    left = [0]

    def interrupted(self: Path, target: Path) -> Path:
        if tmp_path in Path(target).parents:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    script, words = next(iter(commands(tmp_path / "mine", recipe)))
    words += ["--skip", "demos"]  # the slowest stage, which tests/steering/test_demos.py interrupts
    n_interrupted = 0
    for writes in (4, 9, 6, 11, 17, 23, 10_000):  # files written before the next interruption
        left[0] = writes
        try:
            say(script, words)
            break
        except KeyboardInterrupt:
            n_interrupted += 1
    assert n_interrupted >= 4
    run = RunFolder(tmp_path / "mine")
    # Demos also measure limits and gates into metrics.json.
    expected, found = (
        {name: data for name, data in files.items() if not name.startswith("demos/") and "metrics.json" not in name}
        for files in (whole[1], contents(run))
    )
    assert set(found) == set(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert set(run.load_info().stages) == set(whole[0].load_info().stages) - {"demos"}
