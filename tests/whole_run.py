"""A run folder with every kind of file, small and consistent, built without FLUX."""

import io
import json
from dataclasses import replace
from pathlib import Path

import synthetic_run
import torch
from PIL import Image

from fluxsae.features.scores import ScoreAccumulator, merge_score_files
from fluxsae.files import save_tensors, write_bytes
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import encode_webp
from fluxsae.sae.acts import SparseActs
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder

EARLY, LATE = "transformer_blocks.1.ff", synthetic_run.HOOKPOINT
D_MODEL, N_FEATURES = 16, len(synthetic_run.FEATURES)


def build(path: Path, *, flux_id: str = "miniature", n_images: int = 40) -> RunFolder:
    """The run; both hook points hold the same features, their SAEs differ."""
    synthetic = synthetic_run.build(path, n_images=n_images)
    run = synthetic.run
    run.save_info(replace(run.load_info(), flux_id=flux_id, hookpoints=(EARLY, LATE), prompts_hash="ab" * 32))
    run.save_features(EARLY, run.load_features(LATE))
    write_bytes(run.heatmaps_path(EARLY), run.heatmaps_path(LATE).read_bytes())
    for seed, hookpoint in enumerate((EARLY, LATE)):
        _write_sae(run, hookpoint, seed)
        _write_scores(run, hookpoint, synthetic)
        _write_directions(run, hookpoint)
        _write_pictures(run, hookpoint)
        metrics = {"fvu": {"value": 0.0625, "low": 0.05, "high": 0.075}, "l0": 7.5, "steps": [1, 2]}
        concepts = {"ratio": {"SAE feature": {"value": 0.9375, "low": None, "high": None}}, "matches": {"3": "red"}}
        run.save_metrics(hookpoint, metrics | {"dead_share": 0.03125, "concepts": concepts, "splice_error": None})
    run.save_index(run.load_info().hookpoints)
    return run


def build_sae(run: RunFolder, hookpoint: str, seed: int) -> SparseAutoencoder:
    """A random SAE that says that it was trained on this run's ground."""
    info = run.load_info()
    trained_on = TrainedOn(
        flux_id=info.flux_id,
        hookpoint=hookpoint,
        steps=info.steps,
        sigmas=info.sigmas,
        height=info.settings.height,
        width=info.settings.width,
        guidance_scale=info.settings.guidance_scale,
        n_tokens=info.rows * info.cols,
        dataset_hash="cd" * 32,
    )
    config = SaeConfig(architecture="topk", d_model=D_MODEL, n_features=N_FEATURES, k=4, trained_on=trained_on)
    return SparseAutoencoder(config, seed=seed)


def _write_sae(run: RunFolder, hookpoint: str, seed: int) -> None:
    build_sae(run, hookpoint, seed).save_pretrained(run.sae_path(hookpoint))


def _write_scores(run: RunFolder, hookpoint: str, synthetic: synthetic_run.Synthetic) -> None:
    info = run.load_info()
    acts = SparseActs.from_dense(synthetic.acts.transpose(1, 2).contiguous())
    image_ids = list(range(len(synthetic.acts)))
    accumulator = ScoreAccumulator(N_FEATURES, grid=synthetic_run.GRID, steps=info.steps)
    for step in info.steps:
        accumulator.update(image_ids, acts, step=step)
    part = run.work_path("score") / "part.safetensors"
    save_tensors(part, {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens()})
    merge_score_files(run.scores_path(hookpoint), [part], steps=info.steps, grid=synthetic_run.GRID)
    part.unlink()
    accumulator.stats().save(run.stats_path(hookpoint))


def _write_directions(run: RunFolder, hookpoint: str) -> None:
    generator = torch.Generator().manual_seed(0)
    neighbours = torch.stack([(torch.arange(N_FEATURES) + shift) % N_FEATURES for shift in (1, 2)], dim=1)
    run.save_directions(
        hookpoint,
        {
            "neighbours": neighbours.to(torch.int32),
            "similarities": torch.rand(N_FEATURES, 2, generator=generator),
            "positions": torch.randn(N_FEATURES, 2, generator=generator),
        },
    )


def _write_pictures(run: RunFolder, hookpoint: str) -> None:
    picture = run.load_images().picture(0)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    run.save_sheet(hookpoint, "features", buffer.getvalue())
    write_bytes(run.demo_image_path(hookpoint, "demo-3"), encode_webp(picture, longest_side=64))
    run.save_demos(hookpoint, [json.dumps({"feature": 3, "image": "demo-3", "score": {"score": 0.1}})])


def bad_picture() -> bytes:
    """The first half of a PNG."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]
