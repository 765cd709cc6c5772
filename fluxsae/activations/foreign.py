"""Activations that other scripts wrote as `.npy`: a row a token, image after image, all steps of an image in a row."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fluxsae.activations.shards import ActivationManifest, ShardWriter
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings

_HELD_OUT_EVERY = 10


def adopt_rows(
    path: str | Path,
    folder: str | Path,
    *,
    hookpoint: HookPoint,
    flux_id: str,
    settings: GenerationSettings,
    sigmas: Mapping[int, float],
    n_tokens: int,
    digest: str,
    images_per_shard: int = 8,
) -> int:
    """Writes the rows of a `.npy` file as a folder of shards; how many images they are.

    `sigmas` holds the noise level of each step that the file has of an image, in its order; at each there are
    `n_tokens` rows.

    Raises:
        FluxSaeError: no plain table of numbers, or rows that are no whole number of such images.
    """
    rows = _table(Path(path))
    n_images, rest = divmod(len(rows), len(sigmas) * n_tokens)
    if rest or not n_images:
        raise FluxSaeError(
            f"{path} has {len(rows)} rows, which are no whole number of images of {len(sigmas)} steps and {n_tokens} "
            "tokens. Check --steps (all that the file holds), --height and --width."
        )
    manifest = ActivationManifest(
        hookpoint=str(hookpoint), d_model=rows.shape[1], flux_id=flux_id, flux_revision=None, settings=settings,
        steps=tuple(sigmas), sigmas=tuple(sigmas.values()), n_tokens=n_tokens, tokens_per_image=n_tokens,
        n_images=n_images, images_per_shard=images_per_shard, prompts_hash=digest, seed=0,
        held_out_every=0 if n_images == 1 else min(_HELD_OUT_EVERY, n_images),
    )  # fmt: skip
    images = rows.reshape(n_images, len(sigmas), n_tokens, rows.shape[1])
    writer = ShardWriter(folder, manifest)
    for shard in writer.missing():
        ids = manifest.image_ids(shard)
        tokens = torch.from_numpy(np.array(images[ids.start : ids.stop], dtype=np.float32))
        if not bool(torch.isfinite(tokens).all()):
            raise FluxSaeError(f"{path} holds NaN or infinite numbers in images {ids.start} to {ids.stop - 1}.")
        index = torch.arange(n_tokens, dtype=torch.int32).expand(tokens.shape[:3]).contiguous()
        writer.write(shard, tokens.to(torch.bfloat16), index)
    return n_images


def _table(path: Path) -> np.ndarray:
    """The file as a memory map; never a pickled object."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise FluxSaeError(f"{path} is no .npy file of plain numbers ({error}).") from error
    if rows.ndim != 2 or not np.issubdtype(rows.dtype, np.floating):
        raise FluxSaeError(f"{path} holds {rows.dtype} of shape {rows.shape}; it must be floats, (rows, d_model).")
    return rows
