"""The page holds FLUX as its run was made, and reads with SAEs of that very hook point."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_flux import SETTINGS

import fluxsae.flux
from fluxsae.errors import FluxSaeError
from fluxsae.flux import capture
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.reading import read_image
from fluxsae.ui.serve.session import Workbench


def test_an_sae_of_another_hook_point_is_refused_as_in_steering(tiny_flux) -> None:
    trained_on = TrainedOn(
        flux_id="unknown", hookpoint="transformer_blocks.1.ff", steps=(1,), sigmas=(0.8,), height=32, width=32,
        guidance_scale=3.5, n_tokens=16, dataset_hash="", sigma_tolerance=0.5,
    )  # fmt: skip
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=32, n_features=8, trained_on=trained_on))
    asked = {"prompt": "a red circle", "seed": 0, "settings": SETTINGS}
    with pytest.raises(FluxSaeError, match=r"hookpoint is transformer_blocks\.2\.ff, not transformer_blocks\.1\.ff"):
        read_image(tiny_flux, {"transformer_blocks.2.ff": sae}, **asked)
    assert read_image(tiny_flux, {"transformer_blocks.1.ff": sae}, **asked).grid.n_tokens == 16


@pytest.mark.parametrize("has_ground", [True, False])
def test_each_step_is_read_at_its_own_noise_level(tiny_flux, has_ground: bool) -> None:
    sigmas = fluxsae.flux.schedule_sigmas(tiny_flux, SETTINGS)
    trained_on = TrainedOn(
        flux_id="unknown", hookpoint="transformer_blocks.1.ff", steps=(1, 2), sigmas=(sigmas[1], sigmas[2]), height=32,
        width=32, guidance_scale=3.5, n_tokens=16, dataset_hash="", sigma_tolerance=0.01,
    )  # fmt: skip
    config = SaeConfig(
        architecture="l1", d_model=32, n_features=8, sigma_table=(sigmas[2], sigmas[1]),
        trained_on=trained_on if has_ground else None,
    )  # fmt: skip
    sae = SparseAutoencoder(config)
    sae.sigma_shift.data[0] = 1.0
    place = "transformer_blocks.1.ff"
    with capture(tiny_flux, [place]) as captured:
        reading = read_image(tiny_flux, {place: sae}, prompt="a red circle", seed=0, settings=SETTINGS)
    maps = reading.maps[place]
    assert maps.steps == (1, 2), "the table ends there"
    for step in maps.steps:
        expected = sae.encode(captured.get(place, step)[0], sigma=captured.sigma(step)).detach()
        found = np.stack([maps.acts(feature, step) for feature in range(8)], axis=1)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)
    assert not np.allclose(maps.acts(0, 1), maps.acts(0, 2))


@pytest.mark.parametrize(("recorded", "asked"), [("bfloat16", torch.bfloat16), (None, None)])
def test_flux_is_held_in_the_type_its_run_was_made_in(recorded, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(RunFolder(miniature_path("run")), source="embedded")
    bench.info = replace(bench.info, dtype=recorded)
    found = []
    monkeypatch.setattr(fluxsae.flux, "load_flux", lambda *_, dtype, **__: found.append(dtype), raising=False)
    _ = bench.pipe
    assert found == [asked]
