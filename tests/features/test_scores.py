"""S, the sums and the heatmaps: the definition, the merge law, the disk, and what is said of each feature."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxsae.errors import FluxSaeError
from fluxsae.features.analysis import class_counts, describe_features, find_companions, find_families, place_shares
from fluxsae.features.config import AnalysisConfig
from fluxsae.features.scores import (
    ScoreAccumulator,
    ScoreMatrix,
    TopImages,
    fingerprint_metadata,
    max_over_tokens,
    merge_score_files,
)
from fluxsae.features.statistics import HISTOGRAM_EDGES, FeatureStats
from fluxsae.features.top_maps import TopMapCollector, write_heatmaps
from fluxsae.files import load_tensors, save_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.runs.tables import Heatmaps
from fluxsae.sae.acts import SparseActs

GRID = TokenGrid(2, 3)
N_FEATURES = 5
STEPS = (1, 4)


def sparse_acts(seed: int, n_images: int, *, width: int = 2) -> SparseActs:
    """Random acts with ties (few distinct values), and tokens on which nothing fires."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n_images, GRID.n_tokens, N_FEATURES, generator=generator)
    indices = scores.topk(width, dim=-1).indices
    values = torch.randint(0, 4, indices.shape, generator=generator).float() * 0.3
    return SparseActs.from_dense(torch.zeros_like(scores).scatter_(2, indices, values))


def accumulate(images: range, steps: tuple[int, ...] = STEPS) -> ScoreAccumulator:
    accumulator = ScoreAccumulator(N_FEATURES, grid=GRID, steps=STEPS)
    for step in steps:
        for i in images:
            accumulator.update([i], sparse_acts(100 * i + step, 1), step=step)
    return accumulator


def test_scores_by_hand() -> None:
    # Token 0: feature 1 at 2; token 1: feature 1 at 3, feature 0 at 1; token 2: feature 1 at 3 again.
    acts = SparseActs.from_dense(torch.tensor([[[0.0, 2.0, 0.0], [1.0, 3.0, 0.0], [0.0, 3.0, 0.0]]]))
    scores, tokens = max_over_tokens(acts)
    assert scores.tolist() == [[1.0, 3.0, 0.0]]
    assert tokens.tolist() == [[1, 1, 0]]  # the tie of tokens 1 and 2 goes to 1; the silent feature 2 has 0


@given(st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sparse_scores_equal_the_dense_maximum_and_its_first_token(seed: int) -> None:
    acts = sparse_acts(seed, 3)
    scores, tokens = max_over_tokens(acts)
    full = acts.dense()
    assert torch.equal(scores, full.amax(1))
    first = (full == full.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(tokens.long(), first.where(scores > 0, 0))


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_scores_never_fall_when_tokens_are_added(seed: int) -> None:
    acts = sparse_acts(seed, 2)
    fewer = SparseActs.from_dense(acts.dense()[:, :4])
    assert (max_over_tokens(acts)[0] >= max_over_tokens(fewer)[0]).all()


def assert_equal_results(a: ScoreAccumulator, b: ScoreAccumulator) -> None:
    assert a.image_ids == b.image_ids
    assert torch.equal(a.scores(), b.scores())
    assert torch.equal(a.argmax_tokens(), b.argmax_tokens())
    for name, tensor in a.stats().tensors().items():
        other = b.stats().tensors()[name]
        if tensor.dtype == torch.float64:
            assert torch.allclose(tensor, other, rtol=1e-12, atol=1e-12), name
        else:
            assert torch.equal(tensor, other), name


@given(st.integers(0, 6))
@settings(max_examples=7, deadline=None)
def test_two_halves_merged_equal_one_pass_whatever_the_order(cut: int) -> None:
    whole, first, second = accumulate(range(6)), accumulate(range(cut)), accumulate(range(cut, 6))
    assert_equal_results(first.merge(second), whole)
    assert_equal_results(second.merge(first), whole)


def test_steps_merged_equal_one_pass() -> None:
    early, late = accumulate(range(4), steps=(1,)), accumulate(range(4), steps=(4,))
    assert_equal_results(early.merge(late), accumulate(range(4)))
    assert_equal_results(late.merge(early), accumulate(range(4)))


def test_an_image_and_step_scored_twice_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="Image 2 was scored at step 1 before"):
        accumulate(range(3)).merge(accumulate(range(2, 4)))


def test_acts_off_the_grid_are_refused() -> None:
    accumulator = ScoreAccumulator(N_FEATURES, grid=TokenGrid(2, 2), steps=STEPS)
    with pytest.raises(FluxSaeError, match="do not fit"):
        accumulator.update([0], sparse_acts(0, 1), step=1)


def test_sums_are_those_of_the_dense_acts() -> None:
    acts = sparse_acts(3, 4)
    accumulator = ScoreAccumulator(N_FEATURES, grid=GRID, steps=STEPS)
    accumulator.update([0, 1, 2, 3], acts, step=4)
    full, stats = acts.dense().double().flatten(0, 1), accumulator.stats()
    assert stats.n_tokens == 24
    assert stats.counts.tolist() == (full > 0).sum(0).tolist()
    assert torch.allclose(stats.sums, full.sum(0))
    assert torch.allclose(stats.square_sums, full.square().sum(0))
    assert torch.allclose(stats.step_profile, torch.stack([torch.zeros(N_FEATURES).double(), full.mean(0)]))
    assert torch.equal(stats.histogram.sum(1), stats.counts)
    assert torch.allclose(stats.places.sum(1), stats.sums)
    assert torch.allclose(stats.maxima.double(), full.amax(0))


def stats_of(values: list[float], cells: list[int]) -> FeatureStats:
    """Stats of one feature that fired with these values in these cells."""
    stats = FeatureStats.empty(1, steps=(0,))
    features = torch.zeros(len(values), dtype=torch.int64)
    stats.add(0, features, torch.tensor(values), torch.tensor(cells), n_tokens=100)
    return stats


def test_quantiles_lie_within_a_bin_of_the_exact_ones() -> None:
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0)).mul(6).exp().div(20)
    stats = stats_of(values.tolist(), [0] * 5000)
    levels = [0.1, 0.5, 0.9, 1.0]
    exact = values.double().quantile(torch.tensor(levels).double())
    ratio = stats.quantiles(levels)[0] / exact
    assert ((ratio > 2**-0.25) & (ratio < 2**0.25)).all()
    assert stats.quantiles([1.0])[0, 0] == stats.maxima[0]


def test_spatial_spread_is_0_in_one_place_and_1_everywhere() -> None:
    assert stats_of([1.0, 2.0], [5, 5]).spatial_spread.item() == pytest.approx(0.0)
    assert stats_of([1.0] * 64, list(range(64))).spatial_spread.item() == pytest.approx(1.0)


def test_stats_survive_the_disk(tmp_path: Path) -> None:
    stats = accumulate(range(3)).stats()
    stats.save(tmp_path / "stats.safetensors")
    loaded = FeatureStats.load(tmp_path / "stats.safetensors")
    assert (loaded.steps, loaded.n_images) == (stats.steps, 3)
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in stats.tensors().items())


# The matrix on disk


def write_part(path: Path, accumulator: ScoreAccumulator, extra: dict[str, torch.Tensor] | None = None) -> Path:
    save_tensors(path, {"S": accumulator.scores(), "argmax_token": accumulator.argmax_tokens(), **(extra or {})})
    return path


def test_parts_make_the_matrix(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / f"{i}", accumulate(range(3 * i, 3 * i + 3))) for i in range(2)]
    merge_score_files(tmp_path / "scores.safetensors", parts, steps=STEPS, grid=GRID)
    matrix, whole = ScoreMatrix.load(tmp_path / "scores.safetensors"), accumulate(range(6))
    assert matrix.values.dtype == np.float16
    assert matrix.argmax_token.dtype == np.uint8
    assert (matrix.steps, matrix.grid) == (STEPS, GRID)
    assert torch.equal(matrix.stored(), whole.scores().half())
    assert np.array_equal(matrix.argmax_token, whole.argmax_tokens().numpy())
    assert torch.equal(matrix.feature(2), matrix.stored()[:, 2].float())
    with pytest.raises(FluxSaeError, match="features go from 0 to 4"):
        matrix.feature(5)


def test_a_matrix_names_its_sae_where_all_of_its_parts_do(tmp_path: Path) -> None:
    parts = [write_part(tmp_path / f"{i}", accumulate(range(3 * i, 3 * i + 3))) for i in range(2)]

    def merged(*fingerprints: str | None) -> str | None:
        for part, fingerprint in zip(parts, fingerprints, strict=True):
            save_tensors(part, load_tensors(part), metadata=fingerprint_metadata(fingerprint))
        merge_score_files(tmp_path / "s", parts, steps=STEPS, grid=GRID)
        return ScoreMatrix.load(tmp_path / "s").sae_fingerprint

    assert [merged("a", "a"), merged(None, None), merged(None, "a"), merged("b", "a")] == ["a", None, None, None]


def test_scores_that_overflow_fp16_are_kept_in_fp32_and_tiny_ones_still_fire(tmp_path: Path) -> None:
    for highest, dtype in ((1e5, np.float32), (1e3, np.float16)):
        part = tmp_path / f"part-{highest}"
        save_tensors(part, {"S": torch.tensor([[highest, 1e-12, 0.0]]), "argmax_token": torch.zeros(1, 3).int()})
        merge_score_files(tmp_path / "s", [part], steps=STEPS, grid=GRID)
        values = ScoreMatrix.load(tmp_path / "s").values
        assert values.dtype == dtype
        assert (np.asarray(values) > 0).tolist() == [[True, True, False]]


def test_top_images_are_the_highest_with_ties_to_the_lower_id() -> None:
    scores = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0], [3.0, 0.0]])
    at_once = TopImages.empty(2, 3).updated(torch.arange(4), scores)
    in_parts = TopImages.empty(2, 3).updated(torch.arange(2), scores[:2]).updated(torch.arange(2, 4), scores[2:])
    for top in (at_once, in_parts):
        assert top.image_ids.tolist() == [[1, 3, 0], [2, -1, -1]]
        assert top.scores.tolist() == [[3.0, 3.0, 1.0], [2.0, 0.0, 0.0]]


def test_heatmaps_of_the_final_best_images_are_complete(tmp_path: Path) -> None:
    n_images, n_top = 30, 3
    collector = TopMapCollector(N_FEATURES, n_top=n_top, n_tokens=GRID.n_tokens)
    accumulator = ScoreAccumulator(N_FEATURES, grid=GRID, steps=STEPS)
    full, parts = [], []
    for start in range(0, n_images, 5):
        ids = list(range(start, start + 5))
        acts = {step: sparse_acts(1000 * start + step, 5) for step in STEPS}
        for step, part in acts.items():
            accumulator.update(ids, part, step=step)
            collector.update(ids, part)
        collector.complete(ids, accumulator.scores(ids))
        full.append(torch.stack([part.dense() for part in acts.values()]).amax(0))
        parts.append(tmp_path / f"part-{start}")
        save_tensors(parts[-1], collector.pop())
    top = TopImages.empty(N_FEATURES, n_top).updated(torch.arange(n_images), accumulator.scores())
    write_heatmaps(tmp_path / "h", parts, top, scale=accumulator.stats().maxima, grid=GRID)
    maps, acts_of = Heatmaps.load(tmp_path / "h"), torch.cat(full)
    for feature in range(N_FEATURES):
        found = maps.acts(feature)
        assert list(found) == [i for i in top.image_ids[feature].tolist() if i >= 0]
        for image_id, values in found.items():
            exact = acts_of[image_id, :, feature].numpy()
            assert np.abs(values - exact).max() <= accumulator.stats().maxima[feature] / 255 / 2 + 1e-6
    pairs = {
        pair
        for part in map(load_tensors, parts)
        for pair in zip(part["map_image"].tolist(), part["map_feature"].tolist(), strict=True)
    }
    assert len(pairs) < n_images * N_FEATURES / 3  # most images were never among a feature's best, and are not stored


def test_heatmaps_on_disk_cost_what_fires_and_pass_over_long_gaps(tmp_path: Path) -> None:
    grid = TokenGrid(30, 40)
    entries = {
        (0, 1, 0): 4.0,
        (0, 1, 1): 2.0,
        (0, 1, 1199): 1.0,
        (3, 1, 255): 3.0,
        (3, 4, 256): 0.001,
        (3, 4, 600): 1.0,
    }
    keys = torch.tensor(list(entries), dtype=torch.int32)
    names = ("map_image", "map_feature", "map_token")
    values = torch.tensor(list(entries.values()))
    save_tensors(tmp_path / "part", {**dict(zip(names, keys.T, strict=True)), "map_value": values})
    scores = torch.zeros(4, 6)
    scores[0, 1], scores[3, 1], scores[3, 4] = 4.0, 3.0, 1.0
    top = TopImages.empty(6, 3).updated(torch.arange(4), scores)
    write_heatmaps(tmp_path / "h", [tmp_path / "part"], top, scale=scores.amax(0), grid=grid)
    maps = Heatmaps.load(tmp_path / "h")
    assert maps.fits()
    assert maps.features.tolist() == [1, 4]
    # 1 + 1 + 5 (1198 is 4 * 255 + 178), then 2 (256 is 255 + 1); then 2 (257) and 2 (344)
    assert maps.starts.tolist() == [0, 7, 9, 9, 13, 13, 13]
    found = {(i, f, t): a for f in range(6) for i, acts in maps.acts(f).items() for t, a in enumerate(acts) if a > 0}
    assert set(found) == set(entries), "an act far below the maximum is still shown"
    assert all(found[key] == pytest.approx(entries[key], abs=4 / 255) for key in entries)


# What is said of the features


def test_features_that_fire_on_the_same_images_are_companions_and_a_family() -> None:
    scores = torch.zeros(8, 4)
    scores[:4, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    scores[:4, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0]) * 10
    scores[4:, 2] = 1.0
    companions = find_companions(TopImages.empty(4, 8).updated(torch.arange(8), scores), n_images=8, n_neighbours=2)
    assert companions.features == [[1], [0], [], []]
    assert companions.similarities[0] == pytest.approx([1.0])
    assert find_families(companions, similarity=0.9) == [0, 0, -1, -1]


def test_every_feature_gets_its_row(tmp_path: Path) -> None:
    accumulator = accumulate(range(6))
    part = write_part(tmp_path / "part", accumulator)
    merge_score_files(tmp_path / "s", [part], steps=STEPS, grid=GRID)
    config = AnalysisConfig(n_top_images=2, very_common_from=0.3)
    matrix, stats = ScoreMatrix.load(tmp_path / "s"), accumulator.stats()
    table = describe_features(matrix, stats, config)
    assert len(table) == N_FEATURES
    assert table.steps == [*STEPS]
    assert table.histogram_edges == list(HISTOGRAM_EDGES)
    assert sum(class_counts(table).values()) == N_FEATURES
    for row in table:
        best = matrix.feature(row.feature).argsort(descending=True, stable=True)[:2].tolist()
        assert row.top_images == best
        assert row.top_tokens == [int(matrix.argmax_token[i, row.feature]) for i in best]
        assert row.density == pytest.approx(float(stats.density[row.feature]))
        assert row.feature_class == ("very common" if row.density >= 0.3 else "common")
        json.dumps(row.histogram)


def test_a_feature_that_never_fires_is_dead(tmp_path: Path) -> None:
    accumulator = ScoreAccumulator(2, grid=GRID, steps=(0,))
    acts = torch.zeros(1, 6, 2)
    acts[0, 2, 0] = 0.5
    accumulator.update([0], SparseActs.from_dense(acts), step=0)
    merge_score_files(tmp_path / "s", [write_part(tmp_path / "part", accumulator)], steps=(0,), grid=GRID)
    table = describe_features(ScoreMatrix.load(tmp_path / "s"), accumulator.stats(), AnalysisConfig())
    assert [row.feature_class for row in table] == ["very common", "dead"]
    assert table[1].top_images == []
    assert table[1].max_act == table[1].mean_act == 0.0
    assert all(np.isfinite(table[1].quantiles))


@pytest.mark.parametrize("changes", [{"rare_below": 0.0}, {"very_common_from": 2.0}, {"n_top_images": 0}])
def test_impossible_bounds_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(FluxSaeError, match="must be"):
        AnalysisConfig(**changes)  # type: ignore[arg-type]


def test_shares_of_middle_and_border_by_hand() -> None:
    corner, middle, nothing = torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(4, 4)
    corner[0, 3], middle[1:3, 1:3], middle[0, 0] = 2.0, 1.0, 4.0
    places = torch.stack([torch.ones(4, 4), corner, middle, nothing]).flatten(1)
    centres, borders = place_shares(places, TokenGrid(4, 4))
    assert centres == [0.25, 0.0, 0.5, None]
    assert borders == [0.75, 1.0, 0.5, None]
    assert place_shares(torch.ones(2, 8), TokenGrid(1, 20)) == ([None, None], [None, None])
