"""`train.verify`: a whole run passes, and every kind of damage is named with its file."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import whole_run
from tiny_flux import SETTINGS

from fluxsae.activations.shards import ActivationManifest, ShardWriter
from fluxsae.errors import FluxSaeError
from fluxsae.features.scores import fingerprint_metadata
from fluxsae.files import load_tensors, read_header, save_tensors
from fluxsae.miniature import miniature_path
from fluxsae.publishing.checksums import read_checksums, write_checksums
from fluxsae.publishing.verify import verify_run
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.tables import Embeddings
from train import verify

LATE = whole_run.LATE


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = whole_run.build(tmp_path_factory.mktemp("whole") / "run")
    run.card_path.write_text("card")
    write_checksums(run)
    return run


@pytest.fixture
def run(whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy to damage; without checksums, which would catch everything."""
    shutil.copytree(whole.path, tmp_path / "run")
    copy = RunFolder(tmp_path / "run")
    copy.checksums_path.unlink()
    return copy


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A safetensors file with changed tensors and its own metadata."""
    metadata, tensors = read_header(path).metadata, load_tensors(path)
    change(tensors)
    save_tensors(path, tensors, metadata=metadata)


def put(name: str, value: float, *place: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][place] = value

    return change


def scored_with_another_sae(run: RunFolder) -> None:
    path = run.scores_path(LATE)
    told = {**read_header(path).metadata, **fingerprint_metadata("0" * 16)}
    save_tensors(path, load_tensors(path), metadata=told)


def test_a_whole_run_has_no_problems_and_nothing_absent(whole: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verify.main(verify.VerifyConfig(run=str(whole.path)))
    assert verdict.problems == ()
    assert verdict.absent == ()
    assert verdict.n_files == len(whole.published_files()) > 15
    out = capsys.readouterr().out
    assert "0 problems" in out
    assert "Checked: every file against its hash" in out
    assert "Not checked" not in out


def test_without_checksums_it_says_what_was_not_checked_and_writes_them_when_asked(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    verify.main(verify.VerifyConfig(run=str(run.path)))
    out = capsys.readouterr().out
    assert "Not checked: whether a file was changed" in out
    assert "--write-checksums makes one" in out
    assert not run.checksums_path.exists()
    embeddings = run.embeddings_path.read_bytes()
    run.embeddings_path.write_bytes(b"?")
    verify.main(verify.VerifyConfig(run=str(run.path), write_checksums=True))
    assert not run.checksums_path.exists(), "what is damaged gets no hash"
    run.embeddings_path.write_bytes(embeddings)
    verify.main(verify.VerifyConfig(run=str(run.path), write_checksums=True))
    assert "Wrote" in capsys.readouterr().out
    assert verify.main(verify.VerifyConfig(run=str(run.path))).is_whole
    run.embeddings_path.write_bytes(b"?")
    assert any("does not have its hash" in str(problem) for problem in verify_run(run).problems)
    with pytest.raises(FluxSaeError, match="is no folder"):
        verify.main(verify.VerifyConfig(run="user/name", write_checksums=True))


def test_a_changed_a_missing_and_an_unknown_file_are_named(whole: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    weights = run.sae_path(LATE) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight: still finite, still the right shape
    weights.write_bytes(content)
    run.directions_path(LATE).unlink()
    (run.path / "stray.txt").write_text("?")
    problems = [str(problem) for problem in verify_run(run).problems]
    assert len(problems) == 3
    assert any("model.safetensors does not have its hash" in problem for problem in problems)
    assert any(f"directions/{LATE}.safetensors is listed but not there" in problem for problem in problems)
    assert any("stray.txt is there but not listed" in problem for problem in problems)


DAMAGES: dict[str, tuple[Callable[[RunFolder], None], str, str]] = {
    "weights not finite": (
        lambda run: rewrite(run.sae_path(LATE) / "model.safetensors", put("W_dec", float("nan"), 0, 0)),
        f"sae/{LATE}",
        "W_dec",
    ),
    "weights cut off": (
        lambda run: _cut(run.sae_path(LATE) / "model.safetensors"),
        f"sae/{LATE}",
        "is not a whole safetensors file",
    ),
    "weights of another hook point": (
        lambda run: _copy_folder(run.sae_path(whole_run.EARLY), run.sae_path(LATE)),
        f"sae/{LATE}",
        "was trained on the hook point transformer_blocks.1.ff, but lies at transformer_blocks.3.ff",
    ),
    "metrics with NaN": (
        lambda run: run.metrics_path(LATE).write_text('{"fvu": NaN}'),
        f"sae/{LATE}/metrics.json",
        "it holds NaN",
    ),
    "S with a negative value": (
        lambda run: rewrite(run.scores_path(LATE), put("S", -1, 3, 3)),
        f"scores/{LATE}/scores.safetensors",
        "negative or not finite",
    ),
    "S of fewer images": (
        lambda run: rewrite(run.scores_path(LATE), _fewer_rows),
        f"scores/{LATE}/scores.safetensors",
        "has 20 rows, but the run has 40 images",
    ),
    "S of an SAE that was trained again": (
        scored_with_another_sae,
        f"scores/{LATE}/scores.safetensors",
        "changed after scoring",
    ),
    "S that the sums do not know": (
        lambda run: rewrite(run.scores_path(LATE), put("S", 1, 0, 0)),
        f"scores/{LATE}/stats.safetensors",
        "counts other images than S does",
    ),
    "a top image that does not exist": (
        lambda run: _change_column(run, "top_images", 2, [99]),
        f"features/{LATE}/features.parquet",
        "top_images names images that do not exist, for example 99 of 40",
    ),
    "top scores of another run": (
        lambda run: _change_column(run, "top_scores", 5, 0.125),
        f"features/{LATE}/features.parquet",
        "has top scores that are not those in S (features [5]",
    ),
    "a neighbour that does not exist": (
        lambda run: _change_column(run, "neighbours", 2, [-1]),
        f"features/{LATE}/features.parquet",
        "neighbours names features that do not exist, for example -1",
    ),
    "an unknown class": (
        lambda run: _change_column(run, "feature_class", 2, "nice"),
        f"features/{LATE}/features.parquet",
        "has the classes ['nice']",
    ),
    "a heatmap of a missing feature": (
        lambda run: rewrite(run.heatmaps_path(LATE), put("features", 999, -1)),
        f"features/{LATE}/heatmaps.safetensors",
        "features names features that do not exist, for example 999",
    ),
    "a direction neighbour that does not exist": (
        lambda run: rewrite(run.directions_path(LATE), put("neighbours", 500, 0, 0)),
        f"directions/{LATE}.safetensors",
        "neighbours names features that do not exist, for example 500",
    ),
    "a map position that is not finite": (
        lambda run: rewrite(run.directions_path(LATE), put("positions", float("inf"), 0, 0)),
        f"directions/{LATE}.safetensors",
        "positions has values that are not finite",
    ),
    "embeddings that are not unit vectors": (
        lambda run: run.save_embeddings(Embeddings(np.full((40, 3), 2.0, np.float32), "scene-reader")),
        "clip/embeddings.safetensors",
        "not finite unit vectors",
    ),
    "a demo without its picture": (
        lambda run: run.demo_image_path(LATE, "demo-3").unlink(),
        f"demos/{LATE}/demos.jsonl",
        "line 1 names the picture demo-3.webp, which is not there",
    ),
    "a demo of a missing feature": (
        lambda run: run.save_demos(LATE, [json.dumps({"feature": 999, "image": "demo-3"})]),
        f"demos/{LATE}/demos.jsonl",
        "line 1 is about feature 999, which does not exist",
    ),
    "a sheet cut off": (
        lambda run: run.sheet_path(LATE, "features").write_bytes(whole_run.bad_picture()),
        f"sheets/{LATE}/features.png",
        "cannot be shown",
    ),
    "an image twice": (
        lambda run: run.save_images([replace(row, prompt="same", seed=1) for row in run.load_images()]),
        "images/images.parquet",
        "holds 'same' with seed 1 40 times",
    ),
    "a thumbnail that is no picture": (
        lambda run: run.save_images([replace(row, thumbnail=b"none") for row in run.load_images()]),
        "images/images.parquet",
        "the thumbnail of image 0 cannot be shown",
    ),
    "a pickle": (
        lambda run: (run.path / "weights.pt").write_bytes(b"x") and None,
        "weights.pt",
        "can run code",
    ),
    "an index of other hook points": (
        lambda run: run.save_index([LATE]),
        "config.json",
        "lists the hook points",
    ),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _copy_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def _fewer_rows(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        tensors[name] = tensors[name][:20].clone()


def _change_column(run: RunFolder, name: str, feature: int, value: object) -> None:
    table = run.load_features(LATE)
    values = table.column(name).tolist()
    values[feature] = [value] * len(values[feature]) if isinstance(value, float) else value
    run.save_features(LATE, table.with_columns({name: values}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named_with_its_file(run: RunFolder, damage: str) -> None:
    inflict, path, text = DAMAGES[damage]
    inflict(run)
    problems = verify_run(run).problems
    assert [problem for problem in problems if problem.path == path and text in problem.text], problems


def test_parts_that_are_not_there_are_no_problem_but_told(run: RunFolder) -> None:
    run.directions_path(LATE).unlink()
    run.embeddings_path.unlink()
    verdict = verify_run(run)
    assert verdict.is_whole
    assert {f"directions/{LATE}.safetensors", "clip/embeddings.safetensors"} <= set(verdict.absent)


def test_the_run_is_named_once_with_or_without_its_option(whole: RunFolder) -> None:
    assert verify.main(verify.VerifyConfig(place=str(whole.path))).is_whole
    for config in (verify.VerifyConfig(), verify.VerifyConfig(run="a", place="b")):
        with pytest.raises(FluxSaeError, match="Name one run: --run"):
            verify.main(config)


def test_a_newer_schema_and_a_missing_run_are_refused(run: RunFolder, tmp_path: Path) -> None:
    values = json.loads(run.info_path.read_text())
    run.info_path.write_text(json.dumps({**values, "schema_version": 99}))
    with pytest.raises(FluxSaeError, match="Update fluxsae"):
        verify_run(run)
    with pytest.raises(FluxSaeError, match="There is no folder"):
        verify.main(verify.VerifyConfig(run=str(tmp_path / "nowhere" / "at" / "all")))


def test_checksums_are_those_of_sha256sum_and_stay_in_the_folder(whole: RunFolder, tmp_path: Path) -> None:
    sums = read_checksums(whole.checksums_path)
    assert set(sums) == set(whole.published_files()) - {"SHA256SUMS"}
    for line in ("abc  file", f"{'a' * 64}  ../outside", f"{'a' * 64}  /etc/passwd", f"{'a' * 64} one-space"):
        (tmp_path / "sums").write_text(line + "\n")
        with pytest.raises(FluxSaeError, match="Line 1 of"):
            read_checksums(tmp_path / "sums")


def test_the_committed_run_is_whole() -> None:
    assert verify_run(miniature_path("run")).problems == ()


@pytest.mark.parametrize("name", ["sums", "square_sums", "maxima", "step_sums", "places"])
def test_stats_that_are_no_numbers_are_found(run: RunFolder, name: str) -> None:
    path = run.stats_path(run.hookpoints()[0])
    metadata, tensors = read_header(path).metadata, load_tensors(path)
    tensors[name].view(-1)[0] = torch.nan
    save_tensors(path, tensors, metadata=metadata)
    assert [p.text for p in verify_run(run).problems] == [
        f"has values of {name} that are negative or not finite. Score the images again."
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_found_by_shard_and_image(run: RunFolder, value: float) -> None:
    place = run.hookpoints()[0]
    manifest = ActivationManifest(
        hookpoint=str(place), d_model=4, flux_id="tiny", flux_revision=None, settings=SETTINGS, steps=(1,),
        sigmas=(0.5,), n_tokens=3, tokens_per_image=2, n_images=4, images_per_shard=2, prompts_hash="0", seed=0,
    )  # fmt: skip
    writer = ShardWriter(run.activations_folder(place), manifest)
    tokens, index = torch.ones(2, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(2, 1, 2, dtype=torch.int32)
    writer.write(0, tokens, index)
    assert verify_run(run).problems == ()  # the second shard is still to come: no fault
    tokens[1, 0, 0, 0] = value
    writer.write(1, tokens, index)
    assert [p.text for p in verify_run(run).problems] == [
        "shard-00001.safetensors holds NaN or infinite numbers of images [3]. Delete the file and collect again, in "
        "bfloat16 or float32."
    ]
