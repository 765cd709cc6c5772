"""The named endpoints: typed arguments, one schema each, the same checks over HTTP, MCP and from the page."""

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.components.api_component import Api

from fluxsae.ui.serve.guard import guarded, validator
from fluxsae.ui.serve.schemas import EXAMPLE_EDIT, Request
from fluxsae.ui.serve.session import Workbench

LANE = "flux"
"""Concurrency group of everything that needs FLUX: one at a time."""
BROWSING = 16
"""Browsing requests answered at a time; they never wait for FLUX."""
REQUIRED: Any = ...
"""Default of a required argument that stands behind optional ones; with None, Gradio would call it optional."""


def in_lane(status: gr.HTML) -> dict[str, Any]:
    """How the page's own events that use FLUX run: one at a time, told in a progress bar, no endpoint."""
    return {
        "show_progress": "minimal",
        "show_progress_on": status,
        "concurrency_id": LANE,
        "concurrency_limit": 1,
        "api_visibility": "private",
    }


def add_endpoint(
    handler: Callable[..., Any],
    *,
    schema: type[Request],
    bench: Workbench,
    outputs: Sequence[gr.components.Component],
    uses_flux: bool,
) -> None:
    """Serves `handler` under its own name. Its parameters are the schema's fields; its docstring is the description.

    Values reach the handler as they were sent, so that the schema sees them before any component can bend them.
    """
    names = [name for name in inspect.signature(handler).parameters if name in schema.model_fields]
    properties = schema.model_json_schema()["properties"]
    defaults = inspect.signature(handler).parameters
    gr.on(
        triggers=[],
        fn=guarded(handler, bench.visitors if uses_flux else None),
        inputs=[Api(_default(defaults[name]), _described(properties[name], bench), name) for name in names],
        outputs=list(outputs),
        api_name=handler.__name__,
        preprocess=False,
        queue=True,
        validator=validator(schema, bench.limits, names),
        show_progress="hidden",
        concurrency_id=LANE if uses_flux else "browse",
        concurrency_limit=1 if uses_flux else BROWSING,
    )


def _default(parameter: inspect.Parameter) -> Any:
    return None if parameter.default in (inspect.Parameter.empty, REQUIRED) else parameter.default


def _described(schema: dict[str, Any], bench: Workbench) -> dict[str, Any]:
    """The schema with its description where `gradio_client`'s `view_api` looks for it, too."""
    description = schema["description"].replace(EXAMPLE_EDIT, json.dumps(bench.example_edit))
    return {**schema, "description": description, "additional_description": description}
