"""Where scripts write files that the user names, checked before any model works for them."""

from pathlib import Path

from fluxsae.errors import FluxSaeError


def check_png_path(path: Path) -> None:
    """Raises a FluxSaeError for a path to which no PNG can be written; a missing folder is made."""
    if path.suffix.lower() != ".png":
        raise FluxSaeError(f"--out {path}: the picture is written as PNG. Let the name end in .png.")
    check_file_path(path)


def check_file_path(path: Path) -> None:
    """Raises a FluxSaeError for a path to which no file can be written; a missing folder is made."""
    try:
        if path.is_dir():
            raise FluxSaeError(f"--out {path} is a folder. Name a file in it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise FluxSaeError(f"--out {path}: no file can be written there ({error}). Name another place.") from error


def check_folder_path(path: Path, *, option: str) -> None:
    """Raises a FluxSaeError for a path that is no folder and cannot become one; a missing folder is made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FluxSaeError(f"{option} {path} cannot be a folder ({error}). Name another place.") from error
