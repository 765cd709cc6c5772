"""FLUX to token rows: the right tokens, once per image, the same bytes however often it was cut off."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bad_images import spoil_in
from test_mixing import MANIFEST

import train.benchmarks.collection
from fluxsae.activations.collection import (
    SEED_BLOCK,
    CaptureRequest,
    ImagePlan,
    build_manifests,
    build_request,
    capture_rows,
    collect,
    count_left_out,
    stream_shapes,
)
from fluxsae.activations.live import LiveImages, live_sources
from fluxsae.activations.mixing import DiskReader, mixing_buffer
from fluxsae.activations.shards import ShardFolder
from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, capture, default_settings, generate
from fluxsae.flux.hookpoints import HookPoint
from train.benchmarks.options import CollectionConfig

PLACES = ["layer1", "single_transformer_blocks.0", "transformer_blocks.0.ff_context"]
WORDS = ["red", "blue", "green", "pink", "cyan", "purple", "orange"]
PLAN = ImagePlan.build([f"a {word} star" for word in WORDS], seed=0, purpose="collect")


def request_of(pipe: FluxPipeline, **changes: Any) -> CaptureRequest:
    return build_request(pipe, PLACES, [1, 3], **{"batch_size": 2, "tokens_per_image": 5, **changes})


def folders_in(path: Path, request: CaptureRequest) -> dict[HookPoint, Path]:
    return {hookpoint: path / str(hookpoint) for hookpoint in request.hookpoints}


def collect_into(pipe: FluxPipeline, path: Path, **options: Any) -> dict[HookPoint, Path]:
    request = request_of(pipe)
    manifests = build_manifests(pipe, PLAN, request, images_per_shard=3, held_out_every=4)
    folders = folders_in(path, request)
    collect(pipe, PLAN, request, folders=folders, manifests=manifests, **options)
    return folders


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_rows_are_the_captured_tokens_at_their_index(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    for hookpoint, folder in collect_into(tiny_flux, tmp_path).items():
        for image_id, tokens, index in ShardFolder(folder).iter_images("all"):
            if image_id not in (0, 1):
                continue  # captured below in the same batch of two
            with capture(tiny_flux, [hookpoint], [1, 3]) as captured:
                generate(tiny_flux, list(PLAN.prompts[:2]), seeds=[PLAN.seed(0), PLAN.seed(1)], output_type="latent")
            for position, step in enumerate((1, 3)):
                whole = captured.get(hookpoint, step)[image_id].to(torch.bfloat16)
                assert torch.equal(tokens[position], whole[index[position].long()])
                assert index[position].tolist() == sorted(set(index[position].tolist()))


def test_the_text_stream_and_single_blocks_have_their_own_shapes(tiny_flux: FluxPipeline) -> None:
    shapes = stream_shapes(tiny_flux, request_of(tiny_flux))
    assert {str(h): shape for h, shape in shapes.items()} == {
        "transformer_blocks.1.ff": (16, 32),
        "transformer_blocks.0.ff_context": (8, 32),
        "single_transformer_blocks.0": (16, 32),
    }


def test_collection_stopped_after_any_shard_ends_with_the_same_bytes(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    collect_into(tiny_flux, tmp_path / "whole")

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Stopped

    for _ in range(3):
        try:
            collect_into(tiny_flux, tmp_path / "cut", on_images=stop)
        except Stopped:
            continue
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_two_processes_write_what_one_would(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    collect_into(tiny_flux, tmp_path / "one")
    for rank in (0, 1):
        collect_into(tiny_flux, tmp_path / "two", rank=rank, world_size=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_is_complete_is_not_generated_again(
    tiny_flux: FluxPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect_into(tiny_flux, tmp_path)
    monkeypatch.setattr("fluxsae.activations.collection.capture_rows", lambda *_: pytest.fail("generated again"))
    collect_into(tiny_flux, tmp_path)


def test_nothing_runs_after_the_last_wanted_block(tiny_flux: FluxPipeline) -> None:
    calls = []
    handle = tiny_flux.transformer.transformer_blocks[2].register_forward_hook(lambda *_: calls.append(1))
    try:
        request = build_request(tiny_flux, ["layer1"], [0, 1], batch_size=2)
        capture_rows(tiny_flux, PLAN, [0, 1], request)
    finally:
        handle.remove()
    assert len(calls) == 1  # step 0 ran through, step 1 ended in block 1


def test_seeds_of_collection_scoring_and_other_runs_never_collide() -> None:
    blocks = {
        ImagePlan.build(["a"], seed=seed, purpose=purpose).first_seed // SEED_BLOCK
        for seed in range(5)
        for purpose in ("collect", "score")
    }
    assert len(blocks) == 10
    with pytest.raises(FluxSaeError, match="allowed are 1 to"):
        ImagePlan.build(["a"] * (SEED_BLOCK + 1), seed=0, purpose="score")


def test_training_straight_from_flux_sees_the_rows_of_the_disk(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    folder = collect_into(tiny_flux, tmp_path)[HookPoint.parse("layer1")]
    from_disk = mixing_buffer(folder, batch_size=50)
    live = live_sources(tiny_flux, PLAN, request_of(tiny_flux), batch_size=50, images_per_shard=3, held_out_every=4)[
        HookPoint.parse("layer1")
    ]
    assert (live.n_batches, live.d_model, live.n_rows) == (from_disk.n_batches, from_disk.d_model, from_disk.n_rows)
    rows = [sorted(map(tuple, torch.cat(list(source.batches(0))).float().tolist())) for source in (from_disk, live)]
    assert torch.allclose(torch.tensor(rows[0]), torch.tensor(rows[1]), atol=0.02)  # other batches, so not bit by bit
    repeated, later = next(live.batches(1, cursor=0)), next(live.batches(1, cursor=0))
    assert torch.equal(repeated, later)
    assert not torch.equal(repeated, next(live.batches(0)))


def test_a_disk_too_small_for_all_hook_points_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifests = {
        HookPoint.parse(name): replace(MANIFEST, hookpoint=name)
        for name in ("transformer_blocks.1.ff", "transformer_blocks.2.ff")
    }
    request = CaptureRequest(tuple(manifests), MANIFEST.steps, MANIFEST.settings)
    room = SimpleNamespace(free=MANIFEST.bytes_on_disk * 3 // 2)
    monkeypatch.setattr("fluxsae.files.shutil.disk_usage", lambda _: room)
    with pytest.raises(FluxSaeError, match="GB are free"):
        collect(None, PLAN, request, folders=folders_in(tmp_path / "acts", request), manifests=manifests)
    assert not (tmp_path / "acts").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [4]}, "steps from 0 to 3"),
        ({"steps": []}, "steps from 0 to 3"),
        ({"hookpoints": []}, "at least one hook point"),
        ({"hookpoints": ["layer"]}, "names no hook point"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"tokens_per_image": 0}, "tokens_per_image is 0"),
    ],
)
def test_impossible_requests_are_refused(tiny_flux: FluxPipeline, changes: dict[str, Any], message: str) -> None:
    given = {"hookpoints": ["layer1"], "steps": [0], **changes}
    with pytest.raises(FluxSaeError, match=message):
        build_request(tiny_flux, given.pop("hookpoints"), given.pop("steps"), **given)


def test_a_hook_point_the_model_lacks_is_refused(tiny_flux: FluxPipeline) -> None:
    with pytest.raises(FluxSaeError, match=r"has no transformer_blocks\.15\.ff"):
        stream_shapes(tiny_flux, build_request(tiny_flux, ["layer15"], [0]))


def test_the_benchmark_counts_blocks_and_bytes(tiny_flux: FluxPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    config = CollectionConfig(step=1, n_images=2, repeats=1)
    speed = train.benchmarks.collection.main(config, pipe=tiny_flux)
    n_steps = default_settings(tiny_flux).num_inference_steps
    n_blocks = len(tiny_flux.transformer.transformer_blocks) + len(tiny_flux.transformer.single_transformer_blocks)
    assert speed.blocks_share == pytest.approx((n_blocks + 2) / (n_steps * n_blocks))
    assert speed.all_steps_bytes > speed.n_bytes > speed.all_steps_bytes / (2 * n_steps)
    assert "blocks run" in capsys.readouterr().out


@pytest.mark.bench
def test_early_exit_takes_about_the_share_of_blocks_that_it_runs(miniature: FluxPipeline) -> None:
    speed = train.benchmarks.collection.main(CollectionConfig(), pipe=miniature)
    assert speed.early_seconds / speed.denoised_seconds <= speed.blocks_share + 0.05


def test_collection_refuses_numbers_that_are_none_by_image_and_step(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    with (
        spoil_in(tiny_flux),
        pytest.raises(FluxSaeError, match=r"At step 1 of transformer_blocks.1.ff, .* image 1 hold NaN or infinite"),
    ):
        capture_rows(tiny_flux, PLAN, [0, 1], build_request(tiny_flux, ["layer1"], [1], batch_size=2))


def bad_images(tiny_flux: FluxPipeline) -> tuple[Any, ...]:
    plan = ImagePlan.build(["a red circle"] * 20, seed=0, purpose="collect")
    request = build_request(tiny_flux, ["layer1"], [1], batch_size=5)
    return plan, request, build_manifests(tiny_flux, plan, request, images_per_shard=10, held_out_every=10)


def test_collection_leaves_a_bad_image_out_and_counts_it(
    tiny_flux: FluxPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, request, manifests = bad_images(tiny_flux)
    folders = {request.hookpoints[0]: tmp_path}
    with spoil_in(tiny_flux, 2):  # image 11
        assert collect(tiny_flux, plan, request, folders=folders, manifests=manifests) == 1
    assert "image 11 of 20 is left out. At step 1 of transformer_blocks.1.ff" in caplog.text
    folder = ShardFolder(tmp_path)
    assert [shard.left_out for shard in folder.shards] == [(), (11,)]
    assert [image_id for image_id, *_ in folder.iter_images("train")] == [*range(9), 10, *range(12, 19)]
    assert DiskReader(folder).n_rows() == [9 * 16, 8 * 16]
    assert DiskReader(folder).rows([0, 1], torch.arange(17 * 16), epoch=0).any(dim=1).all()
    # The same command again finds it done, and still counts what is missing.
    assert collect(tiny_flux, plan, request, folders=folders, manifests=manifests) == 1
    assert count_left_out(plan, folders) == 1
    with pytest.raises(FluxSaeError, match="1 of 19 images would be left out"):
        count_left_out(plan.first(19), folders)


def test_collection_stops_when_too_many_images_are_bad(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    plan, request, manifests = bad_images(tiny_flux)
    with (
        spoil_in(tiny_flux),
        pytest.raises(FluxSaeError, match=r"2 of 20 images would be left out, too many to go on\. At step 1"),
    ):
        collect(tiny_flux, plan, request, folders={request.hookpoints[0]: tmp_path}, manifests=manifests)
    assert not any(shard.path.exists() for shard in ShardFolder(tmp_path).shards)


def test_a_live_source_puts_a_sound_image_in_the_place_of_a_bad_one(
    tiny_flux: FluxPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    plan, request, _ = bad_images(tiny_flux)
    with spoil_in(tiny_flux, 0, 1):  # the shapes are read off at step 0 of a generation that ends there
        images = LiveImages(tiny_flux, plan, request, images_per_shard=10, held_out_every=0)
        with pytest.raises(FluxSaeError, match="2 of 20 images would be left out"):
            images.take(request.hookpoints[0], 0, epoch=0)
    with spoil_in(tiny_flux, 1):
        images = LiveImages(tiny_flux, plan, request, images_per_shard=10, held_out_every=0)
        rows = images.take(request.hookpoints[0], 0, epoch=0).reshape(10, 16, -1)
    assert "image 6 is left out. At step 1 of transformer_blocks.1.ff" in caplog.text
    assert rows.isfinite().all()
    assert [i for i in range(10) if i != 6 and torch.equal(rows[i], rows[6])] == [7]
