"""Sparse autoencoders that open FLUX: capture, train, score, select, show and steer.

Names load on first use (PEP 562), so that browsing a run never imports diffusers.
"""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.errors import FluxSaeError
    from fluxsae.flux.generation import generate
    from fluxsae.flux.hookpoints import HookPoint, TokenGrid
    from fluxsae.flux.hooks import capture
    from fluxsae.flux.loading import load_flux
    from fluxsae.flux.reading import read_picture
    from fluxsae.flux.settings import GenerationSettings
    from fluxsae.publishing.publish import pull_run, push_run
    from fluxsae.runs.folder import RunFolder
    from fluxsae.runs.names import SaeName
    from fluxsae.sae.config import SaeConfig
    from fluxsae.sae.model import SaeOutput, SparseAutoencoder
    from fluxsae.steering.apply import steer
    from fluxsae.steering.edits import SteeringEdit
    from fluxsae.steering.sweeps import sweep

__all__ = [
    "FluxSaeError",
    "GenerationSettings",
    "HookPoint",
    "RunFolder",
    "SaeConfig",
    "SaeName",
    "SaeOutput",
    "SparseAutoencoder",
    "SteeringEdit",
    "TokenGrid",
    "capture",
    "generate",
    "load_flux",
    "pull_run",
    "push_run",
    "read_picture",
    "steer",
    "sweep",
]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "FluxSaeError": "errors",
        "GenerationSettings": "flux.settings",
        "HookPoint": "flux.hookpoints",
        "RunFolder": "runs.folder",
        "SaeConfig": "sae.config",
        "SaeName": "runs.names",
        "SaeOutput": "sae.model",
        "SparseAutoencoder": "sae.model",
        "SteeringEdit": "steering.edits",
        "TokenGrid": "flux.hookpoints",
        "capture": "flux.hooks",
        "generate": "flux.generation",
        "load_flux": "flux.loading",
        "pull_run": "publishing.publish",
        "push_run": "publishing.publish",
        "read_picture": "flux.reading",
        "steer": "steering.apply",
        "sweep": "steering.sweeps",
    },
)
