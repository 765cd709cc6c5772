"""The Steer tab in a real browser: sliders, starters, swaps, strips, recipes."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import expect
from steps import (
    PHONE,
    PROMPT,
    Open,
    add_feature,
    chosen,
    generate,
    go_to,
    nothing_serious,
    turn,
    wait_until_turned,
)

pytestmark = pytest.mark.browser


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
    expect(page.locator("fs-edits .fs-notice")).to_contain_text("At most 6 features")
    found.first.click()
    wanted = [int((found.nth(at).inner_text()).split("#")[1]) for at in range(1, 7)]
    page.wait_for_function("((document.querySelector('fs-result').data || {}).edits || []).length === 6")
    shown = page.evaluate("document.querySelector('fs-result').data.edits.map((edit) => edit.feature)")
    assert shown == wanted


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
    expect(page.locator("fs-result")).to_contain_text("Nothing is changed yet")
    expect(page.get_by_role("button", name="Paint where it acts")).to_be_visible()
    page.wait_for_timeout(1500)  # scrolling is smooth
    expect(page.locator("fs-result .fs-ba")).to_be_in_viewport(ratio=0.9)
    turn(page, 0.5)
    wait_until_turned(page)
    expect(page.locator(".fs-edit")).to_be_in_viewport()


def test_the_old_pictures_are_dimmed_until_the_new_ones_are_there(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    opacity = "getComputedStyle(document.querySelector('#steer-result :is(img, canvas)')).opacity"
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
    expect(page.locator(".fs-edit .fs-label").first).to_have_text(re.compile(rf"{old}\??"))  # "?": it is a guess
    expect(page.locator(".fs-edit .fs-label").nth(1)).to_have_text(re.compile(rf"{new}\??"))
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
    old, new = (page.locator(f"#steer-{which} input").input_value().partition(" (")[0] for which in ("old", "new"))
    page.locator("#steer-swap").click()
    wait_until_turned(page)
    labels = [text.removesuffix("?") for text in page.locator(".fs-edit .fs-label").all_inner_texts()]
    assert labels[0] == old
    assert set(labels[1:]) == {new}
    expect(page.locator(".toast-body")).to_have_count(0)
    expect(page.locator(".fs-words li").first).to_contain_text(f"“{old}” became “{new}”")
    page.get_by_role("button", name="Undo the swap").click()
    expect(page.locator(".fs-edit")).to_have_count(0)
    expect(page.locator(".fs-starter").first).to_be_visible()


def test_the_strip_shows_seven_strengths_and_draws_the_natural_range(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    add_feature(page)
    page.locator("#steer-strip-go").click()
    expect(page.locator("fs-strip li")).to_have_count(7)
    expect(page.locator(".fs-edit .fs-hint").first).to_be_visible()
    page.set_viewport_size(PHONE)  # the strip is scrolled sideways there
    nothing_serious(page)


def test_the_natural_range_goes_when_the_steps_of_an_edit_change(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    page.locator(".fs-starter").last.click()
    wait_until_turned(page)
    page.locator("#steer-strip-go").click()
    expect(page.locator(".fs-natural")).to_have_count(1)
    page.get_by_text("When and where").first.click()
    page.get_by_label("First step edited").first.fill("8")
    page.get_by_label("First step edited").first.press("Enter")
    expect(page.locator(".fs-natural")).to_have_count(0)
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
    with other.expect_file_chooser() as chooser:
        other.get_by_role("button", name="Load a recipe").click()
    chooser.value.set_files(picture)
    expect(other.locator(".fs-edit output")).to_contain_text("3 × its activation removed")


def test_a_name_that_cannot_be_had_is_marked_and_refused_beside_the_button(visit: Open) -> None:
    page = visit()
    go_to(page, "Steer")
    new = page.locator("#steer-new input")
    expect(new).not_to_have_value("")
    new.click()
    page.get_by_role("option", name="no feature").first.click()
    expect(new).to_have_value(re.compile(r"\(no feature .*\)"))
    page.locator("#steer-swap").click()
    expect(page.locator(".fs-swap fs-status")).to_contain_text("cannot replace another: no feature")
