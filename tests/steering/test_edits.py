import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.steering.edits import (
    MAX_EDITS,
    MODES,
    HeatmapRegion,
    Recipe,
    SaeSource,
    SteeringEdit,
    is_batched,
    load_recipes,
    parse_edits,
    png_bytes,
)

EDIT = {"hookpoint": "layer1", "feature": 7, "mode": "scale", "strength": 3.0}


def recipe(**changes: object) -> Recipe:
    fields = {
        "prompt": "a red “circle”, naïve — 赤",
        "seed": 11,
        "settings": GenerationSettings(height=128, width=128, num_inference_steps=20),
        "flux_id": "miniature",
        "flux_revision": "abc123",
        "saes": (SaeSource(HookPoint.parse("layer1"), "user/name", "sae/transformer_blocks.1.ff", "def456"),),
        "batch": ((), (SteeringEdit(**EDIT),), (SteeringEdit(**{**EDIT, "strength": -1.0}),)),
        "index": 2,
        "shared_steps": 10,
    }
    return Recipe(**{**fields, **changes})


regions = st.one_of(
    st.none(),
    st.floats(0, 10).map(HeatmapRegion),
    st.tuples(st.integers(1, 4), st.integers(1, 4)).flatmap(
        lambda shape: st.lists(
            st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        )
    ),
)
windows = st.one_of(st.none(), st.tuples(st.integers(0, 50), st.integers(0, 50)).map(sorted).map(tuple))
hookpoints = st.sampled_from(
    ["layer0", "transformer_blocks.3.ff", "single_transformer_blocks.2", "transformer_blocks.1:text"]
)


edits = st.builds(
    SteeringEdit,
    hookpoints,
    st.integers(0, 10**6),
    st.sampled_from(MODES),
    st.floats(0, 1),
    steps=windows,
    region=regions,
)


@given(edits)
def test_an_edit_survives_json(edit: SteeringEdit) -> None:
    assert SteeringEdit.from_json(edit.to_json()) == edit
    assert SteeringEdit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit
    assert hash(edit) == hash(SteeringEdit.from_json(edit.to_json()))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"strength": math.nan}, "strength"),
        ({"strength": math.inf}, "strength"),
        ({"strength": 1e30}, "strength"),
        ({"strength": 10**400}, "strength"),
        ({"strength": True}, "strength"),
        ({"strength": "3"}, "strength"),
        ({"mode": "ablate", "strength": 1.5}, "strength"),
        ({"mode": "project_out", "strength": -0.1}, "strength"),
        ({"mode": "boost"}, "mode"),
        ({"mode": ["scale"]}, "mode"),
        ({"feature": -1}, "feature"),
        ({"feature": 1.0}, "feature"),
        ({"feature": True}, "feature"),
        ({"hookpoint": "layer"}, "hook point"),
        ({"hookpoint": 3}, "hookpoint"),
        ({"steps": [5, 2]}, "steps"),
        ({"steps": [-1, 2]}, "steps"),
        ({"steps": [0.0, 2]}, "steps"),
        ({"steps": 4}, "steps"),
        ({"region": [[1, 0], [1]]}, "region"),
        ({"region": [[2, 0]]}, "region"),
        ({"region": []}, "region"),
        ({"region": "heatmap"}, "region"),
        ({"region": {"heatmap": -1}}, "region"),
        ({"region": {"heatmap": math.nan}}, "region"),
        ({"region": {"heat": 1}}, "region"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_field_is_refused_by_name(changes: dict[str, object], names: str) -> None:
    with pytest.raises(FluxSaeError, match=names):
        SteeringEdit.from_dict({**EDIT, **changes})


def test_a_wrong_field_given_by_its_place_is_refused_by_name_with_what_is_allowed() -> None:
    with pytest.raises(FluxSaeError, match=r"^feature is -1\. It must be greater than or equal to 0\.$"):
        SteeringEdit(HookPoint.parse("layer1"), -1, "add", 1.0)
    with pytest.raises(FluxSaeError, match=r"^region: threshold is -1\. It must be greater than or equal to 0\.$"):
        SteeringEdit.from_dict({**EDIT, "region": {"heatmap": -1}})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(FluxSaeError, match="strength"):
        SteeringEdit.from_dict({key: value for key, value in EDIT.items() if key != "strength"})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"strength": NaN}', "[" * 100_000, '"x"', "9" * 5000])
def test_text_that_is_no_edit_is_refused(text: str) -> None:
    with pytest.raises(FluxSaeError):
        SteeringEdit.from_json(text)


def test_a_list_of_edits_says_which_one_is_wrong() -> None:
    with pytest.raises(FluxSaeError, match=r"edits\[1\].*mode"):
        parse_edits([EDIT, {**EDIT, "mode": "x"}])


def test_a_thousand_edits_are_refused() -> None:
    with pytest.raises(FluxSaeError, match=f"1000 edits.*{MAX_EDITS}"):
        parse_edits([EDIT] * 1000)


def test_flat_and_nested_lists_are_told_apart() -> None:
    edit = SteeringEdit(**EDIT)
    assert not is_batched([edit, edit])
    assert not is_batched([])
    assert is_batched([[edit], []])
    with pytest.raises(FluxSaeError, match="mixes"):
        is_batched([edit, [edit]])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mode": "scale", "strength": 1}, True),
        ({"mode": "scale", "strength": 0}, False),
        ({"mode": "add", "strength": 0}, True),
        ({"mode": "ablate", "strength": 0}, True),
        ({"mode": "project_out", "strength": 0}, True),
        ({"mode": "clamp", "strength": 0}, False),
        ({"mode": "clamp", "strength": 0, "steps": (4, 4)}, True),
        ({"mode": "clamp", "strength": 0, "region": [[0, 0], [0, 0]]}, True),
        ({"mode": "clamp", "strength": 0, "region": [[0, 1], [0, 0]]}, False),
    ],
)
def test_identity_edits_are_known(changes: dict[str, object], expected: bool) -> None:
    assert SteeringEdit(**{**EDIT, **changes}).is_identity is expected


def test_a_recipe_survives_json() -> None:
    assert Recipe.from_json(recipe().to_json()) == recipe()
    assert recipe().edits == (SteeringEdit(**{**EDIT, "strength": -1.0}),)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"index": 3}, "index"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"shared_steps": 21}, "shared_steps"),
        ({"prompt": None}, "prompt"),
    ],
)
def test_a_recipe_out_of_range_is_refused(changes: dict[str, object], names: str) -> None:
    with pytest.raises(FluxSaeError, match=names):
        Recipe.from_dict({**recipe().to_dict(), **changes})


@pytest.mark.parametrize(
    "changes", [{"schema_version": 99}, {"batch": 3}, {"extra": 1}, {"settings": {"height": -1}}, {"batch": [[{}]]}]
)
def test_a_damaged_recipe_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(FluxSaeError):
        Recipe.from_dict({**recipe().to_dict(), **changes})


def test_recipes_travel_in_png_and_json(tmp_path) -> None:
    recipes = [recipe(index=0), recipe()]
    picture = Image.new("RGB", (8, 8), (10, 200, 30))
    (tmp_path / "grid.png").write_bytes(png_bytes(picture, recipes))
    (tmp_path / "one.json").write_text(recipes[1].to_json(), encoding="utf-8")
    assert load_recipes(tmp_path / "grid.png") == recipes
    assert load_recipes(tmp_path / "one.json") == recipes[1:]
    (tmp_path / "one.json").rename(tmp_path / "renamed.txt")
    (tmp_path / "grid.png").rename(tmp_path / "grid.jpg")
    assert load_recipes(tmp_path / "renamed.txt") == recipes[1:]
    assert load_recipes(tmp_path / "grid.jpg") == recipes
    (tmp_path / "grid.jpg").rename(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").tobytes() == picture.tobytes()


def test_a_file_without_a_recipe_is_refused(tmp_path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "bare.png")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.jpg")
    for name in ("bare.png", "broken.png", "absent.png", "picture.jpg"):
        with pytest.raises(FluxSaeError, match=name):
            load_recipes(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.json", b"[]", "is an empty list"),
        ("number.json", b"[5]", "is no recipe"),
        ("deep.json", b"[" * 100_000, "is not valid JSON"),
        ("half.json", '{"prompt": "a'.encode("utf-16"), "is not valid JSON"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00", "is not a readable PNG"),
        ("jpeg.png", b"\xff\xd8\xff\xe0", "is not a readable PNG"),
    ],
)
def test_an_odd_file_is_refused_in_a_sentence(tmp_path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FluxSaeError, match=words):
        load_recipes(tmp_path / name)


def test_a_recipe_in_another_encoding_is_read(tmp_path) -> None:
    for encoding in ("utf-16", "utf-8-sig"):
        (tmp_path / "recipe.json").write_text(recipe().to_json(), encoding=encoding)
        assert load_recipes(tmp_path / "recipe.json") == [recipe()]


def test_a_picture_that_unpacks_to_too_much_is_refused(tmp_path) -> None:
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(FluxSaeError, match="has 10000 x 10000 pixels"):
        load_recipes(tmp_path / "bomb.png")
    text = PngImagePlugin.PngInfo()
    text.add_text("fluxsae.recipes", "x" * 20_000_000, zip=True)
    Image.new("1", (1, 1)).save(tmp_path / "text.png", pnginfo=text)
    with pytest.raises(FluxSaeError, match="is not a readable PNG"):
        load_recipes(tmp_path / "text.png")
