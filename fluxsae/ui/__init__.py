"""The page: Gradio only; what it shows comes from the library."""

from typing import TYPE_CHECKING

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.ui.build import build_app

__all__ = ["build_app"]

__getattr__, __dir__ = hand_on(__name__, {"build_app": "build"})
