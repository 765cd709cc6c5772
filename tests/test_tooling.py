"""The repository as a newcomer meets it: requirements, make, the wheel, what is committed."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(name: str) -> dict[str, str]:
    """Package -> version of a requirements file."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith(("#", "-r "))]
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        assert [s.operator for s in requirement.specifier] == ["=="], f"{requirement} is not pinned"
    return {requirement.name.lower(): next(iter(requirement.specifier)).version for requirement in requirements}


def tracked() -> list[Path]:
    """The files that git has."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_what_the_space_runs_lies_in_the_ranges_of_the_wheel() -> None:
    pins = pinned("requirements.txt")
    app = PROJECT["optional-dependencies"]["app"]
    for requirement in map(Requirement, PROJECT["dependencies"] + app):
        assert requirement.name.lower() in pins, f"{requirement.name} is not in requirements.txt"
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_the_installed_versions_are_the_pinned_ones() -> None:
    pins = pinned("requirements.txt") | pinned("requirements-dev.txt")
    assert {name: version(name) for name in pins} == pins


OPTIONAL = {"bitsandbytes", "torchao", "trackio", "triton"}
"""Imported inside a function, for those who have them; the message says how to install them."""
BENCHMARKED = {"dictionary_learning", "overcomplete", "sae_lens", "sparsify"}
"""The tools that `make bench` compares with, in an environment of their own."""


def imported_packages() -> set[str]:
    """The packages outside the standard library that the app, the library and the scripts import anywhere."""
    sources = [ROOT / "app.py", *(ROOT / "fluxsae").rglob("*.py"), *(ROOT / "train").rglob("*.py")]
    names: set[str] = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"fluxsae", "train"}


def test_every_package_that_is_imported_is_required_directly() -> None:
    distributions = packages_distributions()
    pins = pinned("requirements.txt")
    required = {name.replace("_", "-") for name in pins}
    missing = {
        package
        for package in imported_packages() - OPTIONAL - BENCHMARKED
        if not required & {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
    }
    assert missing == set()


def test_no_requirement_is_named_twice() -> None:
    assert not set(pinned("requirements.txt")) & set(pinned("requirements-dev.txt"))


def make(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def bare_clone(tmp_path: Path) -> Path:
    """What `make` reads, without a .venv."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_refuses_an_old_python_in_words(bare_clone: Path) -> None:
    old = bare_clone / "python3.8"
    old.write_text('#!/bin/sh\ncase "$*" in *exit*) exit 1;; *) echo 3.8.10;; esac\n')
    old.chmod(0o755)
    for target in ("app", "test"):
        done = make(bare_clone, target, f"PYTHON={old}")
        assert done.returncode != 0
        assert f"fluxsae needs Python 3.11 or newer; found {old}: 3.8.10." in done.stderr
        assert "make PYTHON=/path/to/python3.12" in done.stderr
        assert not (bare_clone / ".venv").exists()


def test_make_tells_when_the_named_python_does_not_exist(bare_clone: Path) -> None:
    done = make(bare_clone, "app", "PYTHON=/nowhere/python")
    assert done.returncode != 0
    assert "found /nowhere/python: none that runs." in done.stderr


def test_make_installs_again_when_a_requirement_changes_and_only_then(bare_clone: Path) -> None:
    """A fake interpreter records what it is asked; the stamp decides."""
    fake = bare_clone / "python"
    fake.write_text(
        '#!/bin/sh\nroot=$(cd "$(dirname "$0")" && pwd)\n'
        'case "$*" in\n'
        '"-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python;;\n'
        '"-m pip"*) echo "$*" >> installs.txt;;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    installs = bare_clone / "installs.txt"
    assert make(bare_clone, "venv", f"PYTHON={fake}").returncode == 0
    assert [line.split()[-1] for line in installs.read_text().splitlines()] == [
        "requirements.txt",
        "requirements-dev.txt",
    ]
    assert make(bare_clone, "venv").returncode == 0
    assert len(installs.read_text().splitlines()) == 2
    with (bare_clone / "requirements-dev.txt").open("a") as file:
        file.write("another==1\n")
    assert make(bare_clone, "venv").returncode == 0
    assert len(installs.read_text().splitlines()) == 3, "what the app runs did not change"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, so that the checkout gets no build folder."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "fluxsae", source / "fluxsae", ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as archive:
        archive.extractall(out / "unpacked")
    return out / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    own = {path.relative_to(ROOT) for path in tracked() if path.is_relative_to(ROOT / "fluxsae")}
    packed = {path.relative_to(wheel) for path in wheel.rglob("*") if path.is_file()}
    assert own - packed == set()


def test_the_miniature_paints_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    code = """
import fluxsae, sys
assert sys.argv[1] in fluxsae.__file__, fluxsae.__file__
from fluxsae import generate, load_flux, RunFolder, SparseAutoencoder
from fluxsae.miniature import miniature_path
pipe = load_flux("miniature")
image = pipe("a large red circle", num_inference_steps=2, height=128, width=128, max_sequence_length=32).images[0]
assert image.size == (128, 128)
run = RunFolder(miniature_path("run"))
SparseAutoencoder.from_pretrained(run.path, subfolder=run.sae_subfolder(run.hookpoints()[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(wheel)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(wheel), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_nothing_large_is_committed() -> None:
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked()}
    assert {name for name, size in sizes.items() if size >= 10_000_000} == set()
    miniature = sum(size for name, size in sizes.items() if name.startswith("fluxsae/miniature/"))
    assert miniature < 30_000_000


def test_no_kind_of_file_that_can_run_code_is_committed() -> None:
    assert [path for path in tracked() if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".npy")] == []
