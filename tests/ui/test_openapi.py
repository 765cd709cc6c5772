"""The served OpenAPI document against the app: whatever fits it or not is answered or refused, never a fault."""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import page_server
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

N_EXAMPLES = int(os.environ.get("FLUXSAE_FUZZ_EXAMPLES", "10"))
"""Calls of each operation and mode."""
FUZZ = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BROKEN_OFF = 0
GRADIOS_OWN = {("GET", BROKEN_OFF)}
"""Faults that are Gradio's: the stream of a call that does not exist (404, raised after the headers were sent)."""


@pytest.fixture(scope="module")
def page() -> Iterator[page_server.Page]:
    with page_server.serve() as served:
        yield served


def outcomes(url: str, operation: Any, mode: GenerationMode) -> Counter[tuple[str, int]]:
    """(Method, status) of each call that is made of an operation."""
    seen: Counter[tuple[str, int]] = Counter()

    @seed(0)
    @FUZZ
    @given(operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        try:
            status = case.call(base_url=url, timeout=60).status_code
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError):
            status = BROKEN_OFF
        seen[case.method.upper(), status] += 1

    try:
        call()
    except Unsatisfiable:  # an operation whose every input fits its description has no negative cases
        assert mode is GenerationMode.NEGATIVE
    return seen


@pytest.mark.timeout(900)
def test_no_call_that_the_document_describes_or_forbids_is_answered_with_a_fault(page: page_server.Page) -> None:
    document = requests.get(f"{page.url}/gradio_api/openapi.json", timeout=60).json()
    operations = [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]
    assert len(operations) == 15, "seven endpoints, each to call and to read, and uploads"
    faults: dict[str, set[tuple[str, int]]] = {}
    for operation in operations:
        for mode in GenerationMode:
            seen = outcomes(page.url, operation, mode)
            found = {what for what in seen if what[1] >= 500 or what[1] == BROKEN_OFF} - GRADIOS_OWN
            if found:
                faults[f"{operation.method} {operation.path} {mode.value}"] = found
    assert faults == {}
    assert requests.get(f"{page.url}/config", timeout=60).ok
    assert "fluxsae.app ERROR" not in page.log.read_text(errors="replace"), "nothing failed in the product itself"
