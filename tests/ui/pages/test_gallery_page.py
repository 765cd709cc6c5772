"""The Gallery tab in a real browser."""

import pytest
from playwright.sync_api import expect
from steps import PHONE, Open, go_to

pytestmark = pytest.mark.browser


def test_the_gallery_finds_opens_and_sends_a_feature_through_the_tabs(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    page.wait_for_selector("fs-gallery .fs-card")
    label = page.locator("fs-gallery .fs-label").first.inner_text()
    page.locator("#gallery-query textarea").press_sequentially(label, delay=30)
    expect(page.locator("fs-gallery p").first).to_contain_text(f"match “{label}”")
    card = page.locator("fs-gallery .fs-card").first
    feature = card.get_attribute("data-feature")
    card.click()
    expect(page.locator("fs-feature article")).to_have_attribute("aria-label", f"Feature {feature}")
    expect(page.locator("fs-feature .fs-help").first).to_be_visible()
    expect(page.locator("fs-feature [title]")).to_have_count(0)  # what is needed is no tooltip
    page.get_by_role("button", name="Show in map").click()
    expect(page.locator("fs-near article")).to_have_attribute("aria-label", f"Feature {feature}")
    page.wait_for_selector("fs-map canvas")  # fetched beside the card; a report holds it once it is there
    with page.expect_download() as report:
        page.locator("fs-near").get_by_role("button", name="Save report").click()
    saved = report.value.path().read_text()
    assert f"Near feature {feature}" in saved
    assert "the map of directions" in saved
    assert saved.count("<img") == 4
    page.locator("fs-near").get_by_role("button", name="Steer with this").click()
    expect(page.locator(".fs-edit")).to_contain_text(f"#{feature},")


def test_a_new_search_closes_the_open_feature_and_says_how_each_was_found(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    page.locator("fs-gallery .fs-card").first.click()
    expect(page.locator("fs-feature article")).to_have_count(1)
    page.locator("#gallery-query textarea").press_sequentially("striped", delay=30)
    expect(page.locator("fs-gallery p").first).to_contain_text("match “striped” by name")
    expect(page.locator("fs-gallery p").first).to_contain_text("more by the captions of their best images")
    expect(page.locator("fs-feature article")).to_have_count(0)


def test_a_closed_feature_opens_again_and_a_number_too_high_is_told(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    card = page.locator("fs-gallery .fs-card").first
    for _ in range(2):
        card.click()
        expect(page.locator("fs-feature article")).to_have_count(1)
        page.locator("fs-feature").get_by_role("button", name="Close").click()
        expect(page.locator("fs-feature article")).to_have_count(0)
    page.locator("#gallery-query textarea").press_sequentially("9999", delay=30)
    expect(page.locator("fs-gallery")).to_contain_text("Feature 9999 does not exist")


def test_a_search_that_is_pasted_or_cleared_is_answered_too(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    found = page.locator("fs-gallery p").first
    every = found.inner_text()
    page.locator("#gallery-query textarea").focus()
    page.keyboard.insert_text("striped")
    expect(found).to_contain_text("match “striped” by name")
    page.locator("#gallery-query textarea").press("Control+a")
    page.locator("#gallery-query textarea").press("Backspace")
    expect(found).to_have_text(every)


def test_the_word_that_silences_a_feature_is_told_and_goes_with_the_feature(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    page.locator("fs-gallery .fs-card").first.click()
    page.get_by_role("button", name="Which word silences it?").click()
    page.wait_for_selector("fs-silence section")
    data = page.evaluate("document.querySelector('fs-silence').data")
    expect(page.locator("fs-silence h3")).to_have_text(data["verdict"])
    counts = [1 + len(image["without"]) for image in data["images"]]
    assert page.locator("fs-silence figure").count() == sum(counts)
    assert page.locator("fs-silence figure:visible").count() == counts[0]
    assert page.locator("fs-silence details").count() == len(counts) - 1
    page.locator("fs-gallery .fs-card").nth(1).click()
    expect(page.locator("fs-silence section")).to_have_count(0)


def test_open_code_leaves_a_features_page_as_wide_as_the_phone(visit: Open) -> None:
    page = visit(viewport=PHONE)
    go_to(page, "Gallery")
    page.locator("fs-gallery .fs-card").first.click()
    page.locator("fs-feature summary").first.click()
    expect(page.locator("fs-feature pre")).to_be_visible()
    assert page.locator("fs-feature article").evaluate("article => article.scrollWidth <= article.clientWidth")
