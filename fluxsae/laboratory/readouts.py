"""Ways to read numbers off tokens: an SAE's features, and the baselines that it is compared with."""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from fluxsae.features.scores import max_over_tokens
from fluxsae.sae.model import SparseAutoencoder


class SaeReadout:
    """An SAE's features; the pooled values are S, step by step.

    An SAE with a `sigma_table` needs the noise levels of the steps.
    """

    def __init__(
        self, sae: SparseAutoencoder, sigmas: Float[Tensor, " steps"] | None = None, *, name: str = "SAE feature"
    ) -> None:
        self.name = name
        self.sae = sae
        self._sigmas = sigmas
        self.n_candidates = sae.config.n_features

    @torch.no_grad()
    def pooled(self, x: Float[Tensor, "images steps tokens d"]) -> Float[Tensor, "images steps candidates"]:
        """S of each image at each step."""
        rows = rearrange(x, "images steps tokens d -> (images steps) tokens d")
        levels = None if self._sigmas is None else self._sigmas.repeat(len(x))[:, None]
        acts = self.sae.encode_sparse(rows, sigma=levels)
        scores, _ = max_over_tokens(acts)
        return rearrange(scores, "(images steps) candidates -> images steps candidates", images=len(x))

    @torch.no_grad()
    def maps(
        self, x: Float[Tensor, "images steps tokens d"], candidates: Sequence[int]
    ) -> Float[Tensor, "images chosen tokens"]:
        """Acts of some features on every token, the largest over the steps."""
        levels = None if self._sigmas is None else self._sigmas[:, None]
        acts = self.sae.encode_features(x, list(candidates), sigma=levels)
        return rearrange(acts.amax(1), "images tokens chosen -> images chosen tokens")


class LinearReadout:
    """Directions in the space of normalised activations: value = x~ . direction.

    With `both_signs` candidate n + i is minus direction i, so that a channel that falls is as good as one that rises.
    """

    def __init__(
        self,
        name: str,
        directions: Float[Tensor, "directions d"],
        *,
        sae: SparseAutoencoder,
        both_signs: bool = False,
    ) -> None:
        self.name = name
        self._sae = sae
        both = torch.cat([directions, -directions]) if both_signs else directions
        self.directions = both.to(sae.W_enc.device)
        self.n_candidates = len(self.directions)

    @torch.no_grad()
    def pooled(self, x: Float[Tensor, "images steps tokens d"]) -> Float[Tensor, "images steps candidates"]:
        """The largest projection over the tokens of each image and step; image by image, to bound the memory."""
        return torch.stack([(self._sae.normalise(image) @ self.directions.T).amax(1) for image in x])

    @torch.no_grad()
    def maps(
        self, x: Float[Tensor, "images steps tokens d"], candidates: Sequence[int]
    ) -> Float[Tensor, "images chosen tokens"]:
        """Projections of every token on some directions, the largest over the steps."""
        values = (self._sae.normalise(x) @ self.directions[list(candidates)].T).amax(1)
        return rearrange(values, "images tokens chosen -> images chosen tokens")


Readout = SaeReadout | LinearReadout
"""Candidates that each give every token a number; an image's number is the largest of its tokens'."""


def channels(sae: SparseAutoencoder) -> LinearReadout:
    """The raw channels of the activations, both signs."""
    return LinearReadout("raw channel", torch.eye(sae.config.d_model), sae=sae, both_signs=True)


def random_directions(sae: SparseAutoencoder, *, seed: int) -> LinearReadout:
    """As many random unit directions as the SAE has features."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(sae.config.n_features, sae.config.d_model, generator=generator)
    return LinearReadout("random direction", torch.nn.functional.normalize(directions, dim=1), sae=sae)


def principal_components(sae: SparseAutoencoder, x: Float[Tensor, "tokens d"]) -> LinearReadout:
    """All principal components of some tokens, both signs."""
    normalised = sae.normalise(x).double()
    centred = normalised - normalised.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return LinearReadout("PCA component", vectors.T.flip(0).float(), sae=sae, both_signs=True)
