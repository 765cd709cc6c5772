"""Waiting, stopping and browsing on, and a gallery that grows, in a real browser."""

import page_server
import pytest
from gradio_client import Client
from gradio_client.utils import Status
from playwright.sync_api import expect
from steps import PROMPT, Open, go_to

pytestmark = pytest.mark.browser


def test_who_waits_is_told_and_stops_at_once_while_others_paint(visit: Open, served: page_server.Page) -> None:
    page = visit()
    client = Client(served.url, verbose=False)
    asked = {"prompt": PROMPT, "num_inference_steps": 60, "limit": 1, "api_name": "/heatmap"}
    others = [client.submit(seed=7_000 + number, **asked) for number in range(3)]
    while others[0].status().code in {Status.STARTING, Status.JOINING_QUEUE}:
        page.wait_for_timeout(50)
    page.locator("#heatmap-prompt textarea").fill("a small blue star on a black background")
    page.locator("#heatmap-go").click()
    expect(page.locator(".fs-status")).to_contain_text("before you")
    go_to(page, "Gallery")
    page.locator("fs-gallery .fs-card").first.click()
    expect(page.locator("fs-feature article")).to_have_count(1)
    go_to(page, "Heatmap")
    page.locator("#heatmap-stop").click()
    expect(page.locator("#heatmap-status .fs-status")).to_have_count(0)
    assert not all(other.done() for other in others)
    for other in others:
        other.cancel()


def test_more_cards_join_those_that_are_there(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    cards = page.locator("fs-gallery .fs-card")
    expect(cards).to_have_count(24)
    first = cards.first.element_handle()
    page.get_by_role("button", name="Show 24 more of").click()
    expect(cards).to_have_count(48)
    assert first.evaluate("node => node.isConnected"), "the first ones stay, and are not drawn anew"
    numbers = cards.evaluate_all("nodes => nodes.map((node) => node.dataset.feature)")
    assert len(set(numbers)) == 48
