"""Hook points: names, streams, layouts; the token grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.flux.families import FAMILIES
from fluxsae.flux.hookpoints import HookPoint, TokenGrid

DOUBLE = ["transformer_blocks.{i}" + end for end in ("", ":text", ".attn", ".attn:text", ".ff", ".ff_context")]
SINGLE = [
    "single_transformer_blocks.{i}" + submodule + stream
    for submodule in ("", ".attn", ".proj_mlp", ".proj_out")
    for stream in ("", ":text")
]


def test_layer_number_is_short_for_the_double_block_feed_forward():
    assert HookPoint.parse("layer15") == HookPoint.parse("transformer_blocks.15.ff")
    assert str(HookPoint.parse("layer15")) == "transformer_blocks.15.ff"


@given(st.sampled_from(DOUBLE + SINGLE), st.integers(0, 99))
def test_a_hook_point_reads_back_from_its_own_text(pattern, index):
    hookpoint = HookPoint.parse(pattern.format(i=index))
    assert HookPoint.parse(str(hookpoint)) == hookpoint
    assert hookpoint.block_index == index
    assert not set(str(hookpoint)) & set('/\\:*?"<>|'), "unsafe as a folder name"


@given(st.lists(st.sampled_from(DOUBLE + SINGLE), min_size=2), st.data())
def test_hook_points_sort_by_block_number_not_by_text(patterns, data):
    hookpoints = [HookPoint.parse(pattern.format(i=data.draw(st.integers(0, 12)))) for pattern in patterns]
    ordered = sorted(hookpoints)
    kinds = [(hookpoint.block_kind, hookpoint.block_index) for hookpoint in ordered]
    assert kinds == sorted(kinds)


@pytest.mark.parametrize(
    "text",
    ["", "layer", "layer-1", "layer1.5", "transformer_blocks", "transformer_blocks.x.ff", "transformer_blocks.1.norm1",
     "transformer_blocks.1.proj_out", "single_transformer_blocks.1.ff", "layer15:text",
     "transformer_blocks.1.ff_context:image",
     "transformer_blocks.1.attn:audio", "../../etc/passwd", "layer" + "9" * 5000],
)  # fmt: skip
def test_what_names_no_hook_point_is_refused_in_words(text):
    with pytest.raises(FluxSaeError) as caught:
        HookPoint.parse(text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [None, 15, ["layer1"], b"layer1"])
def test_what_is_not_text_is_refused(value):
    with pytest.raises((FluxSaeError, Exception), match=r"text|type"):
        HookPoint.parse(value)


FLUX1, FLUX2 = FAMILIES


def _output(hookpoint: HookPoint, text: torch.Tensor, image: torch.Tensor, *, family):
    """What diffusers 0.42 returns at this hook point (DESIGN, section 4), written out once more by hand."""
    if family is FLUX2 and hookpoint.block_kind == "single":
        return torch.cat([text, image], dim=1)
    if hookpoint.block_kind == "double":
        return {"ff": image, "ff_context": text, "": (text, image), "attn": (image, text)}[hookpoint.submodule]
    return (text, image) if hookpoint.submodule == "" else torch.cat([text, image], dim=1)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [*((FLUX1, pattern) for pattern in DOUBLE + SINGLE), *((FLUX2, pattern) for pattern in DOUBLE + SINGLE[:4])],
)
def test_split_gives_the_streams_tokens_and_join_puts_others_in_their_place(family, pattern):
    hookpoint = HookPoint.parse(pattern.format(i=0))
    layout = family.layout(hookpoint)
    text, image = torch.arange(6.0).reshape(1, 3, 2), torch.arange(10.0, 18.0).reshape(1, 4, 2)
    output = _output(hookpoint, text, image, family=family)
    own, other = (text, image) if hookpoint.stream == "text" else (image, text)
    assert torch.equal(hookpoint.split(output, 3, layout), own)
    new = -own
    joined = hookpoint.join(output, new, 3, layout)
    assert type(joined) is type(output)
    assert torch.equal(hookpoint.split(joined, 3, layout), new)
    assert torch.equal(hookpoint.split(output, 3, layout), own), "the original must stay as it was"
    if pattern.endswith((".ff", ".ff_context")):
        return
    twin = HookPoint.parse(pattern.removesuffix(":text").format(i=0) + ("" if pattern.endswith(":text") else ":text"))
    assert torch.equal(twin.split(joined, 3, family.layout(twin)), other)


def test_a_third_element_of_attention_survives():
    hookpoint = HookPoint.parse("transformer_blocks.0.attn")
    output = tuple(torch.full((1, 2, 2), float(i)) for i in range(3))
    joined = hookpoint.join(output, torch.ones(1, 2, 2) * 9, 0, FLUX1.layout(hookpoint))
    assert [part[0, 0, 0].item() for part in joined] == [9, 1, 2]


@given(st.integers(1, 64), st.integers(1, 64), st.data())
def test_token_and_position_are_inverse_and_row_major(rows, cols, data):
    grid = TokenGrid(rows, cols)
    token = data.draw(st.integers(0, grid.n_tokens - 1))
    row, column = grid.position(token)
    assert grid.token(row, column) == token == row * cols + column


def test_grid_is_height_by_width_over_patch_and_not_square_by_habit():
    assert TokenGrid.from_size(1024, 512, patch=16) == TokenGrid(64, 32)
    assert TokenGrid.from_size(128, 96, patch=8) == TokenGrid(16, 12)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (128, 100), (0, 128), (128, -8), (4, 128)])
def test_a_size_off_the_patch_is_refused_with_one_that_fits(height, width):
    with pytest.raises(FluxSaeError, match="multiple of 8, for example"):
        TokenGrid.from_size(height, width, patch=8)


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (0, 3), (2, 0)])
def test_a_patch_outside_the_grid_is_refused(row, column):
    with pytest.raises(FluxSaeError, match="outside the token grid: allowed are 0 to"):
        TokenGrid(2, 3).token(row, column)


@pytest.mark.parametrize("token", [-1, 6, 10**12])
def test_a_token_outside_the_grid_is_refused(token):
    with pytest.raises(FluxSaeError, match="allowed are 0 to 5"):
        TokenGrid(2, 3).position(token)
