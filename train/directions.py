"""Computes the geometry of a run's decoder directions: neighbours, a map, alignment, norms; and draws the map.

python -m train.directions --run RUN
"""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from jaxtyping import Float

from fluxsae.artifacts import RunFolder
from fluxsae.cards import CardIndex
from fluxsae.directions import draw_map, encoder_decoder_alignment, feature_map, nearest_features
from fluxsae.errors import FluxSaeError
from fluxsae.heatmaps import feature_colour
from fluxsae.hookpoints import HookPoint
from fluxsae.sae import SparseAutoencoder


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which hook points, and how the map is made."""

    run: Path
    """Run folder with trained SAEs."""
    hookpoint: str | None = None
    """One hook point; all of the run's without it."""
    n_neighbours: int = 16
    """Nearest features kept a feature."""
    perplexity: float = 30.0
    """Of the t-SNE map: roughly how many neighbours of a feature should stay near it."""
    seed: int = 0
    """Seed of the map; the same seed gives the same map."""


def main(config: Config) -> None:
    """Writes directions/<hookpoint>.safetensors and, where features were analysed, the map as a sheet."""
    run = RunFolder(config.run)
    hookpoints = run.hookpoints() if config.hookpoint is None else [run.check_hookpoint(config.hookpoint)]
    missing = [str(hookpoint) for hookpoint in hookpoints if not run.has_sae(hookpoint)]
    if missing:
        raise FluxSaeError(f"there is no SAE of {', '.join(missing)} in {run.path}; run train.fit first")
    for hookpoint in hookpoints:
        _write_directions(run, hookpoint, config)


def _write_directions(run: RunFolder, hookpoint: HookPoint, config: Config) -> None:
    sae = SparseAutoencoder.from_pretrained(run.path, subfolder=run.sae_subfolder(hookpoint))
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    near = nearest_features(W_dec, n=min(config.n_neighbours, len(W_dec) - 1))
    alignment = encoder_decoder_alignment(W_enc, W_dec)
    tensors = {
        "neighbours": near.indices.to(torch.int32),
        "similarities": near.cosines,
        "positions": torch.from_numpy(feature_map(W_dec, perplexity=config.perplexity, seed=config.seed)),
        "alignment": alignment,
        "encoder_norms": W_enc.norm(dim=1),
        "decoder_norms": W_dec.norm(dim=1),
    }
    run.save_directions(hookpoint, tensors)
    print(
        f"{hookpoint}: {len(W_dec)} directions, median nearest cosine {near.cosines[:, 0].median():.3f}, "
        f"median encoder-decoder alignment {alignment.median():.3f}, in {run.directions_path(hookpoint)}"
    )
    if run.features_path(hookpoint).is_file() and run.images_path.is_file():
        _draw(run, hookpoint, tensors["positions"].numpy())


def _draw(run: RunFolder, hookpoint: HookPoint, positions: Float[np.ndarray, "features 2"]) -> None:
    index = CardIndex(run, hookpoint)
    picture = draw_map(
        positions,
        index.labels,
        is_alive=[maximum > 0 for maximum in index.features.column("max_act")],
        title=f"Decoder directions of {hookpoint}",
        colours=[feature_colour(feature) for feature in range(len(index))],
    )
    png = io.BytesIO()
    picture.save(png, format="PNG", optimize=True)
    run.save_sheet(hookpoint, "directions", png.getvalue())


if __name__ == "__main__":
    main(tyro.cli(Config))
