"""CLIP embeddings and perceptual distances behind two small protocols: no caller knows which model is inside."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import einops
import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from fluxsae.errors import FluxSaeError
from fluxsae.flux.requests import words_outside
from fluxsae.miniature import miniature_path


@runtime_checkable
class ImageEmbedder(Protocol):
    """Pictures and texts as unit vectors of one space, in fp32 on the CPU."""

    name: str

    def embed_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """One unit vector an image."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit vector a text."""
        ...

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that the model has no meaning for; empty where it spells any word from pieces."""
        ...


@runtime_checkable
class PerceptualDistance(Protocol):
    """How different two pictures look: 0 for equal pictures, in units of the named measure."""

    name: str

    def distance(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Float[Tensor, " pairs"]:
        """The distance of each pair."""
        ...

    def distance_map(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image]
    ) -> Float[Tensor, "pairs height width"]:
        """The distance of each pair at every pixel; its mean over a region is the distance inside that region."""
        ...


class OpenClipEmbedder:
    """CLIP by the open_clip package (Radford et al. 2021, arXiv 2103.00020)."""

    def __init__(
        self, name: str, *, model: str, pretrained: str | None, device: str = "cpu", batch_size: int = 32
    ) -> None:
        import open_clip

        self.name = name
        self.batch_size = batch_size
        self.device = device
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn before the real ones are loaded
            self.model, _, self.preprocess = open_clip.create_model_and_transforms(model, pretrained, device=device)
        self.tokenizer = open_clip.get_tokenizer(model)
        self.model.eval()

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Float[Tensor, "images width"]:
        """One unit vector an image."""
        return self._in_batches(images, self._encode_images)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """One unit vector a text; longer texts are cut where the model's context ends."""
        return self._in_batches(texts, self._encode_texts)

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that a word-level vocabulary (the miniature's) lacks; empty for pieces of words."""
        return words_outside(getattr(self.tokenizer, "tokenizer", None), text)

    def _encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([self.preprocess(image.convert("RGB")) for image in images]).to(self.device)
        encoded: Tensor = self.model.encode_image(pixels)
        return encoded

    def _encode_texts(self, texts: Sequence[str]) -> Tensor:
        encoded: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self.device))
        return encoded

    def _in_batches(self, items: Sequence[Any], encode: Any) -> Float[Tensor, "items width"]:
        if not items:
            raise FluxSaeError("nothing to embed: the list is empty; give at least one image or text")
        batches = [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return torch.cat([normalize(encode(batch).float(), dim=-1).cpu() for batch in batches])


class LpipsDistance:
    """LPIPS: weighted squared differences of unit-normalised features, summed over layers.

    Zhang et al. 2018, arXiv 1801.03924.

    With `random_features` the same formula on an untrained network: a random-feature distance, which is not LPIPS.
    """

    def __init__(self, *, random_features: bool, device: str = "cpu", seed: int = 0) -> None:
        import lpips

        self.name = "random-feature distance" if random_features else "LPIPS (AlexNet)"
        self.device = device
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision by its old arguments
            torch.manual_seed(seed)
            self.model = lpips.LPIPS(
                net="alex", spatial=True, pnet_rand=random_features, lpips=not random_features, verbose=False
            ).to(device)
        self.model.eval().requires_grad_(False)

    def distance(self, first: Sequence[Image.Image], second: Sequence[Image.Image]) -> Float[Tensor, " pairs"]:
        """The distance of each pair: the mean of its map."""
        return einops.reduce(self.distance_map(first, second), "pairs height width -> pairs", "mean")

    @torch.inference_mode()
    def distance_map(
        self, first: Sequence[Image.Image], second: Sequence[Image.Image]
    ) -> Float[Tensor, "pairs height width"]:
        """The distance of each pair at every pixel.

        Raises:
            FluxSaeError: the lists differ in length or hold pictures of several sizes.
        """
        if len(first) != len(second) or len({image.size for image in (*first, *second)}) != 1:
            sizes = {image.size for image in (*first, *second)}
            raise FluxSaeError(
                f"{len(first)} and {len(second)} pictures of {len(sizes)} sizes were given; "
                "a distance needs two equally long lists of pictures of one size"
            )
        maps = [self._one_map(one, other) for one, other in zip(first, second, strict=True)]
        return torch.cat(maps).float().cpu()

    def _one_map(self, one: Image.Image, other: Image.Image) -> Float[Tensor, "1 height width"]:
        spatial: Tensor = self.model(self._pixels(one), self._pixels(other))
        return spatial[:, 0]

    def _pixels(self, image: Image.Image) -> Float[Tensor, "1 3 height width"]:
        array = np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1.0
        pixels = einops.rearrange(torch.from_numpy(array), "h w c -> 1 c h w").to(self.device)
        # AlexNet's strides leave nothing of pictures under 64 pixels
        return (
            pixels if min(image.size) >= 64 else interpolate(pixels, scale_factor=64 / min(image.size), mode="nearest")
        )


def load_embedder(name: str = "miniature", *, device: str = "cpu", batch_size: int = 32) -> ImageEmbedder:
    """CLIP by name: "miniature", "ViT-B-32/laion2b_s34b_b79k" (open_clip model/weights), "hf-hub:...", "local-dir:...".

    Raises:
        FluxSaeError: the name is none of these, or the model cannot be loaded.
    """
    model, pretrained = _open_clip_name(name)
    try:
        return OpenClipEmbedder(name, model=model, pretrained=pretrained, device=device, batch_size=batch_size)
    except (OSError, RuntimeError, ValueError) as error:
        raise FluxSaeError(f"the CLIP model {name!r} could not be loaded ({error}); {_REMEDY}") from error


_REMEDY = 'give "miniature" (no network), "ViT-B-32/laion2b_s34b_b79k", "hf-hub:org/model" or "local-dir:/path"'


def _open_clip_name(name: str) -> tuple[str, str | None]:
    if name == "miniature":
        return f"local-dir:{miniature_path('clip')}", None
    if name.startswith("local-dir:"):
        if not Path(name.removeprefix("local-dir:")).is_dir():
            raise FluxSaeError(f"the CLIP folder {name.removeprefix('local-dir:')!r} does not exist; {_REMEDY}")
        return name, None
    if name.startswith("hf-hub:"):
        return name, None
    model, _, pretrained = name.partition("/")
    if not model or not pretrained:
        raise FluxSaeError(f"the CLIP model {name!r} names no pretrained weights; {_REMEDY}")
    return model, pretrained


def load_distance(name: str = "lpips", *, device: str = "cpu") -> PerceptualDistance:
    """A distance by name: "lpips" (AlexNet, fetched on first use) or "random-features" (no download, and not LPIPS).

    Raises:
        FluxSaeError: an unknown name, or LPIPS's backbone is neither cached nor reachable.
    """
    if name not in ("lpips", "random-features"):
        raise FluxSaeError(f'the distance {name!r} is unknown; give "lpips" or "random-features"')
    try:
        return LpipsDistance(random_features=name == "random-features", device=device)
    except OSError as error:
        raise FluxSaeError(
            f"the AlexNet weights of LPIPS could not be fetched ({error}); connect once, "
            'or give "random-features", which needs no download and is not LPIPS'
        ) from error
