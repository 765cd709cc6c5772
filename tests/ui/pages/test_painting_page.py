"""Painting where an edit acts, in a real browser."""

import json

import pytest
from playwright.sync_api import Page, expect
from steps import (
    Open,
    add_feature,
    go_to,
    turn,
    wait_until_turned,
)

from fluxsae.ui.kit.links import decode_view

pytestmark = pytest.mark.browser


def paint_a_stroke(page: Page) -> None:
    """Turns a feature, waits for the picture and paints on it."""
    go_to(page, "Steer")
    add_feature(page)
    turn(page, 0.5)
    wait_until_turned(page)
    stroke(page)


def stroke(page: Page) -> None:
    page.get_by_role("button", name="Paint where it acts").click()
    box = page.locator(".fs-paint").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.3, steps=8)
    page.mouse.up()


REGION = "((document.querySelector('fs-result').data.recipe || {batch: [[], [{}]]}).batch[1][0] || {}).region"


@pytest.mark.parametrize("press", ["Use this region", "Steer"])
def test_a_painted_region_is_sent_with_the_edit(visit: Open, press: str) -> None:
    page = visit()
    paint_a_stroke(page)
    page.get_by_role("button", name=press, exact=True).click()
    page.wait_for_function(REGION)
    assert 1 <= sum(map(sum, page.evaluate(REGION))) < 60
    expect(page.locator(".fs-edit")).to_contain_text("marked patches")


def test_a_painted_region_is_in_the_link_the_recipe_and_the_strip_before_any_picture_has_it(visit: Open) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    paint_a_stroke(page)
    result = page.locator("fs-result")
    expect(result.get_by_text("does not show the painted region yet")).to_be_visible()
    result.get_by_role("button", name="Copy link").click()
    expect(result.get_by_role("button", name="Copied")).to_be_visible()
    view = decode_view(page.evaluate("navigator.clipboard.readText()").partition("#view=")[2])
    with page.expect_download() as download:
        result.get_by_role("link", name="Recipe", exact=True).click()
    recipe = json.loads(download.value.path().read_text())
    region = view["edits"][0]["region"]
    assert 1 <= sum(map(sum, region)) < 60
    assert recipe["batch"][recipe["index"]] == view["edits"]
    page.locator("#steer-strip-go").click()
    page.wait_for_selector("fs-strip section")
    strongest = page.evaluate("document.querySelector('fs-strip').data.cells.at(-1).measurement")
    assert strongest["edited_share"] == sum(map(sum, region)) / 64


def test_a_region_painted_before_anything_is_turned_is_kept(visit: Open) -> None:
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    go_to(page, "Steer")
    add_feature(page)
    page.wait_for_selector("fs-result section")
    stroke(page)
    result = page.locator("fs-result")
    result.get_by_role("button", name="Copy link").click()
    expect(result.get_by_role("button", name="Copied")).to_be_visible()
    (edit,) = decode_view(page.evaluate("navigator.clipboard.readText()").partition("#view=")[2])["edits"]
    assert 1 <= sum(map(sum, edit["region"])) < 60
    turn(page, 0.5)
    wait_until_turned(page)
    assert page.evaluate(REGION) == edit["region"]
