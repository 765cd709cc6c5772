"""What the README says is so: its commands exist, its snippets run, its pictures are there."""

import ast
import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fluxsae.errors import MAKERS
from fluxsae.sae import SaeConfig, SparseAutoencoder
from fluxsae.sae.interop import to_sparsify

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, ROOT / "train" / "LOG.md", ROOT / "CHANGELOG.md"]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES if page.is_file()}


GUIDE_NAMES = [page.relative_to(ROOT).as_posix() for page in GUIDES]


def snippets(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT.get(page, ""), re.DOTALL)


@pytest.mark.parametrize("page", TEXT)
def test_every_script_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"python -m (train\.[a-z_]+)", TEXT[page]))
    assert {name for name in named if importlib.util.find_spec(name) is None} == set()


def test_every_torchrun_command_leaves_its_script_all_of_its_options() -> None:
    from torch.distributed.run import get_args_parser

    scripts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "train").glob("*.py"))
    commands = re.findall(
        r"^\s*(?:\.venv/bin/)?torchrun (--.*?)(?:\s{2,}#.*)?$", "\n".join([*TEXT.values(), scripts]), re.MULTILINE
    )
    assert len(commands) >= 6
    for command in commands:
        _, _, options = command.partition(" train.")
        # `...` in a docstring stands for the options that any of them may have; --run is in torchrun's own way.
        words = [word for word in (*command.split(), *(["--run", "x"] if "..." in options else [])) if word != "..."]
        parsed = get_args_parser().parse_args(words)
        assert importlib.util.find_spec(parsed.training_script)
        assert "--run" in parsed.training_script_args


def test_the_examples_of_every_help_text_stand_on_lines_of_their_own() -> None:
    texts = {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in (ROOT / "train").glob("*.py")}
    # tyro joins lines that are not indented
    joined = re.compile(r"^(?:python|torchrun) .*\n(?:python|torchrun) ", re.MULTILINE)
    assert [name for name, text in texts.items() if joined.search(text)] == []


@pytest.mark.parametrize("page", GUIDE_NAMES)
def test_programs_of_the_venv_are_named_with_their_folder(page: str) -> None:
    assert re.findall(r"(?:^\s*|`)(?:hf|pip|torchrun|pytest|ruff|mypy|trackio) .*", TEXT[page], re.MULTILINE) == []


def test_every_mark_that_contributing_names_is_one_of_the_tests() -> None:
    (line,) = re.findall(r"^- Mark a test (.*) if it", TEXT["CONTRIBUTING.md"], re.MULTILINE)
    marks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert set(re.findall(r"`(\w+)`", line)) == {mark.partition(":")[0] for mark in marks}


def test_messages_of_the_library_name_its_own_call_before_a_script() -> None:
    for script, call in MAKERS.items():
        module, _, name = call.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))
        assert importlib.util.find_spec(f"train.{script}")
    sources = {path: path.read_text() for path in (ROOT / "fluxsae").rglob("*.py")}
    named = re.compile(r'^.*["\'`]\S*.*(?:[Rr]un|with|again) `?(?:python -m )?train\.\w+.*$', re.MULTILINE)
    assert {path.name: found for path, text in sources.items() if (found := named.findall(text))} == {}


@pytest.mark.parametrize("page", TEXT)
def test_every_make_target_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"(?:^\s*|`)make ([a-z]+)", TEXT[page], re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", TEXT)
def test_no_figure_is_still_to_be_filled_in(page: str) -> None:
    assert re.findall(r"@[A-Z][A-Z0-9]*@", TEXT[page]) == []


@pytest.mark.parametrize("page", TEXT)
def test_every_local_link_and_picture_is_there(page: str) -> None:
    linked = re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXT[page])
    local = [link for link in linked if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in local if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", TEXT)
def test_every_python_snippet_is_python(page: str) -> None:
    for snippet in snippets(page, "python"):
        ast.parse(snippet)


@pytest.mark.parametrize("page", GUIDE_NAMES)
def test_every_flag_of_a_command_is_one_of_its_script(page: str) -> None:
    calls = re.findall(r"python -m (train\.[a-z_]+)((?:[^\n`]|\\\n)*)", TEXT[page])
    for script, arguments in calls:
        flags = set(re.findall(r"--([a-z][a-z0-9-]*)", arguments))
        if not flags:
            continue
        spec = importlib.util.find_spec(
            ".".join([script, arguments.split()[0]]) if script == "train.benchmarks" else script
        )
        assert spec is not None
        assert spec.origin is not None
        options = [
            ROOT / "train" / name for name in ("flux_options.py", "recipes/__init__.py", "benchmarks/options.py")
        ]
        sources = [Path(spec.origin), *Path(spec.origin).parent.glob("__main__.py"), *options]
        fields = " ".join(source.read_text() for source in sources)
        assert {flag for flag in flags if f"{flag.replace('-', '_')}:" not in fields} == set(), script


@pytest.mark.parametrize("page", GUIDE_NAMES)
def test_lines_and_tables_stay_narrow(page: str) -> None:
    lines = TEXT[page].splitlines()
    assert [line for line in lines if len(line) > 120] == []
    assert [line for line in lines if line.startswith("|") and line.count("|") > 6] == []


def test_every_python_snippet_is_fenced_so_that_the_next_test_runs_it() -> None:
    indented = re.compile(r"^ {4}(?:from \w[\w.]* import|import \w|\w+ = \w+[.(])", re.MULTILINE)
    assert [page for page in GUIDE_NAMES if indented.search(TEXT[page])] == []


SNIPPETS = [(page, code) for page in GUIDE_NAMES for code in snippets(page, "python") if "gradio_client" not in code]
"""All but calls of a served page, which `tests/ui/test_api.py` makes."""


@pytest.mark.parametrize("code", [code for _, code in SNIPPETS], ids=[page for page, _ in SNIPPETS])
def test_every_snippet_runs_as_it_stands(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fluxsae").symlink_to(ROOT / "fluxsae")
    monkeypatch.chdir(tmp_path)
    to_sparsify(SparseAutoencoder(SaeConfig(architecture="topk", d_model=4, n_features=8, k=2)), "downloaded")
    exec(code, {})
    if "before.png" in code:
        assert Path("before.png").read_bytes() != Path("after.png").read_bytes()


def test_the_tutorial_runs_and_shows_its_pictures() -> None:
    notebook = nbformat.read(ROOT / "docs" / "tutorial.ipynb", as_version=4)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    made = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for outputs in (shown, made):
        assert sum("image/png" in output.get("data", {}) for output in outputs) == 4


def test_the_log_lists_each_of_its_entries_once() -> None:
    entries = re.findall(r"^## (\d{4}-.*)$", TEXT["train/LOG.md"], re.MULTILINE)
    listed = re.findall(r"^\| [\d-]+ \| \[[^]]+\]\(#([^)]*)\) \|", TEXT["train/LOG.md"], re.MULTILINE)
    assert listed == [re.sub(r"[^\w\- ]", "", entry.lower()).replace(" ", "-") for entry in entries]
