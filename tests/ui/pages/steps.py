"""What a visitor does on the page, step by step."""

import json
from collections.abc import Callable

from playwright.sync_api import Page

DESKTOP, PHONE = {"width": 1366, "height": 900}, {"width": 390, "height": 844}
WAIT = 90_000
PROMPT = "a large red circle on a black background"
Open = Callable[..., Page]


def canvas_pixels(page: Page) -> str:
    page.wait_for_timeout(250)
    return str(page.locator(".fs-stage canvas").evaluate("canvas => canvas.toDataURL()"))


def go_to(page: Page, tab: str) -> None:
    found = page.get_by_role("tab", name=tab)
    if not found.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text(tab).click()
        return
    found.click()


def generate(page: Page, prompt: str = PROMPT) -> None:
    page.get_by_label("Keep this seed").check()
    page.locator("#heatmap-prompt textarea").fill(prompt)
    page.locator("#heatmap-go").click()
    page.wait_for_function("prompt => document.querySelector('fs-lab').data.prompt === prompt", arg=prompt)
    page.wait_for_function("document.querySelector('fs-lab').data.kind === 'live'")


def chosen(page: Page) -> int:
    return int(page.locator("fs-lab .fs-card[aria-pressed=true]").get_attribute("data-feature") or -1)


def add_feature(page: Page) -> None:
    page.get_by_role("group", name="Add a feature").get_by_role("button").first.click()
    page.wait_for_selector(".fs-turn")


def turn(page: Page, value: float) -> None:
    slider = page.locator(".fs-turn").first
    slider.evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')); "
        "input.dispatchEvent(new Event('change')) }",
        value,
    )


def wait_until_turned(page: Page) -> None:
    """A feature that was added is shown unturned first."""
    page.wait_for_function("(document.querySelector('fs-result').data || {}).measurement")


def nothing_serious(page: Page) -> None:
    """A screen reader's and low vision's rules, as axe checks them."""
    from axe_playwright_python.sync_playwright import Axe

    serious = [
        {"rule": item["id"], "nodes": [node["html"][:160] for node in item["nodes"]][:3]}
        for item in Axe().run(page).response["violations"]
        if item["impact"] in {"serious", "critical"}
    ]
    assert not serious, json.dumps(serious, indent=1)
