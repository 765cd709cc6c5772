"""Pictures of every tab and a film of painting for the README, from the served page: `make screenshots`, into docs/."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright

from tests import browser, page_server

DOCS = Path(__file__).parent.parent / "docs"
DESKTOP, PHONE = {"width": 1366, "height": 900}, {"width": 390, "height": 844}
FILM_MOST, FRAME_MS, LAST_MS = 1_000_000, 160, 2400


def heatmap(page: Page) -> None:
    """The image that the page opens on made anew, its features, and the first one's heat."""
    page.get_by_label("Keep this seed").check()
    page.locator("#heatmap-go").click()
    page.wait_for_function("document.querySelector('fs-lab').data.kind === 'live'")


def film(page: Page) -> list[Image.Image]:
    """The image and the heat of one feature in it, denoising step by step; the whole image last."""
    heatmap(page)
    slider = page.get_by_label("Denoising step", exact=True)
    stage = page.locator("fs-lab .fs-stage")
    frames = []
    for step in [*range(1, int(slider.get_attribute("max") or 0) + 1), 0]:
        slider.fill(str(step))
        page.wait_for_timeout(250)  # the step's own picture is drawn once it is there
        frames.append(Image.open(io.BytesIO(stage.screenshot())).convert("RGB"))
    return frames


def save_film(frames: list[Image.Image], path: Path) -> None:
    """Writes an animation that stays on its last frame for a while.

    Raises:
        ValueError: it is larger than a README should load.
    """
    shown = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0, quality=80)
    if path.stat().st_size > FILM_MOST:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; make it smaller than {FILM_MOST}.")


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


def open_page(chromium: Browser, url: str, *, viewport: dict[str, int], dark: bool = False) -> Page:
    """The page as a visitor meets it."""
    page = chromium.new_page(viewport=ViewportSize(width=viewport["width"], height=viewport["height"]))
    page.set_default_timeout(120_000)
    page.goto(f"{url}/?__theme={'dark' if dark else 'light'}")
    page.wait_for_selector("fs-lab canvas")
    return page


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
            page = open_page(chromium, served.url, viewport=viewport, dark=dark)
            prepare(page)
            page.wait_for_timeout(700)
            raw = DOCS / f"{name}.png"
            page.screenshot(path=raw, full_page=viewport is DESKTOP)
            with Image.open(raw) as picture:
                picture.convert("RGB").save(raw, optimize=True)
            print(f"{raw} ({raw.stat().st_size // 1024} KB)")
            page.close()
        path = DOCS / "painting.webp"
        save_film(film(open_page(chromium, served.url, viewport=DESKTOP)), path)
        print(f"{path} ({path.stat().st_size // 1024} KB)")
        chromium.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
