"""The Heatmap tab in a real browser: mouse, keyboard, phone."""

from io import BytesIO
from typing import Any

import numpy as np
import page_server
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect
from steps import (
    DESKTOP,
    PHONE,
    Open,
    canvas_pixels,
    chosen,
    generate,
)

from fluxsae.miniature import miniature_path
from fluxsae.pictures.heatmaps import overlay
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.kit.views import base64_text

pytestmark = pytest.mark.browser


def test_the_page_opens_on_a_ready_example_without_generating(visit: Open, served: page_server.Page) -> None:
    page = visit()
    assert page.evaluate("document.querySelector('fs-lab').data.kind") == "example"
    expect(page.locator("fs-lab .fs-card").first).to_be_visible()
    assert page.locator("fs-lab .fs-card").count() >= 2


def test_a_prompt_shows_overlays_that_change_with_the_chosen_feature(visit: Open) -> None:
    page = visit()
    generate(page)
    first, feature = canvas_pixels(page), chosen(page)
    page.locator("fs-lab .fs-card[aria-pressed=false]").first.click()
    assert chosen(page) != feature
    assert canvas_pixels(page) != first
    expect(page.locator("fs-lab .fs-caption")).to_contain_text("% of all patches")
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
    fold = page.locator("fs-lab .fs-side > .fs-list > details", has_text="with uncertain names")
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
    page.get_by_text("How the heat is shown").click()
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
    frames, last = set(), int(slider.get_attribute("max") or 0)
    for value in (0, last // 2, last):
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
    expect(page.locator("fs-lab .fs-notice").first).to_contain_text("does not know “some” (“two”?), so")
    generate(page, "z" * 500 + " red star" * 20)
    expect(page.locator("fs-lab .fs-notice").first).to_contain_text("zzz…”, so the image ignores it")
    expect(page.locator("fs-lab .fs-notice").nth(1)).to_contain_text("did not read its last 18 words")
    assert page.evaluate("document.documentElement.scrollWidth") <= DESKTOP["width"]
    generate(page, "a red zebra")
    expect(page.locator("fs-lab .fs-notice").first).to_contain_text("zebra")
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


def test_the_page_lays_heat_over_a_picture_as_the_library_does(visit: Open) -> None:
    page = visit()
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    heat = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    encoded = BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    drawn = page.evaluate(
        """async ([url, map]) => {
            const canvas = document.createElement("canvas");
            await FS.drawHeat(canvas, { url, map: FS.bytes(map), rows: 8, cols: 8, smooth: false });
            return Array.from(canvas.getContext("2d").getImageData(0, 0, 8, 8).data);
        }""",
        [f"data:image/png;base64,{base64_text(encoded.getvalue())}", base64_text(heat)],
    )
    shown = np.array(drawn, dtype=np.uint8).reshape(8, 8, 4)[..., :3]
    expected = np.asarray(overlay(Image.fromarray(picture), heat.astype(np.float32) / 255, smooth=False))
    assert np.abs(shown.astype(int) - expected.astype(int)).max() <= 1


def ask_why(page: Page, name: str = "Why does it fire?") -> Locator:
    page.get_by_role("button", name=name).click()
    panel = page.locator("fs-lab .fs-why")
    expect(panel).to_be_visible()
    return panel


def choose_red(page: Page) -> None:
    card = page.locator("fs-lab .fs-card", has_text="red").first
    if not card.is_visible():  # folded, since its name is a guess here
        page.locator("fs-lab .fs-side > .fs-list > details > summary", has_text="with uncertain names").click()
    card.click()


def test_why_a_feature_fires_is_told_under_it_and_belongs_to_it_alone(visit: Open) -> None:
    page = visit()
    generate(page)
    choose_red(page)
    panel = ask_why(page)
    expect(panel.get_by_role("heading", name="Why “red” fires")).to_be_visible()
    first = panel.locator("li").first
    expect(first).to_contain_text("“red”")
    assert first.locator(".fs-tilt").get_attribute("aria-label") == f"red: {first.locator('.fs-num').inner_text()}"
    for words in ("One step (step 3 of 20, at noise level 0.96)", "Without any word", "does not reconstruct"):
        expect(panel).to_contain_text(words)
    page.locator("fs-lab .fs-card[aria-pressed=false]").first.click()
    expect(panel).not_to_be_visible()
    choose_red(page)
    expect(panel).to_be_visible()
    panel.get_by_role("button", name="Close why it fires").click()
    expect(panel).not_to_be_visible()


def test_why_answers_for_a_patch_by_keyboard_and_leads_to_earlier_features(visit: Open) -> None:
    page = visit(viewport=PHONE)
    generate(page)
    choose_red(page)
    page.locator(".fs-stage").focus()
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Why at row 4, column 4?").focus()
    page.keyboard.press("Enter")
    panel = page.locator("fs-lab .fs-why")
    expect(panel).to_contain_text("the patch in row 4, column 4")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.wait_for_function(  # told where it is seen: below the image, which stays
        "document.querySelector('.fs-why').getBoundingClientRect().top >= "
        "document.querySelector('.fs-stage').getBoundingClientRect().bottom"
    )
    link = panel.locator(".fs-link").first
    feature = link.locator(".fs-num").inner_text().removeprefix("#")
    link.click()
    expect(page.locator("#gallery-feature")).to_contain_text(feature)
