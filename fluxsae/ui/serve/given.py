"""A visitor's own picture: checked, made RGB and of the run's size, never kept as a file nor beyond the visit."""

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gradio.utils import get_upload_folder
from PIL import Image

from fluxsae.errors import FluxSaeError

MAX_PICTURE_BYTES: Final = 8 * 2**20
"""Largest picture file that is taken, as sent."""
NAME: Final = "the picture"


@dataclass(frozen=True)
class GivenPicture:
    """A visitor's picture as plain data: it names a reading, and can be sent to another process."""

    width: int
    height: int
    pixels: bytes = field(repr=False)
    """Red, green and blue of each pixel, row by row."""
    notes: tuple[str, ...] = ()
    """What was done to it, for example "cropped"."""

    @property
    def image(self) -> Image.Image:
        """The picture."""
        return Image.frombytes("RGB", (self.width, self.height), self.pixels)

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """What the page calls it by."""
        return hashlib.sha256(self.pixels).hexdigest()[:32]


def take_picture(value: Any, *, height: int, width: int) -> GivenPicture:
    """A picture that was sent as a data URL or uploaded to this page, in the middle cropped to the run's shape.

    Raises:
        FluxSaeError: something else, or no picture that can be read; the message says what to send.
    """
    from fluxsae.pictures.sources import describe_fit, fit_picture, inspect_picture

    opened = inspect_picture(_content(value), name=NAME)
    fitted = fit_picture(opened.image, height=height, width=width)
    notes = (*opened.notes, *describe_fit(opened.image.size, height=height, width=width))
    return GivenPicture(width, height, fitted.tobytes(), notes)


def forget_uploads(values: Iterable[Any]) -> None:
    """Deletes what was uploaded with a request."""
    for value in values:
        path = _upload(value)
        if path is not None:
            path.unlink(missing_ok=True)


def _content(value: Any) -> bytes:
    path = _upload(value)
    if path is not None:
        if not path.is_file():
            raise FluxSaeError("The uploaded picture is no longer here. Upload it again.")
        _check_length(path.stat().st_size)
        return path.read_bytes()
    head, _, text = value.partition(",") if isinstance(value, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise FluxSaeError(
            "picture is no picture that was sent along; give a data URL (data:image/png;base64,...) or an uploaded "
            "file (in Python: handle_file(path)). Links are not followed."
        )
    _check_length(len(text) * 3 // 4)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FluxSaeError("picture is a damaged data URL: its base64 cannot be read. Send it again.") from error


def _check_length(n_bytes: int) -> None:
    if n_bytes > MAX_PICTURE_BYTES:
        raise FluxSaeError(
            f"picture has {n_bytes / 2**20:.1f} MB; give at most {MAX_PICTURE_BYTES // 2**20} MB. Scale it down."
        )


def _upload(value: Any) -> Path | None:
    """The file that a value names, if it lies where this page's uploads are: any other is not the visitor's."""
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        return None
    folder = Path(get_upload_folder()).resolve()
    try:
        path = Path(value["path"]).resolve()
    except (OSError, ValueError):
        return None
    return path if path.is_relative_to(folder) and path != folder else None
