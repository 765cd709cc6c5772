"""Generation settings: ranges, types, JSON."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings


@given(
    st.builds(
        GenerationSettings,
        height=st.integers(1, 4096),
        width=st.integers(1, 4096),
        num_inference_steps=st.integers(1, 1000),
        guidance_scale=st.floats(0, 100),
        true_cfg_scale=st.floats(1, 100),
        negative_prompt=st.text(max_size=50),
        max_sequence_length=st.integers(1, 512),
    )
)
def test_settings_survive_json(settings):
    assert GenerationSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_the_defaults_are_those_of_flux_dev():
    settings = GenerationSettings()
    assert (settings.height, settings.width, settings.num_inference_steps) == (1024, 1024, 28)
    assert (settings.guidance_scale, settings.true_cfg_scale, settings.max_sequence_length) == (3.5, 1.0, 512)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 0), ("height", -8), ("height", 10**9), ("height", True), ("height", 128.0), ("width", "128"),
        ("num_inference_steps", 0), ("num_inference_steps", 100_000), ("num_inference_steps", None),
        ("guidance_scale", math.nan), ("guidance_scale", math.inf), ("guidance_scale", -1), ("guidance_scale", "3.5"),
        ("true_cfg_scale", 0.5), ("true_cfg_scale", False), ("max_sequence_length", 513), ("max_sequence_length", 0),
        ("negative_prompt", 7), ("negative_prompt", "x" * 5000),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_with_its_name_and_the_range(name, value):
    with pytest.raises(FluxSaeError, match=f"^{name} is .*It must (be|have) ") as caught:
        GenerationSettings.from_dict({name: value})
    assert len(str(caught.value)) < 300


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(FluxSaeError, match=r"^steps is unknown. Allowed are height, width, num_inference_steps"):
        GenerationSettings.from_dict({"steps": 20})
