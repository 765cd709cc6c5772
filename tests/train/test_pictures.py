"""Runs made from pictures: every stage from collecting to contact sheets, with captions and without."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsae.activations.collection import build_manifests, build_request, capture_rows, collect
from fluxsae.activations.shards import ShardFolder
from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.features.scores import ScoreMatrix
from fluxsae.flux import FluxPipeline, read_picture
from fluxsae.miniature.scenes import caption_scene, render_scene, sample_scene
from fluxsae.pictures import fit_picture
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from train import collect as collecting
from train import score as scoring
from train.pipeline import PipelineConfig, main
from train.prompts import BUNDLED_PROMPTS

OPTIONS = (
    "collect.images=12", "collect.images_per_shard=5", "collect.batch_size=4", "fit.epochs=2", "fit.batch_size=64",
    "fit.n_features=16", "fit.k=4", "score.images=8", "score.images_per_part=4", "score.batch_size=3",
    "analyze.features.n_top_images=3", "render.n_features=1", "render.columns=2", "score.n_top=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 drawn scenes of several sizes with captions beside them, and some that cannot be read."""
    folder, rng = tmp_path_factory.mktemp("sources") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(50):
        scene = sample_scene(rng)
        image = Image.fromarray(render_scene(scene))
        (image.resize((96, 64)) if i % 2 else image).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption_scene(scene, rng))
    (folder / "cut.png").write_bytes((folder / "000.png").read_bytes()[:200])
    (folder / "double.png").write_bytes((folder / "000.png").read_bytes())
    return folder


@pytest.fixture(scope="module")
def finished(photos: Path, tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    run = tmp_path_factory.mktemp("runs") / "run"
    config = PipelineConfig(
        flux=str(tiny_flux_folder), run=run, pictures=photos, hookpoints=("layer2",), steps=(1, 3),
        skip=("directions", "demos"),
        set=(*OPTIONS, "embed.model=miniature"),
    )  # fmt: skip
    assert {result.word for result in main(config)} == {"done"}
    return config


def run_of(config: PipelineConfig) -> RunFolder:
    assert config.run is not None
    return RunFolder(config.run)


def test_run_and_images_say_which_pictures_they_come_from(finished: PipelineConfig, photos: Path) -> None:
    info = json.loads(run_of(finished).info_path.read_text())
    assert info["source"] == "pictures"
    assert info["pictures"] == {
        "name": "photos", "pictures": 8, "with_caption": 8, "changed": info["pictures"]["changed"],
        "refused": {"broken or cut off": 1, "double": 1},
    }  # fmt: skip
    assert info["pictures"]["changed"]["scaled down"] == 8 > info["pictures"]["changed"]["cropped"] > 0
    assert info["splits"]["collect"]["by"] == "pictures"
    assert str(photos) not in json.dumps(info)
    images = run_of(finished).load_images()
    assert len(images) == 8
    for row in images:
        assert row.source is not None
        assert row.prompt == (photos / row.source).with_suffix(".txt").read_text()
        kept = np.asarray(row.picture(), dtype=float)
        original = fit_picture(Image.open(photos / row.source), height=32, width=32)
        assert np.abs(kept - np.asarray(original, dtype=float)).mean() < 12  # webp


def test_no_picture_is_in_two_splits(finished: PipelineConfig) -> None:
    config = collecting.CollectConfig(pictures=finished.pictures, images=12)
    settings = run_of(finished).load_info().settings
    collected = config.build_plan(12, purpose="collect", settings=settings, held_out_every=10)
    scored = config.build_plan(60, purpose="score", settings=settings)
    train = {key for i, key in enumerate(collected.keys) if i % 10 != 9}
    held_out = set(collected.keys[9::10])
    assert not train & held_out
    assert not set(scored.keys) & (train | held_out)
    assert len(set(scored.keys)) == len(scored) < 60  # none is scored twice, however many were asked for
    everything = config.build_plan(600, purpose="collect", settings=settings, held_out_every=10)
    assert len({k for i, k in enumerate(everything.keys) if i % 10 != 9}) == sum(
        i % 10 != 9 for i in range(len(everything))
    )


def test_the_rows_are_those_of_a_read(finished: PipelineConfig, tiny_flux: FluxPipeline) -> None:
    run = run_of(finished)
    config = collecting.CollectConfig(pictures=finished.pictures, images=12)
    plan = config.build_plan(12, purpose="collect", settings=run.load_info().settings, held_out_every=10)
    assert plan.pictures is not None
    read = read_picture(
        tiny_flux, [plan.pictures.picture(i) for i in range(4)], prompt=list(plan.prompts[:4]), hookpoints=["layer2"],
        steps=[1, 3], seeds=[plan.seed(i) for i in range(4)],
    )  # fmt: skip
    shards = ShardFolder(run.activations_folder("layer2"))
    image_id, tokens, _ = next(iter(shards.iter_images("all")))
    assert image_id == 0
    expected = torch.stack([read.get("layer2", step)[0] for step in (1, 3)]).to(torch.bfloat16)
    torch.testing.assert_close(tokens.reshape(expected.shape), expected, rtol=1e-2, atol=1e-2)


def test_scores_are_those_of_a_read(finished: PipelineConfig, tiny_flux: FluxPipeline, photos: Path) -> None:
    run = run_of(finished)
    sae = SparseAutoencoder.from_pretrained(run.sae_path("layer2"))
    row = run.load_images()[5]
    assert row.source is not None
    config = scoring.ScoreConfig(pictures=photos)
    plan = config.build_plan(8, purpose="score", settings=run.load_info().settings)
    assert plan.pictures is not None
    read = read_picture(
        tiny_flux, plan.pictures.picture(5), prompt=row.prompt, hookpoints=["layer2"], steps=[1, 3], seeds=row.seed
    )
    expected = torch.stack([sae.encode(read.get("layer2", step))[0].amax(0) for step in (1, 3)]).amax(0)
    kept = ScoreMatrix.load(run.scores_path("layer2")).stored()[5]
    torch.testing.assert_close(kept.float(), expected.detach().float(), rtol=2e-2, atol=2e-2)


def test_sheets_labels_and_cards_are_made_of_pictures(finished: PipelineConfig) -> None:
    run = run_of(finished)
    assert run.sheet_path("layer2", "features-01").is_file()
    index = CardIndex(run, "layer2")
    top = index[index.ranked[0]].top_images[0]
    assert top.source == run.load_images().sources[top.image_id]
    assert top.title == top.prompt != ""


def test_a_second_time_everything_is_skipped_and_another_folder_is_noticed(
    finished: PipelineConfig, photos: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in photos.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert {result.word for result in main(replace(finished, pictures=moved))} == {"skipped"}
    (moved / "000.txt").write_text("another caption")
    with pytest.raises(FluxSaeError, match=r"collect is complete at .* with other settings"):
        main(replace(finished, pictures=moved))


def bare(photos: Path, folder: Path) -> Path:
    """The same pictures without captions."""
    folder.mkdir()
    for file in sorted(photos.glob("0*.png")):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_pictures_without_captions_get_scores_coherence_and_cards_too(
    finished: PipelineConfig, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_of(finished).path, tmp_path / "run")
    config = replace(finished, run=tmp_path / "run", pictures=bare(photos, tmp_path / "bare"))
    main(replace(config, only=("score", "analyze", "embed", "select"), force=True))
    run = run_of(config)
    images = run.load_images()
    assert set(images.prompts) == {""}
    assert len(set(images.subjects)) == len(images) == 8
    coherence = run.load_features("layer2").column("coherence").astype(float)
    assert np.isfinite(coherence).any(), "images without a caption would all count as one"
    index = CardIndex(run, "layer2")
    top = index[index.ranked[0]].top_images[0]
    assert top.title == top.source


def test_what_is_scored_last_is_what_the_run_says(
    finished: PipelineConfig, tiny_flux_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_of(finished).path, tmp_path / "run")
    options = {"flux": str(tiny_flux_folder), "images": 3, "images_per_part": 4, "force": True}
    scoring.main(scoring.ScoreConfig(run=tmp_path / "run", prompts=BUNDLED_PROMPTS, **options))
    info = RunFolder(tmp_path / "run").load_info()
    assert (info.source, info.pictures) == ("prompts", {})
    assert info.splits["collect"]["by"] == "pictures"
    assert info.splits["score"] == {"by": "prompts", "shared": False, "score": 3}
    assert set(RunFolder(tmp_path / "run").load_images().sources) == {None}


class Stopped(Exception):
    """Stands for a process that is killed."""


def test_a_stopped_collection_goes_on_and_ends_with_the_same_bytes(
    finished: PipelineConfig, photos: Path, tiny_flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = collecting.CollectConfig(
        flux=str(tiny_flux_folder), run=tmp_path / "stopped", pictures=photos, hookpoints=("layer2",), steps=(1, 3),
        images=12, images_per_shard=5, batch_size=4,
    )  # fmt: skip
    turns = itertools.count()

    def stop_at_fifth(*arguments: Any, **options: Any) -> Any:
        if next(turns) == 4:
            raise Stopped
        return read_picture(*arguments, **options)

    monkeypatch.setattr("fluxsae.activations.collection.read_picture", stop_at_fifth)
    with pytest.raises(Stopped):
        collecting.main(config)
    collecting.main(config)
    assert shards(config.run / "activations") == shards(run_of(finished).activations_path)


def test_ranks_read_a_share_of_the_pictures_each(
    finished: PipelineConfig, tiny_flux: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read = run_of(finished), list[int]()
    config = collecting.CollectConfig(pictures=finished.pictures)
    plan = config.build_plan(12, purpose="collect", settings=run.load_info().settings, held_out_every=10)
    request = build_request(tiny_flux, ["layer2"], [1], settings=run.load_info().settings, batch_size=4)
    manifests = build_manifests(tiny_flux, plan, request, images_per_shard=5)
    monkeypatch.setattr(
        "fluxsae.activations.collection.capture_rows",
        lambda pipe, plan, ids, request, **how: read.extend(ids) or capture_rows(pipe, plan, ids, request, **how),
    )
    for rank in (0, 1):
        folders = dict.fromkeys(manifests, tmp_path / "shards")
        collect(tiny_flux, plan, request, folders=folders, manifests=manifests, rank=rank, world_size=2)
    assert read == [0, 1, 2, 3, 4, 10, 11, 5, 6, 7, 8, 9]
    assert len(ShardFolder(tmp_path / "shards").manifest.steps) == 1


def shards(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
