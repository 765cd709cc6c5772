from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.pictures.perceptual import ImageEmbedder, LpipsDistance, PerceptualDistance, load_distance, load_embedder
from train.miniature.contrast import save_clip
from train.miniature.models import CLIP_CONFIG


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights in the layout of the miniature's."""
    folder = tmp_path_factory.mktemp("clip")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(open_clip.CLIP(**CLIP_CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def distance() -> PerceptualDistance:
    return load_distance("random-features")


def noise(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_clip_folder_embeds_pictures_and_texts_as_unit_vectors_of_one_space(clip_folder: Path) -> None:
    embedder = load_embedder(f"local-dir:{clip_folder}", batch_size=2)
    assert isinstance(embedder, ImageEmbedder)
    images = embedder.embed_images([noise(0), noise(1, (96, 32)), noise(2)])
    texts = embedder.embed_texts(["a red star", "a blue ring"])
    assert images.shape == (3, 64)
    assert texts.shape == (2, 64)
    for vectors in (images, texts):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-5)


def test_a_clip_names_the_words_that_its_vocabulary_lacks(clip_folder: Path) -> None:
    embedder = load_embedder(f"local-dir:{clip_folder}")
    assert embedder.unknown_words("a big Red unicorn") == ["unicorn"]
    embedder.tokenizer = open_clip.get_tokenizer("ViT-B-32")  # spells any word from pieces
    assert embedder.unknown_words("a big Red unicorn") == []


def test_a_picture_has_the_same_embedding_in_any_batch(clip_folder: Path) -> None:
    embedder = load_embedder(f"local-dir:{clip_folder}", batch_size=2)
    together = embedder.embed_images([noise(0), noise(1), noise(2)])
    alone = embedder.embed_images([noise(2)])
    assert torch.allclose(together[2], alone[0], atol=1e-5)


def test_loading_clip_leaves_the_callers_random_numbers_alone(clip_folder: Path) -> None:
    before = torch.random.get_rng_state()
    load_embedder(f"local-dir:{clip_folder}")
    load_distance("random-features")
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_to_embed_is_refused(clip_folder: Path) -> None:
    with pytest.raises(FluxSaeError, match="empty"):
        load_embedder(f"local-dir:{clip_folder}").embed_texts([])


@pytest.mark.parametrize("name", ["ViT-B-32", "local-dir:/no/such/folder", "", "no-such-model/openai"])
def test_an_unknown_clip_is_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(FluxSaeError, match='give "miniature"'):
        load_embedder(name)


def test_equal_pictures_have_distance_zero_and_different_ones_more(distance: PerceptualDistance) -> None:
    same, other = distance.distance([noise(0), noise(0)], [noise(0), noise(1)]).tolist()
    assert same == 0.0
    assert other > 0.01


def test_a_distance_is_the_mean_of_its_map_and_the_map_knows_where(distance: PerceptualDistance) -> None:
    first = noise(0)
    second = first.copy()
    second.paste(Image.new("RGB", (32, 64), (255, 0, 0)), (0, 0))
    where = distance.distance_map([first], [second])
    assert where.shape == (1, 64, 64)
    assert where[0].mean().item() == pytest.approx(distance.distance([first], [second]).item(), abs=1e-6)
    assert where[0, :, :24].mean() > 2 * where[0, :, 56:].mean()


def test_the_random_feature_distance_is_the_same_in_every_process_and_is_not_called_lpips() -> None:
    torch.rand(7)
    first, second = LpipsDistance(random_features=True), LpipsDistance(random_features=True)
    pair = ([noise(0)], [noise(1)])
    assert first.distance(*pair).item() == second.distance(*pair).item()
    assert "lpips" not in first.name.lower()


def test_pictures_of_several_sizes_are_refused(distance: PerceptualDistance) -> None:
    with pytest.raises(FluxSaeError, match="one size"):
        distance.distance([noise(0)], [noise(0, (64, 96))])
    with pytest.raises(FluxSaeError, match="equally long"):
        distance.distance([noise(0)], [])


def test_small_pictures_have_a_distance_too(distance: PerceptualDistance) -> None:
    assert distance.distance([noise(0, (32, 24))], [noise(1, (32, 24))]).item() > 0


def test_an_unknown_distance_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="random-features"):
        load_distance("ssim")
