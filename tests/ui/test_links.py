"""A view as a link and as code."""

from typing import Any

import pytest
from desk_data import LATE
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.ui.kit.links import check_view, decode_view, encode_view, view_of
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.serve.schemas import HeatmapRequest, SteerRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.steer.desk import SteerDesk


@given(st.dictionaries(st.text(max_size=8), st.integers() | st.text(max_size=20), max_size=5))
def test_a_link_opens_what_it_was_made_of(values: dict[str, Any]) -> None:
    assert decode_view(encode_view(values)) == values


@pytest.mark.parametrize("text", ["", "x", "!!!", "eNo", encode_view({"a": 1})[:-3], "A" * 5000])
def test_a_damaged_link_is_refused_in_words(text: str) -> None:
    with pytest.raises(FluxSaeError, match="link is damaged"):
        decode_view(text)


def test_a_link_that_unpacks_to_too_much_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="link is damaged"):
        decode_view(encode_view({"a": "x" * 10_000_000}))


def test_a_view_stands_behind_the_hash_and_is_found_in_old_links_too() -> None:
    view = {"tab": "steer", "prompt": "x" * 50_000}
    text = encode_view(view)
    assert view_of({}, f"#view={text}") == view_of({"view": text}) == view
    assert view_of({}, "#somewhere") == view_of({}, None) == {}


def test_a_link_of_another_sae_under_the_same_name_is_refused(bench: Workbench) -> None:
    desk = SteerDesk(bench)
    values = {"prompt": "a circle", "edits": [], "seed": 0, "num_inference_steps": 20}
    view = decode_view(desk.frame(SteerRequest, values, tab="steer")["link"])
    assert set(view["saes"]) == set(bench.hookpoints)
    check_view(view, bench.fingerprints)
    check_view({**view, "saes": {**view["saes"], "layer9": "of an SAE that is not here"}}, bench.fingerprints)
    check_view({"tab": "gallery", "hookpoint": LATE, "feature": 7}, bench.fingerprints)
    with pytest.raises(FluxSaeError, match=f"made with another SAE of {LATE}: its feature numbers mean something else"):
        check_view({**view, "saes": {**view["saes"], LATE: "0" * 16}}, bench.fingerprints)


def test_a_hand_written_link_names_a_feature() -> None:
    assert view_of({"hookpoint": LATE, "feature": "7"}) == {"tab": "gallery", "hookpoint": LATE, "feature": 7}
    assert view_of({"feature": "seven"})["feature"] == "seven"


def test_snippets_carry_the_values_on_screen() -> None:
    code = snippets(HeatmapRequest, {"step": None, "seed": 3, "prompt": "it's <b>"})
    compile(code["Python"], "snippet", "exec")
    assert "seed=3" in code["Python"]
    assert '"seed": 3, "step": null' in code["curl"]
    assert "it'\\''s <b>" in code["curl"]
    assert '"name": "heatmap"' in code["MCP"]
