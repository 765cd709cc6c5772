import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_measurements import PixelDistance, measurement
from test_steering import random_sae
from tiny_flux import SETTINGS

import train.find_demos
import train.steer
import train.steering_grids
from fluxsae.errors import FluxSaeError
from fluxsae.features.scores import merge_score_files
from fluxsae.files import save_tensors
from fluxsae.flux import FluxPipeline, capture, generate
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.pictures.grids import GridCell, GridRow, steering_grid
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import FeatureRow, FeatureTable, ImageRow, encode_webp
from fluxsae.steering.conditions import Condition
from fluxsae.steering.demos import (
    DemoConfig,
    candidate_images,
    demo_score,
    describe_edit,
    edit_direction,
    find_demos,
    load_limits,
    measured_sweep,
)
from fluxsae.steering.demos import measured as measured_module
from fluxsae.steering.demos import search as demo_search
from fluxsae.steering.demos.search import _Search
from fluxsae.steering.edits import Recipe, SteeringEdit, load_recipes
from fluxsae.steering.sweeps import reproduce

PLACE = HookPoint.parse("layer1")
PROMPTS = ["a red circle", "a blue star", "a small green ring", "a large pink heart", "a cyan cross", "a black square"]
CONFIG = DemoConfig(
    n_candidates=2,
    suppress=(0.5, 0.0),
    amplify=(0.1, 0.3),
    steps=(1, 4),
    n_limit_images=4,
    n_natural_images=4,
    least_score=0.0,
)


@pytest.fixture(scope="module")
def run(tiny_flux: FluxPipeline, tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of the random tiny FLUX with a random SAE: scored and analysed, no demos yet."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "tiny")
    sae, seeds = random_sae(), list(range(len(PROMPTS)))
    sae.save_pretrained(run.sae_path(PLACE))
    with capture(tiny_flux, [PLACE], steps=[2]) as captured:
        images = generate(tiny_flux, PROMPTS, seeds=seeds, settings=SETTINGS)
    scores, tokens = sae.encode(captured.get(PLACE, 2)).max(dim=1)
    run.save_info(
        RunInfo(str(tiny_flux_folder), SETTINGS, (str(PLACE),), steps=(2,), sigmas=(captured.sigma(2),), rows=4, cols=4)
    )
    webps = [encode_webp(image, longest_side=32) for image in images]
    run.save_images(ImageRow(*row) for row in zip(seeds, PROMPTS, seeds, webps, strict=True))
    part = run.work_path("score") / "part.safetensors"
    save_tensors(part, {"S": scores, "argmax_token": tokens.to(torch.int32)})
    merge_score_files(run.scores_path(PLACE), [part], steps=(2,), grid=TokenGrid(4, 4))
    rows = [feature_row(feature, scores[:, feature], tokens[:, feature]) for feature in range(scores.shape[1])]
    metadata = {"steps": "[2]", "quantile_levels": "[0.5, 0.9]", "histogram_edges": "[0.1, 1.0]"}
    run.save_features(PLACE, FeatureTable.from_rows(rows, metadata=metadata))
    return run


def feature_row(feature: int, scores: torch.Tensor, tokens: torch.Tensor) -> FeatureRow:
    best = torch.argsort(scores, descending=True, stable=True)[: int((scores > 0).sum())]
    return FeatureRow(
        feature=feature, feature_class="common", density=0.1, image_density=float((scores > 0).float().mean()),
        mean_act=float(scores.mean()), max_act=float(scores.max()), quantiles=[0.0, 0.0], spatial_spread=0.5,
        step_profile=[0.1], histogram=[1], top_images=best.tolist(), top_scores=scores[best].tolist(),
        top_tokens=tokens[best].tolist(), neighbours=[0], neighbour_similarities=[0.5], family=-1,
        label=f"thing {feature}", label_confidence=0.5,
    )  # fmt: skip


@pytest.fixture
def features(run: RunFolder) -> list[int]:
    rows = [row for row in run.load_features(PLACE) if len(row.top_images) >= 2]
    return [row.feature for row in sorted(rows, key=lambda row: -row.max_act)[:2]]


def search(run: RunFolder, pipe: FluxPipeline, features: list[int], **options: object):
    saes = {PLACE: random_sae()}
    options = {"config": CONFIG, **options}
    return find_demos(run, pipe, saes, {PLACE: features}, distance=PixelDistance(), **options)[PLACE]


# The score


def measured(inside: float, outside: float, out_of_distribution: float = 0.0):
    return replace(measurement(out_of_distribution), distance_inside=inside, distance_outside=outside, distance=inside)


def test_the_score_is_its_formula() -> None:
    suppress = [(0.5, measured(0.1, 0.0)), (0.0, measured(0.4, 0.1))]
    amplify = [(1.0, measured(0.2, 0.05)), (2.0, measured(0.9, 0.0, out_of_distribution=1.0))]
    score = demo_score(suppress, amplify)
    assert (score.suppress, score.amplify) == (0.0, 1.0)  # 0.9 is worth nothing out of distribution
    assert (score.less, score.more, score.balance) == (0.4, 0.2, 0.5)
    assert score.collateral == pytest.approx(0.2)  # 0.1 / 0.5 and 0.05 / 0.25
    assert score.score == pytest.approx(0.3 * 0.5 * 0.8)


def test_one_direction_alone_is_worth_nothing() -> None:
    assert demo_score([(0.0, measured(0.5, 0.0))], [(1.0, measured(0.0, 0.0))]).score == 0
    assert demo_score([(0.0, measured(0.0, 0.0))], [(1.0, measured(0.0, 0.0))]).score == 0


def test_collateral_and_foreign_tokens_lower_the_score() -> None:
    clean = demo_score([(0.0, measured(0.5, 0.0))], [(1.0, measured(0.5, 0.0))]).score
    spilling = demo_score([(0.0, measured(0.5, 0.4))], [(1.0, measured(0.5, 0.4))]).score
    foreign = demo_score([(0.0, measured(0.5, 0.0, 0.3))], [(1.0, measured(0.5, 0.0, 0.3))]).score
    assert spilling < clean
    assert foreign < clean


def test_an_image_is_worth_what_clip_sees_of_the_label_between_its_pictures() -> None:
    score = demo_score([(0.0, measured(0.5, 0.0))], [(1.0, measured(0.5, 0.0))])
    assert score.worth == score.score
    assert replace(score, label_less=-0.1, label_more=0.3).worth == pytest.approx(0.1 * score.score)
    assert replace(score, label_less=0.2, label_more=0.5).worth == 0


# The search


def test_demos_are_sought_where_prompts_name_the_feature_and_say_most() -> None:
    prompts = ["a red circle", "a star", "a large red striped circle on the left", "a red ring", "a red circle, a ring"]
    scores = torch.tensor([5.0, 9.0, 1.0, 4.0, 3.0])
    assert candidate_images(scores, prompts, label="red", n_wanted=2) == [4, 2]
    assert candidate_images(scores, prompts, label="red circle", n_wanted=9) == [0, 2]
    assert candidate_images(scores, prompts, label="", n_wanted=1) == [2]  # the wordiest of all
    assert candidate_images(scores, prompts, label="blue", n_wanted=5)[0] == 1  # none is named so: the strongest
    assert candidate_images(torch.zeros(5), prompts, label="red", n_wanted=2) == []


def test_demos_that_show_nothing_are_not_kept(run: RunFolder, tiny_flux: FluxPipeline, features: list[int]) -> None:
    best = max(demo.score.score for demo in search(run, tiny_flux, features))
    kept = search(run, tiny_flux, features, config=replace(CONFIG, least_score=best * 0.999))
    assert [demo.score.score for demo in kept] == [best]
    assert len(run.load_demos(PLACE)) == 1


def test_demos_are_found_written_and_made_again_bit_for_bit(
    run: RunFolder, tiny_flux: FluxPipeline, features: list[int]
) -> None:
    demos = search(run, tiny_flux, features)
    assert demos
    assert [demo.score.score for demo in demos] == sorted((demo.score.score for demo in demos), reverse=True)
    stored = run.load_demos(PLACE)
    assert [demo["feature"] for demo in stored] == [demo.feature for demo in demos]
    first = stored[0]
    assert first["distance_name"] == "mean absolute difference"
    assert first["measurements"]["less"]["distance"] > 0
    with Image.open(run.demo_image_path(PLACE, first["image"])) as strip:
        pictures = [strip.convert("RGB").crop((36 * place, 0, 36 * place + 32, 32)) for place in range(3)]
    for word, picture in zip(("less", "before", "more"), pictures, strict=True):
        again = reproduce(tiny_flux, {PLACE: random_sae()}, Recipe.from_dict(first["recipes"][word])).image
        difference = torch.tensor(list(again.getdata())).float() - torch.tensor(list(picture.getdata())).float()
        assert difference.abs().mean() < 12  # webp is lossy; another image would be tens away
    assert Recipe.from_dict(first["recipe"]).edits[0].mode == "add"
    assert load_limits(run, PLACE) is not None


def test_a_search_that_was_cut_off_goes_on_where_it_stopped(
    tiny_flux: FluxPipeline, run: RunFolder, features: list[int], tmp_path: Path
) -> None:
    whole = search(run, tiny_flux, features)
    other = copy_of(run, tmp_path)

    def cut_off(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(other, tiny_flux, features, on_candidate=cut_off)
    counts: list[tuple[int, int]] = []
    resumed = search(other, tiny_flux, features, on_candidate=lambda done, total: counts.append((done, total)))
    assert counts[-1] == (len(features) * CONFIG.n_candidates - 2,) * 2
    assert [(d.feature, d.prompt, d.score) for d in resumed] == [(d.feature, d.prompt, d.score) for d in whole]
    again: list[object] = []
    search(other, tiny_flux, features, on_candidate=lambda done, total: again.append(done))
    assert not again


def copy_of(run: RunFolder, folder: Path) -> RunFolder:
    """The run without its demos and without what a search keeps."""
    import shutil

    shutil.copytree(run.path, folder / "run", ignore=shutil.ignore_patterns("demos", ".work"))
    return RunFolder(folder / "run")


def test_features_without_a_reference_activation_get_no_demo_and_do_not_end_the_search(
    run: RunFolder, tiny_flux: FluxPipeline, features: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = copy_of(run, tmp_path / "run")
    sae = deepcopy(random_sae())
    sae.reference_acts[features[0]] = 0.0
    options = {"distance": PixelDistance(), "config": CONFIG}
    find_demos(own, tiny_flux, {PLACE: sae}, {PLACE: features[:1]}, **options)  # the smallest run: nothing is left
    assert f"No demo of features {features[0]}: they have no reference activation." in caplog.text


def test_a_demo_search_compares_with_a_baseline_of_the_same_batch(
    run: RunFolder, tiny_flux: FluxPipeline, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two features share an image: the second one's batch needs an unedited image of its own."""
    swept = []

    def watch(pipe, saes, variants, **options):
        swept.append((variants[0], len(variants), options.get("baseline")))
        return measured_module.measured_sweep(pipe, saes, variants, **options)

    monkeypatch.setattr(demo_search, "measured_sweep", watch)
    search(copy_of(run, tmp_path), tiny_flux, features)
    n_edits = len(CONFIG.suppress) + len(CONFIG.amplify)
    assert len(swept) >= 2 * CONFIG.n_candidates
    assert set(swept) == {((), n_edits + 1, None)}


def test_a_feature_that_never_fires_is_refused(run: RunFolder, tiny_flux: FluxPipeline) -> None:
    silent = [row.feature for row in run.load_features(PLACE) if not row.top_images]
    if not silent:
        pytest.skip("every feature of this random SAE fires")
    with pytest.raises(FluxSaeError, match="fires in none"):
        search(run, tiny_flux, silent[:1])


class Reds:
    """Pictures by their mean colour, every text as red."""

    name = "reds"

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        means = [np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in images]
        return torch.nn.functional.normalize(torch.tensor(np.stack(means)), dim=1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, 0.0]] * len(texts))

    def unknown_words(self, text: str) -> list[str]:
        return []


def test_what_clip_sees_of_a_label_is_told_of_both_directions() -> None:
    before, less, more = (Image.new("RGB", (4, 4), colour) for colour in ((100, 100, 0), (0, 100, 0), (100, 0, 0)))
    search = SimpleNamespace(embedder=Reds(), labels={7: "red"}, _places=lambda _: {"less": 1, "before": 0, "more": 2})
    plain = demo_score([(0.0, measured(0.5, 0.0))], [(1.0, measured(0.5, 0.0))])
    score = _Search._with_label(search, 7, plain, [before, less, more])
    assert (score.label_less, score.label_more) == pytest.approx((-(0.5**0.5), 1 - 0.5**0.5))
    assert _Search._with_label(search, 8, plain, [before, less, more]) == plain  # without a label


def test_a_demo_in_which_clip_does_not_see_the_label_go_and_come_is_not_kept(
    run: RunFolder, tiny_flux: FluxPipeline, features: list[int], tmp_path: Path
) -> None:
    other = copy_of(run, tmp_path)
    assert search(other, tiny_flux, features)
    assert search(other, tiny_flux, features, embedder=Reds()) == []


def test_a_stored_baseline_measures_like_one_in_the_batch(run: RunFolder, tiny_flux: FluxPipeline, features) -> None:
    search(run, tiny_flux, features)
    edit = SteeringEdit(PLACE, features[0], "add", 8.0, steps=(1, 4))
    options = {"prompt": PROMPTS[0], "seed": 0, "settings": SETTINGS, "distance": PixelDistance()}
    limits = {PLACE: load_limits(run, PLACE)}
    saes = {PLACE: random_sae()}
    found, together = measured_sweep(tiny_flux, saes, [(), (edit,)], limits=limits, **options)
    _, apart = measured_sweep(tiny_flux, saes, [(edit,)], limits=limits, baseline=found[0].image, **options)
    assert apart[0].distance == pytest.approx(together[1].distance, abs=2e-3)
    assert apart[0].activation_before is None
    assert together[1].activation_before is not None


# Words and pictures


@pytest.mark.parametrize(
    ("mode", "strength", "words", "direction"),
    [
        ("scale", 1.0, "unchanged", 0),
        ("scale", 0.0, "100% taken away", -1),
        ("scale", -1.0, "2 × taken away", -1),
        ("scale", 3.0, "× 3", 1),
        ("add", 2.0, "+2 × usual", 1),
        ("add", -1.5, "-1.5 × usual", -1),
        ("clamp", 0.0, "set to 0 × usual", -1),
        ("clamp", 2.0, "set to 2 × usual", 1),
        ("ablate", 0.5, "50% ablated", -1),
        ("project_out", 1.0, "100% projected out", -1),
    ],
)
def test_edits_are_described_in_words(mode: str, strength: float, words: str, direction: int) -> None:
    edit = SteeringEdit(PLACE, 0, mode, strength)
    assert describe_edit(edit) == words
    assert edit_direction(edit) == direction


def test_a_grid_shows_every_picture_unscaled_or_in_whole_multiples() -> None:
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    cells = [GridCell(Image.new("RGB", (32, 32), colour), "+2 × usual", "distance 0.1") for colour in colours]
    sheet = steering_grid([GridRow(3, "red", "a prompt", cells)] * 2, title="t", cell=64)
    counts = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 20)}
    assert all(counts[colour] == 2 * 64 * 64 for colour in colours)


def test_a_ragged_grid_is_refused() -> None:
    cell = GridCell(Image.new("RGB", (8, 8)), "x")
    with pytest.raises(FluxSaeError, match="same number"):
        steering_grid([GridRow(0, "a", "", [cell]), GridRow(1, "b", "", [cell, cell])], title="t")


# The scripts


def test_the_scripts_steer_find_and_draw(run: RunFolder, features: list[int], tmp_path: Path, capsys) -> None:
    other = copy_of(run, tmp_path)
    config = train.find_demos.FindDemosConfig(run=other.path, features=tuple(features), search=CONFIG)
    assert train.find_demos.main(config).word == "done"
    assert train.find_demos.main(config).word == "skipped"
    grids = train.steering_grids.SteeringGridsConfig(
        run=other.path, demos=True, steps=(1, 4), suppress=(0.0,), amplify=(2.0,), cell=64
    )
    (sheet,) = train.steering_grids.main(grids)
    recipes = load_recipes(sheet)
    assert len(recipes) == 3 * len(other.load_demos(PLACE))
    out = tmp_path / "again.png"
    train.steer.main(train.steer.SteerConfig(recipe=sheet, index=2, out=out))
    assert load_recipes(out) == [recipes[2]]


def test_steer_writes_a_picture_that_its_recipe_makes_again(run: RunFolder, features, tmp_path: Path, capsys) -> None:
    out = tmp_path / "steered.png"
    asked = train.steer.SteerConfig(
        run=run.path, prompt=PROMPTS[0], feature=features[0], mode="add", strength=5.0, steps=(1, 4), out=out,
        when=str(features[0]), when_above=0.0,
    )  # fmt: skip
    first = train.steer.main(asked)
    assert "relative_size" in capsys.readouterr().out
    for name in ("steered.png", "steered.json"):
        again = train.steer.main(train.steer.SteerConfig(recipe=tmp_path / name, out=tmp_path / "again.png"))
        assert torch.equal(again.latents, first.latents)
        assert Image.open(tmp_path / "again.png").tobytes() == Image.open(out).tobytes()
    assert "bit for bit the same" in capsys.readouterr().out
    assert load_recipes(out)[0].edits[0].when == Condition((features[0],), 0.0)
    assert load_recipes(tmp_path / "steered-before.png")[0].edits == ()
    assert json.loads((tmp_path / "steered.json").read_text())["index"] == 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "a red circle"}, "feature is missing"),
        ({"prompt": "a red circle", "feature": 1, "hookpoint": "layer7"}, "no SAE"),
        ({"prompt": "a red circle", "feature": 999, "steps": (0, 2)}, "feature is 999"),
        ({"prompt": "a red circle", "feature": 1, "when": "nothing like it"}, "has the label 'nothing like it'"),
        ({"prompt": "a red circle", "edits": "[{}]"}, r"edits\[0\]"),
        ({"recipe": Path("nowhere.png")}, "nowhere.png"),
    ],
)
def test_steer_refuses_what_it_cannot_do(run: RunFolder, tmp_path: Path, changes, match: str) -> None:
    with pytest.raises(FluxSaeError, match=match):
        train.steer.main(train.steer.SteerConfig(run=run.path, out=tmp_path / "x.png", **changes))
    assert not (tmp_path / "x.png").exists()
