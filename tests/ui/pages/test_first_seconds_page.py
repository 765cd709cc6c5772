"""The first thirty seconds in a real browser: a swap under one slider, words to press, painting that is seen."""

from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, expect
from steps import DESKTOP, PHONE, PROMPT, Open, canvas_pixels, generate

pytestmark = pytest.mark.browser

SIDE = 64
SMALL = """canvas => {
    const small = new OffscreenCanvas(64, 64).getContext("2d");
    small.drawImage(canvas, 0, 0, 64, 64);
    return Array.from(small.getImageData(0, 0, 64, 64).data);
}"""


def shown(page: Page) -> np.ndarray:
    page.wait_for_timeout(250)
    pixels = np.array(page.locator(".fs-stage canvas").evaluate(SMALL), dtype=np.int16)
    return pixels.reshape(SIDE, SIDE, 4)[..., :3]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_first_story_is_above_the_fold_and_one_slider_turns_the_colour_at_once(visit: Open, viewport: Any) -> None:
    page = visit(viewport=viewport)
    slider = page.get_by_label("Turn red into yellow")
    for seen in (page.locator(".fs-stage"), slider, page.locator(".fs-word").first, page.locator("#heatmap-go")):
        box = seen.bounding_box()
        assert box is not None
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= viewport["height"]
    expect(page.locator("fs-lab .fs-card[aria-pressed=true]")).to_have_count(0)
    before = shown(page)
    slider.fill("6")
    after = shown(page)
    changed = np.abs(after - before).max(axis=2) > 60
    assert 0.01 < changed.mean() < 0.25  # the red things, and little else
    red, green, blue = (after[changed] - before[changed]).mean(axis=0)
    assert green > 40 > max(red, blue)  # red with green is yellow
    page.locator(".fs-word", has_text="mushroom").click()
    lit = shown(page)
    expect(page.locator("fs-lab .fs-card[aria-pressed=true]")).to_contain_text("mushroom")
    assert slider.input_value() == "0"
    is_hot = np.abs(lit - 0.78 * before).mean(axis=2) > 12
    assert 0.01 < is_hot.mean() < 0.3  # heat where the word is
    assert is_hot[:, : SIDE // 2].sum() > 0.8 * is_hot.sum()  # the mushroom is on the left
    assert np.abs(lit[~is_hot] - 0.78 * before[~is_hot]).mean() < 3  # its own colours, a little darker


def test_words_that_the_miniature_knows_are_put_into_the_prompt_in_place_of_their_kind(visit: Open) -> None:
    page = visit()
    box = page.locator("#heatmap-prompt textarea")
    box.fill("a red star and a green cat")
    box.evaluate("box => box.setSelectionRange(24, 24)")
    page.locator("fs-vocabulary").get_by_role("button", name="blue").click()
    expect(box).to_have_value("a red star and a blue cat")
    page.locator("fs-vocabulary").get_by_role("button", name="left").click()
    expect(box).to_have_value("a red star and a blue cat on the left")


def test_another_prompt_has_another_seed_unless_it_is_kept_or_typed(visit: Open) -> None:
    page = visit()
    seed, box = page.get_by_label("Seed", exact=True), page.locator("#heatmap-prompt textarea")
    first = seed.input_value()

    def paint(prompt: str) -> str:
        box.fill(prompt)
        page.locator("#heatmap-go").click()
        page.wait_for_function(
            "p => { const { data } = document.querySelector('fs-lab'); "
            "return data.kind === 'live' && data.prompt === p; }",
            arg=prompt,
        )
        return str(page.evaluate("document.querySelector('fs-lab').data.seed"))

    second = paint(PROMPT)
    assert second != first
    assert seed.input_value() == second
    page.get_by_label("Keep this seed").check()
    assert paint("a small blue star") == second
    page.get_by_label("Keep this seed").uncheck()
    seed.fill("7")
    assert paint("a large green heart") == "7"


def test_painting_is_seen_step_by_step_with_heat_and_can_be_played_again(visit: Open) -> None:
    page = visit()
    page.evaluate(
        "() => { window.seen = []; document.addEventListener('fs-seen', event => window.seen.push(event.detail)); }"
    )
    generate(page, "a large green striped fish on a white background")  # what was made before would come at once
    page.wait_for_function("window.seen.at(-1) === null")
    steps = [view["step"] for view in page.evaluate("window.seen") if view]
    assert len(steps) >= 10
    assert steps == sorted(steps)
    views = [view for view in page.evaluate("window.seen") if view]
    assert len({view["image"] for view in views}) == len(views)
    assert all(view["feature"]["label"] and view["map"] for view in views)
    data = page.evaluate("document.querySelector('fs-lab').data")
    assert sorted(map(int, data["previews"])) == list(range(20))
    page.get_by_text("How the heat is shown").click()
    page.get_by_role("button", name="plain").click()
    slider, frames = page.get_by_label("Denoising step", exact=True), [canvas_pixels(page)]
    for step in (1, 6, 20):
        slider.fill(str(step))
        frames.append(canvas_pixels(page))
    assert len(set(frames)) == 4
    expect(page.locator(".fs-steps output")).to_contain_text("step 20 of 20")


def test_stopped_while_painting_the_old_image_comes_back(visit: Open) -> None:
    page = visit()
    before = canvas_pixels(page)
    page.locator("#heatmap-prompt textarea").fill("a small yellow heart")
    page.locator("#heatmap-go").click()
    page.wait_for_function(
        "() => document.querySelector('.fs-seeing') && !document.getElementById('heatmap-stop').click()"
    )
    expect(page.locator(".fs-seeing")).to_have_count(0)
    page.wait_for_timeout(500)
    assert page.evaluate("document.querySelector('fs-lab').data.kind") == "example"
    assert canvas_pixels(page) == before
