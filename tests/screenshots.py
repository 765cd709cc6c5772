"""Pictures of every tab for the README, from the served page: `make screenshots` writes them into docs/."""

import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests import browser, page_server

DOCS = Path(__file__).parent.parent / "docs"
DESKTOP, PHONE = {"width": 1366, "height": 900}, {"width": 390, "height": 844}
PROMPT = "a large red striped circle on the left and a small blue star on the right on a black background"


def heatmap(page: Page) -> None:
    """An image of two objects, its features, and the first one's heat."""
    page.get_by_label("Keep this seed").check()
    page.locator("#heatmap-prompt textarea").fill(PROMPT)
    page.locator("#heatmap-go").click()
    page.wait_for_function("document.querySelector('fs-lab').data.kind === 'live'")


def gallery(page: Page) -> None:
    """The best features."""
    page.get_by_role("tab", name="Gallery").click()
    page.wait_for_selector("fs-gallery .fs-card")


def directions(page: Page) -> None:
    """The map with a feature chosen by keyboard."""
    page.get_by_role("tab", name="Directions").click()
    page.wait_for_selector("fs-map canvas")
    page.wait_for_timeout(400)
    page.locator(".fs-mapstage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("fs-near article")


def steer(page: Page) -> None:
    """The first starter, or the first good feature, turned up; and the strip."""
    page.get_by_role("tab", name="Steer").click()
    if page.locator(".fs-starter").count():
        page.locator(".fs-starter").first.click()
        page.wait_for_selector(".fs-turn")
    else:
        page.get_by_role("group", name="Add a feature").get_by_role("button").first.click()
        page.wait_for_selector(".fs-turn")
        page.locator(".fs-turn").first.evaluate(
            "input => { input.value = 0.6; "
            "input.dispatchEvent(new Event('input')); input.dispatchEvent(new Event('change')) }"
        )
    page.wait_for_selector("fs-result section")
    page.locator("#steer-strip-go").click()
    page.wait_for_selector("fs-strip section")


SHOTS: list[tuple[str, Callable[[Page], None], dict[str, int], bool]] = [
    ("heatmap", heatmap, DESKTOP, False),
    ("heatmap-phone", heatmap, PHONE, False),
    ("gallery", gallery, DESKTOP, False),
    ("directions", directions, DESKTOP, False),
    ("steer", steer, DESKTOP, False),
]


def main() -> int:
    """Takes every picture; 1 where there is no Chromium."""
    found = browser.find_chromium()
    if found is None:
        print("No Chromium: run `make browser` first", file=sys.stderr)
        return 1
    DOCS.mkdir(exist_ok=True)
    with page_server.serve() as served, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(found), args=list(browser.ARGUMENTS))
        for name, prepare, viewport, dark in SHOTS:
            page = chromium.new_page(viewport=viewport)
            page.set_default_timeout(120_000)
            page.goto(f"{served.url}/?__theme={'dark' if dark else 'light'}")
            page.wait_for_selector("fs-lab canvas")
            prepare(page)
            page.wait_for_timeout(700)
            raw = DOCS / f"{name}.png"
            page.screenshot(path=raw, full_page=viewport is DESKTOP)
            with Image.open(raw) as picture:
                picture.convert("RGB").save(raw, optimize=True)
            print(f"{raw} ({raw.stat().st_size // 1024} KB)")
            page.close()
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
