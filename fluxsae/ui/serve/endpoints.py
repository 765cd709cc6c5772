"""The named endpoints: each serves its schema over HTTP and MCP, with the same checks as the page."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import gradio as gr
from gradio.components.api_component import Api

from fluxsae.errors import FluxSaeError
from fluxsae.ui.serve.arguments import EXAMPLE_EDIT
from fluxsae.ui.serve.given import forget_uploads
from fluxsae.ui.serve.guard import guarded, validator
from fluxsae.ui.serve.lane import Done, Pending
from fluxsae.ui.serve.schemas import Request, RequestError
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf

LANE = "flux"
"""Concurrency group of everything that may need FLUX. Its own lane takes one at a time; what is kept comes at once."""
BROWSING = 16
"""Browsing requests answered at a time; they never wait for FLUX."""
RUN: Final = "run"
"""Last argument of every endpoint."""
RUN_WORDS: Final = "Name of one of the runs that are served; null: the first."
COMPONENTS: Final[Mapping[str, Callable[..., gr.components.Component]]] = {
    "image": partial(gr.Image, format="png"),
    "gallery": partial(gr.Gallery, format="png"),
    "json": gr.JSON,
    "plot": gr.Plot,
}
"""Kind of a result -> the component that sends it."""
Answers = Mapping[type[Request], Callable[[Any], Any]]
"""Schema of an endpoint -> what answers a checked request: the results, or with FLUX its steps and the results."""


def in_lane(status: gr.HTML) -> dict[str, Any]:
    """How the page's own events that use FLUX run: told in a progress bar, no endpoint."""
    return {
        "show_progress": "hidden",
        "concurrency_id": LANE,
        "concurrency_limit": None,
        "api_visibility": "private",
    }


def add_endpoint(schema: type[Request], answers: Mapping[str, Callable[[Any], Any]], shelf: Shelf) -> None:
    """Serves a schema under its name; `answers` is what answers it of each run.

    Values reach the schema as they were sent, before any component can bend them.
    """
    uses_flux = schema.uses_flux
    signature = endpoint_signature(schema, shelf)
    arguments = endpoint_arguments(schema, shelf.first)
    gr.on(
        triggers=[],
        fn=guarded(_handler(schema, answers, shelf, signature)),
        inputs=[
            Api(None if parameter.default is ... else parameter.default, arguments[name], name)
            for name, parameter in signature.parameters.items()
        ],
        outputs=[COMPONENTS[kind](label=name, visible=False) for name, kind, _ in schema.results],
        api_name=schema.endpoint,
        preprocess=False,
        queue=True,
        validator=validator(lambda values: parse(schema, shelf, values), list(arguments)),
        show_progress="hidden",
        concurrency_id=LANE if uses_flux else "browse",
        concurrency_limit=None if uses_flux else BROWSING,
    )


def parse(schema: type[Request], shelf: Shelf, values: Mapping[str, Any]) -> tuple[str, Request]:
    """The name of the run that is asked for, and the request, checked against what that run allows.

    Raises:
        RequestError: a value is out of range, or there is no such run.
    """
    try:
        bench = shelf.pick(values.get(RUN))
    except FluxSaeError as error:
        raise RequestError({RUN: str(error)}) from None
    return bench.name, schema.parse(bench.limits, **{name: value for name, value in values.items() if name != RUN})


def endpoint_defaults(schema: type[Request], shelf: Shelf) -> dict[str, Any]:
    """Argument -> default: what the run decides is null where there are several, since each decides for itself."""
    if len(shelf.runs) == 1:
        return {**schema.defaults(shelf.first.limits), RUN: None}
    return {**dict.fromkeys(schema.defaults(shelf.first.limits)), **schema.fixed_defaults(), RUN: None}


def endpoint_signature(schema: type[Request], shelf: Shelf) -> inspect.Signature:
    """The schema's fields as parameters; a required one has `...` for a default: with None Gradio calls it optional."""
    defaults, kind = endpoint_defaults(schema, shelf), inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=defaults.get(name, ...)) for name in (*schema.model_fields, RUN)]
    )


def endpoint_arguments(schema: type[Request], bench: Workbench) -> dict[str, dict[str, Any]]:
    """Argument -> JSON schema, its description also where `gradio_client`'s `view_api` looks for it."""
    example, found = json.dumps(bench.example_edit), {}
    for name, argument in schema.properties().items():
        description = argument["description"].replace(EXAMPLE_EDIT, example)
        found[name] = {**argument, **_described(description)}
    found[RUN] = {"anyOf": [{"type": "string"}, {"type": "null"}], **_described(RUN_WORDS)}
    return found


def _described(words: str) -> dict[str, str]:
    return {"description": words, "additional_description": words}


def _handler(
    schema: type[Request], answers: Mapping[str, Callable[[Any], Any]], shelf: Shelf, signature: inspect.Signature
) -> Callable[..., Any]:
    """What Gradio calls: it reads names and defaults from the signature, and descriptions from the docstring."""

    def call(*values: Any) -> Any:
        run, request = parse(schema, shelf, dict(zip(signature.parameters, values, strict=True)))
        return answers[run](request)

    def stream(*values: Any) -> Iterator[Any]:
        nothing_yet = (gr.skip(),) * len(schema.results) if len(schema.results) > 1 else gr.skip()
        try:
            for event in call(*values):
                yield event.value if isinstance(event, Done) else event if isinstance(event, Pending) else nothing_yet
        finally:
            forget_uploads(values)

    handler = stream if schema.uses_flux else call
    arguments = [
        f"{name}: {argument['description']}" for name, argument in endpoint_arguments(schema, shelf.first).items()
    ]
    returns = [f"{result.name}: {result.description}" for result in schema.results]
    handler.__name__ = schema.endpoint
    handler.__doc__ = "\n".join([schema.description(), "Args:", *arguments, "Returns:", *returns])
    handler.__dict__["__signature__"] = signature
    return handler
