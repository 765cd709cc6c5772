"""What researchers take with them: tables as CSV and activations as arrays, each made when it is asked for."""

import csv
import io
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fluxsae.errors import FluxSaeError
from fluxsae.ui.serve.guard import without_folders

Downloads = Mapping[str, Callable[[Mapping[str, str]], bytes]]
"""File name -> what makes it from the query of its address."""
TYPES: Final = {"csv": "text/csv; charset=utf-8", "npz": "application/octet-stream"}
_offered: dict[str, dict[str, Callable[[Mapping[str, str]], bytes]]] = {}
"""What each run of this process offers."""


def offer(run: str, downloads: Downloads) -> None:
    """Serves some files of a run, by its part of an address."""
    _offered.setdefault(run, {}).update(downloads)


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """A table as CSV; text that a spreadsheet would take for a formula is marked as text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(columns)
    writer.writerows([[_plain(value) for value in row] for row in rows])
    return buffer.getvalue().encode()


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as numpy's compressed archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # as np.savez_compressed, whatever the names
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return buffer.getvalue()


def whole_number(values: Mapping[str, str], name: str) -> int | str | None:
    """A value of an address as a number, for a request's schema; what is none stays as it is, to be refused there."""
    text = values.get(name)
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 12 else text


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


def _answer(request: Request) -> Response:
    run, name = request.path_params["run"], request.path_params["name"]
    make = _offered.get(run, {}).get(name)
    if make is None:
        return PlainTextResponse("There is no such file here.", status_code=404)
    try:
        data = make(request.query_params)
    except FluxSaeError as error:
        return PlainTextResponse(without_folders(str(error)), status_code=422)
    headers = {"Content-Disposition": f'attachment; filename="{run}-{name}"', "Cache-Control": "no-store"}
    return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=headers)


def download_route() -> Route:
    """What the served app answers for files; Starlette calls it on a thread of its own."""
    return Route("/downloads/{run}/{name}", _answer, methods=["GET"])
