"""FLUX to token rows and to S: the right tokens, once per image, the same bytes however often it was cut off."""

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
from fluxsae.features.analysis import describe_features
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.scores import ScoreMatrix
from fluxsae.features.scoring import (
    ScoreParts,
    ScoreRequest,
    check_trained_step,
    generate_with_acts,
    merge_parts,
    score_images,
    stream_grid,
    trained_steps,
)
from fluxsae.features.statistics import FeatureStats
from fluxsae.flux import BlockCall, FluxPipeline, block_hooks, capture, default_settings, generate, schedule_sigmas
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import Heatmaps
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
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


# Scoring


def sae_for(pipe: FluxPipeline, hookpoint: HookPoint, steps: tuple[int, ...]) -> SparseAutoencoder:
    settings = default_settings(pipe)
    sigmas = schedule_sigmas(pipe, settings)
    ground = TrainedOn(
        flux_id="tiny", hookpoint=str(hookpoint), steps=steps, sigmas=tuple(sigmas[step] for step in steps),
        height=settings.height, width=settings.width, guidance_scale=settings.guidance_scale, n_tokens=16,
        dataset_hash="x",
    )  # fmt: skip
    return SparseAutoencoder(SaeConfig(architecture="topk", d_model=32, n_features=64, k=4, trained_on=ground), seed=1)


HOOKPOINTS = tuple(HookPoint.parse(name) for name in PLACES)


def score_request(pipe: FluxPipeline, **changes: Any) -> tuple[dict[HookPoint, SparseAutoencoder], ScoreRequest]:
    settings = default_settings(pipe)
    steps = dict(zip(HOOKPOINTS, [(1, 3), (2,), (0, 1)], strict=True))
    saes = {hookpoint: sae_for(pipe, hookpoint, steps[hookpoint]) for hookpoint in HOOKPOINTS}
    request = ScoreRequest(
        plan=ImagePlan.build(PLAN.prompts, seed=0, purpose="score"),
        settings=settings,
        steps=steps,
        sae_hashes=dict.fromkeys(HOOKPOINTS, "abc"),
        grids={hookpoint: stream_grid(pipe, hookpoint, settings) for hookpoint in HOOKPOINTS},
        **{"batch_size": 2, "images_per_part": 4, "n_top": 3, "thumbnail_side": 32, **changes},
    )
    return saes, request


def score_into(pipe: FluxPipeline, path: Path, *, ranks: int = 1) -> RunFolder:
    saes, request = score_request(pipe)
    run = RunFolder(path)
    run.save_info(RunInfo(flux_id="tiny", settings=request.settings, hookpoints=tuple(map(str, HOOKPOINTS))))
    parts = ScoreParts(run, request)
    for rank in range(ranks):
        score_images(pipe, saes, parts, rank=rank, world_size=ranks)
    merge_parts(parts)
    return run


@pytest.fixture(scope="module")
def scored(tiny_flux: FluxPipeline, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return score_into(tiny_flux, tmp_path_factory.mktemp("runs") / "scored")


def test_scores_are_the_maximum_over_tokens_and_steps(tiny_flux: FluxPipeline, scored: RunFolder) -> None:
    saes, request = score_request(tiny_flux)
    for hookpoint, steps in request.steps.items():
        with capture(tiny_flux, [hookpoint], steps) as captured:
            prompts, seeds = list(request.plan.prompts[:2]), [request.plan.seed(0), request.plan.seed(1)]
            generate(tiny_flux, prompts, seeds=seeds, output_type="latent")
        acts = torch.stack([saes[hookpoint].encode(captured.get(hookpoint, step)) for step in steps]).amax(0)
        matrix = ScoreMatrix.load(scored.scores_path(hookpoint))
        assert torch.equal(matrix.stored()[:2], acts.amax(1).detach().half())
        for image in range(2):
            for feature in acts[image].amax(0).nonzero().flatten().tolist():
                token = int(matrix.argmax_token[image, feature])
                assert acts[image, token, feature] == acts[image, :, feature].max()


def test_images_are_those_of_their_prompt_and_seed(tiny_flux: FluxPipeline, scored: RunFolder) -> None:
    table = scored.load_images()
    assert table.prompts == list(PLAN.prompts)
    assert min(table.seeds) >= SEED_BLOCK
    alone = generate(tiny_flux, table.prompts[5], seeds=table.seeds[5])[0]
    shown = table.picture(5)
    assert shown.size == alone.size
    difference = torch.tensor(list(alone.getdata())).float() - torch.tensor(list(shown.getdata())).float()
    assert difference.abs().mean() < 8  # webp is lossy


def test_every_image_and_token_is_counted(scored: RunFolder) -> None:
    for hookpoint, n_steps in zip(HOOKPOINTS, (2, 1, 2), strict=True):
        stats = FeatureStats.load(scored.stats_path(hookpoint))
        n_tokens = 8 if hookpoint.stream == "text" else 16
        assert stats.n_images == len(PLAN)
        assert stats.n_tokens == len(PLAN) * n_steps * n_tokens
        assert int(stats.counts.sum()) <= 4 * stats.n_tokens


def test_heatmaps_cover_the_best_images(scored: RunFolder) -> None:
    for hookpoint in HOOKPOINTS:
        matrix, maps = ScoreMatrix.load(scored.scores_path(hookpoint)), Heatmaps.load(scored.heatmaps_path(hookpoint))
        top = matrix.top(3)
        assert len(maps.features) > 0
        for feature in maps.features.tolist():
            for rank, (image_id, acts) in enumerate(maps.acts(feature).items()):
                assert image_id == top.image_ids[feature, rank]
                assert acts[matrix.argmax_token[image_id, feature]] == acts.max()


def test_scoring_by_two_processes_equals_one(tiny_flux: FluxPipeline, scored: RunFolder, tmp_path: Path) -> None:
    two = score_into(tiny_flux, tmp_path, ranks=2)
    assert published(two) == published(scored)


def test_scoring_stopped_after_a_part_ends_with_the_same_bytes(
    tiny_flux: FluxPipeline, scored: RunFolder, tmp_path: Path
) -> None:
    saes, request = score_request(tiny_flux)
    run = RunFolder(tmp_path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_images(tiny_flux, saes, ScoreParts(run, request), on_images=stop)
    assert ScoreParts(run, request).missing() == [1]
    assert published(score_into(tiny_flux, tmp_path)) == published(scored)


def published(run: RunFolder) -> dict[str, bytes]:
    return {name: (run.path / name).read_bytes() for name in run.published_files()}


def test_parts_of_other_saes_are_never_mixed_in(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    _, request = score_request(tiny_flux)
    run = RunFolder(tmp_path)
    ScoreParts(run, request)
    with pytest.raises(FluxSaeError, match="other settings or SAEs"):
        ScoreParts(run, replace(request, sae_hashes=dict.fromkeys(HOOKPOINTS, "def")))


def test_missing_parts_are_told(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    _, request = score_request(tiny_flux)
    with pytest.raises(FluxSaeError, match="2 of 2 parts of the scoring are missing"):
        merge_parts(ScoreParts(RunFolder(tmp_path), request))


def test_watching_changes_no_pixel(tiny_flux: FluxPipeline) -> None:
    saes, request = score_request(tiny_flux)
    prompts, seeds = ["a red star", "a blue ring"], [1, 2]
    images = generate_with_acts(
        tiny_flux, saes, request.steps, prompts=prompts, seeds=seeds, settings=request.settings, on_acts=lambda *_: None
    )
    plain = generate(tiny_flux, prompts, seeds=seeds)
    assert [image.tobytes() for image in images] == [image.tobytes() for image in plain]


def test_an_sae_is_scored_at_the_steps_nearest_to_its_sigmas(tiny_flux: FluxPipeline) -> None:
    sae = sae_for(tiny_flux, HOOKPOINTS[0], (1, 3))
    sigmas = schedule_sigmas(tiny_flux, default_settings(tiny_flux))
    assert trained_steps(sae, sigmas) == (1, 3)
    assert check_trained_step(sae, 3, sigmas) == 3
    with pytest.raises(FluxSaeError, match="Step 0 has sigma"):
        check_trained_step(sae, 0, sigmas)
    assert check_trained_step(sae, 0, sigmas, allow_mismatch=["sigmas"]) == 0
    with pytest.raises(FluxSaeError, match="steps go from 0 to 3"):
        check_trained_step(sae, 4, sigmas)
    other = schedule_sigmas(tiny_flux, replace(default_settings(tiny_flux), num_inference_steps=1))
    with pytest.raises(FluxSaeError, match="No step of this schedule"):
        trained_steps(sae, other)
    with pytest.raises(FluxSaeError, match="does not say what steps it was trained on"):
        trained_steps(SparseAutoencoder(replace(sae.config, trained_on=None)), sigmas)


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


def spoil_second(call: BlockCall) -> torch.Tensor:
    """As a number that overflows in float16 would come out of a block."""
    spoiled = call.tokens.clone()
    spoiled[1, 0, 0] = float("inf")
    return spoiled


def test_collection_refuses_numbers_that_are_none_by_image_and_step(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    with (
        block_hooks(tiny_flux, {HookPoint.parse("layer0"): spoil_second}),
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
    folders, batches = {request.hookpoints[0]: tmp_path}, []

    def spoil_one(call: BlockCall) -> torch.Tensor | None:
        batches.extend([1] * (call.step == 1))
        return spoil_second(call) if call.step == 1 and len(batches) == 3 else None  # image 11

    with block_hooks(tiny_flux, {HookPoint.parse("layer0"): spoil_one}):
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
        block_hooks(tiny_flux, {HookPoint.parse("layer0"): spoil_second}),
        pytest.raises(FluxSaeError, match=r"2 of 20 images would be left out, too many to go on\. At step 1"),
    ):
        collect(tiny_flux, plan, request, folders={request.hookpoints[0]: tmp_path}, manifests=manifests)
    assert not any(shard.path.exists() for shard in ShardFolder(tmp_path).shards)


def spoil_in(pipe: FluxPipeline, *batches: int) -> AbstractContextManager[Any]:
    """The second image of these batches, counted from 0, turns bad at step 1."""
    seen: list[int] = []

    def spoil(call: BlockCall) -> torch.Tensor | None:
        seen.extend([call.step] * (call.step == 1))
        return spoil_second(call) if call.step == 1 and len(seen) - 1 in batches else None

    return block_hooks(pipe, {HookPoint.parse("transformer_blocks.0"): spoil})


def score_twenty(pipe: FluxPipeline, path: Path, *spoiled: int, **changes: Any) -> tuple[RunFolder, int]:
    saes, request = score_request(pipe, batch_size=5, images_per_part=10, **changes)
    request = replace(request, plan=ImagePlan.build(["a red star"] * 20, seed=0, purpose="score"))
    run = RunFolder(path)
    run.save_info(RunInfo(flux_id="tiny", settings=request.settings, hookpoints=tuple(map(str, HOOKPOINTS))))
    parts = ScoreParts(run, request)
    with spoil_in(pipe, *spoiled):
        score_images(pipe, saes, parts)
    return run, merge_parts(parts)


def test_scoring_leaves_a_bad_image_out_of_everything_and_counts_it(
    tiny_flux: FluxPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound, n_sound = score_twenty(tiny_flux, tmp_path / "sound")
    spoiled, n_spoiled = score_twenty(tiny_flux, tmp_path / "spoiled", 2)  # image 11, when its step 0 was counted
    assert (n_sound, n_spoiled) == (0, 1)
    assert "image 11 of 20 is left out. At step 1 of" in caplog.text
    others = [i for i in range(20) if i != 11]
    for place in HOOKPOINTS:
        clean, matrix = (ScoreMatrix.load(run.scores_path(place)) for run in (sound, spoiled))
        assert (clean.left_out, matrix.left_out) == ((), (11,))
        assert torch.equal(matrix.stored()[others], clean.stored()[others])
        assert not matrix.stored()[11].any()
        all_stats, stats = (FeatureStats.load(run.stats_path(place)) for run in (sound, spoiled))
        assert (stats.n_images, stats.n_tokens * 20) == (19, all_stats.n_tokens * 19)
        assert torch.equal(stats.image_counts, (matrix.stored() > 0).sum(0))
        assert 11 not in Heatmaps.load(spoiled.heatmaps_path(place)).image_ids
        assert spoiled.load_metrics(place)["image_fvu"]["n_images"] == 19
        assert len(describe_features(matrix, stats, AnalysisConfig())) == matrix.n_features
    assert len(spoiled.load_images()) == 20


def test_scoring_stops_when_too_many_images_are_bad(tiny_flux: FluxPipeline, tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=r"2 of 20 images would be left out, too many to go on\. At step 1"):
        score_twenty(tiny_flux, tmp_path, 0, 3)  # the first batch is made twice


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


def test_scoring_refuses_numbers_that_are_none_by_prompt_and_seed(tiny_flux: FluxPipeline) -> None:
    saes, request = score_request(tiny_flux)
    with (
        block_hooks(tiny_flux, {HookPoint.parse("transformer_blocks.0"): spoil_second}),
        pytest.raises(FluxSaeError, match=r"the activations of seed 2 \('a blue ring'\) hold NaN or infinite"),
    ):
        generate_with_acts(
            tiny_flux, saes, request.steps, prompts=["a red star", "a blue ring"], seeds=[1, 2],
            settings=request.settings, on_acts=lambda *_: None,
        )  # fmt: skip
