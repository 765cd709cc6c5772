"""The served OpenAPI document against the app: whatever fits it or not is answered or refused, never a fault.

The page borrows its GPU, by the double of the `spaces` package: jobs run in another process.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import page_server
import pytest
import requests
import schemathesis
from gradio_client import Client
from gradio_client.exceptions import AppError
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from fluxsae.miniature import miniature_path
from fluxsae.sae.model import SparseAutoencoder

N_EXAMPLES = int(os.environ.get("FLUXSAE_FUZZ_EXAMPLES", "5"))
"""Calls of each operation and mode."""
FUZZ = settings(
    max_examples=N_EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BROKEN_OFF = 0
PLACE = "transformer_blocks.1.ff"
GRADIOS_OWN = {("GET", BROKEN_OFF)}
"""Faults that are Gradio's: the stream of a call that does not exist (404, raised after the headers were sent)."""


@pytest.fixture(scope="module")
def page() -> Iterator[page_server.Page]:
    with page_server.serve(SPACES_ZERO_GPU="true", PYTHONPATH=str(page_server.ROOT / "tests" / "doubles")) as served:
        yield served


def test_a_page_that_borrows_its_gpu_makes_images_and_refuses_in_words(page: page_server.Page) -> None:
    client = Client(page.url, verbose=False, download_files=False)
    image, features, _ = client.predict(prompt="a large red circle on a black background", limit=3, api_name="/heatmap")
    assert image
    assert len(features) == 3
    sae = SparseAutoencoder.from_pretrained(miniature_path("run"), subfolder=f"sae/{PLACE}")
    silent = int((sae.reference_acts == 0).nonzero()[0])
    edit = {"hookpoint": PLACE, "feature": silent, "mode": "add", "strength": 1.0}
    with pytest.raises(AppError, match=f"feature {silent}"):
        client.predict(prompt="a circle", edits=[edit], api_name="/steer")


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
    assert len(operations) == 27, "13 endpoints, each to call and to read, and uploads"
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
