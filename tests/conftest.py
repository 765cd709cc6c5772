"""Set-up of every test: no network, shapes and types checked at run time, and the models that tests share."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from jaxtyping import install_import_hook

# Before fluxsae is first imported: its jaxtyping shapes and its types are then checked at every call.
install_import_hook("fluxsae", "typechecking.checked")

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

if TYPE_CHECKING:
    from fluxsae.flux import FluxPipeline


@pytest.fixture(scope="session")
def tiny_flux() -> "FluxPipeline":
    """A random tiny FLUX, shared: leave it as you found it."""
    from tiny_flux import build_tiny_flux

    return build_tiny_flux()


@pytest.fixture(scope="session")
def tiny_flux_folder(tiny_flux: "FluxPipeline", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a folder, for `load_flux` in this process or another."""
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    tiny_flux.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def miniature() -> "FluxPipeline":
    """The embedded miniature, shared: leave it as you found it."""
    from fluxsae.flux import load_flux

    return load_flux("miniature")
