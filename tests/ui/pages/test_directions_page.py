"""The Directions tab in a real browser."""

import re

import pytest
from playwright.sync_api import expect
from steps import Open, go_to

from fluxsae.ui.kit.links import encode_view

pytestmark = pytest.mark.browser


def test_the_map_is_clicked_through_and_walked_by_keyboard(visit: Open) -> None:
    page = visit()
    go_to(page, "Directions")
    page.wait_for_selector("fs-map canvas")
    page.wait_for_timeout(300)
    page.locator(".fs-mapstage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_selector("fs-near article")
    first = page.locator("fs-near article").get_attribute("aria-label")
    page.locator("fs-near .fs-rank button").first.click()
    expect(page.locator("fs-near article")).not_to_have_attribute("aria-label", str(first))


def test_a_link_opens_the_map_of_its_own_hook_point(visit: Open) -> None:
    early = "transformer_blocks.1.ff"
    view = encode_view({"tab": "directions", "hookpoint": early, "feature": 7})
    page = visit(query=f"&view={view}")
    expect(page.locator("fs-near article")).to_have_attribute("aria-label", "Feature 7")
    page.wait_for_selector("fs-map canvas")
    assert page.evaluate("document.querySelector('fs-map').data.hookpoint") == early
    expect(page.locator("#directions-hook input:checked")).to_have_value(early)


def test_hook_points_are_compared(visit: Open) -> None:
    page = visit()
    go_to(page, "Directions")
    page.locator("#directions-compare").get_by_role("button").first.click()
    page.locator("#directions-compare-go").click()
    expect(page.locator("fs-compared h3").first).to_contain_text("In both")
    expect(page.locator("fs-compared .fs-lives").first).to_contain_text(re.compile(r"\d+ of \d+"))
