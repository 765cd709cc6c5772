"""The named endpoints: each serves its schema over HTTP and MCP, with the same checks as the page."""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import gradio as gr
from gradio.components.api_component import Api

from fluxsae.ui.serve.arguments import EXAMPLE_EDIT, Limits
from fluxsae.ui.serve.guard import guarded, validator
from fluxsae.ui.serve.lane import Done, Pending
from fluxsae.ui.serve.schemas import Request
from fluxsae.ui.serve.session import Workbench

LANE = "flux"
"""Concurrency group of everything that may need FLUX. Its own lane takes one at a time; what is kept comes at once."""
BROWSING = 16
"""Browsing requests answered at a time; they never wait for FLUX."""
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


def add_endpoint(schema: type[Request], answer: Callable[[Any], Any], bench: Workbench) -> None:
    """Serves a schema under its name.

    Values reach the schema as they were sent, before any component can bend them.
    """
    uses_flux = schema.uses_flux
    signature = endpoint_signature(schema, bench.limits)
    arguments = endpoint_arguments(schema, bench)
    gr.on(
        triggers=[],
        fn=guarded(_handler(schema, answer, bench, signature)),
        inputs=[
            Api(None if parameter.default is ... else parameter.default, arguments[name], name)
            for name, parameter in signature.parameters.items()
        ],
        outputs=[COMPONENTS[kind](label=name, visible=False) for name, kind, _ in schema.results],
        api_name=schema.endpoint,
        preprocess=False,
        queue=True,
        validator=validator(schema, bench.limits, list(arguments)),
        show_progress="hidden",
        concurrency_id=LANE if uses_flux else "browse",
        concurrency_limit=None if uses_flux else BROWSING,
    )


def endpoint_signature(schema: type[Request], limits: Limits) -> inspect.Signature:
    """The schema's fields as parameters; a required one has `...` for a default: with None Gradio calls it optional."""
    defaults, kind = schema.defaults(limits), inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [inspect.Parameter(name, kind, default=defaults.get(name, ...)) for name in schema.model_fields]
    )


def endpoint_arguments(schema: type[Request], bench: Workbench) -> dict[str, dict[str, Any]]:
    """Argument -> JSON schema, its description also where `gradio_client`'s `view_api` looks for it."""
    example, found = json.dumps(bench.example_edit), {}
    for name, argument in schema.properties().items():
        description = argument["description"].replace(EXAMPLE_EDIT, example)
        found[name] = {**argument, "description": description, "additional_description": description}
    return found


def _handler(
    schema: type[Request], answer: Callable[[Any], Any], bench: Workbench, signature: inspect.Signature
) -> Callable[..., Any]:
    """What Gradio calls: it reads names and defaults from the signature, and descriptions from the docstring."""

    def call(*values: Any) -> Any:
        return answer(schema.parse(bench.limits, **dict(zip(signature.parameters, values, strict=True))))

    def stream(*values: Any) -> Iterator[Any]:
        nothing_yet = (gr.skip(),) * len(schema.results) if len(schema.results) > 1 else gr.skip()
        for event in call(*values):
            yield event.value if isinstance(event, Done) else event if isinstance(event, Pending) else nothing_yet

    handler = stream if schema.uses_flux else call
    arguments = [f"{name}: {argument['description']}" for name, argument in endpoint_arguments(schema, bench).items()]
    returns = [f"{result.name}: {result.description}" for result in schema.results]
    handler.__name__ = schema.endpoint
    handler.__doc__ = "\n".join([schema.description(), "Args:", *arguments, "Returns:", *returns])
    handler.__dict__["__signature__"] = signature
    return handler
