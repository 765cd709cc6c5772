import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from synthetic_run import FEATURES, HOOKPOINT, Synthetic, build

import train.compare_layers
import train.directions
from fluxsae.errors import FluxSaeError
from fluxsae.features import layers
from fluxsae.features.directions import (
    draw_comparison,
    draw_map,
    encoder_decoder_alignment,
    feature_map,
    find_neighbourhoods,
    nearest_features,
)
from fluxsae.features.layers import LayerComparison, compare_layers
from fluxsae.runs.folder import RunFolder


def directions(n: int = 60, d_model: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed))


def test_nearest_features_are_the_highest_cosines_and_never_the_feature_itself() -> None:
    # cosines to feature 0: 1: 1, 2: 0, 3: -1
    near = nearest_features(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), n=3)
    assert near.indices[0].tolist() == [1, 2, 3]
    assert near.cosines[0].tolist() == pytest.approx([1.0, 0.0, -1.0])


def test_neighbours_of_some_features_are_those_of_all() -> None:
    W_dec = directions(5000, 6)
    every, some = nearest_features(W_dec, n=5), nearest_features(W_dec, torch.tensor([4999, 3]), n=5)
    assert torch.equal(every.indices[[4999, 3]], some.indices)


@pytest.mark.parametrize(("features", "n"), [(None, 60), (None, 0), (torch.tensor([60]), 3), (torch.tensor([-1]), 3)])
def test_neighbours_that_do_not_exist_are_refused(features: torch.Tensor | None, n: int) -> None:
    with pytest.raises(FluxSaeError, match="give"):
        nearest_features(directions(), features, n=n)


def test_alignment_is_1_where_a_feature_writes_what_it_reads() -> None:
    W_dec = torch.nn.functional.normalize(directions(), dim=1)
    assert torch.allclose(encoder_decoder_alignment(3 * W_dec, W_dec), torch.ones(60), atol=1e-6)
    assert torch.allclose(encoder_decoder_alignment(-W_dec, W_dec), -torch.ones(60), atol=1e-6)


def test_the_map_is_the_same_every_time_and_keeps_clusters_together() -> None:
    centres = torch.eye(12)[:3].repeat_interleave(20, dim=0)
    W_dec = centres + 0.05 * directions()
    near = nearest_features(W_dec, n=59)
    first, second = feature_map(W_dec), feature_map(W_dec, near=near)
    assert np.array_equal(first, second)
    assert np.abs(first).max() == pytest.approx(1.0)
    groups = first.reshape(3, 20, 2)
    spread = np.linalg.norm(groups - groups.mean(axis=1, keepdims=True), axis=2).max()
    apart = [np.linalg.norm(groups[i].mean(axis=0) - groups[j].mean(axis=0)) for i in range(3) for j in range(i)]
    assert spread < min(apart)


def test_neighbourhoods_are_named_by_the_word_their_labels_share() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal((-1, 0), 0.05, (20, 2)), rng.normal((1, 0), 0.05, (20, 2))
    labels = [f"red thing{i}" for i in range(20)] + [f"blue thing{i}" for i in range(20)] + [None]
    positions = np.concatenate([left, right, [[0.0, 5.0]]]).astype(np.float32)
    found = find_neighbourhoods(positions, labels, n=2)
    assert sorted((place.name, round(place.x)) for place in found) == [("blue", 1), ("red", -1)]
    assert find_neighbourhoods(positions, [None] * 41) == []


def permuted_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """S of a layer, S of another with the same features in another order plus one of its own, and that order."""
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(100, 8, generator=generator) * (torch.rand(100, 8, generator=generator) < 0.4)
    order = torch.randperm(8, generator=generator)
    own = torch.rand(100, 1, generator=generator) * (torch.rand(100, 1, generator=generator) < 0.4)
    return first, torch.cat([2.5 * first[:, order], own], dim=1), order


def test_layers_are_matched_by_what_fires_and_never_by_equal_index() -> None:
    first, second, order = permuted_pair()
    comparison = compare_layers(first, second)
    assert {(int(left), int(right)) for left, right in comparison.pairs} == {(int(f), i) for i, f in enumerate(order)}
    assert comparison.correlations == pytest.approx(np.ones(8), abs=1e-5)
    assert comparison.only_first.tolist() == []
    assert comparison.only_second.tolist() == [8]
    assert comparison.null_correlation < 0.5


def test_a_comparison_keeps_its_bound_on_disk() -> None:
    first, second, _ = permuted_pair()
    stored = compare_layers(first, second, counterpart=0.75).tensors()
    assert LayerComparison.from_tensors(stored).counterpart == 0.75
    assert (
        LayerComparison.from_tensors({name: stored[name] for name in set(stored) - {"counterpart"}}).counterpart == 0.5
    )


def test_dead_features_take_no_part_in_a_comparison() -> None:
    first, second, _ = permuted_pair()
    first[:, 2] = 0
    comparison = compare_layers(first, second)
    assert 2 not in comparison.pairs[:, 0]
    assert np.isnan(comparison.best_first[2])
    assert len(comparison.pairs) == 7


@pytest.mark.parametrize("candidates", [2, 40])
def test_layers_compared_in_blocks_of_a_stored_matrix_are_matched_as_well_as_at_once(
    candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (torch.rand(60, 23, generator=torch.Generator().manual_seed(seed)).half() for seed in (1, 2))
    second[:, :9] = (second[:, :9] + 3 * first[:, 5:14]) / 4
    correlations = np.corrcoef(first.T.double(), second.T.double())[:23, 23:]
    best = correlations[linear_sum_assignment(correlations.clip(0), maximize=True)].clip(0).sum()
    sizes: list[int] = []
    standardise = layers.normalize

    def counted(columns: torch.Tensor, **options: int) -> torch.Tensor:
        sizes.append(columns.shape[1])
        return standardise(columns, **options)

    for name, value in (("_ROWS", 7), ("_COLUMNS", 4), ("CANDIDATES", candidates), ("normalize", counted)):
        monkeypatch.setattr(layers, name, value)
    comparison = compare_layers(first, second)
    assert max(sizes) == 4
    assert comparison.correlations.sum() == pytest.approx(best, rel=1e-5 if candidates == 40 else 0.1)
    assert {(f + 5, f) for f in range(9)} <= {(int(left), int(right)) for left, right in comparison.pairs}
    assert comparison.correlations == pytest.approx(correlations[tuple(comparison.pairs.T)], abs=1e-6)
    assert comparison.best_first == pytest.approx(correlations.max(1), abs=1e-6)
    assert comparison.best_second == pytest.approx(correlations.max(0), abs=1e-6)
    assert len(np.unique(comparison.pairs[:, 0])) == len(np.unique(comparison.pairs[:, 1])) == len(comparison.pairs)


def test_scores_of_other_images_cannot_be_compared() -> None:
    with pytest.raises(FluxSaeError, match="same images"):
        compare_layers(torch.rand(10, 3), torch.rand(11, 3))
    with pytest.raises(FluxSaeError, match="min_images"):
        compare_layers(torch.zeros(10, 3), torch.rand(10, 3))


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    first, second, _ = permuted_pair()
    comparison, run = compare_layers(first, second), RunFolder(tmp_path)
    run.save_comparison("layer1", "layer3", comparison.tensors())
    loaded = LayerComparison.from_tensors(run.load_comparison("layer1", "layer3"))
    assert np.array_equal(loaded.pairs, comparison.pairs)
    assert np.array_equal(loaded.best_first, comparison.best_first.astype(np.float32), equal_nan=True)
    assert loaded.null_correlation == pytest.approx(comparison.null_correlation)
    with pytest.raises(FluxSaeError, match="pairs"):
        LayerComparison.from_tensors({})


def test_maps_and_comparisons_become_pictures() -> None:
    first, second, _ = permuted_pair()
    W_dec = directions()
    drawn = draw_map(feature_map(W_dec), ["red"] * 30 + [None] * 30, is_alive=[True] * 60, title="map")
    plot = draw_comparison(compare_layers(first, second), first="early", second="late")
    for picture in (drawn, plot):
        assert min(picture.size) > 400
        assert np.asarray(picture).std() > 5


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return build(tmp_path_factory.mktemp("runs") / "synthetic", n_images=40)


def test_the_directions_script_writes_geometry_and_map_and_then_skips(synthetic: Synthetic) -> None:
    config = train.directions.DirectionsConfig(run=synthetic.run.path, n_neighbours=5)
    assert train.directions.main(config).word == "done"
    tensors = synthetic.run.load_directions(HOOKPOINT)
    assert tensors["neighbours"].shape == (len(FEATURES), 5)
    assert tensors["positions"].shape == (len(FEATURES), 2)
    assert tensors["decoder_norms"].tolist() == pytest.approx([1.0] * len(FEATURES), abs=1e-4)
    assert Image.open(synthetic.run.sheet_path(HOOKPOINT, "directions")).size[0] > 400
    assert train.directions.main(config).word == "skipped"


def test_two_runs_of_the_same_images_can_be_compared_and_one_not_with_itself(
    synthetic: Synthetic, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build(tmp_path / "other", n_images=40)
    config = train.compare_layers.CompareLayersConfig(run=synthetic.run.path, other_run=other.run.path)
    train.compare_layers.main(config)
    assert "mean correlation 1.000" in capsys.readouterr().out
    assert synthetic.run.sheet_path(HOOKPOINT, f"compared-with-other-{HOOKPOINT}").is_file()
    with pytest.raises(FluxSaeError, match="with itself"):
        train.compare_layers.main(train.compare_layers.CompareLayersConfig(run=synthetic.run.path))
    third = build(tmp_path / "third", n_images=40, seed=1)
    with pytest.raises(FluxSaeError, match="other images"):
        train.compare_layers.main(
            train.compare_layers.CompareLayersConfig(run=synthetic.run.path, other_run=third.run.path)
        )


def test_scored_hook_points_are_compared_each_with_the_next(tmp_path: Path) -> None:
    run = build(tmp_path / "two", n_images=40).run
    for kind in ("scores", "features", "sae"):
        shutil.copytree(run.path / kind / HOOKPOINT, run.path / kind / "transformer_blocks.1.ff")
    run.save_info(replace(run.load_info(), hookpoints=("transformer_blocks.1.ff", HOOKPOINT)))
    train.directions.main(train.directions.DirectionsConfig(run=run.path))
    comparison = LayerComparison.from_tensors(run.load_comparison("layer1", "layer3"))
    assert len(comparison.pairs) > 0
    assert (comparison.pairs[:, 0] == comparison.pairs[:, 1]).all()
    assert run.sheet_path("layer1", f"compared-with-{HOOKPOINT}").is_file()
