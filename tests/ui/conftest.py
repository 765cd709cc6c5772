"""A small run, opened for visitors, without FLUX."""

import pytest
import whole_run

from fluxsae.ui.serve.session import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench(whole_run.build(tmp_path_factory.mktemp("run")))
