"""What every script begins with: quick help, faults in words, quiet libraries, bars on stderr."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from train.benchmarks.options import CONFIGS
from train.command import Bars, start
from train.pull import PullConfig

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "scipy", "pandas", "pyarrow", "gradio", "sklearn", "open_clip"}
SCRIPTS = [path.stem for path in sorted((ROOT / "train").glob("*.py")) if "__main__" in path.read_text()]
COMMANDS = [
    *([f"train.{name}"] for name in [*SCRIPTS, "miniature", "benchmarks"]),
    *(["train.benchmarks", name] for name in CONFIGS),
]
RUN_ALL = """
import contextlib, io, runpy, sys
for module, *words in {commands!r}:
    sys.argv, said = [module, *words, "--help"], io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert words == [] and module == "train.benchmarks" or "usage:" in said.getvalue(), module
    assert "default: None" not in " ".join(said.getvalue().replace("│", "").split()), module
    print(module, *words, *({heavy!r} & set(sys.modules)), sep=",")
"""


def python(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_help_of_every_script_loads_no_model_library() -> None:
    done = python("-c", RUN_ALL.format(commands=COMMANDS, heavy=HEAVY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [",".join(command) for command in COMMANDS]
    assert len(SCRIPTS) >= 20


def test_help_in_a_fresh_process_loads_no_model_library() -> None:
    done = python("-X", "importtime", "-m", "train.fit", "--help")
    assert "--hookpoint" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tyro" in loaded
    assert not HEAVY & loaded


def fail(config: PullConfig) -> None:
    raise FluxSaeError(f"{config.repo} is nothing. Write user/name.")


WORDS = ["--repo", "x", "--into", "y"]


def test_a_fault_ends_a_script_with_its_message_and_verbose_with_its_traceback() -> None:
    with pytest.raises(SystemExit, match=r"^Error: x is nothing. Write user/name.$"):
        start(fail, PullConfig, "What it does.", arguments=WORDS)
    with pytest.raises(FluxSaeError):
        start(fail, PullConfig, "What it does.", arguments=["-v", *WORDS])


@pytest.mark.parametrize(("words", "is_shown"), [(WORDS, False), (["-v", *WORDS], True)])
def test_warnings_of_other_packages_show_only_with_v(
    words: list[str], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "default")  # what `start` would set is undone after the test
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("DIFFUSERS_VERBOSITY", "error")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start(lambda config: warnings.warn("chatter", stacklevel=1), PullConfig, "", arguments=words)
    assert bool(caught) == is_shown


def test_a_bar_counts_to_its_total_on_stderr_and_the_next_thing_gets_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Bars(unit="image") as bars:
        bars("collect", 1, 2)
        bars("collect", 2, 2)
        bars("score", 3, 4)
    said = capsys.readouterr()
    assert said.out == ""
    assert "collect: 100%" in said.err
    assert "2/2" in said.err
    assert "score:  75%" in said.err
    assert "3/4" in said.err
    with Bars(is_shown=False) as bars:
        bars("collect", 1, 2)
        bars("score", 1, 2)
    assert capsys.readouterr().err == ""
