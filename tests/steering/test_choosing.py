"""The condition of an edit, chosen on planted acts: images x steps x tokens x features."""

import numpy as np
import pytest

from fluxsae import FluxSaeError
from fluxsae.steering.choosing import choose_condition

N_STEPS, N_TOKENS, N_FEATURES = 2, 4, 6


def planted(n_images: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Acts, and whether each image shows the concept "purple": feature 0 fires on blue and purple, feature 1 on blue.

    A third of the images shows each of blue, purple and nothing; the colours lie on one random token. Feature 2 fires
    on any token of any image, and feature 1 on another token of half of the purple images.
    """
    rng = np.random.default_rng(seed)
    acts = np.zeros((n_images, N_STEPS, N_TOKENS, N_FEATURES), dtype=np.float32)
    kind = np.arange(n_images) % 3
    own, other = rng.permuted(np.tile(np.arange(N_TOKENS), (n_images, 1)), axis=1)[:, :2].T
    every = np.arange(n_images)
    acts[every, :, own, 0] = np.where(kind < 2, rng.uniform(0.8, 1.2, n_images), 0.0)[:, None]
    acts[every, :, own, 1] = np.where(kind == 0, rng.uniform(0.8, 1.2, n_images), 0.0)[:, None]
    is_beside = (kind == 1) & (rng.random(n_images) < 0.5)
    acts[every[is_beside], :, other[is_beside], 1] = 1.0
    acts[..., 2] = rng.uniform(0.0, 2.0, acts.shape[:-1])
    references = np.array([2.0, 0.5, 1.0, 1.0, 0.0, 1.0], dtype=np.float32)
    return acts * references, kind == 1, references


def holds(condition, acts: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Where the condition holds anywhere in an image, as an edit would ask."""
    import torch

    by_feature = {feature: torch.from_numpy(acts[..., feature]) for feature in condition.features}
    return condition.where_present(by_feature, torch.from_numpy(references)).numpy().any(axis=(1, 2))


def test_a_concept_that_no_feature_tells_alone_gets_a_weighted_sum_at_one_patch() -> None:
    acts, is_present, references = planted(300, seed=0)
    found = choose_condition(acts, is_present, features=range(N_FEATURES), reference_acts=references, label="purple")
    weights = dict(zip(found.condition.features, found.condition.weights, strict=True))
    assert weights[0] > 0.9
    assert weights[1] < -0.3
    assert found.condition.label == "purple"
    fresh, is_there, _ = planted(600, seed=1)
    hits = holds(found.condition, fresh, references)
    assert hits[is_there].mean() > 0.97
    assert hits[~is_there].mean() <= 0.03
    alone = choose_condition(acts, is_present, features=range(N_FEATURES), reference_acts=references, limit=1)
    assert alone.condition.features == (0,)
    assert alone.condition.weights == ()
    assert alone.detected < 0.2


def test_a_concept_that_two_features_tell_together_gets_both() -> None:
    # orange fires red's and yellow's features half as much as these do: no weighted sum tells it from both
    rng = np.random.default_rng(4)
    kind = np.arange(300) % 6  # yellow, orange, red, and three colours that fire neither
    acts = np.zeros((300, 1, N_TOKENS, 5), dtype=np.float32)
    acts[:, 0, 1, 0] = np.array([0.0, 0.5, 1.0, 0.0, 0.0, 0.0])[kind] * rng.uniform(0.8, 1.2, 300)
    acts[:, 0, 1, 1] = np.array([1.0, 0.5, 0.0, 0.0, 0.0, 0.0])[kind] * rng.uniform(0.8, 1.2, 300)
    acts[..., 2:] = rng.uniform(0.0, 0.3, (300, 1, N_TOKENS, 3))
    found = choose_condition(acts, kind == 1, features=range(5), reference_acts=np.ones(5))
    assert set(found.condition.features) == {0, 1}
    assert found.condition.least == 2
    assert (found.detected, found.false_alarms) == (1.0, 0.0)


def test_one_feature_is_kept_where_it_is_enough_and_its_number_is_the_callers() -> None:
    acts, _, references = planted(120, seed=2)
    is_blue = np.arange(120) % 3 == 0
    acts[~is_blue, :, :, 1] = 0.0
    found = choose_condition(acts[..., :3], is_blue, features=[70, 71, 72], reference_acts=references[:3])
    assert found.condition.features == (71,)
    assert (found.detected, found.false_alarms) == (1.0, 0.0)
    assert 0.35 < found.condition.above < 0.65  # midway between silence and the weakest blue, 0.8


def test_the_level_keeps_false_alarms_of_fresh_images_to_the_rate() -> None:
    rates = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        scores = rng.normal(3.0, 1.0, (400, 1, 1, 1)).clip(0)
        is_present = np.arange(400) < 100
        scores[is_present] += 1.0
        found = choose_condition(scores, is_present, features=[0], reference_acts=np.ones(1), false_alarms=0.1)
        fresh = rng.normal(3.0, 1.0, 2000).clip(0)
        rates.append(float((fresh > found.condition.above).mean()))
    assert 0.08 < np.mean(rates) < 0.105


def test_an_image_counts_as_detected_at_the_first_step_and_as_a_false_alarm_at_any() -> None:
    acts = np.zeros((60, 2, 1, 1))
    is_present = np.arange(60) < 30
    acts[is_present, 1] = 1.0  # the concept comes when the edit should long have begun
    late = choose_condition(acts, is_present, features=[0], reference_acts=np.ones(1))
    assert late.detected == 0.0
    acts = np.zeros((60, 2, 1, 1))
    acts[is_present, 0] = 1.0
    acts[~is_present, 1] = 2.0
    wrong = choose_condition(acts, is_present, features=[0], reference_acts=np.ones(1))
    assert wrong.condition.above >= 2.0


@pytest.mark.parametrize(
    ("n_present", "reference", "words"), [(2, 1.0, "2 images with the concept and 38"), (20, 0.0, "and 0 features")]
)
def test_too_little_to_choose_on_is_refused(n_present: int, reference: float, words: str) -> None:
    is_present = np.arange(40) < n_present
    with pytest.raises(FluxSaeError, match=words):
        choose_condition(np.ones((40, 1, 1, 1)), is_present, features=[0], reference_acts=np.array([reference]))
