"""The page holds FLUX as its run was made, and reads with SAEs of that very hook point."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from tiny_flux import SETTINGS, build_tiny_flux

import fluxsae.flux
from fluxsae.errors import FluxSaeError
from fluxsae.flux import block_hooks, capture
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.kit.header import header_html
from fluxsae.ui.serve.given import GivenPicture
from fluxsae.ui.serve.reading import read_given, read_image
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.serve.shelf import Shelf


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


@pytest.mark.parametrize("is_given", [False, True], ids=["made", "own picture"])
def test_an_image_whose_activations_are_no_numbers_is_refused_by_step(tiny_flux, is_given: bool) -> None:
    place = "transformer_blocks.1.ff"
    saes = {place: SparseAutoencoder(SaeConfig(architecture="l1", d_model=32, n_features=8))}
    asked = {"prompt": "a red circle", "seed": 0, "settings": SETTINGS}
    own = {"picture": GivenPicture(32, 32, bytes(32 * 32 * 3)), "metrics": {place: {}}}
    read = partial(read_given, **own) if is_given else read_image
    with (
        block_hooks(tiny_flux, {HookPoint.parse("layer0"): lambda call: call.tokens / 0 if call.step == 2 else None}),
        pytest.raises(FluxSaeError, match=r"At step 2 of transformer_blocks.1.ff, the activations of this image hold"),
    ):
        read(tiny_flux, saes, **asked)


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


def test_the_header_says_that_flux_is_offloaded_or_quantised_once_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf([Workbench(RunFolder(miniature_path("run")))])
    bench, pipe = shelf.first, build_tiny_flux()
    bench.info = replace(bench.info, flux_id="owner/flux", flux_revision=None)
    monkeypatch.setattr(fluxsae.flux, "load_flux", lambda *_, **__: pipe)
    before = header_html(shelf, bench)
    _ = bench.pipe
    assert header_html(shelf, bench) == before
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        add_hook_to_module(part, CpuOffload(execution_device=torch.device("meta")))
    assert "owner/flux, offloaded here: exact" in header_html(shelf, bench)
    pipe.transformer.hf_quantizer = object()
    assert "here the transformer is quantised (object): its activations are not" in header_html(shelf, bench)
