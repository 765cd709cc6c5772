"""The browser that visits the served page."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import browser
import page_server
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from steps import DESKTOP, WAIT, Open


@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    found = browser.find_chromium()
    assert found is not None, "no Chromium: run `python -m browser`"
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(found), args=list(browser.ARGUMENTS))
        yield running
        running.close()


@pytest.fixture(scope="package")
def windows(chromium: Browser) -> Callable[[int, int, str], BrowserContext]:
    """A kind of window: width, height and colour scheme. Its pages share what they fetched, so they start faster."""

    @cache
    def window(width: int, height: int, theme: Any) -> BrowserContext:
        return chromium.new_context(viewport={"width": width, "height": height}, color_scheme=theme)

    return window


@pytest.fixture
def visit(served: page_server.Page, windows: Callable[[int, int, str], BrowserContext]) -> Iterator[Open]:
    """Opens the page; afterwards no script may have failed."""
    pages: list[Page] = []
    failures: list[str] = []

    def open_page(*, viewport: Any = DESKTOP, dark: bool = False, query: str = "") -> Page:
        served.check_alive()
        theme = "dark" if dark else "light"
        page = windows(viewport["width"], viewport["height"], theme).new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: failures.append(str(error)))
        pages.append(page)
        page.goto(f"{served.url}/?__theme={theme}{query}")
        page.wait_for_selector("fs-lab canvas", state="attached")  # a link opens another tab
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not failures
