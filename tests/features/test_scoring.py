"""FLUX and SAEs to S: the right maxima, once per image, the same bytes however often it was cut off."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_images import spoil_in

from fluxsae.activations.collection import SEED_BLOCK, ImagePlan
from fluxsae.errors import FluxSaeError
from fluxsae.features.analysis import describe_features
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.score_parts import ScoreParts, ScoreRequest
from fluxsae.features.scores import ScoreMatrix, load_scores
from fluxsae.features.scoring import (
    check_trained_step,
    generate_with_acts,
    merge_parts,
    score_images,
    stream_grid,
    trained_steps,
)
from fluxsae.features.statistics import FeatureStats
from fluxsae.flux import FluxPipeline, capture, default_settings, generate, schedule_sigmas
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import Heatmaps
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder

PLACES = ["layer1", "single_transformer_blocks.0", "transformer_blocks.0.ff_context"]
HOOKPOINTS = tuple(HookPoint.parse(name) for name in PLACES)
PLAN = ImagePlan.build(
    [f"a {word} star" for word in ("red", "blue", "green", "pink", "cyan", "purple", "orange")], seed=0, purpose="score"
)


def sae_for(pipe: FluxPipeline, hookpoint: HookPoint, steps: tuple[int, ...]) -> SparseAutoencoder:
    settings = default_settings(pipe)
    sigmas = schedule_sigmas(pipe, settings)
    ground = TrainedOn(
        flux_id="tiny", hookpoint=str(hookpoint), steps=steps, sigmas=tuple(sigmas[step] for step in steps),
        height=settings.height, width=settings.width, guidance_scale=settings.guidance_scale, n_tokens=16,
        dataset_hash="x",
    )  # fmt: skip
    return SparseAutoencoder(SaeConfig(architecture="topk", d_model=32, n_features=64, k=4, trained_on=ground), seed=1)


def score_request(pipe: FluxPipeline, **changes: Any) -> tuple[dict[HookPoint, SparseAutoencoder], ScoreRequest]:
    settings = default_settings(pipe)
    steps = dict(zip(HOOKPOINTS, [(1, 3), (2,), (0, 1)], strict=True))
    saes = {hookpoint: sae_for(pipe, hookpoint, steps[hookpoint]) for hookpoint in HOOKPOINTS}
    request = ScoreRequest(
        plan=PLAN,
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


def test_scores_know_their_sae_and_are_refused_with_another(
    tiny_flux: FluxPipeline, scored: RunFolder, tmp_path: Path
) -> None:
    run, place = RunFolder(shutil.copytree(scored.path, tmp_path / "run")), HOOKPOINTS[0]
    sae = score_request(tiny_flux)[0][place]
    scores = load_scores(run, place)  # no SAE beside them: they may have been copied alone
    table = describe_features(scores, FeatureStats.load(run.stats_path(place)), AnalysisConfig())
    assert scores.sae_fingerprint == table.sae_fingerprint == sae.fingerprint
    sae.save_pretrained(run.sae_path(place))
    load_scores(run, place)
    SparseAutoencoder(sae.config, seed=2).save_pretrained(run.sae_path(place))
    with pytest.raises(FluxSaeError, match=r"changed after scoring.*Score it again with --force"):
        load_scores(run, place)


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


def score_twenty(pipe: FluxPipeline, path: Path, *spoiled: int, **changes: Any) -> tuple[RunFolder, int]:
    saes, request = score_request(pipe, batch_size=5, images_per_part=10, **changes)
    request = replace(request, plan=ImagePlan.build(["a red star"] * 20, seed=0, purpose="score"))
    run = RunFolder(path)
    run.save_info(RunInfo(flux_id="tiny", settings=request.settings, hookpoints=tuple(map(str, HOOKPOINTS))))
    parts = ScoreParts(run, request)
    with spoil_in(pipe, *spoiled) if spoiled else nullcontext():
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


def test_scoring_refuses_numbers_that_are_none_by_prompt_and_seed(tiny_flux: FluxPipeline) -> None:
    saes, request = score_request(tiny_flux)
    with (
        spoil_in(tiny_flux),
        pytest.raises(FluxSaeError, match=r"the activations of seed 2 \('a blue ring'\) hold NaN or infinite"),
    ):
        generate_with_acts(
            tiny_flux, saes, request.steps, prompts=["a red star", "a blue ring"], seeds=[1, 2],
            settings=request.settings, on_acts=lambda *_: None,
        )  # fmt: skip
