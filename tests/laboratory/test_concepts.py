"""Features against true concepts, in a planted world where the answer is known."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.intervals import auc_table
from fluxsae.evaluation.stream import ActivationBatch, ImageSet
from fluxsae.flux import FluxPipeline
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory import concepts as module
from fluxsae.laboratory.concept_report import ConceptReport
from fluxsae.laboratory.concept_tables import concepts_text
from fluxsae.laboratory.concepts import _Gathered, evaluate_concepts
from fluxsae.laboratory.halves import Halves, fold_by_prompt, split_by_prompt
from fluxsae.laboratory.localisation import best_threshold, intersection_over_union, pointing
from fluxsae.laboratory.matching import find_matches, label_names
from fluxsae.laboratory.probes import TokenMoments, pooled_probe
from fluxsae.laboratory.readouts import principal_components
from fluxsae.laboratory.truths import CONCEPTS, Concept, coverage, truth_table
from fluxsae.miniature.scenes import Scene, SceneObject, caption_scene, render_scene, sample_scene
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder

HERE = HookPoint.parse("layer1")
GRID = TokenGrid(16, 16)
SETTINGS = GenerationSettings(height=128, width=128, num_inference_steps=4, max_sequence_length=8)
D = 48


def planted_directions() -> torch.Tensor:
    """One random orthogonal direction for each concept, so that no raw channel is a concept."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(D, D, generator=generator))[0][: len(CONCEPTS)]


def planted_sae() -> SparseAutoencoder:
    """Feature f reads concept f; the rest read noise."""
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=D, n_features=64), seed=1)
    with torch.no_grad():
        sae.W_enc[: len(CONCEPTS)] = planted_directions()
        sae.b_enc.fill_(-0.2)
    return sae


class World:
    """Stands in for FLUX: every image is a drawn scene, and its tokens say what is where, in planted directions."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(1)
        self.scenes = [sample_scene(rng, held_out=None) for _ in range(count)]
        self.images = ImageSet(tuple(caption_scene(scene, rng, keep=1.0) for scene in self.scenes), tuple(range(count)))
        self.passes = 0

    def iter_activations(
        self, pipe: object, images: ImageSet, steps: dict, *, with_pictures: bool = False, **_: object
    ) -> Iterator[ActivationBatch]:
        self.passes += 1
        generator = torch.Generator().manual_seed(2)
        for start in range(0, len(images), 16):
            rows = range(start, min(start + 16, len(images)))
            covers = np.stack([coverage(self.scenes[row], GRID) for row in rows])
            clean = torch.einsum("ict,cd->itd", torch.from_numpy(covers).float(), planted_directions())
            x = clean[:, None].repeat(1, len(steps[HERE]), 1, 1)
            x = x + 0.06 * torch.randn(x.shape, generator=generator)
            pictures = [Image.fromarray(render_scene(self.scenes[row])) for row in rows] if with_pictures else []
            yield ActivationBatch(rows, {HERE: x}, pictures)


@pytest.fixture(scope="module")
def planted(tiny_flux: FluxPipeline) -> tuple[ConceptReport, World]:
    world = World(150)
    labels = [concept.value for concept in CONCEPTS] + [None] * (64 - len(CONCEPTS))
    labels[0] = "a wrong label"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "iter_activations", world.iter_activations)
        report = evaluate_concepts(
            tiny_flux, {HERE: planted_sae()}, world.images, {HERE: [3]}, settings=SETTINGS, labels={HERE: labels},
            draws=50,
        )[HERE]  # fmt: skip
    return report, world


def test_the_planted_feature_is_found_for_every_concept(planted: tuple[ConceptReport, World]) -> None:
    report, _ = planted
    assert len(report.concepts) >= 24
    for score in report.concepts:
        assert score.methods["SAE feature"].candidate == CONCEPTS.index(score.concept), score.concept
        assert score.methods["SAE feature"].auc.value > 0.98


def test_features_reach_the_ceiling_and_baselines_do_not(planted: tuple[ConceptReport, World]) -> None:
    report, _ = planted
    assert report.ratio["SAE feature"].value > 0.97
    assert report.ratio["linear probe"].value == pytest.approx(1.0)
    for baseline in ("raw channel", "PCA component", "random direction"):
        assert report.ratio[baseline].value < report.ratio["SAE feature"].low
    assert report.ratio["SAE feature"].low <= report.ratio["SAE feature"].value <= report.ratio["SAE feature"].high


def test_planted_features_fire_where_the_concept_is(planted: tuple[ConceptReport, World]) -> None:
    for score in planted[0].concepts:
        feature = score.methods["SAE feature"]
        assert feature.iou is not None
        assert feature.pointing is not None
        assert feature.iou.value > 0.7, score.concept
        assert feature.pointing.value > 0.95, score.concept
        assert score.methods["linear probe"].iou is not None


def test_matches_and_labels_are_counted(planted: tuple[ConceptReport, World]) -> None:
    report, _ = planted
    planted_matches = {f: c for f, c in report.matches.items() if f < len(CONCEPTS)}
    assert all(CONCEPTS[feature] == concept for feature, concept in planted_matches.items())
    assert report.n_matched == len(report.matches) >= 24
    assert report.label_accuracy is not None
    named = sum(feature in planted_matches and feature != 0 for feature in range(len(CONCEPTS)))
    assert report.label_accuracy.value == pytest.approx(named / report.n_matched)
    assert report.matched_share["SAE feature"] == pytest.approx(report.n_matched / report.n_alive)


def test_images_are_looked_at_twice_and_never_held(planted: tuple[ConceptReport, World]) -> None:
    assert planted[1].passes == 2


def test_the_report_is_text_and_json(planted: tuple[ConceptReport, World]) -> None:
    import json

    report, _ = planted
    text = concepts_text(report)
    assert "colour red" in text
    assert "linear probe" in text
    restored = json.loads(json.dumps(report.to_dict()))
    assert restored["ratio"]["SAE feature"]["value"] == pytest.approx(report.ratio["SAE feature"].value)
    assert len(restored["concepts"]) == len(report.concepts)


def test_pictures_that_cannot_be_read_are_refused(tiny_flux: FluxPipeline) -> None:
    world = World(8)
    world.scenes = [Scene((), "black")] * 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "iter_activations", world.iter_activations)
        with pytest.raises(FluxSaeError, match="0 show scenes that can be read"):
            evaluate_concepts(tiny_flux, {HERE: planted_sae()}, world.images, {HERE: [1]}, settings=SETTINGS)


def test_images_of_one_prompt_stay_in_one_half() -> None:
    prompts = [f"prompt {index % 20}" for index in range(100)]
    is_first = split_by_prompt(prompts)
    assert is_first.sum() == 50
    for prompt in set(prompts):
        assert len({bool(is_first[i]) for i, one in enumerate(prompts) if one == prompt}) == 1


def test_folds_cut_the_first_half_by_prompt() -> None:
    prompts = [f"prompt {index % 20}" for index in range(100)]
    is_first = split_by_prompt(prompts)
    folds = fold_by_prompt(prompts, is_first, n=3)
    assert set(folds[~is_first]) == {-1}
    assert set(folds[is_first]) == {0, 1, 2}
    for prompt in set(prompts):
        assert len({int(folds[i]) for i, one in enumerate(prompts) if one == prompt}) == 1


def test_a_probe_of_noise_is_no_better_than_chance_by_cross_validation() -> None:
    rng = np.random.default_rng(0)
    noise, truth = rng.normal(size=(80, 40)), np.arange(80) % 2
    assert 0.25 < pooled_probe(noise, truth, noise).validated_auc < 0.75
    one = _Gathered(planted_sae(), [TokenMoments(planted_sae()) for _ in range(3)], 0)
    x = torch.randn(60, 1, 4, D, generator=torch.Generator().manual_seed(0))
    folds, shown = np.arange(60) % 3, np.arange(60) // 3 % 2
    for image, fold, shows in zip(x, folds, shown, strict=True):
        one.moments[fold].update(image, np.full((len(CONCEPTS), 4), float(shows)))
    one.finish_probe()
    held_out = auc_table(one.held_out_scores(x, folds), shown[:, None])[0, 0]
    fitted = auc_table(one.readouts["token probe"].pooled(x).amax(1).numpy(), shown[:, None])[0, 0]
    assert fitted > 0.7 > held_out


def test_merged_moments_are_those_of_all_tokens() -> None:
    parts = [TokenMoments(planted_sae()) for _ in range(2)]
    whole = TokenMoments(planted_sae())
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        x, covers = torch.randn(2, 8, D, generator=generator), np.random.default_rng(1).random((len(CONCEPTS), 8))
        part.update(x, covers)
        whole.update(x, covers)
    merged = TokenMoments.merged(parts)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.product, whole.product)
    torch.testing.assert_close(merged.concept_total, whole.concept_total)


def a_thing(**changes: object) -> SceneObject:
    values = dict(
        thing="square", colour="red", texture="solid", size="large", position="left", x=32.0, y=64.0, radius=25.0
    )
    return SceneObject(**{**values, **changes})


def test_a_concept_covers_its_objects_and_the_background_the_rest() -> None:
    scene = Scene((a_thing(), a_thing(thing="circle", x=96.0, position="right")), "gray")
    covers = dict(zip(CONCEPTS, coverage(scene, GRID), strict=True))
    red, square, gray = (
        covers[Concept(*pair)] for pair in (("colour", "red"), ("thing", "square"), ("background", "gray"))
    )
    assert square.reshape(16, 16)[8, 4] == 1.0
    assert square.reshape(16, 16)[8, 12] == 0.0
    assert red.reshape(16, 16)[8, 12] == 1.0
    np.testing.assert_allclose(red + gray, 1.0, atol=1e-6)
    assert covers[Concept("colour", "blue")].max() == 0.0


def test_the_truth_table_names_what_is_shown() -> None:
    row = truth_table([Scene((a_thing(),), "gray")])[0]
    assert {str(concept) for concept, shown in zip(CONCEPTS, row, strict=True) if shown} == {
        "thing square", "colour red", "texture solid", "size large", "position left", "background gray",
    }  # fmt: skip


def test_overlap_and_pointing_on_hand_computed_maps() -> None:
    maps = np.array([[0.9, 0.6, 0.1, 0.0], [0.0, 0.2, 0.8, 0.1]])
    covers = np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    # above 0.5: {0, 1} against {0} is 1/2; {2} against {0, 1} is 0
    np.testing.assert_allclose(intersection_over_union(maps, covers, threshold=0.5), [0.5, 0.0])
    np.testing.assert_allclose(pointing(maps, covers), [1.0, 0.0])
    np.testing.assert_allclose(pointing(np.zeros_like(maps), covers), [0.0, 0.0])  # a silent feature points nowhere
    assert np.isnan(intersection_over_union(maps, np.zeros_like(covers), threshold=0.5)).all()


def test_the_best_threshold_separates_the_concept_where_it_can() -> None:
    rng = np.random.default_rng(0)
    covers = (rng.random((30, 64)) < 0.2).astype(float)
    maps = covers * 2 + rng.random((30, 64))
    threshold = best_threshold(maps, covers, everywhere=maps)
    assert intersection_over_union(maps, covers, threshold=threshold).mean() > 0.9


def test_a_concept_on_most_of_the_picture_has_its_threshold_too() -> None:
    covers = np.tile(np.arange(64) < 60, (30, 1)).astype(float)
    maps = covers + 0.5 * np.random.default_rng(0).random((30, 64))
    threshold = best_threshold(maps, covers, everywhere=maps)
    assert intersection_over_union(maps, covers, threshold=threshold).mean() > 0.95


def test_a_sparse_map_may_also_fire_everywhere() -> None:
    covers = np.ones((30, 64))
    maps = (np.arange(64) == 5) * np.ones((30, 1))
    threshold = best_threshold(maps, covers, everywhere=maps)
    assert intersection_over_union(maps, covers, threshold=threshold).mean() == 1


def test_principal_components_come_from_the_first_half_however_the_images_are_batched() -> None:
    gathered = [_Gathered(planted_sae(), [TokenMoments(planted_sae())], 0) for _ in range(2)]
    x = torch.randn(12, 1, 8, D, generator=torch.Generator().manual_seed(0))
    is_first = np.arange(12) % 2 == 0
    x[~is_first] *= 100
    for one, size in zip(gathered, (3, 12), strict=True):
        for start in range(0, 12, size):
            one.add(x[start : start + size], is_first[start : start + size])
        one.finish()
    some, all_at_once = (one.scores("PCA component") for one in gathered)
    np.testing.assert_allclose(some, all_at_once, rtol=1e-3)
    basis = principal_components(planted_sae(), x[is_first].flatten(0, 2)).pooled(x)[:, 0]
    np.testing.assert_allclose(some, basis.numpy(), rtol=1e-3)


def test_matches_come_the_surest_first() -> None:
    halves = Halves.plan(
        [Scene((a_thing(),), "gray"), Scene((a_thing(colour="blue"),), "gray")] * 20, np.arange(40) % 4 < 2,
        draws=2, seed=0,
    )  # fmt: skip
    is_red = np.tile([1.0, 0.0], 20)
    unsure = is_red.copy()
    unsure[:8:2] = 0.0
    matches, _ = find_matches(halves, np.stack([unsure, is_red], axis=1))
    assert list(matches) == [1, 0]


@pytest.mark.parametrize(
    ("label", "names"),
    [("red", True), ("large red circle", True), ("redish", False), (None, False), ("", False), ("blue", False)],
)
def test_a_label_names_a_concept_by_its_word(label: str | None, names: bool) -> None:
    assert label_names(label, Concept("colour", "red")) is names


def test_a_synonym_names_a_concept() -> None:
    assert label_names("grey backdrop", Concept("background", "gray"))
