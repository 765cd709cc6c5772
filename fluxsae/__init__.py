"""Sparse autoencoders that open FLUX.1: capture, train, score, select, show and steer.

Names load on first use (PEP 562), so that browsing a run never imports diffusers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fluxsae.artifacts import RunFolder
    from fluxsae.edits import SteeringEdit
    from fluxsae.errors import FluxSaeError
    from fluxsae.flux import capture, generate, load_flux
    from fluxsae.hookpoints import HookPoint, TokenGrid
    from fluxsae.publish import pull_run, push_run
    from fluxsae.sae import SaeConfig, SaeOutput, SparseAutoencoder
    from fluxsae.settings import GenerationSettings
    from fluxsae.steering import steer
    from fluxsae.sweeps import sweep

_HOMES = {
    "FluxSaeError": "errors",
    "GenerationSettings": "settings",
    "HookPoint": "hookpoints",
    "RunFolder": "artifacts",
    "SaeConfig": "sae",
    "SaeOutput": "sae",
    "SparseAutoencoder": "sae",
    "SteeringEdit": "edits",
    "TokenGrid": "hookpoints",
    "capture": "flux",
    "generate": "flux",
    "load_flux": "flux",
    "pull_run": "publish",
    "push_run": "publish",
    "steer": "steering",
    "sweep": "sweeps",
}

__all__ = [
    "FluxSaeError",
    "GenerationSettings",
    "HookPoint",
    "RunFolder",
    "SaeConfig",
    "SaeOutput",
    "SparseAutoencoder",
    "SteeringEdit",
    "TokenGrid",
    "capture",
    "generate",
    "load_flux",
    "pull_run",
    "push_run",
    "steer",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fluxsae' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"fluxsae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
