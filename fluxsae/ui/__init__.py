"""The page: Gradio only; what it shows comes from the library."""

from typing import Any

__all__ = ["build_app"]


def __getattr__(name: str) -> Any:
    if name != "build_app":
        raise AttributeError(f"module 'fluxsae.ui' has no attribute {name!r}; it offers build_app")
    from fluxsae.ui.build import build_app

    return build_app
