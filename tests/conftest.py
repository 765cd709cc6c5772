"""Set-up of every test: no network, shapes and types checked at run time, and the models that tests share."""

import os
from collections.abc import Iterator
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
    from hub_driver import HubProcess
    from local_hub import LocalHub

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


@pytest.fixture(scope="module")
def server() -> "Iterator[LocalHub]":
    """A Hub of one test file, over HTTP on this machine."""
    from local_hub import served_hub

    with served_hub() as served:
        yield served


@pytest.fixture(scope="module")
def machine(server: "LocalHub", tmp_path_factory: pytest.TempPathFactory) -> "Iterator[HubProcess]":
    """Another process that talks to that Hub, with a cache of its own."""
    from hub_driver import hub_process

    with hub_process(server, tmp_path_factory.mktemp("machine")) as process:
        yield process
