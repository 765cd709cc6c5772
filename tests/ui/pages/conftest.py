"""The served page and the browser that visits it."""

from collections.abc import Iterator
from typing import Any

import browser
import page_server
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from steps import DESKTOP, WAIT, Open


@pytest.fixture(scope="package")
def served() -> Iterator[page_server.Page]:
    with page_server.serve() as page:
        yield page


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    found = browser.find_chromium()
    assert found is not None, "no Chromium: run `python -m browser`"
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(found), args=list(browser.ARGUMENTS))
        yield running
        running.close()


@pytest.fixture
def visit(served: page_server.Page, chromium: Browser) -> Iterator[Open]:
    """Opens the page; afterwards no script may have failed."""
    pages: list[Page] = []
    failures: list[str] = []

    def open_page(*, viewport: Any = DESKTOP, dark: bool = False, query: str = "") -> Page:
        page = chromium.new_page(viewport=viewport, color_scheme="dark" if dark else "light")
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: failures.append(str(error)))
        pages.append(page)
        theme = "dark" if dark else "light"
        page.goto(f"{served.url}/?__theme={theme}{query}")
        page.wait_for_selector("fs-lab canvas", state="attached")  # a link opens another tab
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not failures
