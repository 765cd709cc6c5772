"""Who may import what, as seen by a fresh process and in the source; `lint-imports` holds the layers themselves."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fluxsae

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fluxsae"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def loaded_modules(code: str) -> set[str]:
    """The top-level packages that a fresh process holds after running the code."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not the house style"
            yield node.module or ""


def importers(package: str) -> set[str]:
    """The files of fluxsae that import a package."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if any(name.partition(".")[0] == package for name in imports(path))
    }


def test_importing_fluxsae_loads_neither_torch_nor_diffusers_nor_gradio() -> None:
    assert not {"torch", "diffusers", "transformers", "gradio", "huggingface_hub"} & loaded_modules("import fluxsae")


def test_browsing_loads_no_diffusers() -> None:
    """Gallery and directions, in a fresh process: an eager `__init__` or a chain of imports would show."""
    code = """
import fluxsae
from fluxsae import HookPoint, RunFolder, SparseAutoencoder, SteeringEdit, pull_run, push_run
import fluxsae.features.cards, fluxsae.features.directions, fluxsae.features.selection
import fluxsae.pictures.heatmaps, fluxsae.pictures.perceptual
import fluxsae.publishing.model_card, fluxsae.publishing.verify, fluxsae.hub.transfer
import fluxsae.ui.tabs.gallery.tab
"""
    loaded = loaded_modules(code)
    assert "torch" in loaded
    assert "diffusers" not in loaded


def test_an_sae_is_loaded_without_diffusers_and_without_the_hub_client(tmp_path: Path) -> None:
    code = f"""
from fluxsae import SaeConfig, SparseAutoencoder
SparseAutoencoder(SaeConfig(architecture="topk", d_model=4, n_features=8, k=2)).save_pretrained({str(tmp_path)!r})
SparseAutoencoder.from_pretrained({str(tmp_path)!r})
"""
    assert not {"diffusers", "transformers", "huggingface_hub", "gradio"} & loaded_modules(code)


def test_only_flux_imports_diffusers() -> None:
    assert importers("diffusers") == {"flux/families.py", "flux/loading.py", "flux/pipelines.py", "flux/previews.py"}


def test_only_ui_imports_gradio() -> None:
    assert {path.partition("/")[0] for path in importers("gradio") | importers("spaces")} == {"ui"}


def test_nothing_in_the_library_imports_the_scripts_or_the_tests() -> None:
    assert importers("train") == set()
    assert importers("tests") == set()


@pytest.mark.parametrize("package", ["pickle", "cloudpickle", "joblib", "dill"])
def test_nothing_reads_or_writes_pickles(package: str) -> None:
    assert importers(package) == set()


@pytest.mark.parametrize("name", fluxsae.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(fluxsae, name).__name__ == name


def test_an_unknown_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"'fluxsae' has no attribute 'load_flx'; it offers .*load_flux"):
        _ = fluxsae.load_flx


def test_a_script_tells_a_fault_that_the_user_can_mend_as_one_sentence() -> None:
    arguments = [sys.executable, "-m", "train.verify", "no/run/here"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: There is no folder no/run/here")
    assert "Traceback" not in done.stderr
