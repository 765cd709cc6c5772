"""Where scripts write pictures, checked before any model works for them."""

from pathlib import Path

from fluxsae.errors import FluxSaeError


def check_png_path(path: Path) -> None:
    """Raises a FluxSaeError for a path to which no PNG can be written; a missing folder is made."""
    if path.suffix.lower() != ".png":
        raise FluxSaeError(f"--out {path}: the picture is written as PNG. Let the name end in .png.")
    if path.is_dir():
        raise FluxSaeError(f"--out {path} is a folder. Name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxSaeError(f"--out {path}: its folder cannot be made ({error}). Name another place.") from error
