"""How FLUX fits a machine: presets from faked memory, devices, access to gated models, quantised models marked."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from local_hub import served_hub
from tiny_flux import build_tiny_flux

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, is_exact, load_flux, why_inexact
from fluxsae.flux import loading as flux
from fluxsae.flux.presets import (
    GB,
    PRESETS,
    Machine,
    choose_device,
    choose_dtype,
    choose_preset,
    measure_machine,
    quantised_parts,
    required_bytes,
)

CUDA, MPS, CPU = torch.device("cuda"), torch.device("mps"), torch.device("cpu")
# FLUX.1-dev in bfloat16, bytes of its files.
DEV = {"transformer": 23_803_000_000, "text_encoder": 246_000_000, "text_encoder_2": 9_525_000_000, "vae": 168_000_000}
# FLUX.2 klein 4B, with a component that it does not have.
KLEIN = {"transformer": 7_751_000_000, "text_encoder": 8_045_000_000, "text_encoder_2": 0, "vae": 168_000_000}
TINY = {"transformer": 7_000_000, "text_encoder_2": 400_000}


@pytest.mark.parametrize(
    ("free", "host", "wanted"),
    [(80, 128, "full"), (48, 64, "full"), (32, 64, "offload"), (32, 16, "int8"), (24, 64, "int8"), (24, 16, "int8"),
     (16, 64, "nf4"), (141, 8, "full")],
)  # fmt: skip
def test_the_first_preset_that_fits_is_taken_exact_ones_first(free, host, wanted):
    choice = choose_preset(DEV, Machine(CUDA, free * GB, host * GB))
    assert choice.preset == wanted
    assert f"{free}.0 GB free on cuda" in choice.reason
    assert ("CHANGES the activations" in choice.reason) == (wanted in ("int8", "nf4"))


def test_a_quantised_preset_shrinks_the_transformer_and_the_largest_text_encoder():
    assert quantised_parts(DEV) == ("transformer", "text_encoder_2")
    assert quantised_parts(KLEIN) == ("transformer", "text_encoder")
    assert choose_preset(KLEIN, Machine(CUDA, 24 * GB, 64 * GB)).preset == "full"


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 100))
def test_more_memory_never_gives_a_later_preset(free, host, more):
    def rank(gigabytes: int) -> int:
        try:
            return PRESETS.index(choose_preset(DEV, Machine(CUDA, gigabytes * GB, host * GB)).preset)
        except FluxSaeError:
            return len(PRESETS)

    assert rank(free + more) <= rank(free)


@given(st.sampled_from(PRESETS), st.integers(1, 100))
def test_a_chosen_preset_needs_no_more_than_is_free(preset, free):
    machine = Machine(CUDA, free * GB, 100 * GB)
    try:
        choice = choose_preset(DEV, machine)
    except FluxSaeError:
        assert all(required_bytes(name, DEV) > machine.free for name in PRESETS)
    else:
        assert required_bytes(choice.preset, DEV) <= machine.free


@pytest.mark.parametrize("device", [CUDA, MPS, CPU])
def test_no_room_is_refused_with_what_each_preset_needs(device):
    with pytest.raises(FluxSaeError, match=r"does not fit: 8\.0 GB are free .* need full 38 GB") as caught:
        choose_preset(DEV, Machine(device, 8 * GB, 8 * GB))
    assert ("nf4" in str(caught.value)) == (device == CUDA)


def test_a_small_model_is_kept_whole_whatever_the_machine():
    for device in (CUDA, MPS, CPU):
        assert choose_preset(TINY, Machine(device, 0, 0)).preset == "full"


def test_a_preset_that_was_asked_for_is_obeyed_or_refused_in_words():
    machine = Machine(CUDA, 80 * GB, 80 * GB)
    assert choose_preset(DEV, machine, "nf4").preset == "nf4"
    with pytest.raises(FluxSaeError, match="allowed are full, offload, int8, nf4"):
        choose_preset(DEV, machine, "fp8")
    with pytest.raises(FluxSaeError, match="needs a CUDA device"):
        choose_preset(DEV, Machine(MPS, 80 * GB, 80 * GB), "nf4")


# Devices


@contextmanager
def devices(
    monkeypatch, *, cuda: bool = False, mps: bool = False, bf16: bool = True, macos: int = 15
) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: cuda)
        patch.setattr(torch.backends.mps, "is_available", lambda: mps)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
        patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        yield


def test_cuda_goes_before_mps_and_mps_before_the_cpu(monkeypatch):
    with devices(monkeypatch, cuda=True, mps=True):
        assert choose_device() == CUDA
        assert choose_device("mps") == MPS
    with devices(monkeypatch, mps=True):
        assert choose_device() == MPS
    with devices(monkeypatch):
        assert choose_device() == CPU


@pytest.mark.parametrize(("device", "words"), [("cuda", "has none"), ("mps:0", "has none"), ("gpu", "no device")])
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, words):
    with devices(monkeypatch), pytest.raises(FluxSaeError, match=words):
        choose_device(device)


def test_large_models_take_the_half_precision_that_the_device_has_and_small_ones_float32(monkeypatch):
    large, small = 34 * GB, GB // 100
    with devices(monkeypatch, cuda=True, mps=True):
        assert [choose_dtype(device, large) for device in (CUDA, MPS, CPU)] == [torch.bfloat16] * 3
        assert [choose_dtype(device, small) for device in (CUDA, MPS, CPU)] == [torch.float32] * 3
    with devices(monkeypatch, cuda=True, mps=True, bf16=False, macos=13):
        assert [choose_dtype(device, large) for device in (CUDA, MPS)] == [torch.float16] * 2


def test_free_memory_is_measured_on_this_machine_and_on_an_apple_one(monkeypatch):
    own = measure_machine(CPU)
    assert 0 < own.free == own.host_free
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 20 * GB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3 * GB)
    machine = measure_machine(MPS)
    assert machine.free == min(17 * GB, machine.host_free)


# Loading


@pytest.fixture
def opened(monkeypatch, tiny_flux_folder):
    """What `load_flux` asks of diffusers for a model of FLUX.1-dev's size on a faked GPU of 24 GB."""
    asked = SimpleNamespace(arguments={}, moved=[])

    def from_pretrained(folder, **arguments):
        asked.arguments = arguments
        return build_tiny_flux()

    def record(name):
        return lambda pipe, *args, **kwargs: (
            asked.moved.append((name, *map(str, args), *map(str, kwargs.values()))) or pipe
        )

    monkeypatch.setattr(FluxPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(FluxPipeline, "to", record("to"))
    monkeypatch.setattr(FluxPipeline, "enable_model_cpu_offload", record("offload"))
    monkeypatch.setattr(flux, "component_bytes", lambda folder: DEV)
    monkeypatch.setattr(flux, "choose_device", lambda device: CUDA)
    monkeypatch.setattr(flux, "choose_dtype", lambda device, size: torch.bfloat16)
    monkeypatch.setattr(flux, "measure_machine", lambda device: Machine(CUDA, 24 * GB, 64 * GB))
    monkeypatch.setattr(flux, "require_quantiser", lambda: None)

    def load(**arguments):
        asked.moved.clear()
        load_flux(tiny_flux_folder, **arguments)
        return asked

    return load


def test_the_choice_is_printed_with_its_reason(opened, capsys):
    opened()
    assert "preset int8 on cuda in bfloat16 (24.0 GB free" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "backend", "argument"),
    [("int8", "bitsandbytes_8bit", "load_in_8bit"), ("nf4", "bitsandbytes_4bit", "load_in_4bit")],
)
def test_quantised_presets_ask_diffusers_for_the_two_large_parts(opened, monkeypatch, preset, backend, argument):
    configs: list[dict] = []
    monkeypatch.setattr(diffusers, "PipelineQuantizationConfig", lambda **values: configs.append(values) or "config")
    asked = opened(preset=preset)
    assert asked.arguments == {"dtype": torch.bfloat16, "quantization_config": "config"}
    assert configs[0]["quant_backend"] == backend
    assert configs[0]["quant_kwargs"][argument] is True
    assert configs[0]["components_to_quantize"] == ["transformer", "text_encoder_2"]


def test_full_moves_the_model_and_offload_leaves_it_to_diffusers(opened):
    assert opened(preset="full").moved == [("to", "cuda")]
    assert opened(preset="offload").moved == [("offload", "cuda")]
    assert opened(preset="offload").arguments["quantization_config"] is None


def test_quantised_presets_without_the_library_say_what_to_install(tiny_flux_folder, monkeypatch):
    monkeypatch.setattr(flux, "choose_preset", lambda *_: SimpleNamespace(preset="nf4", reason=""))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FluxSaeError, match="pip install"):
        load_flux(tiny_flux_folder)


def test_a_model_is_marked_where_its_activations_are_not_its_own(tiny_flux):
    assert is_exact(tiny_flux)
    cached = build_tiny_flux()
    cached.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    assert not is_exact(cached)
    assert "step cache" in why_inexact(cached)
    cached.transformer.disable_cache()
    assert is_exact(cached)
    narrow = build_tiny_flux()
    narrow.transformer.proj_out.to(torch.float8_e4m3fn)
    assert "quantised (float8_e4m3fn)" in why_inexact(narrow)


HUB_SESSION = """
import os, sys
from huggingface_hub import HfApi
from fluxsae.errors import FluxSaeError
from fluxsae.flux import flux_identity, load_flux

for name in ("user/gated", "user/open"):
    HfApi().create_repo(name)
    commit = HfApi().upload_folder(repo_id=name, folder_path=sys.argv[1]).oid
print(*flux_identity(load_flux("user/open"))[:2], commit)
print(sys.stdin.readline().strip())
del os.environ["HF_TOKEN"]
try:
    load_flux("user/gated")
except FluxSaeError as error:
    print(error)
"""


def test_a_hub_model_loads_at_its_commit_and_a_gated_one_says_how_to_get_access(tiny_flux_folder, tmp_path):
    with served_hub() as hub:
        command = [sys.executable, "-c", HUB_SESSION, str(tiny_flux_folder)]
        with subprocess.Popen(
            command, env=hub.environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as session:
            name, revision, commit = session.stdout.readline().split()
            hub.repo("user/gated", gated=True)
            message = session.communicate("gated now\n")[0].splitlines()[-1]
    assert (name, revision) == ("user/open", commit)
    assert "user/gated is gated. Open" in message
    assert "accept its terms" in message
    assert "hf auth login" in message
