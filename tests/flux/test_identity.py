"""Which FLUX computes, told from what its weights are and not from what it is called."""

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_flux import SETTINGS, build_tiny_flux

from fluxsae.activations.shards import ActivationManifest
from fluxsae.flux import flux_identity, load_flux, settings_ground
from fluxsae.flux.identity import FluxIdentity, identity_differences
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.files import load_sae_config
from fluxsae.sae.ground import check_ground


def test_the_weights_are_named_by_their_hash_and_a_local_folder_by_its_name(tiny_flux_folder: Path) -> None:
    identity = flux_identity(load_flux(tiny_flux_folder))
    content = (tiny_flux_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    weights = sha256(sha256(content).digest()).hexdigest()
    assert identity == FluxIdentity("tiny-flux", weights[:12], weights, (), True)


@pytest.fixture
def cached(tiny_flux_folder: Path, tmp_path: Path):
    """The same weights in the Hub's cache, as two commits of one repository; opened by diffusers alone."""

    def open_commit(commit: str) -> diffusers.FluxPipeline:
        folder = tmp_path / "models--black-forest-labs--FLUX.1-dev" / "snapshots" / commit
        if not folder.exists():
            shutil.copytree(tiny_flux_folder, folder)
        return diffusers.FluxPipeline.from_pretrained(folder)

    return open_commit


def test_a_plain_pipeline_of_the_hub_keeps_its_owner_and_a_readme_edit_changes_nothing(cached) -> None:
    before, after = flux_identity(cached("a" * 40)), flux_identity(cached("b" * 40))
    assert (before.flux_id, before.revision, after.revision) == ("black-forest-labs/FLUX.1-dev", "a" * 40, "b" * 40)
    assert identity_differences(before, after) == {}
    assert set(identity_differences(before, after._replace(weights="0" * 64))) == {"flux"}


def test_a_pipeline_made_of_another_ones_parts_is_the_same_flux(cached) -> None:
    pipe = cached("a" * 40)
    assert flux_identity(diffusers.FluxImg2ImgPipeline(**pipe.components)) == flux_identity(pipe)


def test_a_file_of_the_hubs_cache_is_not_read_again(tmp_path: Path, tiny_flux_folder: Path) -> None:
    from fluxsae.flux.identity import weights_hash

    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.parent.mkdir()
    blob.write_bytes(b"other bytes than its name says: it is not read")
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors").symlink_to(blob)
    (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant, which is not opened")
    assert weights_hash(folder) == sha256(bytes.fromhex("ab" * 32)).hexdigest()


# Records of before these fields


def test_the_committed_run_opens_and_what_it_lacks_is_unknown_and_refuses_nothing(miniature) -> None:
    run = RunFolder(miniature_path("run"))
    info = run.load_info()
    here = flux_identity(miniature)
    assert here.flux_id == "miniature"
    assert identity_differences(info.identity, here) == {}
    for hookpoint in run.hookpoints():
        trained_on = load_sae_config(run.sae_path(hookpoint)).trained_on
        assert check_ground(trained_on, settings_ground(miniature, info.settings, hookpoint)) == {}
    if info.flux_weights is None:
        # The revision of a local model is the beginning of the hash, so other weights are noticed all the same.
        assert set(identity_differences(info.identity, here._replace(revision="0" * 12))) == {"flux"}


def test_an_older_manifest_keeps_its_hash(tmp_path: Path) -> None:
    manifest = ActivationManifest(
        hookpoint="transformer_blocks.1.ff", d_model=4, flux_id="tiny", flux_revision=None, settings=SETTINGS,
        steps=(1,), sigmas=(0.5,), n_tokens=3, tokens_per_image=2, n_images=4, images_per_shard=2, prompts_hash="0",
        seed=0,
    )  # fmt: skip
    values = json.loads(json.dumps(manifest.to_dict()))
    assert "flux_weights" not in values
    assert ActivationManifest.from_dict(values).dataset_hash == manifest.dataset_hash
    adapted = replace(manifest, adapters=("adapter 0",))
    assert ActivationManifest.from_dict(json.loads(json.dumps(adapted.to_dict()))) == adapted


# Adapters


class AdaptedLayer(torch.nn.Module):
    """A layer as peft's LoRA leaves it, without peft."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, seed: int, *, scale: float = 1.0, name: str = "default_0") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(32, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({name: torch.nn.Linear(2, 32, bias=False)})
        for part in (*self.lora_A.values(), *self.lora_B.values()):
            part.weight.data.copy_(torch.randn(part.weight.shape, generator=generator))
        self.active_adapters, self.merged_adapters, self.disable_adapters = [name], [], False
        self.scaling = {name: scale}


def adapters_with(layer: AdaptedLayer) -> tuple[str, ...]:
    pipe = build_tiny_flux()
    pipe.transformer.transformer_blocks[0].adapted = layer
    return flux_identity(pipe).adapters


def test_an_adapter_is_known_by_what_it_does_and_not_by_its_name() -> None:
    (active,) = adapters_with(AdaptedLayer(0))
    assert active.startswith("adapter ")
    assert adapters_with(AdaptedLayer(0, name="style").to(torch.bfloat16)) == (active,)
    assert adapters_with(AdaptedLayer(1)) != (active,)
    assert adapters_with(AdaptedLayer(0, scale=0.5)) != (active,)


def test_a_fused_adapter_counts_and_one_that_is_switched_off_does_not() -> None:
    layer = AdaptedLayer(0)
    layer.disable_adapters = True
    assert adapters_with(layer) == ()
    layer.merged_adapters = ["default_0"]
    assert adapters_with(layer) == adapters_with(AdaptedLayer(0))


def test_a_lora_of_peft_is_seen_active_fused_and_unloaded() -> None:
    peft = pytest.importorskip("peft")
    pipe = build_tiny_flux()
    before = flux_identity(pipe)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="style")
    active = flux_identity(pipe)
    assert set(identity_differences(before, active)) == {"adapters"}
    pipe.fuse_lora(components=["transformer"])
    assert flux_identity(pipe).adapters == active.adapters
    pipe.unload_lora_weights()
    assert flux_identity(pipe).adapters == ("fused adapter style",)
