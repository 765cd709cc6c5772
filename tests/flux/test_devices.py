"""Where FLUX computes and where its parts rest: offloaded pipelines, no float64, SAEs elsewhere."""

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.flux import execution_device, is_offloaded
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.presets import Machine
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.metrics import fvu, to_float64
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering import sweeps
from fluxsae.steering.apply import edit_delta
from fluxsae.steering.edits import SteeringEdit

META = torch.device("meta")


@pytest.fixture
def offloaded():
    """A FLUX whose parts rest on the CPU and run on another device, by accelerate's own hooks."""
    pipe = build_tiny_flux()
    parts = (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer)
    for part in parts:
        add_hook_to_module(part, CpuOffload(execution_device=META))
    yield pipe
    for part in parts:
        remove_hook_from_module(part)


def test_an_offloaded_pipeline_says_where_it_computes(offloaded, tiny_flux) -> None:
    assert offloaded.device.type == offloaded.transformer.device.type == "cpu"
    assert execution_device(offloaded) == META
    assert execution_device(tiny_flux) == torch.device("cpu")
    assert is_offloaded(offloaded)
    assert not is_offloaded(tiny_flux)


def test_batch_sizes_and_recipes_follow_the_device_that_computes(offloaded, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(sweeps, "measure_machine", lambda device: asked.append(device) or Machine(device, 10**9, 10**9))
    sweeps.batch_within_memory(offloaded, SETTINGS)
    assert asked == [META]
    recipe = sweeps._recipe(offloaded, None, prompt="a", seed=0, settings=SETTINGS, batch=((),), shared_steps=0)
    assert recipe.device == "meta"


def build_sae(architecture: str) -> SparseAutoencoder:
    return SparseAutoencoder(SaeConfig(architecture=architecture, d_model=8, n_features=24)).requires_grad_(False)


@pytest.mark.parametrize("architecture", ["l1", "jumprelu"])
@pytest.mark.parametrize("use", ["forward", "encode", "encode_features", "decode"])
def test_an_sae_goes_where_the_activations_are(architecture: str, use: str) -> None:
    sae, x = build_sae(architecture), torch.empty(2, 3, 8, device=META)
    if use == "forward":
        assert sae(x).x_hat.device == META
    elif use == "encode_features":
        assert sae.encode_features(x, [3, 1]).shape == (2, 3, 2)
    elif use == "decode":
        assert sae.decode(torch.empty(2, 24, device=META)).device == META
    else:
        assert sae.encode(x).device == META
    assert {tensor.device for tensor in sae.state_dict().values()} == {META}


def test_an_edit_is_made_on_the_device_of_the_activations() -> None:
    sae = build_sae("l1")
    sae.reference_acts.fill_(1.0)
    edit = SteeringEdit(HookPoint.parse("layer1"), 3, "add", 2.0, steps=(0, 4))
    assert edit_delta(edit, sae, torch.empty(2, 3, 8, device=META)).device == META


class OnMps(torch.Tensor):
    """A tensor that says it is on Apple's GPU, which has no float64."""

    device = torch.device("mps")

    def double(self) -> torch.Tensor:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_exact_sums_leave_a_device_without_float64() -> None:
    values = torch.randn(5, 8)
    on_mps = values.as_subclass(OnMps)
    assert torch.equal(to_float64(on_mps), values.double())
    assert fvu(on_mps, on_mps * 0.9) == pytest.approx(fvu(values, values * 0.9))
