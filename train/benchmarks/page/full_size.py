"""A run of FLUX.1-dev's size without FLUX.1-dev: random numbers in files of the true shapes, and a FLUX that is slow.

Its transformer is narrow, with as many tokens as FLUX.1-dev has at 1024 px, so that attention takes a CPU its time.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from fluxsae.features.analysis import feature_class
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.layers import LayerComparison
from fluxsae.files import save_tensors
from fluxsae.flux import flux_identity, load_flux, schedule_sigmas, token_grid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.perceptual import load_embedder
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import HEATMAPS_SCHEMA, Embeddings, FeatureTable, ImageRow, encode_webp
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from train.benchmarks.gpu.models import TINY, build_pipeline

WORDS = ("red", "blue", "green", "striped", "round", "old", "wooden", "bright", "fox", "boat", "house", "tree", "snow")
"""What prompts are made of, and what features are called by."""
THUMBNAILS = 64
"""Different pictures; each stands for many images."""
TOP = 16
ENTRIES = 60
"""Patches on which a feature fires in one of its top images."""


def build_flux(folder: Path, settings: GenerationSettings) -> None:
    """A pipeline of random weights whose token grid at `settings` is that of FLUX.1-dev."""
    channels = (4, 4, 4, 4)
    vae = TINY.vae | {"block_out_channels": channels}
    scale = replace(TINY, vae=vae, settings=settings)
    pipe = build_pipeline(scale, device=torch.device("cpu"), dtype=torch.float32, words=("a", *WORDS))
    pipe.save_pretrained(folder)


def build_run(
    folder: Path, flux: Path, settings: GenerationSettings, *, n_images: int, n_features: int, seed: int = 0
) -> None:
    """Every file that the page reads."""
    rng = np.random.default_rng(seed)
    pipe = load_flux(str(flux))
    grid, sigmas, identity = token_grid(pipe, settings), schedule_sigmas(pipe, settings), flux_identity(pipe)
    run, steps = RunFolder(folder), (settings.num_inference_steps // 2,)
    hookpoints = ("transformer_blocks.0.ff", "transformer_blocks.1.ff")
    info = RunInfo(
        flux_id=identity.flux_id,
        flux_revision=identity.revision,
        flux_weights=identity.weights,
        adapters=identity.adapters,
        settings=settings,
        hookpoints=hookpoints,
        steps=steps,
        sigmas=tuple(sigmas[step] for step in steps),
        rows=grid.rows,
        cols=grid.cols,
        dtype="float32",
    )
    run.save_info(info)
    run.save_images(_images(rng, n_images))
    width = load_embedder("miniature").embed_texts(["a"]).shape[1]
    vectors = rng.standard_normal((n_images, width)).astype(np.float32)
    run.save_embeddings(Embeddings(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), "miniature"))
    for number, name in enumerate(hookpoints):
        trained_on = TrainedOn(
            flux_id=info.flux_id,
            flux_revision=info.flux_revision,
            flux_weights=info.flux_weights,
            adapters=info.adapters,
            hookpoint=name,
            steps=info.steps,
            sigmas=info.sigmas,
            height=settings.height,
            width=settings.width,
            guidance_scale=settings.guidance_scale,
            n_tokens=grid.n_tokens,
            dataset_hash="ab" * 32,
        )
        config = SaeConfig(
            architecture="topk", d_model=TINY.d_model, n_features=n_features, k=16, trained_on=trained_on
        )
        sae = SparseAutoencoder(config, seed=number)
        sae.reference_acts.fill_(1.0)
        sae.save_pretrained(run.sae_path(name))
        _write_features(run, name, rng, n_images=n_images, n_features=n_features, steps=steps)
        _write_heatmaps(run, name, rng, n_tokens=grid.n_tokens)
        _write_directions(run, name, rng, n_features=n_features)
    run.save_comparison(hookpoints[0], hookpoints[1], _comparison(rng, n_features).tensors())
    run.save_index(hookpoints)


def _images(rng: np.random.Generator, n_images: int) -> Iterator[ImageRow]:
    colours = rng.integers(0, 256, (THUMBNAILS, 6, 6, 3), dtype=np.uint8)
    small = [Image.fromarray(each).resize((384, 384), Image.Resampling.BICUBIC) for each in colours]
    webps = [encode_webp(each, longest_side=384) for each in small]
    for image in range(n_images):
        said = " ".join(rng.choice(WORDS, size=4, replace=False).tolist())
        yield ImageRow(image, f"a {said}, number {image}", image, webps[image % THUMBNAILS])


def _write_features(
    run: RunFolder, name: str, rng: np.random.Generator, *, n_images: int, n_features: int, steps: tuple[int, ...]
) -> None:
    density = 10 ** rng.uniform(-5, -0.5, n_features)
    density[rng.random(n_features) < 0.05] = 0.0  # dead
    alive, max_act = density > 0, np.where(density > 0, rng.uniform(1, 20, n_features), 0.0)
    top = rng.integers(0, n_images, (n_features, TOP)).tolist()
    labelled = alive & (rng.random(n_features) < 0.4)
    labels = rng.choice(WORDS, n_features)
    levels = np.linspace(1.0, 0.5, TOP)
    columns = {
        "feature": np.arange(n_features),
        "feature_class": [feature_class(float(each), AnalysisConfig()) for each in density],
        "density": density,
        "image_density": np.minimum(1.0, density * 20),
        "mean_act": max_act / 4,
        "max_act": max_act,
        "quantiles": [[0.1, 0.5]] * n_features,
        "spatial_spread": rng.random(n_features),
        "step_profile": [[0.1] * len(steps)] * n_features,
        "histogram": rng.integers(0, 1000, (n_features, 40)).tolist(),
        "top_images": [one if lives else [] for one, lives in zip(top, alive, strict=True)],
        "top_scores": [(levels * one).tolist() if one else [] for one in max_act],
        "top_tokens": [[0] * TOP if lives else [] for lives in alive],
        "neighbours": rng.integers(0, n_features, (n_features, 8)).tolist(),
        "neighbour_similarities": rng.random((n_features, 8)).tolist(),
        "family": np.full(n_features, -1),
        "coherence": np.where(alive, rng.random(n_features), np.nan),
        "p_value": rng.random(n_features),
        "q_value": rng.random(n_features),
        "is_coherent": (rng.random(n_features) < 0.2).tolist(),
        "label": [str(label) if named else None for label, named in zip(labels, labelled, strict=True)],
        "label_confidence": [float(rng.random()) if named else None for named in labelled],
        "caption_words": [rng.choice(WORDS, 5).tolist() for _ in range(n_features)],
        "silent_images": rng.integers(0, n_images, (n_features, 4)).tolist(),
    }
    edges = np.geomspace(1e-3, 1e3, 41).tolist()
    metadata = {"steps": str(list(steps)), "quantile_levels": "[0.5, 0.9]", "histogram_edges": str(edges)}
    table = pa.table({key: pa.array(values) for key, values in columns.items()})
    run.save_features(name, FeatureTable(table.replace_schema_metadata(metadata)))


def _write_heatmaps(run: RunFolder, name: str, rng: np.random.Generator, *, n_tokens: int) -> None:
    table = run.load_features(name)
    alive = np.flatnonzero(table.column("max_act") > 0)
    n_maps = len(alive) * TOP
    tensors = {
        "features": torch.from_numpy(alive.astype(np.int32)),
        "image_ids": torch.tensor([table[int(feature)].top_images for feature in alive], dtype=torch.int32),
        "scale": torch.from_numpy(table.column("max_act")[alive].astype(np.float32)),
        "starts": torch.arange(n_maps + 1, dtype=torch.int64) * ENTRIES,
        "steps": torch.from_numpy(rng.integers(1, max(2, n_tokens // ENTRIES), n_maps * ENTRIES).astype(np.uint8)),
        "levels": torch.from_numpy(rng.integers(1, 256, n_maps * ENTRIES).astype(np.uint8)),
    }
    info = run.load_info()
    metadata = {"rows": str(info.rows), "cols": str(info.cols), "schema_version": str(HEATMAPS_SCHEMA)}
    save_tensors(run.heatmaps_path(name), tensors, metadata=metadata)


def _write_directions(run: RunFolder, name: str, rng: np.random.Generator, *, n_features: int) -> None:
    run.save_directions(
        name,
        {
            "neighbours": torch.from_numpy(rng.integers(0, n_features, (n_features, 32)).astype(np.int32)),
            "similarities": torch.from_numpy(np.sort(rng.random((n_features, 32)).astype(np.float32))[:, ::-1].copy()),
            "positions": torch.from_numpy(rng.standard_normal((n_features, 2)).astype(np.float32)),
            "alignment": torch.from_numpy(rng.random(n_features).astype(np.float32)),
        },
    )


def _comparison(rng: np.random.Generator, n_features: int) -> LayerComparison:
    order = np.argsort(-rng.random(n_features)).astype(np.int32)
    correlations = np.sort(rng.random(n_features).astype(np.float32))[::-1].copy()
    return LayerComparison(
        pairs=np.stack([np.arange(n_features, dtype=np.int32), order], axis=1),
        correlations=correlations,
        only_first=np.arange(0, n_features, 3, dtype=np.int32),
        only_second=np.arange(0, n_features, 4, dtype=np.int32),
        best_first=rng.random(n_features).astype(np.float32),
        best_second=rng.random(n_features).astype(np.float32),
        null_correlation=0.05,
    )
