"""Malformed calls that Gradio answers with a fault of its own: refused in words instead, as every other mistake is."""

from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

MALFORMED: Final = {
    ("gradio_client.utils", "construct_args"): "An argument is missing or unknown",
    ("gradio.route_utils", "upload_fn"): "An upload holds no file",
    ("gradio.route_utils", "on_part_data"): "An upload is no well-formed multipart form",
}
"""Module and function in which Gradio 6.31 fails on a malformed call -> what is wrong with the call."""
MAX_DETAIL = 200


async def refuse(request: Request, error: Exception) -> Response:
    """Status 422 with the reason for a malformed call; every other error goes on its way."""
    words = MALFORMED.get(_place(error))
    if words is None:
        raise error
    return JSONResponse({"detail": f"{words}: {str(error)[:MAX_DETAIL]}"}, status_code=422)


def exception_handlers() -> dict[type[Exception], Any]:
    """What the served app does with the errors that Gradio raises on malformed calls."""
    return {TypeError: refuse, AttributeError: refuse}


def _place(error: Exception) -> tuple[str, str]:
    """Module and function in which the error was raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame if traceback else None
    return (frame.f_globals.get("__name__", ""), frame.f_code.co_name) if frame else ("", "")
