"""What the Steer tab answers: sliders, starters, strips and swaps."""

import math
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from desk_data import LATE, reading
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.vocabulary import NameKinds
from fluxsae.files import save_tensors
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.grids import join_pictures
from fluxsae.steering.conditions import Condition
from fluxsae.steering.demos import DemoConfig
from fluxsae.steering.edits import Recipe, SaeSource, SteeringEdit
from fluxsae.steering.naturalness import NaturalRange
from fluxsae.ui.kit.links import decode_view
from fluxsae.ui.serve import session
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.opening import open_workbench
from fluxsae.ui.serve.schemas import SteerRequest, SwapRequest, SweepRequest
from fluxsae.ui.serve.session import JOBS_TIMED, Workbench
from fluxsae.ui.tabs.steer.desk import STRIP, SteerDesk
from fluxsae.ui.tabs.steer.feature_sliders import MAX_SLIDERS, Sliders
from fluxsae.ui.tabs.steer.job import Steered, SteerJob, run_origin
from fluxsae.ui.tabs.steer.names import failing_swaps
from fluxsae.ui.tabs.steer.swap import FoundSwap, SwapJob
from fluxsae.ui.tabs.steer.words import even_notches, natural_turns, read_words, share_seen, where_it_changed


def test_a_sliders_middle_changes_nothing_and_its_ends_are_two_modes(bench: Workbench) -> None:
    sliders = Sliders(bench, LATE)
    slider = {"hookpoint": LATE, "feature": 3, "label": "red"}
    edits = [sliders.edit({**slider, "turn": turn}) for turn in (-1, -0.25, 0, 0.5)]
    assert [(edit.mode, edit.strength) for edit in edits] == [("scale", -2), ("scale", 0.25), ("add", 0), ("add", 0.5)]
    assert edits[2].is_identity
    assert [sliders.slider_of(edit)["turn"] for edit in edits] == [-1, -0.25, 0, 0.5]
    with pytest.raises(FluxSaeError, match="turn is nan"):
        sliders.edit({**slider, "turn": math.nan})


@pytest.mark.parametrize(
    ("mode", "strength"), [("add", 2.0), ("add", -0.5), ("scale", 3.0), ("scale", -2.5), ("clamp", 1.0)]
)
def test_an_edit_that_no_slider_stands_for_is_refused_not_bent(bench: Workbench, mode: str, strength: float) -> None:
    with pytest.raises(FluxSaeError, match=f"No slider can show {mode} {strength:g}"):
        Sliders(bench, LATE).page_of([SteeringEdit(HookPoint.parse(LATE), 3, mode, strength)])


def test_more_edits_than_sliders_are_refused_not_dropped(bench: Workbench) -> None:
    edits = [SteeringEdit(HookPoint.parse(LATE), feature, "scale", 0.0).to_dict() for feature in range(MAX_SLIDERS + 1)]
    with pytest.raises(FluxSaeError, match=f"There are {MAX_SLIDERS + 1} edits, and the page holds at most"):
        SteerDesk(bench).linked({"prompt": "a circle", "edits": edits})


def recipe_here(bench: Workbench, **changes: Any) -> Recipe:
    """As the page writes it, with one edit of feature 3."""
    place = HookPoint.parse(LATE)
    given = {
        "prompt": "a circle", "seed": 1, "settings": bench.info.settings, "flux_id": bench.info.flux_id,
        "saes": run_origin(bench).saes, "batch": ((SteeringEdit(place, 3, "scale", 0.0),),),
    }  # fmt: skip
    return Recipe(**{**given, **changes})


def test_a_recipe_of_this_run_fills_the_page(bench: Workbench, tmp_path: Path) -> None:
    recipe = recipe_here(bench)
    assert {source.fingerprint for source in recipe.saes} == {sae.fingerprint for sae in bench.saes.values()} != {None}
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    *_, page = SteerDesk(bench).loaded(str(tmp_path / "recipe.json"))
    assert [edit["feature"] for edit in page["edits"]] == [3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flux_id": "user/other"}, "FLUX is miniature .*, not user/other"),
        ({"adapters": ("adapter 0",)}, "adapters are none, not adapter 0"),
        ({"is_exact": False}, "is_exact is True, not False"),
        ({"saes": (SaeSource(HookPoint.parse(LATE), "user/other", fingerprint="0" * 16),)}, f"the SAE of {LATE} is"),
        ({"width": 512}, "width is .*, not 512"),
        ({"guidance_scale": 1.0}, r"guidance_scale is 3.5, not 1.0"),
        ({"true_cfg_scale": 2.0}, r"true_cfg_scale is 1.0, not 2.0"),
        ({"negative_prompt": "a star"}, "negative_prompt is '', not 'a star'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_recipe_that_would_make_another_image_here_is_refused(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(bench, "info", replace(bench.info, adapters=()))
    recipe, fields = recipe_here(bench), set(Recipe.__dataclass_fields__)
    settings = replace(recipe.settings, **{name: value for name, value in changes.items() if name not in fields})
    own = {name: value for name, value in changes.items() if name in fields}
    (tmp_path / "recipe.json").write_text(replace(recipe, settings=settings, **own).to_json())
    with pytest.raises(FluxSaeError, match=f"This recipe was made elsewhere: {message}"):
        SteerDesk(bench).loaded(str(tmp_path / "recipe.json"))


def test_a_file_of_several_recipes_is_refused_not_cut(bench: Workbench, tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text(f"[{recipe_here(bench).to_json()}, {recipe_here(bench).to_json()}]")
    with pytest.raises(FluxSaeError, match="holds 2 recipes, and the page shows one"):
        SteerDesk(bench).loaded(str(tmp_path / "grid.json"))


def test_a_feature_that_was_just_added_is_shown_unturned_with_one_image(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SteerJob] = []

    def cached(job: SteerJob) -> Any:
        asked.append(job)
        recipe = Recipe("a circle", 0, GenerationSettings(height=16, width=16), "miniature", batch=((),) * 3)
        yield Done(Steered((Image.new("RGB", (16, 16)),) * 3, (recipe,) * 3, (None,) * 3))

    monkeypatch.setattr(bench, "cached", cached)
    desk = SteerDesk(bench)
    slider = desk.find("3", {"edits": []})["add"]
    assert (slider["feature"], slider["turn"]) == (3, 0)
    *_, done = desk.turn("a circle", 0, 20, {"edits": [slider]})
    assert asked[0].variants == ((), (), ())
    assert done.value["words"] == ["Nothing is changed yet: move a slider."]
    assert done.value["measurement"] is None
    view = decode_view(done.value["link"])
    assert [(edit["feature"], edit["strength"]) for edit in view["edits"]] == [(3, 0)]


def test_one_image_made_beside_other_work_does_not_stop_the_sliders(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, job = [0.0], SteerJob(((),) * 3, "a circle", 0, 20)
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(bench, "pass_times", deque(maxlen=JOBS_TIMED))
    desk = SteerDesk(bench)

    def make(seconds: float) -> None:
        begun = now[0]
        now[0] += seconds
        bench._time(job, begun)

    make(300)
    assert not bench.is_slow
    make(2)
    make(300)
    assert not bench.is_slow
    assert "Sliders wait" not in desk.cost_words()
    for _ in range(JOBS_TIMED):
        make(300)
    assert bench.is_slow
    assert "Sliders wait" in desk.cost_words()
    make(2)
    assert not bench.is_slow


def demo_of(feature: int, less: float, label_less: float | None) -> dict[str, Any]:
    edit = SteeringEdit(HookPoint.parse(LATE), feature, "scale", 0.0)
    recipe = Recipe("a circle", 1, GenerationSettings(height=16, width=16), "miniature", batch=((edit,),))
    score = {"score": less, "less": less, "collateral": 0.2, "out_of_distribution": 0.0, "label_less": label_less}
    recipes = dict.fromkeys(("less", "before", "more"), recipe.to_dict())
    return {"feature": feature, "image": "none", "score": score, "recipes": recipes}


def test_starters_are_the_clear_demos_in_which_clip_sees_the_label_go(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    demos = [
        demo_of(1, 0.3, -0.2),
        demo_of(2, 0.9, -0.01),  # far, but what its name says stays
        demo_of(3, 0.6, -0.1),
        demo_of(5, 0.2, None),  # made without CLIP
        demo_of(6, 0.5, 0.3),  # comes nearer to its label
    ]
    monkeypatch.setattr(bench.run, "load_demos", lambda name: demos if str(name) == LATE else [])
    monkeypatch.setattr(bench.run, "demo_image_path", lambda *_: Path("none"))
    started = SteerDesk(bench).starters
    assert [starter["edits"][0]["feature"] for starter in started] == [3, 1, 5]


def test_a_step_window_ends_with_the_picture(bench: Workbench) -> None:
    windows = ([3, 60], None, [1, 5])
    known = {"hookpoint": LATE, "feature": 3, "turn": 0.0}
    kept = Sliders(bench, LATE).sent({"edits": [{**known, "steps": window} for window in windows]}, 20)
    assert [slider["steps"] for slider in kept] == [[3, 20], None, [1, 5]]


def test_the_handle_splits_what_changed() -> None:
    before = Image.new("RGB", (40, 10), (0, 0, 0))
    after = before.copy()
    assert where_it_changed(before, after) == 0.5
    after.paste((255, 0, 0), (30, 0, 40, 10))
    assert where_it_changed(before, after) == pytest.approx(0.875)


def test_a_demo_of_an_earlier_sae_is_no_starter(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = demo_of(3, 0.3, None)
    monkeypatch.setattr(bench, "demos", lambda name: [demo] if name == LATE else [])
    for fingerprint, n in ((bench.fingerprints[LATE], 1), ("0" * 16, 0)):
        sources = [SaeSource(HookPoint.parse(LATE), "user/name", fingerprint=fingerprint).to_dict()]
        demo["recipes"] = {side: {**recipe, "saes": sources} for side, recipe in demo["recipes"].items()}
        assert len(SteerDesk(bench).starters) == n


def test_a_demo_that_nobody_sees_change_is_no_starter(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, subtle, clear = (Image.new("RGB", (32, 32), (level, level, level)) for level in (100, 120, 100))
    clear.paste((200, 20, 20), (0, 0, 8, 8))
    assert share_seen(before, subtle) == 0
    assert share_seen(before, clear) == 1 / 16
    for name, less in (("subtle", subtle), ("clear", clear)):
        join_pictures([less, before, before]).save(tmp_path / f"{name}.png")
    demos = [{**demo_of(1, 0.9, -0.2), "image": "subtle"}, {**demo_of(3, 0.3, -0.2), "image": "clear"}]
    monkeypatch.setattr(bench.run, "load_demos", lambda name: demos if str(name) == LATE else [])
    monkeypatch.setattr(bench.run, "demo_image_path", lambda _, name: tmp_path / f"{name}.png")
    assert [starter["edits"][0]["feature"] for starter in SteerDesk(bench).starters] == [3]


def test_a_swap_puts_a_name_where_the_old_one_fires_and_says_what_it_cannot_do() -> None:
    bench = open_workbench("")
    desk = SteerDesk(bench)
    prompt = "a large red boat on the left and a large blue fish on the right in the sea"
    *steps, done = desk.swap(prompt, 7, 20, "red", "yellow")
    assert steps
    *asked, page = done.value
    assert asked == [prompt, 7, 20]
    assert (page["unread"], page["read"]) == (None, ["red", "yellow"])
    old, *new = page["edits"]
    assert (old["label"], {slider["label"] for slider in new}) == ("red", {"yellow"})
    assert old["turn"] < 0 < new[0]["turn"]
    region = np.array(old["region"])
    assert all(slider["region"] == old["region"] for slider in new)
    assert region[:, : bench.limits.cols // 2].sum() > 0.8 * region.sum() > 0  # the boat is on the left
    for names, refused in (
        (("mushroom", "house"), "No feature of “mushroom” clearly fires"),
        (("red", "red"), "cannot replace itself"),
        (("red", "attic"), "'attic' cannot replace another: no feature of this name. Choose one of "),
        ((["red"], "yellow"), "give text of 1 to 200 characters"),
    ):
        with pytest.raises(FluxSaeError, match=refused):
            list(desk.swap(prompt, 7, 20, *names))


@pytest.mark.parametrize(
    ("wrong", "refused"),
    [
        ({"feature": 10**9}, "feature"),
        ({"hookpoint": "attic"}, "hookpoint"),
        ({"region": [[1] * 4000] * 3000}, "region is not"),
        ({"region": [[1], 2]}, "region is not"),
        ({"turn": "much"}, "turn is much"),
        ({"turn": True}, "turn is True"),
        ({"steps": "all"}, "steps"),
    ],
)
def test_a_slider_that_the_page_never_made_is_refused_before_work(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], refused: str
) -> None:
    monkeypatch.setattr(bench, "cached", lambda _: pytest.fail("worked"))
    desk = SteerDesk(bench)
    page = {"edits": [{"hookpoint": LATE, "feature": 3, "turn": 0.5, "label": "x" * 10**6, **wrong}]}
    for ask in (desk.turn, desk.strip) if "turn" not in wrong else (desk.turn,):
        with pytest.raises(FluxSaeError, match=refused):
            list(ask("a circle", 0, 20, page))
    known = {**page["edits"][0], "hookpoint": LATE, "feature": 3, "region": None, "steps": None}
    assert desk.sliders.sent({"edits": [known]})[0]["label"] == bench.cards[LATE].labels[3]


def test_a_slider_that_acts_only_where_its_name_is_becomes_an_edit_with_all_features_of_that_name(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    label, features, cards = "red", [3, 5], bench.cards[LATE]
    monkeypatch.setattr(cards, "labels", [label] * len(cards))
    monkeypatch.setattr(cards, "named", lambda: {label: features})
    sliders = Sliders(bench, LATE)
    slider = sliders.slider(LATE, features[0])
    assert slider["when"] is None
    edit = sliders.edit({**slider, "turn": -0.5, "when": slider["present"]})
    assert edit.when == Condition(tuple(features), label=label)
    assert sliders.slider_of(edit)["when"] == slider["present"]
    assert sliders.sent({"edits": [{**slider, "when": slider["present"]}]})[0]["when"] == slider["present"]


def test_a_condition_names_few_of_the_many_features_that_a_large_run_has_of_a_name(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards, many = bench.cards[LATE], list(range(3000))
    monkeypatch.setattr(cards, "labels", ["red"] * len(cards))
    monkeypatch.setattr(cards, "named", lambda: {"red": many})
    assert Sliders(bench, LATE).slider(LATE, 3)["present"]["features"] == many[:32]


@pytest.fixture
def named_desk(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> SteerDesk:
    """A desk of a run whose features have three names, all of known usual strength."""
    for cards in bench.cards.values():
        monkeypatch.setattr(cards, "named", lambda: {"red": [1], "green": [2], "blue": [3]})
    desk = SteerDesk(bench)
    monkeypatch.setattr(desk.names, "addable", desk.names.known)
    return desk


def test_what_the_prompt_has_is_offered_first_to_be_replaced(named_desk: SteerDesk) -> None:
    def replaceable(prompt: str, name: str) -> tuple[list[str], str]:
        return named_desk.names.replaceable(prompt, 0, 20, name)

    assert replaceable("a blue thing", "red") == (["blue", "red", "green"], "blue")
    assert replaceable("a blue and green thing", "green") == (["green", "blue", "red"], "green")
    assert replaceable("a thing", "green") == (["red", "green", "blue"], "green")


def test_what_surely_fires_in_an_image_that_was_read_is_offered_first_too(
    named_desk: SteerDesk, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards, kept = bench.cards[LATE], replace(reading(), prompt="a thing")  # features 1 and 2 fire
    monkeypatch.setattr(bench, "kept_reading", lambda *asked: kept if asked == ("a thing", 7, 20) else None)
    sure = np.where(np.arange(len(cards)) == 1, 0.6, 0.9)  # 3 is surely blue, where it fires
    monkeypatch.setattr(cards, "label_confidence_at", lambda shares: np.where(shares > 0, sure, 0.0))
    assert named_desk.names.replaceable("a thing", 7, 20, "red") == (["green", "red", "blue"], "green")
    assert named_desk.names.replaceable("a thing", 8, 20, "red") == (["red", "green", "blue"], "red")


def tally(worked: int, tried: int, high: float) -> dict[str, Any]:
    return {"features": {"n": tried, "success": {"value": worked / tried, "low": 0.0, "high": high}}}


@pytest.fixture
def colours_desk(bench: Workbench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SteerDesk:
    """Seven colours are used alike. Of blue no usual strength is known, gold is not trusted, pink has no feature."""
    colours = {"red": [1], "cyan": [2], "green": [3], "blue": [4], "lime": [5, 4]}
    cards = bench.cards[LATE]
    monkeypatch.setattr(cards, "named", lambda: colours)
    monkeypatch.setattr(cards, "labels", [None, "red", "cyan", "green", "blue", "lime", "gold", *cards.labels[7:]])
    prompts = [f"a {colour} ring" for colour in ("red", "pink", "gold", "blue", "green", "cyan", "lime")]
    monkeypatch.setattr(bench.images, "prompts", prompts)
    acts = torch.ones(len(cards))
    acts[4] = 0.0
    save_tensors(tmp_path / "model.safetensors", {"reference_acts": acts})
    monkeypatch.setattr(bench.run, "sae_path", lambda hookpoint: tmp_path)
    tests = {"green": tally(1, 6, 0.5), "lime": tally(1, 3, 1.0), "red": tally(2, 2, 1.0)}
    swaps = [{"concept": f"colour {name}", "arms": arms} for name, arms in tests.items()]
    monkeypatch.setattr(bench, "metrics", lambda hookpoint: {"steering": {"swaps": swaps}})
    desk = SteerDesk(bench)
    assert desk.sliders.hookpoint == LATE
    return desk


def test_names_that_cannot_be_had_or_rarely_worked_are_offered_last_with_the_reason(colours_desk: SteerDesk) -> None:
    assert colours_desk.names.choices("red") == [
        ("cyan", "cyan"),
        ("lime", "lime"),  # 1 of 3 says little
        ("green (rarely worked: 1 of 6 test swaps)", "green"),
        ("blue (its features fired too rarely to be added)", "blue"),
        ("pink (no feature of this name)", "pink"),
        ("gold (no feature surely has this name)", "gold"),
    ]


def test_a_new_name_on_screen_is_offered_though_it_is_of_another_kind(named_desk: SteerDesk) -> None:
    named_desk.names.__dict__["_kinds"] = NameKinds(["a red ring", "a green ring", "one blue star"], ["blue"])
    assert [name for _, name in named_desk.names.choices("red")] == ["green"]
    assert [name for _, name in named_desk.names.choices("red", "blue")] == ["green", "blue"]
    assert [name for _, name in named_desk.names.choices("red", "attic")] == ["green"]
    assert [name for _, name in named_desk.names.choices("blue")] == ["red", "green"]  # none is used like it


def test_a_swap_that_cannot_be_had_is_refused_before_work_with_what_can(
    colours_desk: SteerDesk, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "cached", lambda _: pytest.fail("worked"))
    for old, new, refused in (
        ("red", "pink", "'pink' cannot replace another: no feature of this name. Choose one of green, cyan, lime."),
        ("red", "gold", "'gold' cannot replace another: no feature surely has this name. "),
        ("red", "blue", "'blue' cannot replace another: its features fired too rarely to be added. "),
        ("pink", "red", "'pink' cannot be replaced: no feature of this name. Choose one of red, cyan, green, blue"),
    ):
        with pytest.raises(FluxSaeError, match=refused):
            list(colours_desk.swapped(SwapRequest.parse(bench.limits, prompt="a ring", old=old, new=new)))


def test_only_features_of_known_strength_are_added(
    colours_desk: SteerDesk, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[SwapJob] = []
    monkeypatch.setattr(bench, "cached", lambda job: asked.append(job) or iter(()))
    list(colours_desk.swap("a red ring", 0, 20, "blue", "lime"))
    assert (asked[0].old_features, asked[0].new_features) == ((4,), (5,))


@pytest.mark.parametrize("damaged", [{"steering": 3}, {"steering": {"swaps": [{}]}}, {"steering": None}, {}])
def test_a_report_that_says_nothing_of_swaps_speaks_against_no_name(damaged: dict[str, Any]) -> None:
    assert failing_swaps(damaged) == {}


def test_a_swap_that_is_read_is_told_and_its_earlier_sliders_come_along(
    named_desk: SteerDesk, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FoundSwap((SteeringEdit(HookPoint.parse(LATE), 1, "scale", -1.0),), is_read=True)
    monkeypatch.setattr(bench, "cached", lambda job: iter([Done(found)]))
    before = named_desk.sliders.page([{**named_desk.sliders.slider(LATE, 3), "turn": 0.5}])
    (done,) = named_desk.swap_on("a star", 0, 20, "red", "green", before)
    page = done.value[-1]
    assert [(slider["feature"], slider["turn"]) for slider in page["undo"]] == [(3, 0.5)]
    assert page["read"] == ["red", "green"]
    assert read_words(page["read"], named_desk.names.known) == [
        "“red” became “green”: CLIP recognises it in this image."
    ]
    assert read_words(["<b>", "green"], named_desk.names.known) == []


def test_an_endpoint_takes_a_condition_by_label(bench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SteerJob] = []
    monkeypatch.setattr(bench, "cached", lambda job: asked.append(job) or iter(()))
    label, features = "red", [3, 5]
    monkeypatch.setattr(bench.cards[LATE], "named", lambda: {label: features})
    edit = {"hookpoint": LATE, "feature": 3, "mode": "scale", "strength": 0.0}

    def steer(when: dict[str, Any]) -> None:
        request = SteerRequest.parse(bench.limits, prompt="a circle", edits=[{**edit, "when": when}])
        list(SteerDesk(bench).steer(request))

    steer({"label": label, "above": 0.25})
    assert asked[0].variants[1][0].when == Condition(tuple(features), 0.25, label=label)
    with pytest.raises(FluxSaeError, match="has the label 'nothing like it'"):
        steer({"label": "nothing like it"})
    with pytest.raises(FluxSaeError, match=r"when.features is \d+; give a whole number"):
        steer({"features": [10**6]})


def test_notches_are_equal_steps_of_measured_change_within_the_natural_range() -> None:
    # right: change 0, 1, 3, 4 at 0, 0.2, 0.4, 0.6, so the steps 1, 2, 3, 4 lie at 0.2, 0.3, 0.4, 0.6; left: one point
    points = [(-0.5, 8.0), (-1.0, 9.0), (0.2, 1.0), (0.4, 3.0), (0.6, 4.0), (0.8, 90.0)]
    assert even_notches(points, (-0.5, 0.6)) == pytest.approx([-0.5, -0.375, -0.25, -0.125, 0, 0.2, 0.3, 0.4, 0.6])
    assert even_notches([(0.5, 0.0)], (0.0, 0.5)) == [0.0]


def test_the_strip_holds_the_strengths_that_demos_use(bench: Workbench) -> None:
    edits = [Sliders(bench, LATE).edit({"hookpoint": LATE, "feature": 3, "turn": turn}) for turn in STRIP]
    demos = DemoConfig()
    assert {edit.strength for edit in edits if edit.mode == "scale"} == set(demos.suppress)
    assert {edit.strength for edit in edits if edit.mode == "add"} >= {0, *demos.amplify}


def test_a_broken_picture_is_not_called_safe_though_its_tokens_are_usual() -> None:
    bench = open_workbench("")
    hookpoint = bench.limits.default_hookpoint
    pink = bench.cards[hookpoint].labels.index("pink")
    request = SweepRequest.parse(
        bench.limits,
        prompt="a large red star on a black background",
        hookpoint=hookpoint,
        feature=pink,
        strengths=[0.1, 0.6],
    )
    *_, done = SteerDesk(bench).sweep(request)
    _, (little, much) = done.value
    assert little["looks_natural"]
    assert much["out_of_distribution"] <= NaturalRange().out_of_distribution
    assert not much["looks_natural"]


def test_the_natural_range_is_unbroken_around_the_middle() -> None:
    points = [(-1.0, True), (-0.5, False), (0.0, True), (0.25, True), (0.5, False), (1.0, True)]
    assert natural_turns(points) == [0.0, 0.25]
    assert natural_turns([(0.5, False), (-0.5, False)]) is None
