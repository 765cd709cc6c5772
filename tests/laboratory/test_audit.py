"""The audit and the pairs on planted data whose answer is known, and on shuffled data that gives nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_flux import SETTINGS

from fluxsae.flux import FluxPipeline
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.laboratory.audit import (
    PCA,
    PERMUTED,
    TRAINED,
    UNTRAINED,
    AuditReport,
    massive_channels,
    measure,
    rank_with_truth,
    separation,
)  # fmt: skip
from fluxsae.laboratory.audit_tables import audit_text
from fluxsae.laboratory.dictionaries import oracle_sae, pca_sae, permuted_decoder, trained_sae, untrained_sae
from fluxsae.laboratory.halves import Halves, split_by_prompt
from fluxsae.laboratory.pairs import draw_pairs, feature_responses, pass_draws, run_pairs
from fluxsae.laboratory.sample import Sample, Truth
from fluxsae.laboratory.truths import CONCEPTS, Concept, coverage
from fluxsae.miniature.scenes import ATTRIBUTES, read_scene, render_scene, sample_scene
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig

RED = Concept("colour", "red")
GRID = TokenGrid(8, 8)


@pytest.fixture(scope="module")
def planted() -> Sample:
    """90 drawn scenes whose tokens hold one random orthogonal direction a concept, and noise."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(90)]
    covers = np.stack([coverage(scene, GRID) for scene in scenes])
    directions = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0)))[0][: len(CONCEPTS)]
    x = torch.from_numpy(covers).float().transpose(1, 2) @ (6 * directions)
    x = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    prompts = tuple(f"prompt {place}" for place in range(len(scenes)))
    embeddings = torch.nn.functional.normalize(torch.from_numpy(Halves.plan(
        scenes, split_by_prompt(prompts), draws=1, seed=0).truth).float(), dim=1)  # fmt: skip
    truth = Truth(Halves.plan(scenes, split_by_prompt(prompts), draws=1, seed=0), covers)
    return Sample(prompts, x[:, None], (0,), torch.tensor([0.5]), embeddings, truth)


@pytest.fixture(scope="module")
def like(planted: Sample) -> SparseAutoencoder:
    rows = planted.x.flatten(0, 2)
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=48, n_features=80, k=6))
    sae.input_mean.copy_(rows.mean(0))
    sae.input_scale.copy_((rows - rows.mean(0)).square().mean().sqrt())
    return sae.requires_grad_(False)


def test_the_planted_oracle_knows_the_scenes_and_random_weights_know_less(
    planted: Sample, like: SparseAutoencoder
) -> None:
    oracle = measure(oracle_sae(like, planted), planted)
    random = measure(untrained_sae(like, planted.x.flatten(0, 2), seed=3), planted)
    assert oracle["concept AUC"] > 0.97
    assert oracle["IoU"] > 0.7
    assert random["concept AUC"] < oracle["concept AUC"] - 0.1
    assert random["IoU"] < oracle["IoU"] - 0.1


def test_shuffled_images_know_nothing(planted: Sample, like: SparseAutoencoder) -> None:
    assert planted.truth is not None
    order = np.random.default_rng(5).permutation(len(planted.x))
    shuffled = replace(planted, x=planted.x[order])
    oracle = oracle_sae(like, planted)
    found = measure(oracle, shuffled)
    assert abs(found["concept AUC"] - 0.5) < 0.08
    assert found["IoU"] < measure(oracle, planted)["IoU"] - 0.3


def test_training_anew_rebuilds_better_than_no_training_and_than_another_decoder(
    planted: Sample, like: SparseAutoencoder
) -> None:
    rows = planted.x.flatten(0, 2)
    trained = trained_sae(like, rows, TrainConfig(epochs=3, lr=3e-3, seed=1))
    fvu = {
        TRAINED: measure(trained, planted)["FVU"],
        UNTRAINED: measure(untrained_sae(trained, rows, seed=2), planted)["FVU"],
        PERMUTED: measure(permuted_decoder(trained, seed=0), planted)["FVU"],
        PCA: measure(pca_sae(trained, rows), planted)["FVU"],
    }
    assert fvu[TRAINED] < min(fvu[UNTRAINED], fvu[PERMUTED])
    again = trained_sae(like, rows, TrainConfig(epochs=3, lr=3e-3, seed=1))
    assert torch.equal(trained.W_enc, again.W_enc)
    assert pca_sae(trained, rows).config.k == 6


def values(trained: list[float], untrained: list[float], name: str = "FVU") -> dict[str, list[dict[str, float]]]:
    return {TRAINED: [{name: value} for value in trained], UNTRAINED: [{name: value} for value in untrained]}


def test_separation_is_in_standard_deviations_of_the_seeds_and_positive_where_trained_is_better() -> None:
    assert separation(values([0.1, 0.2, 0.3], [0.5, 0.7]), "FVU", UNTRAINED) == pytest.approx(4.0)  # smaller is better
    assert separation(values([0.1, 0.2, 0.3], [0.5, 0.7], "IoU"), "IoU", UNTRAINED) == pytest.approx(-4.0)
    assert separation(values([10.0, 10.0], [10.0, 10.0], "L0"), "L0", UNTRAINED) == 0
    assert separation(values([10.0, 10.0], [2.0, 3.0], "L0"), "L0", UNTRAINED) == np.inf
    assert np.isnan(separation(values([0.1], [0.5]), "FVU", UNTRAINED))
    assert np.isnan(separation(values([0.1, 0.2], [0.5]), "FVU", PCA))


def test_a_measure_of_shuffled_seeds_does_not_separate_and_is_marked() -> None:
    rng = np.random.default_rng(0)
    same = []
    for _ in range(20):
        fvu, alike = rng.normal([[0.1], [0.9]], 0.01, (2, 5)), rng.normal(size=(2, 5))
        same.append(
            {
                kind: tuple({"FVU": f, "coherence": c} for f, c in zip(fvu[row], alike[row], strict=True))
                for row, kind in enumerate((TRAINED, UNTRAINED))
            }
        )
    marked = [AuditReport("here", 9, each, (), {}).unseparated() for each in same]
    assert all("FVU" not in names for names in marked)
    assert sum("coherence" in names for names in marked) >= 18
    assert "coherence†" in audit_text(AuditReport("here", 9, same[0], (), {}))


def test_ranks_are_compared_with_what_dictionaries_know() -> None:
    known = {TRAINED: [{"FVU": 0.3 - a, "concept AUC": a, "coherence": c} for a, c in ((0.9, 1), (0.8, 2), (0.7, 3))]}
    assert rank_with_truth(known, "FVU") == pytest.approx(1.0)  # less FVU where more is known
    assert rank_with_truth(known, "coherence") == pytest.approx(-1.0)
    assert np.isnan(rank_with_truth({TRAINED: [{"L0": 5.0, "concept AUC": 0.5}] * 4}, "L0"))


def test_massive_channels_are_found_and_only_they() -> None:
    x = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert massive_channels(x) == ()
    x[:, 7] *= 40
    x[:, 3] += 90
    assert massive_channels(x) == (3, 7)


# Pairs


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_partners_differ_in_their_attribute_alone(attribute: str) -> None:
    concept = Concept(attribute, ATTRIBUTES[attribute][-1])
    for seed in range(3):
        pairs = draw_pairs(concept, seed)
        assert (concept.attribute, concept.value) in pairs.base.concepts()
        for name, partner in pairs.partners.items():
            differing = {kind for kind, _ in pairs.base.concepts() ^ partner.concepts()}
            assert differing == {name}
        base, other = pairs.base.objects[0], pairs.partners["colour"].objects[0]
        assert (base.x, base.y, base.radius) == (other.x, other.y, other.radius)
    assert read_scene(Image.fromarray(render_scene(pairs.base))) == pairs.base


def test_a_response_is_a_change_by_more_than_half_and_a_rise_does_not_count_for_the_own_attribute() -> None:
    names = list(ATTRIBUTES)
    own = names.index("colour")
    acts = np.ones((3, 1 + len(names)))
    acts[0, 1 + own] = 0.4  # falls by more than half
    acts[1, 1 + own] = 3.0  # rises
    acts[1, 1 + names.index("size")] = 1.7  # another attribute's rise counts
    acts[2] = 0.0  # silent
    found = feature_responses(acts, "colour")
    assert found[:, own].tolist() == [True, False, False]
    assert found[1, names.index("size")]
    assert found.sum() == 2


def test_planted_responses_pass_and_shuffled_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    names = list(ATTRIBUTES)
    concepts = [Concept(name, ATTRIBUTES[name][0]) for name in names] * 5
    planted_responses = []
    for concept in concepts:
        found = rng.random((24, len(names))) < 0.1
        found[:, names.index(concept.attribute)] = rng.random(24) < 0.95
        planted_responses.append(found)
    draws = pass_draws(planted_responses, concepts, seed=0)
    assert draws["passes"][0] > 0.95
    shuffled = [rng.permuted(found, axis=1) for found in planted_responses]
    nothing = pass_draws(shuffled, concepts, seed=0)
    assert nothing["passes"][0] < 0.1
    assert np.quantile(draws["passes"] - nothing["passes"], 0.025) > 0.5
    assert pass_draws([], [], seed=0) == {}


def test_saes_without_a_matched_feature_have_no_share(tiny_flux: FluxPipeline, like: SparseAutoencoder) -> None:
    here = HookPoint.parse("layer1")
    report = run_pairs(tiny_flux, here, (like, like), ({}, {}), step=1, settings=SETTINGS)
    assert (report.trained.n_features, report.trained.passes, report.difference) == (0, None, None)
