"""A picture of the visitor's own, in a real browser: chosen, dropped, pasted, read, and steered."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect
from steps import DESKTOP, PHONE, Open, canvas_pixels, turn, wait_until_turned

from fluxsae.ui.kit.views import base64_text

pytestmark = pytest.mark.browser


def photo() -> bytes:
    y, x = np.mgrid[0:300, 0:500]
    content = io.BytesIO()
    pixels = np.stack([x % 256, 255 - y // 2, (x + y) % 256], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(content, format="JPEG")
    return content.getvalue()


def choose(page: Page, name: str, content: bytes) -> None:
    page.locator("fs-given input[type=file]").set_input_files({"name": name, "mimeType": "", "buffer": content})


def wait_until_read(page: Page, other_than: Any = None) -> str:
    page.wait_for_function(
        "old => { const { picture } = document.querySelector('fs-lab').data; return picture && picture !== old; }",
        arg=other_than,
    )
    return str(page.evaluate("document.querySelector('fs-lab').data.picture"))


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_photo_is_read_and_told_to_be_unlike_and_a_sample_is_named_surely(visit: Open, viewport: Any) -> None:
    page = visit(viewport=viewport)
    choose(page, "photo.jpg", photo())
    photographed = wait_until_read(page)
    expect(page.locator("fs-lab .fs-notice")).to_contain_text("unlike anything this FLUX knows")
    told = page.locator("fs-lab .fs-card").all_text_contents()
    assert told
    assert all("a guess" in text or "unnamed" in text for text in told)
    page.locator(".fs-sample").nth(1).click()
    wait_until_read(page, photographed)
    expect(page.locator("fs-lab .fs-notice")).to_have_count(0)
    expect(page.locator("fs-lab .fs-list > .fs-card").first).to_contain_text("sure")
    expect(page.locator("fs-lab .fs-prompt")).to_contain_text("your picture")
    expect(page.locator("fs-lab").get_by_role("button", name="Copy link")).to_have_count(0)
    page.locator(".fs-stage").focus()
    page.keyboard.press("Enter")
    expect(page.locator(".fs-patch li").first).to_be_visible()
    whole = canvas_pixels(page)
    page.get_by_label("Denoising step", exact=True).fill("4")
    assert canvas_pixels(page) != whole
    expect(page.locator(".fs-steps output")).to_contain_text("your picture as FLUX sees it at step 4 of 20")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_caption_is_read_with_the_picture(visit: Open) -> None:
    page = visit()
    page.locator(".fs-sample").first.click()
    wait_until_read(page)
    page.get_by_label("Caption of your picture, optional").fill("a large purple tree")
    page.get_by_role("button", name="Read again").click()
    page.wait_for_function("document.querySelector('fs-lab').data.prompt === 'a large purple tree'")
    expect(page.locator(".fs-word").first).to_be_visible()


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_a_picture_is_dropped_or_pasted_anywhere_on_the_tab(visit: Open, how: str) -> None:
    page = visit()
    page.evaluate(
        """([how, text]) => {
            const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const carried = new DataTransfer();
            carried.items.add(new File([bytes], "a.jpg", { type: "image/jpeg" }));
            const event = how === "drop"
              ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
              : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
            document.querySelector(".fs-stage").dispatchEvent(event);
        }""",
        [how, base64_text(photo())],
    )
    wait_until_read(page)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"these are words and no picture", "is no picture of a kind that is read"),
        ("photo.jpg", photo()[:2000], "broken or cut off"),
    ],
    ids=["text", "cut off"],
)
def test_an_odd_file_gets_a_sentence_and_the_example_stays(
    visit: Open, name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    page = visit()
    choose(page, name, content)
    expect(page.locator(".toast-body").first).to_contain_text(words)
    assert page.evaluate("document.querySelector('fs-lab').data.kind") == "example"


def test_an_own_picture_is_steered_and_given_back_to_the_prompt(visit: Open) -> None:
    page = visit()
    page.locator(".fs-sample").nth(1).click()
    wait_until_read(page)
    page.locator("fs-lab").get_by_role("button", name="Steer with this").click()
    own = page.get_by_role("group", name="Your own picture")
    expect(own).to_be_visible()
    page.wait_for_selector("fs-result section")
    turn(page, 0.5)
    wait_until_turned(page)
    result = page.locator("fs-result")
    expect(result).to_contain_text("Before is your picture, covered with 60 % noise")
    expect(result.get_by_role("link", name="Recipe", exact=True)).to_have_count(0)
    first = page.evaluate("document.querySelector('fs-result').data.before")
    change = own.get_by_label("How much may change")
    change.fill("0.2")
    change.dispatch_event("change")
    expect(result).to_contain_text("covered with 20 % noise")
    assert page.evaluate("document.querySelector('fs-result').data.before") != first
    page.locator("#steer-prompt textarea").fill("a large red circle on a black background")
    own.get_by_role("button", name="Use the prompt instead").click()
    expect(own).to_have_count(0)
    page.wait_for_function("document.querySelector('fs-result').data.given === null")
