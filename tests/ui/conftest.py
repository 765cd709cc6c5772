"""A small run, opened for visitors, without FLUX; and the page with the embedded run, served."""

from collections.abc import Iterator

import page_server
import pytest
import whole_run

from fluxsae.ui.serve.session import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(whole_run.build(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="session")
def served() -> Iterator[page_server.Page]:
    """One for all the tests of a process that only visit it."""
    with page_server.serve() as page:
        yield page
