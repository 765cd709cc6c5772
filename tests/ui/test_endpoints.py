"""An endpoint's arguments stand once, in its schema: everything that is served of them says the same."""

from typing import Any

import pytest
from desk_data import EARLY, LATE

from fluxsae.ui.build import build_app
from fluxsae.ui.serve.endpoints import endpoint_arguments
from fluxsae.ui.serve.schemas import Request
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf
from fluxsae.ui.tabs.about.tab import endpoint_examples
from fluxsae.ui.tabs.registry import TABS


@pytest.fixture(scope="module")
def schemas(bench: Workbench) -> dict[str, type[Request]]:
    """The endpoints that the tabs answer."""
    return {f"/{schema.endpoint}": schema for tab in TABS for schema in tab.desk(bench).answers()}


def test_names_defaults_and_descriptions_of_the_api_are_the_schemas(
    bench: Workbench, schemas: dict[str, type[Request]]
) -> None:
    served: dict[str, Any] = dict(build_app(Shelf([bench])).get_api_info()["named_endpoints"])
    assert list(served) == list(schemas)
    for name, schema in schemas.items():
        info, stated = served[name], endpoint_arguments(schema, bench)
        parameters = {parameter["parameter_name"]: parameter for parameter in info["parameters"]}
        assert list(parameters) == [*schema.model_fields, "run"] == list(stated)
        with_default = {key: value for key, value in parameters.items() if value["parameter_has_default"]}
        defaults = {key: value["parameter_default"] for key, value in with_default.items()}
        assert defaults == {**schema.defaults(bench.limits), "run": None}
        assert {key: value["type"] for key, value in parameters.items()} == stated
        assert info["description"].split() == schema.description().split()
        assert [result["label"] for result in info["returns"]] == [result.name for result in schema.results]


def test_defaults_follow_the_run(bench: Workbench, schemas: dict[str, type[Request]]) -> None:
    assert list(bench.limits.hookpoints) == [EARLY, LATE]
    for schema in schemas.values():
        defaults = schema.defaults(bench.limits)
        assert defaults.get("hookpoint", LATE) == LATE
        assert defaults.get("num_inference_steps", bench.limits.default_steps) == bench.limits.default_steps


PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAGUlEQVR4nO3BMQEAAADCoPVP7WENoA"
    "AAAG4MIAABt9NlCQAAAABJRU5ErkJggg=="
)


def test_the_about_tab_shows_every_endpoint_with_a_call_that_its_schema_takes(
    bench: Workbench, schemas: dict[str, type[Request]]
) -> None:
    shown = {example["name"]: example for example in endpoint_examples(bench, tuple(schemas.values()))}
    assert list(shown) == list(schemas)
    for name, schema in schemas.items():
        (call,) = [line for line in shown[name]["code"]["Python"].split("\n\n") if "client.predict(" in line]
        given: dict[str, Any] = {}
        known = {"given": given, "handle_file": lambda name: PICTURE}
        exec(call.split(" = client.predict(")[1].join(["given.update(", ""]), known)
        assert f"/{schema.endpoint}" == given.pop("api_name")
        assert schema.parse(bench.limits, **given)
        assert [argument for argument, _ in shown[name]["arguments"]] == [*given, "run"]
