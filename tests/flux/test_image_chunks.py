"""Images go through the autoencoder one by one, however large the batch."""

from collections.abc import Iterator

import pytest
import torch

from fluxsae.flux import FluxPipeline, default_settings, encode_images, generate
from fluxsae.flux.latents import decode_latents


@pytest.fixture
def batches(tiny_flux: FluxPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Sizes of the batches that the encoder and decoder of the autoencoder see."""
    seen: list[int] = []
    parts = (tiny_flux.vae.encoder, tiny_flux.vae.decoder)
    hooks = [part.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]))) for part in parts]
    yield seen
    for hook in hooks:
        hook.remove()


def test_images_are_decoded_and_encoded_one_by_one(tiny_flux: FluxPipeline, batches: list[int]) -> None:
    prompts, seeds = ["a red star", "a blue ring", "a ring"], [1, 2, 3]
    images = generate(tiny_flux, prompts, seeds=seeds)
    assert batches == [1, 1, 1]
    latents = generate(tiny_flux, prompts, seeds=seeds, output_type="latent")
    assert isinstance(latents, torch.Tensor)
    again = decode_latents(tiny_flux, latents, default_settings(tiny_flux))
    assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    encode_images(tiny_flux, again)
    assert batches == [1] * 9
    assert not tiny_flux.vae.use_slicing, "left as it was found"
