"""What holds on every tab, in a real browser: refusals, the feature that follows, screen sizes, screen readers."""

import json
from pathlib import Path
from typing import Any

import page_server
import pytest
from playwright.sync_api import Page, expect
from steps import (
    DESKTOP,
    PHONE,
    Open,
    add_feature,
    chosen,
    generate,
    go_to,
    nothing_serious,
    turn,
    wait_until_turned,
)

from fluxsae.ui.kit.links import encode_view
from train.benchmarks.page.visits import config_text

pytestmark = pytest.mark.browser


TABS = ("Heatmap", "Gallery", "Directions", "Steer", "About")


def test_what_is_refused_is_told_once(visit: Open, tmp_path: Path) -> None:
    told = ".toast-body"
    page = visit(query="&view=damaged")
    expect(page.locator(told)).to_have_count(1)
    expect(page.locator(told)).to_contain_text("This link is damaged")
    assert page.locator(told).inner_text().count("damaged") == 1
    page = visit(query=f"&view={encode_view({'tab': 'attic'})}")
    expect(page.locator(told)).to_contain_text("This link leads to 'attic'")
    page = visit()
    go_to(page, "Steer")
    (tmp_path / "recipe.json").write_text("{}")
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Load a recipe").click()
    chooser.value.set_files(tmp_path / "recipe.json")
    expect(page.locator(told)).to_contain_text(
        "recipe.json is no recipe of fluxsae: {} is no recipe of schema_version 1"
    )
    go_to(page, "Gallery")
    page.locator("#gallery-query textarea").fill("x" * 3000)
    expect(page.locator("fs-gallery")).to_contain_text("at most 200")


def test_a_feature_goes_from_the_heatmap_to_its_page_and_to_the_sliders(visit: Open) -> None:
    page = visit()
    page.locator("fs-lab .fs-card").first.click()
    feature = chosen(page)
    page.locator("fs-lab").get_by_role("button", name="Open its page").click()
    expect(page.locator("fs-feature article")).to_have_attribute("aria-label", f"Feature {feature}")
    with page.expect_download() as report:
        page.locator("fs-feature").get_by_role("button", name="Save report").click()
    assert f"Feature {feature}" in report.value.path().read_text()
    go_to(page, "Heatmap")
    page.locator("fs-lab").get_by_role("button", name="Steer with this").click()
    expect(page.locator(".fs-edit")).to_contain_text(f"#{feature},")


def test_the_about_tab_has_code_for_every_endpoint(visit: Open, served: page_server.Page) -> None:
    page = visit()
    go_to(page, "About")
    expect(page.locator("fs-endpoints .fs-endpoint")).to_have_count(13)
    page.locator("fs-endpoints summary").first.click()
    expect(page.locator("fs-endpoints pre").first).to_contain_text(served.url)


def test_the_configuration_that_a_browser_loads_is_small(served: page_server.Page) -> None:
    text = config_text(served.url, served.process)
    assert len(text) < 230_000  # at most 300 kB are wanted; 12,288 features at two hook points made 177 kB
    value_of = {
        each["props"].get("elem_id"): str(each["props"].get("value")) for each in json.loads(text)["components"]
    }
    assert [name for name, value in value_of.items() if len(value) > 12_000] == []  # what grows with a run is fetched


def prepare(page: Page, tab: str) -> None:
    if tab == "Heatmap":
        generate(page)
    go_to(page, tab)
    if tab == "Gallery":
        page.locator("fs-gallery .fs-card").first.click()
        page.wait_for_selector("fs-feature article")
    elif tab == "Directions":
        page.wait_for_selector("fs-map canvas")
    elif tab == "Steer":
        add_feature(page)
        turn(page, 0.5)
        wait_until_turned(page)
    page.wait_for_timeout(500)


@pytest.mark.parametrize(("viewport", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["desktop-light", "phone-dark"])
def test_every_tab_fits_its_screen_and_axe_finds_nothing_serious(visit: Open, viewport: Any, dark: bool) -> None:
    page = visit(viewport=viewport, dark=dark)
    for tab in TABS:
        prepare(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], tab
        nothing_serious(page)
        if tab in {"Heatmap", "Steer"}:  # what is made anew is legible meanwhile
            makes = {"Heatmap": "heatmap-lab", "Steer": "steer-result"}[tab]
            working = {"state": "working", "step": 1, "n_steps": 20, "makes": makes, "counts": "Step"}
            page.locator(f"#{tab.lower()}-status fs-status").evaluate("(bar, data) => { bar.data = data; }", working)
            page.wait_for_timeout(400)
            nothing_serious(page)
            page.locator(f"#{tab.lower()}-status fs-status").evaluate("bar => { bar.data = { state: 'idle' }; }")


def test_back_and_forward_go_from_tab_to_tab(visit: Open) -> None:
    page = visit()
    selected = page.locator('#tabs [role="tab"][aria-selected="true"]')
    for tab in ("Gallery", "Directions"):
        go_to(page, tab)
        expect(selected).to_have_text(tab)
    for go, tab in ((page.go_back, "Gallery"), (page.go_back, "Heatmap"), (page.go_forward, "Gallery")):
        go()
        expect(selected).to_have_text(tab)
