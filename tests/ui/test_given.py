"""A visitor's own picture: what is taken, how it is read and steered, and that nothing of it stays."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.familiarity import Familiarity
from fluxsae.features.firing import CONFIDENCE
from fluxsae.flux import schedule_sigmas
from fluxsae.ui.kit.snippets import PICTURE, snippets
from fluxsae.ui.serve import given, session
from fluxsae.ui.serve.given import MAX_PICTURE_BYTES, forget_uploads, take_picture
from fluxsae.ui.serve.lane import Done, Pending, StepDone
from fluxsae.ui.serve.opening import open_workbench
from fluxsae.ui.serve.schemas import (
    ExplainRequest,
    FeaturesAtRequest,
    ReadPictureRequest,
    RequestError,
    SteerRequest,
)
from fluxsae.ui.serve.session import ReadJob, Workbench
from fluxsae.ui.serve.visitors import VisitorLimits
from fluxsae.ui.tabs.heatmap.desk import HeatmapDesk
from fluxsae.ui.tabs.heatmap.lab import doubted, lab
from fluxsae.ui.tabs.heatmap.why import ExplainJob
from fluxsae.ui.tabs.steer.desk import SteerDesk

SIZE = {"height": 128, "width": 128}


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    content = io.BytesIO()
    image.save(content, format=kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def photo() -> Image.Image:
    """A gradient of colours that the miniature's world does not have."""
    y, x = np.mgrid[0:96, 0:160]
    return Image.fromarray(np.stack([x, 255 - y * 2, (x + y) % 256], axis=-1).astype(np.uint8))


@pytest.fixture(scope="module")
def own() -> Workbench:
    """The embedded run, its FLUX loaded when it is asked."""
    return open_workbench("")


@pytest.fixture
def visit(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(session, "current_visit", lambda: "ann")
    return "ann"


def last(events: Any) -> Any:
    *_, done = events
    assert isinstance(done, Done)
    return done.value


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_pictures_of_many_kinds_become_rgb_of_the_runs_size(kind: str) -> None:
    source = photo().convert("P") if kind == "GIF" else photo()
    taken = take_picture(data_url(source, kind), **SIZE)
    assert (taken.image.mode, taken.image.size) == ("RGB", (128, 128))
    assert "cropped" in taken.notes


ODD = {
    "no text": (None, "give a data URL"),
    "a link": ("https://example.org/a.png", "Links are not followed"),
    "a path": ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "give a data URL"),
    "bad base64": ("data:image/png;base64,@@@", "damaged data URL"),
    "no picture": ("data:image/png;base64," + base64.b64encode(b"hello" * 20).decode(), "no picture of a kind"),
    "nothing": ("data:image/png;base64,", "no picture of a kind"),
    "cut off": (data_url(Image.effect_noise((64, 64), 90))[: 22 + 1200], "broken or cut off"),
    "tiny": (data_url(Image.new("RGB", (4, 4))), "is too small: 4 x 4"),
    "svg": ("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(), "no picture of a kind"),
    "too long": ("data:image/png;base64," + "A" * (MAX_PICTURE_BYTES * 4 // 3 + 100), "give at most 8 MB"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_uploads_get_a_sentence(own: Workbench, name: str) -> None:
    value, words = ODD[name]
    with pytest.raises(RequestError, match=words):
        ReadPictureRequest.parse(own.limits, picture=value)


def test_an_uploaded_file_is_read_and_deleted_and_no_other_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "uploads"
    folder.mkdir()
    monkeypatch.setattr(given, "get_upload_folder", lambda: str(folder))
    photo().save(folder / "mine.png")
    photo().save(tmp_path / "theirs.png")
    mine, theirs = ({"path": str(path)} for path in (folder / "mine.png", folder / ".." / "theirs.png"))
    assert take_picture(mine, **SIZE).image.size == (128, 128)
    with pytest.raises(FluxSaeError, match="give a data URL"):
        take_picture(theirs, **SIZE)
    forget_uploads([mine, theirs, "text", None])
    assert [path.name for path in tmp_path.rglob("*.png")] == ["theirs.png"]
    with pytest.raises(FluxSaeError, match="no longer here"):
        take_picture(mine, **SIZE)


def test_a_prompt_may_be_blank_only_beside_a_picture(own: Workbench) -> None:
    for schema, more in [
        (FeaturesAtRequest, {"row": 1, "column": 1}),
        (ExplainRequest, {"feature": 3}),
        (SteerRequest, {"edits": []}),
    ]:
        with pytest.raises(RequestError, match="prompt is blank"):
            schema.parse(own.limits, prompt=" ", **more)
        assert schema.parse(own.limits, prompt=" ", picture=data_url(photo()), **more).prompt == ""
    with pytest.raises(RequestError, match=r"change is 0; give a number from 0\.1 to 1"):
        SteerRequest.parse(own.limits, prompt="a star", edits=[], change=0)


def test_a_picture_is_read_with_steps_patches_and_reasons_and_forgotten_with_the_visit(
    own: Workbench, visit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = HeatmapDesk(own)
    sample = {"image": data_url(own.images.picture(0)), "caption": own.images.prompts[0]}
    *steps, done = desk.show_given({"picture": sample["image"], "caption": ""}, None, 0)
    page, _, values = done.value
    steps = [step for step in steps if isinstance(step, StepDone)]
    assert page["notices"] == []
    assert page["picture"] == values["picture"]
    assert page["picture"]
    assert len(steps) == len(page["steps"]) == len(page["previews"])
    assert {"image", "step", "sigma", "feature", "map"} == set(steps[-1].view)
    assert page["link"] is None
    assert "handle_file('picture.png')" in page["code"]["Python"]
    fired = last(desk.patch(values, {"row": 4, "column": 4, "step": page["steps"][3]}))
    assert fired["picture"] == page["picture"]
    assert fired["features"]
    other, changed = desk.change_hookpoint(own.hookpoints[0], values)
    assert (other["hookpoint"], changed["picture"]) == (own.hookpoints[0], page["picture"])
    why = last(desk.why(values, {"feature": page["selected"]}))
    assert why["drive"] > 0
    assert why["words"] == []
    monkeypatch.setattr(session, "current_visit", lambda: "bob")
    with pytest.raises(FluxSaeError, match="not kept here any more"):
        list(desk.patch(values, {"row": 4, "column": 4}))
    monkeypatch.setattr(session, "current_visit", lambda: visit)
    assert own.given.get((visit, page["picture"])) is not None
    own.end_visit()
    assert not [key for key in own.cache._entries if isinstance(key, tuple)]
    assert len(own.given) == 0


def test_a_call_from_code_leaves_nothing_and_an_unlike_picture_has_no_sure_name(own: Workbench) -> None:
    desk = HeatmapDesk(own)
    before = len(own.cache)
    request = ReadPictureRequest.parse(own.limits, picture=data_url(photo()), prompt="", limit=20)
    features, overlays, compared = last(desk.read_picture(request))
    assert (len(features), len(overlays)) == (20, 16)
    assert compared["is_unlike"]
    assert {feature["label_confidence_here"] for feature in features} <= {None, 0.0}
    assert len(own.cache) == before
    assert len(own.given) == 0
    one = request.model_copy(update={"step": 18, "limit": 1})
    assert last(desk.read_picture(one))[0][0]["activation"] > 0


def test_names_are_not_sure_where_the_run_does_not_say_what_is_usual(own: Workbench) -> None:
    request = ReadPictureRequest.parse(own.limits, picture=data_url(own.images.picture(4)))
    reading = last(own.read("", 0, own.limits.default_steps, picture=request.picture))
    cards = own.cards[request.hookpoint]
    alike = lab(reading, cards, limit=10)
    assert max(feature["confidence"] or 0 for feature in alike["features"]) >= CONFIDENCE["sure"]
    object.__setattr__(reading, "familiarity", None)
    unknown = lab(reading, cards, limit=10)
    assert "does not say" in unknown["notices"][0]
    assert max(feature["confidence"] or 0 for feature in unknown["features"]) < CONFIDENCE["sure"]
    object.__setattr__(reading, "familiarity", (Familiarity(0.2, 0.1, 0.05, 9),))
    assert "unlike anything this FLUX knows" in lab(reading, cards, limit=10)["notices"][0]
    assert doubted([], reading) == []


def test_a_share_counts_the_passes_of_a_step_that_is_not_named_as_they_are(
    own: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, feature = "a red star", own.example_edit["feature"]
    asked, named = (ExplainRequest.parse(own.limits, prompt=prompt, feature=feature, step=step) for step in (None, 2))
    assert ExplainJob(asked).n_passes(own) == ExplainJob(named).n_passes(own)  # step 2 is the first that was trained on
    picture = take_picture(data_url(photo()), **SIZE)
    assert ReadJob("", 0, 20, picture).n_passes(own) == 20
    assert own.images_of(ReadJob("", 0, 20, picture)) == 1
    monkeypatch.setattr(own, "visitors", VisitorLimits(3))
    list(own.read("", 0, 20, picture=picture))
    assert [len(times) for times in own.visitors._times.values()] == [1]


def test_a_picture_is_steered_from_as_much_noise_as_it_may_change(own: Workbench, visit: str) -> None:
    heatmap, desk = HeatmapDesk(own), SteerDesk(own)
    page, _, _ = last(heatmap.show_given({"picture": data_url(own.images.picture(1)), "caption": ""}, None, 7))
    sent = {"prompt": "", "seed": 7, "num_inference_steps": 8, "given": page["picture"]}
    chosen = {"hookpoint": page["hookpoint"], "feature": page["selected"], "for": "steer", "picture": sent}
    made_from, found = desk.follow(chosen) or (None, {})
    assert made_from == ("", 7, 8)
    slider = {**found["add"], "turn": 0.5}
    results = []
    for change in (0.2, 0.9):
        sliders = {"edits": [slider], "given": {**found["given"], "change": change}}
        *steps, done = desk.turn("", 7, 8, sliders)
        results.append(done.value)
        assert all(isinstance(step, StepDone | Pending) for step in steps)
    sigmas = schedule_sigmas(own.pipe, own.settings(8))
    for change, one in zip((0.2, 0.9), results, strict=True):
        first = next((step for step, sigma in enumerate(sigmas) if sigma <= change), 7)
        assert f"{100 * change:.0f} % noise" in one["given"]
        assert f"from step {first + 1} of 8" in one["given"]
    assert results[0]["recipe"] is results[0]["link"] is None
    assert PICTURE not in results[0]["code"]["curl"]
    original, little, much = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"), dtype=float)
        for url in (page["image"], results[0]["before"], results[1]["before"])
    )
    assert np.abs(little - original).mean() < np.abs(much - original).mean()
    with pytest.raises(FluxSaeError, match="Swap works on images that FLUX makes"):
        desk.swap_on("", 7, 8, "red", "green", sliders)
    own.end_visit()
    with pytest.raises(FluxSaeError, match="Choose it again"):
        list(desk.turn("", 7, 8, sliders))


def test_code_sends_the_readers_own_picture() -> None:
    code = snippets(ReadPictureRequest, {"picture": PICTURE, "prompt": "it's", "seed": 0})
    assert code["Python"].startswith("from gradio_client import Client, handle_file\n")
    assert "picture=handle_file('picture.png')," in code["Python"]
    assert "base64 < picture.png" in code["curl"]
    assert '"picture": "data:image/png;base64,..."' in code["MCP"]
