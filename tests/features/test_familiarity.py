"""How a picture compares with the run's own: the arithmetic, and the miniature's scenes beside pictures of no scene."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsae import RunFolder, SparseAutoencoder, read_picture
from fluxsae.features.familiarity import Familiarity, familiarity, image_fvu, summarise_fvu
from fluxsae.flux import FluxPipeline
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import render_scene, sample_scene
from fluxsae.sae.config import SaeConfig


def test_fvu_is_the_error_of_each_image_about_the_input_mean() -> None:
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=4, n_features=8, k=2))
    sae.input_mean.fill_(0.5)
    tokens = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2
    with torch.no_grad():
        x_hat = sae(tokens).x_hat
    expected = [float((x - y).square().sum() / (x - 0.5).square().sum()) for x, y in zip(tokens, x_hat, strict=True)]
    assert image_fvu(sae, tokens).tolist() == pytest.approx(expected, rel=1e-4)
    assert image_fvu(sae, tokens, sae.encode_sparse(tokens)).tolist() == pytest.approx(expected, rel=1e-4)
    metrics = summarise_fvu(torch.tensor([expected, expected]).T, (2, 9))
    assert metrics["image_fvu"]["n_images"] == 3
    assert metrics["image_fvu"]["by_step"]["9"]["median"] == pytest.approx(np.median(expected))
    found = familiarity(metrics, sae, tokens, step=9)
    assert found is not None
    assert [each.is_unlike for each in found] == [fvu == max(expected) for fvu in expected]
    assert familiarity(metrics, sae, tokens, step=3) is familiarity({}, sae, tokens, step=9) is None


def test_it_is_said_in_words_with_both_figures() -> None:
    assert (
        Familiarity(0.12, 0.055, 0.037, 96)
        .sentence()
        .startswith("This picture is unlike the images of this run (FVU 0.12")
    )
    assert "median 0.037, 99 % below 0.055" in Familiarity(0.03, 0.055, 0.037, 96).sentence()


def clouds(seed: int) -> Image.Image:
    """Colours that change smoothly over the whole picture, as in a photograph out of focus: no drawn scene."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC)


def test_pictures_of_no_scene_are_unlike_the_miniatures_scenes(miniature: FluxPipeline) -> None:
    run = RunFolder(miniature_path("run"))
    hookpoint, step = run.hookpoints()[-1], run.load_info().steps[-1]
    sae = SparseAutoencoder.from_pretrained(run.sae_path(hookpoint))

    def tokens(pictures: list[Image.Image]) -> torch.Tensor:
        return read_picture(miniature, pictures, hookpoints=[hookpoint], steps=[step]).get(hookpoint, step)

    rng = np.random.default_rng(5)
    scenes = [Image.fromarray(render_scene(sample_scene(rng, held_out=None))) for _ in range(40)]
    metrics = summarise_fvu(image_fvu(sae, tokens(scenes[:28]))[:, None], (step,))
    known, strange = (
        familiarity(metrics, sae, tokens(pictures), step=step)
        for pictures in (scenes[28:], [clouds(seed) for seed in range(8)])
    )
    assert known is not None
    assert strange is not None
    assert sum(each.is_unlike for each in known) <= 2
    assert sum(each.is_unlike for each in strange) >= 6
