"""The page holds FLUX as its run was made, and reads with SAEs of that very hook point."""

from dataclasses import replace

import pytest
import torch
from tiny_flux import SETTINGS

import fluxsae.flux
from fluxsae.errors import FluxSaeError
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


@pytest.mark.parametrize(("recorded", "asked"), [("bfloat16", torch.bfloat16), (None, None)])
def test_flux_is_held_in_the_type_its_run_was_made_in(recorded, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(RunFolder(miniature_path("run")), source="embedded")
    bench.info = replace(bench.info, dtype=recorded)
    found = []
    monkeypatch.setattr(fluxsae.flux, "load_flux", lambda *_, dtype, **__: found.append(dtype), raising=False)
    _ = bench.pipe
    assert found == [asked]
