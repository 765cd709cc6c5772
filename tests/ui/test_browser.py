"""Each tab's main story in a real browser: desktop and phone, light and dark, mouse, keyboard and screen reader."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import browser
import page_server
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.kit.views import decode_view, encode_view

pytestmark = pytest.mark.browser

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 812}
TABS = ("Heatmap", "Gallery", "Directions", "Steer", "About")
WAIT = 90_000
PROMPT = "a large red circle on a black background"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def served() -> Iterator[page_server.Page]:
    with page_server.serve() as page:
        yield page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    found = browser.find_chromium()
    assert found is not None, "no Chromium: run `python -m browser`"
    expect.set_options(timeout=WAIT)
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=str(found), args=list(browser.ARGUMENTS))
        yield running
        running.close()


@pytest.fixture
def visit(served: page_server.Page, chromium: Browser) -> Iterator[Open]:
    """Opens the page; afterwards no script may have failed."""
    pages: list[Page] = []
    failures: list[str] = []

    def open_page(*, viewport: Any = DESKTOP, dark: bool = False, query: str = "") -> Page:
        page = chromium.new_page(viewport=viewport, color_scheme="dark" if dark else "light")
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: failures.append(str(error)))
        pages.append(page)
        theme = "dark" if dark else "light"
        page.goto(f"{served.url}/?__theme={theme}{query}")
        page.wait_for_selector("fs-lab canvas", state="attached")  # a link opens another tab
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not failures


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


def test_the_page_opens_on_a_ready_example_without_generating(visit: Open, served: page_server.Page) -> None:
    page = visit()
    assert page.evaluate("document.querySelector('fs-lab').data.kind") == "example"
    expect(page.locator("fs-lab .fs-card").first).to_be_visible()
    assert page.locator("fs-lab .fs-card").count() >= 3


def test_a_prompt_shows_overlays_that_change_with_the_chosen_feature(visit: Open) -> None:
    page = visit()
    generate(page)
    first, feature = canvas_pixels(page), chosen(page)
    page.locator("fs-lab .fs-card[aria-pressed=false]").first.click()
    assert chosen(page) != feature
    assert canvas_pixels(page) != first
    page.locator(f"fs-lab .fs-card[data-feature='{feature}']").click()
    assert canvas_pixels(page) == first


def test_what_fires_is_told_once_a_label_and_the_rest_on_request(visit: Open) -> None:
    page = visit()
    generate(page)
    cards = page.locator("fs-lab .fs-card")
    labels = cards.locator(".fs-label").all_text_contents()
    assert len(set(labels)) == len(labels)
    page.locator("fs-lab .fs-alike summary").first.click()
    expect(cards).not_to_have_count(len(labels))
    alike = page.locator("fs-lab .fs-alike .fs-card").first
    alike.click()
    assert chosen(page) == int(alike.get_attribute("data-feature") or -1)


def test_names_that_are_guesses_stand_folded_behind_the_others(visit: Open) -> None:
    page = visit()
    generate(page)
    told = page.locator("fs-lab .fs-side > .fs-list > .fs-card")
    assert 4 <= told.count() < page.locator("fs-lab .fs-card").count()
    assert "a guess" not in " ".join(told.all_inner_texts()[4:])
    fold = page.locator("fs-lab .fs-side > .fs-list > details", has_text="less sure of their names")
    hidden = fold.locator(".fs-card").first
    expect(hidden).not_to_be_visible()
    fold.locator("summary").first.click()
    expect(hidden).to_contain_text("a guess")


def test_a_surprise_is_made_and_told(visit: Open) -> None:
    page = visit()
    page.locator("#heatmap-surprise").click()
    page.wait_for_function("document.querySelector('fs-lab').data.kind === 'live'")
    prompt = page.evaluate("document.querySelector('fs-lab').data.prompt")
    expect(page.locator("#heatmap-prompt textarea")).to_have_value(prompt)
    assert prompt in RunFolder(miniature_path("run")).load_images().prompts


def test_opacity_threshold_scale_and_steps_redraw_the_heat(visit: Open) -> None:
    page = visit()
    generate(page)
    seen = [canvas_pixels(page)]
    page.get_by_label("Heat", exact=True).fill("0.3")
    seen.append(canvas_pixels(page))
    page.get_by_label("Hide below").fill("0.6")
    seen.append(canvas_pixels(page))
    page.get_by_role("button", name="this image").click()
    seen.append(canvas_pixels(page))
    page.get_by_role("button", name="patches").click()
    seen.append(canvas_pixels(page))
    assert len(set(seen)) == len(seen)
    slider = page.get_by_label("Denoising step", exact=True)
    frames = set()
    for value in range(int(slider.get_attribute("max") or 0) + 1):
        slider.fill(str(value))
        frames.add(canvas_pixels(page))
    assert len(frames) > 1


def test_play_runs_through_the_steps_and_ends(visit: Open) -> None:
    page = visit()
    generate(page)
    play = page.get_by_role("button", name="Play the denoising steps")
    whole = canvas_pixels(page)
    play.click()
    page.wait_for_function("document.querySelector('fs-lab input[aria-label=\"Denoising step\"]').value === '2'")
    assert canvas_pixels(page) != whole
    expect(play).to_have_text("Play")
    assert page.get_by_label("Denoising step", exact=True).input_value() == "0"


def test_a_patch_answers_to_mouse_and_keyboard(visit: Open) -> None:
    page = visit()
    generate(page)
    page.locator(".fs-stage").hover(position={"x": 200, "y": 200})
    expect(page.locator(".fs-stage .fs-tip")).to_contain_text("patch")
    page.locator(".fs-stage").click(position={"x": 200, "y": 200})
    page.wait_for_selector(".fs-patch")
    before = page.locator(".fs-patch h2").inner_text()
    page.locator(".fs-stage").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".fs-patch h2")).not_to_have_text(before)
    for _ in range(2):  # closed and asked again
        page.locator(".fs-patch").get_by_role("button", name="Close").click()
        expect(page.locator(".fs-patch")).to_have_count(0)
        page.locator(".fs-stage").focus()
        page.keyboard.press("Enter")
        expect(page.locator(".fs-patch")).to_have_count(1)


def test_patches_of_another_hook_points_example_answer(visit: Open) -> None:
    page = visit()
    page.get_by_label("early").click()
    page.wait_for_function("document.querySelector('fs-lab').data.hookpoint.includes('.1.ff')")
    page.locator(".fs-stage").click(position={"x": 200, "y": 200})
    expect(page.locator(".fs-patch")).to_have_count(1)


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 1100}, PHONE], ids=["desktop", "phone"])
def test_the_picture_stays_in_view_while_the_cards_are_read(visit: Open, viewport: Any) -> None:
    page = visit(viewport=viewport)
    generate(page)
    for fold in page.locator("fs-lab .fs-list > details > summary").all():
        fold.click()
    card = page.locator("fs-lab .fs-card:visible").last
    card.evaluate("card => card.scrollIntoView({ block: 'end' })")
    page.wait_for_function("scrollY > 0")
    stage = page.locator(".fs-stage").bounding_box()
    assert stage is not None
    assert 0 <= stage["y"] < viewport["height"] / 2
    assert not card.evaluate(
        "card => document.querySelector('.fs-stage').contains(document.elementFromPoint("
        "card.getBoundingClientRect().x + 9, card.getBoundingClientRect().bottom - 9))"
    )


def test_unknown_words_are_named_and_a_blank_prompt_is_refused_keeping_the_result(visit: Open) -> None:
    page = visit()
    generate(page, "some red circles")
    expect(page.locator("fs-lab .fs-notice").first).to_contain_text("does not know “some”, “circles” (“circle”?), so")
    generate(page, "z" * 500 + " red star" * 20)
    expect(page.locator("fs-lab .fs-notice").first).to_contain_text("zzz…”, so the image ignores it")
    expect(page.locator("fs-lab .fs-notice").nth(1)).to_contain_text("last 18 words and signs (tokens) were not read")
    assert page.evaluate("document.documentElement.scrollWidth") <= DESKTOP["width"]
    generate(page, "a red zebra")
    expect(page.locator("fs-lab .fs-notice")).to_contain_text("zebra")
    page.locator("#heatmap-prompt textarea").fill("   ")
    page.locator("#heatmap-go").click()
    expect(page.locator(".toast-body").first).to_contain_text("prompt is blank")
    assert page.evaluate("document.querySelector('fs-lab').data.prompt") == "a red zebra"


def test_html_in_a_prompt_stays_text(visit: Open) -> None:
    page = visit()
    prompt = '<img src=x onerror="window.hacked=1"> red circle'
    generate(page, prompt)
    expect(page.locator("fs-lab .fs-prompt")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None


def test_two_prompts_are_compared(visit: Open) -> None:
    page = visit()
    generate(page)
    page.locator("#heatmap-compare").get_by_role("button").first.click()
    page.locator("#heatmap-other textarea").fill("a large blue circle on a black background")
    page.locator("#heatmap-compare-go").click()
    page.wait_for_selector("fs-diff li")
    page.locator("fs-diff li button").first.click()
    expect(page.locator("fs-diff li button").first).to_have_attribute("aria-pressed", "true")


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
    page.locator("input[type=file]").first.set_input_files(tmp_path / "recipe.json")
    expect(page.locator(told)).to_contain_text("recipe.json is no recipe of fluxsae: recipe lacks schema_version")
    page = visit()
    go_to(page, "Gallery")
    page.locator("#gallery-query textarea").fill("x" * 3000)
    expect(page.locator("fs-gallery")).to_contain_text("at most 200")


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


def test_a_search_for_sliders_adds_the_next_match_and_says_when_there_is_none(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    for count in (1, 2):
        page.get_by_label("Find a feature").fill("red")
        page.get_by_label("Find a feature").press("Enter")
        expect(page.locator(".fs-edit")).to_have_count(count)
    page.get_by_label("Find a feature").fill("9999")
    expect(page.locator("fs-found")).to_contain_text("9999")
    page.get_by_label("Find a feature").press("Enter")
    expect(page.locator(".toast-body").first).to_contain_text("9999")


def test_what_a_search_for_sliders_finds_is_chosen_from_until_six_are_there(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    page.get_by_label("Find a feature").press_sequentially("green")
    found = page.get_by_role("group", name="Features found for green").get_by_role("button")
    expect(found.nth(6)).to_be_visible()
    for count in range(1, 7):
        found.nth(count).click()
        expect(page.locator(".fs-edit")).to_have_count(count)
    expect(page.locator("fs-edits .fs-notice")).to_contain_text("6 features are the most")
    found.first.click()
    wanted = [int((found.nth(at).inner_text()).split("#")[1]) for at in range(1, 7)]
    page.wait_for_function("((document.querySelector('fs-result').data || {}).edits || []).length === 6")
    shown = page.evaluate("document.querySelector('fs-result').data.edits.map((edit) => edit.feature)")
    assert shown == wanted


def test_a_feature_goes_from_the_heatmap_to_its_page_and_to_the_sliders(visit: Open) -> None:
    page = visit()
    feature = chosen(page)
    page.locator("fs-lab").get_by_role("button", name="Open its page").click()
    expect(page.locator("fs-feature article")).to_have_attribute("aria-label", f"Feature {feature}")
    with page.expect_download() as report:
        page.locator("fs-feature").get_by_role("button", name="Save report").click()
    assert f"Feature {feature}" in report.value.path().read_text()
    go_to(page, "Heatmap")
    page.locator("fs-lab").get_by_role("button", name="Steer with this").click()
    expect(page.locator(".fs-edit")).to_contain_text(f"#{feature},")


def test_the_word_that_silences_a_feature_is_told_and_goes_with_the_feature(visit: Open) -> None:
    page = visit()
    go_to(page, "Gallery")
    page.locator("fs-gallery .fs-card").first.click()
    page.get_by_role("button", name="Which word silences it?").click()
    page.wait_for_selector("fs-silence section")
    prompt = page.evaluate("document.querySelector('fs-silence').data.prompt")
    words = page.locator("fs-silence figure").count() - 1
    assert 1 <= words <= len(prompt.split())
    page.locator("fs-gallery .fs-card").nth(1).click()
    expect(page.locator("fs-silence section")).to_have_count(0)


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
    expect(page.locator("fs-compared h3").first).to_contain_text("Live on")


def test_steering_turns_a_feature_and_a_link_opens_the_same(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    page.locator("#steer-prompt textarea").fill(PROMPT)
    add_feature(page)
    turn(page, 0.75)
    wait_until_turned(page)
    result = page.evaluate(
        "(({before, after, link}) => ({before, after, link}))(document.querySelector('fs-result').data)"
    )
    assert result["before"] != result["after"]
    page.get_by_role("slider", name="Before and after").fill("20")
    page.get_by_role("button", name="a random direction").click()
    other = visit(query=f"&view={result['link']}")
    other.wait_for_selector("fs-result section")
    opened = other.evaluate("(({before, after}) => ({before, after}))(document.querySelector('fs-result').data)")
    assert opened == {"before": result["before"], "after": result["after"]}
    expect(other.locator(".fs-edit output")).to_contain_text("usual strength added")


def test_no_move_of_a_slider_is_lost_while_another_is_under_way(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    add_feature(page)
    for value in (-0.5, 0.2, 0.8):
        turn(page, value)
    page.wait_for_function("((document.querySelector('fs-result').data || {}).edits || [{}])[0].strength === 0.8")


def test_a_feature_that_is_added_shows_its_picture_unturned_and_is_in_view(visit: Open) -> None:
    page = visit(viewport=PHONE)
    go_to(page, "Steer")
    add_feature(page)
    page.wait_for_selector("fs-result section")
    expect(page.locator("fs-result")).to_contain_text("Nothing is turned yet")
    expect(page.get_by_role("button", name="Paint where it acts")).to_be_visible()
    page.wait_for_timeout(1500)  # scrolling is smooth
    expect(page.locator("fs-result .fs-ba")).to_be_in_viewport(ratio=0.9)
    turn(page, 0.5)
    wait_until_turned(page)
    expect(page.locator(".fs-edit")).to_be_in_viewport()


def test_the_old_result_is_dimmed_until_the_new_one_is_there(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    opacity = "getComputedStyle(document.querySelector('#steer-result')).opacity"
    status = "document.querySelector('#steer-status fs-status').data"  # told by hand: a real run may end within a frame
    page.evaluate(f"{status} = {{ state: 'working', step: 3, n_steps: 20, makes: 'steer-result' }}")
    page.wait_for_function(f"{opacity} < 0.9", polling=50)
    page.evaluate(f"{status} = {{ state: 'idle' }}")
    page.wait_for_function(f"{opacity} === '1'", polling=50)


def test_a_starter_tells_which_picture_is_which_and_its_swap_is_made(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    expect(page.get_by_label("Find a feature")).to_be_visible()
    starters = page.locator(".fs-starter")
    assert starters.last.locator("strong").all_inner_texts() == ["less", "original", "more"]
    assert starters.first.locator("strong").all_inner_texts() == ["before", "after"]
    old, new = starters.first.inner_text().splitlines()[-1].lower().split(" becomes ")
    starters.first.click()
    expect(page.locator(".fs-edit .fs-label").first).to_have_text(old)
    expect(page.locator(".fs-edit .fs-label").nth(1)).to_have_text(new)
    wait_until_turned(page)
    edits = page.evaluate("document.querySelector('fs-result').data.edits")
    assert [edit["mode"] for edit in edits] == ["scale", *["add"] * (len(edits) - 1)]
    assert all(edit["region"] == edits[0]["region"] is not None for edit in edits)
    expect(page.locator("fs-result .fs-words")).to_contain_text("in the marked region")


def test_a_feature_comes_from_the_heatmap_with_its_picture_and_alone(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    add_feature(page)
    go_to(page, "Heatmap")
    page.get_by_label("Seed").first.fill("7")
    generate(page)
    feature = chosen(page)
    page.locator("fs-lab").get_by_role("button", name="Steer with this").click()
    page.wait_for_function("((document.querySelector('fs-result').data || {}).picture || [])[1] === 7")
    data = page.evaluate("document.querySelector('fs-result').data")
    assert data["picture"][0] == PROMPT
    assert [edit["feature"] for edit in data["edits"]] == [feature]
    expect(page.locator("#steer-prompt textarea")).to_have_value(PROMPT)


def test_starters_come_back_and_a_strip_goes_with_its_feature(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    count = page.locator(".fs-starter").count()
    page.locator(".fs-starter").last.click()
    wait_until_turned(page)
    page.locator("#steer-strip-go").click()
    expect(page.locator("fs-strip section")).to_have_count(1)
    page.locator(".fs-edit").get_by_role("button", name="Remove").click()
    expect(page.locator("fs-strip section")).to_have_count(0)
    expect(page.locator(".fs-starter")).to_have_count(count)


def test_one_name_is_put_in_place_of_another(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    old, new = (page.locator(f"#steer-{which} input").input_value() for which in ("old", "new"))
    page.locator("#steer-swap").click()
    wait_until_turned(page)
    labels = page.locator(".fs-edit .fs-label").all_inner_texts()
    assert labels[0] == old
    assert set(labels[1:]) == {new}
    expect(page.locator(".toast-body")).to_have_count(0)


def test_the_strip_shows_seven_strengths_and_draws_the_safe_range(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    add_feature(page)
    page.locator("#steer-strip-go").click()
    expect(page.locator("fs-strip li")).to_have_count(7)
    expect(page.locator(".fs-edit .fs-hint").first).to_be_visible()


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
    expect(result.get_by_text("not in this picture yet")).to_be_visible()
    result.get_by_role("button", name="Copy link").click()
    expect(result.get_by_role("button", name="Copied")).to_be_visible()
    view = decode_view(page.evaluate("navigator.clipboard.readText()").partition("?view=")[2])
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
    (edit,) = decode_view(page.evaluate("navigator.clipboard.readText()").partition("?view=")[2])["edits"]
    assert 1 <= sum(map(sum, edit["region"])) < 60
    turn(page, 0.5)
    wait_until_turned(page)
    assert page.evaluate(REGION) == edit["region"]


def test_the_safe_range_goes_when_the_steps_of_an_edit_change(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    page.locator(".fs-starter").first.click()
    wait_until_turned(page)
    page.locator("#steer-strip-go").click()
    expect(page.locator(".fs-safe")).to_have_count(1)
    page.get_by_text("When and where").first.click()
    page.get_by_label("First step edited").first.fill("8")
    page.get_by_label("First step edited").first.press("Enter")
    expect(page.locator(".fs-safe")).to_have_count(0)
    expect(page.get_by_label("First step edited").first).to_be_visible()
    page.wait_for_function("document.querySelector('fs-result').data.edits[0].steps")
    assert page.evaluate("document.querySelector('fs-result').data.edits[0].steps") == [8, 20]


def test_image_and_recipe_are_downloaded_and_the_recipe_loads_again(visit: Open, tmp_path: Path) -> None:
    page = visit()
    go_to(page, "Steer")
    add_feature(page)
    turn(page, -1)
    wait_until_turned(page)
    with page.expect_download() as download:
        page.get_by_role("link", name="Image with recipe").click()
    picture = tmp_path / "steered.png"
    download.value.save_as(picture)
    with page.expect_download() as report:
        page.locator("fs-result").get_by_role("button", name="Save report").click()
    report.value.save_as(tmp_path / "report.html")
    assert "Measurements" in (tmp_path / "report.html").read_text()
    other = visit()
    go_to(other, "Steer")
    other.locator("input[type=file]").first.set_input_files(picture)
    expect(other.locator(".fs-edit output")).to_contain_text("3 × what is there taken away")


def test_the_about_tab_has_code_for_every_endpoint(visit: Open, served: page_server.Page) -> None:
    page = visit()
    go_to(page, "About")
    expect(page.locator("fs-endpoints summary")).to_have_count(7)
    page.locator("fs-endpoints summary").first.click()
    expect(page.locator("fs-endpoints pre").first).to_contain_text(served.url)


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


@pytest.mark.parametrize("tab", TABS)
@pytest.mark.parametrize(("viewport", "dark"), [(DESKTOP, False), (PHONE, True)], ids=["desktop-light", "phone-dark"])
def test_every_tab_fits_its_screen_and_axe_finds_nothing_serious(
    visit: Open, tab: str, viewport: Any, dark: bool
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = visit(viewport=viewport, dark=dark)
    prepare(page, tab)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    found = Axe().run(page).response["violations"]
    serious = [
        {"rule": item["id"], "nodes": [node["html"][:160] for node in item["nodes"]][:3]}
        for item in found
        if item["impact"] in {"serious", "critical"}
    ]
    assert not serious, json.dumps(serious, indent=1)
