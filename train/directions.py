"""Computes the geometry of a run's decoder directions: neighbours, a map, alignment, norms; and draws the map.

SAEs that were scored are also compared, each with the next (see train.compare_layers).

python -m train.directions --run runs/miniature
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxsae.errors import FluxSaeError
from train import compare_layers
from train.command import start
from train.compare_layers import CompareLayersConfig
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from jaxtyping import Float

    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class DirectionsConfig:
    """Which hook points, and how the map is made."""

    run: Path = Path("runs/miniature")
    """Run folder with trained SAEs."""
    n_neighbours: int = 16
    """Nearest features kept a feature."""
    perplexity: float = 30.0
    """Of the t-SNE map: roughly how many neighbours of a feature should stay near it."""
    seed: int = 0
    """Seed of the map; the same seed gives the same map."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: DirectionsConfig) -> StageResult:
    """Writes neighbours, map and norms and, where features were analysed, the map as a sheet, and the comparisons."""
    from fluxsae.runs.folder import RunFolder

    run = RunFolder(config.run)
    names = [name for name in run.sae_names() if run.has_sae(name)]
    if not names:
        raise FluxSaeError(f"{run.path} has no trained SAE; run train.fit first")
    own = {"n_neighbours": config.n_neighbours, "perplexity": config.perplexity, "seed": config.seed}
    return run_stage(
        run,
        "directions",
        dict.fromkeys(map(str, names), own),
        lambda todo: _write_all(run, todo, config),
        outputs=lambda asked: [run.directions_path(name) for name in asked],
        force=config.force,
        by_name=True,
    )


def _write_all(run: RunFolder, names: Sequence[str], config: DirectionsConfig) -> None:
    for name in names:
        _write_directions(run, name, config)
    described = [h for h in run.sae_names() if run.features_path(h).is_file() and run.scores_path(h).is_file()]
    for first, second in pairwise(described):
        if not {str(first), str(second)} & {*names}:
            continue
        try:
            compare_layers.main(CompareLayersConfig(run=run.path, first=str(first), second=str(second)))
        except FluxSaeError as error:  # too few images fire: a map without a comparison is still a map
            print(f"{first} and {second} were not compared: {error}")


def _write_directions(run: RunFolder, hookpoint: str, config: DirectionsConfig) -> None:
    import torch

    from fluxsae.features.directions import (
        encoder_decoder_alignment,
        feature_map,
        map_neighbours,
        nearest_features,
    )
    from fluxsae.sae.model import SparseAutoencoder

    sae = SparseAutoencoder.from_pretrained(run.path, subfolder=run.sae_subfolder(hookpoint))
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    n_kept = min(config.n_neighbours, len(W_dec) - 1)
    near = nearest_features(W_dec, n=max(n_kept, map_neighbours(len(W_dec), perplexity=config.perplexity)))
    positions = feature_map(W_dec, perplexity=config.perplexity, seed=config.seed, near=near)
    alignment = encoder_decoder_alignment(W_enc, W_dec)
    tensors = {
        "neighbours": near.indices[:, :n_kept].to(torch.int32),
        "similarities": near.cosines[:, :n_kept].contiguous(),
        "positions": torch.from_numpy(positions),
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
        _draw(run, hookpoint, positions)


def _draw(run: RunFolder, hookpoint: str, positions: Float[np.ndarray, "features 2"]) -> None:
    from fluxsae.features.cards import CardIndex
    from fluxsae.features.directions import draw_map

    index = CardIndex(run, hookpoint)
    picture = draw_map(
        positions,
        index.labels,
        is_alive=[maximum > 0 for maximum in index.features.column("max_act")],
        title=f"Decoder directions of {hookpoint}",
    )
    png = io.BytesIO()
    picture.save(png, format="PNG", optimize=True)
    run.save_sheet(hookpoint, "directions", png.getvalue())


if __name__ == "__main__":
    start(main, DirectionsConfig, __doc__)
