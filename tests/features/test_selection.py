import numpy as np
import pytest
import torch
from scipy.stats import binom, hypergeom, mannwhitneyu
from synthetic_run import CONCEPTS, FEATURES, SceneEmbedder, Synthetic, build

from fluxsae.errors import FluxSaeError
from fluxsae.features.labels import (
    CaptionLabeller,
    PhraseLabeller,
    caption_terms,
    enrichment_log_p,
    prompt_ranks,
    rank_sum,
)
from fluxsae.features.selection import (
    SelectionConfig,
    coherence,
    feature_coherence,
    label_images,
    monosemanticity,
    nearest_silent_images,
    prompt_groups,
    q_values,
    rank_features,
    select_features,
    top_unique,
)


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    return build(tmp_path_factory.mktemp("runs") / "synthetic")


def unit_vectors(n: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def test_coherence_is_the_mean_cosine_over_pairs() -> None:
    # cosines of the three pairs: 1, 0, 0
    assert coherence(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])) == pytest.approx(1 / 3)


def test_coherence_of_one_image_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="at least 2"):
        coherence(unit_vectors(1))


def test_monosemanticity_is_the_weighted_mean_over_pairs() -> None:
    vectors, scores = unit_vectors(6), torch.tensor([3.0, 0.0, 1.0, 0.5, 0.0, 2.0])
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    weights = torch.tensor([scores[i] * scores[j] for i, j in pairs])
    cosines = torch.tensor([vectors[i] @ vectors[j] for i, j in pairs])
    expected = float((weights * cosines).sum() / weights.sum())
    assert monosemanticity(vectors, scores[:, None]).item() == pytest.approx(expected, abs=1e-6)


def test_monosemanticity_of_equal_scores_is_coherence_and_of_one_image_is_unknown() -> None:
    vectors = unit_vectors(6)
    both = monosemanticity(vectors, torch.stack([torch.full((6,), 2.0), torch.eye(6)[0]], dim=1))
    assert both[0].item() == pytest.approx(coherence(vectors), abs=1e-6)
    assert torch.isnan(both[1])


def test_top_images_have_unique_prompts_and_never_a_silent_feature() -> None:
    scores = torch.tensor([0.0, 5.0, 4.0, 4.0, 0.0, 1.0])
    groups = prompt_groups(["a", "b", "b", "c", "d", "e"])
    assert top_unique(scores, groups, n=5).tolist() == [1, 3, 5]
    assert top_unique(scores, groups, n=2).tolist() == [1, 3]


def test_equal_scores_go_to_the_lower_image() -> None:
    assert top_unique(torch.ones(4), torch.arange(4), n=2).tolist() == [0, 1]


def test_a_feature_that_fires_on_too_few_images_gets_no_coherence() -> None:
    scores = torch.zeros(40, 2)
    scores[:3, 0] = 1.0
    scores[:20, 1] = 1.0
    judged = feature_coherence(scores, unit_vectors(40), [f"prompt {i}" for i in range(40)])
    assert np.isnan(judged.coherence[0])
    assert np.isnan(judged.p_value[0])
    assert judged.n_images.tolist() == [3, 16]


@pytest.mark.parametrize("seed", [0, 1])
def test_coherence_on_shuffled_scores_is_called_at_its_own_level(synthetic: Synthetic, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = [rng.permutation(synthetic.scores[:, 1 + i % (len(FEATURES) - 1)].numpy()) for i in range(1000)]
    shuffled = torch.tensor(np.stack(columns, axis=1))
    judged = feature_coherence(shuffled, synthetic.embeddings, synthetic.prompts)
    called = int((judged.p_value <= 0.05).sum())
    low, high = binom.interval(0.99, len(columns), 0.05)
    assert low <= called <= high
    assert (judged.q_value <= 0.05).sum() <= 2


def test_the_null_respects_prompts_that_many_images_share() -> None:
    # 60 images of one prompt look alike; a random set may hold only one of them
    vectors = torch.cat([unit_vectors(1).expand(60, -1), unit_vectors(40, seed=1)])
    prompts = ["the same"] * 60 + [f"prompt {i}" for i in range(40)]
    rng = np.random.default_rng(0)
    shuffled = torch.tensor(np.stack([rng.permutation(np.arange(1.0, 101.0)) for _ in range(600)], axis=1))
    judged = feature_coherence(shuffled.float(), vectors, prompts)
    low, high = binom.interval(0.99, 600, 0.05)
    assert low <= int((judged.p_value <= 0.05).sum()) <= high


def test_true_concepts_are_coherent_and_noise_is_not(synthetic: Synthetic) -> None:
    judged = feature_coherence(synthetic.scores, synthetic.embeddings, synthetic.prompts)
    is_concept = np.array([concept is not None for concept in FEATURES])
    assert (judged.q_value[is_concept] <= 0.05).all()
    assert (np.nan_to_num(judged.q_value[~is_concept], nan=1.0) <= 0.05).sum() <= 1


def test_q_values_by_hand_and_a_feature_without_a_p_value_is_not_a_test() -> None:
    # Benjamini and Hochberg, two tests: min(0.01 * 2 / 1, 0.04 * 2 / 2) and 0.04 * 2 / 2
    rates = q_values(np.array([0.01, np.nan, 0.04]))
    assert np.isnan(rates[1])
    assert rates[[0, 2]].tolist() == pytest.approx([0.02, 0.04])
    assert np.isnan(q_values(np.full(3, np.nan))).all()


def test_terms_are_words_and_phrases_without_function_words_at_their_ends() -> None:
    assert caption_terms("A red star on left, a ring") == {"red", "star", "left", "ring", "red star", "star on left"}


def test_labels_from_captions_name_the_true_concepts(synthetic: Synthetic) -> None:
    labeller = CaptionLabeller(synthetic.prompts)
    named = [labeller.label(synthetic.scores[:, feature]) for feature in range(len(FEATURES))]
    right = [
        bool(labels) and concept[1] in labels[0].text.split()
        for labels, concept in zip(named, FEATURES, strict=True)
        if concept is not None
    ]
    assert np.mean(right) >= 0.9
    assert sum(bool(labels) for labels, concept in zip(named, FEATURES, strict=True) if concept is None) <= 2


def test_the_chance_of_an_enrichment_is_scipys() -> None:
    in_top, in_all = np.array([0, 1, 5, 10, 10, 3]), np.array([1, 60, 12, 10, 95, 98])
    expected = hypergeom.logsf(in_top - 1, 100, in_all, 10)
    assert enrichment_log_p(in_top, in_all, 10, 100) == pytest.approx(expected, abs=1e-9)


def test_clip_phrases_name_the_true_concepts(synthetic: Synthetic) -> None:
    vocabulary = [value for _, value in CONCEPTS]
    texts = SceneEmbedder().embed_texts(vocabulary)
    labeller = PhraseLabeller(vocabulary, texts, synthetic.embeddings, synthetic.prompts)
    for feature, concept in enumerate(FEATURES):
        if concept is not None:
            best = labeller.label(synthetic.scores[:, feature])[0]
            assert best.text == concept[1]
            assert best.p_value < 0.01
    assert labeller.label(torch.zeros(len(synthetic.prompts))) == []


def test_the_chance_of_a_rank_sum_is_mann_and_whitneys() -> None:
    values = np.random.default_rng(0).standard_cauchy((60, 3))
    ranks = prompt_ranks(values, np.arange(60))
    above, log_p = rank_sum(ranks[:20], n_prompts=60)
    expected = mannwhitneyu(values[:20], values[20:], alternative="greater", method="asymptotic", use_continuity=False)
    assert above == pytest.approx(expected.statistic / (20 * 40))
    assert np.exp(log_p) == pytest.approx(expected.pvalue)


def test_images_of_one_prompt_rank_as_one_image() -> None:
    # prompts 0 to 3; the three images of prompt 1 share the place of one: half of a third, then a third further each
    ranks = prompt_ranks(np.array([[1.0], [2.0], [2.1], [2.2], [3.0], [4.0]]), np.array([0, 1, 1, 1, 2, 3]))
    assert ranks.ravel().tolist() == pytest.approx([1, 1.5 + 1 / 6, 2, 2.5 - 1 / 6, 3, 4], abs=1e-6)


def test_clip_phrases_of_shuffled_scores_are_called_at_their_own_level() -> None:
    rng = np.random.default_rng(0)
    heavy = torch.tensor(rng.standard_cauchy((300, 8)), dtype=torch.float32)
    texts = torch.tensor(rng.standard_normal((40, 8)), dtype=torch.float32)
    labeller = PhraseLabeller([str(i) for i in range(40)], texts, heavy, [f"prompt {i}" for i in range(300)])
    columns = [torch.tensor(rng.permutation(300.0 + np.arange(300)), dtype=torch.float32) for _ in range(400)]
    p_values = np.array([labeller.p_value(column, "7") for column in columns])
    low, high = binom.interval(0.99, 400, 0.05)
    assert low <= (p_values <= 0.05).sum() <= high
    assert sum(bool(labeller.label(column)) for column in columns) <= binom.ppf(0.99, 400, 0.05)


def test_a_word_in_every_top_caption_and_in_no_other_is_the_label() -> None:
    prompts = [f"a red thing number{i}" for i in range(10)] + [f"a blue thing number{i}" for i in range(90)]
    scores = torch.tensor([1.0] * 10 + [0.0] * 90)
    best = CaptionLabeller(prompts).label(scores)[0]
    assert best.text == "red thing"
    assert best.confidence == 1.0
    assert best.p_value < 1e-9


def test_which_captions_hold_a_term_is_told_image_by_image() -> None:
    prompts = ["a red star", "a blue star", "a red star", "a red ring", "a blue ring", "a red cross"]
    labeller = CaptionLabeller(prompts, min_count=2)
    held = labeller.holds("red")
    assert held is not None
    assert held.tolist() == [True, False, True, True, False, True]
    assert labeller.holds("purple") is None
    assert labeller.holds("a") is None


def test_the_chance_of_one_word_is_scipys() -> None:
    prompts = [f"a red thing number{i}" for i in range(20)] + [f"a blue thing number{i}" for i in range(80)]
    labeller = CaptionLabeller(prompts)
    scores = torch.tensor([1.0] * 6 + [0.0] * 14 + [1.0] * 4 + [0.0] * 76)  # 10 images fire, 6 of the 20 red ones
    assert labeller.p_value(scores, "red") == pytest.approx(hypergeom.sf(5, 100, 20, 10))
    assert labeller.p_value(torch.zeros(100), "red") == 1.0
    assert labeller.p_value(scores, "purple") is None


def test_weak_images_say_nothing_about_a_label() -> None:
    scores = torch.tensor([1.0, 0.2, 0.9, 0.1, 0.0])
    config = SelectionConfig(label_floor=0.3, top_images=2, min_images=2)
    assert label_images(scores, torch.arange(5), config=config).tolist() == [0, 2]
    outlier = torch.tensor([9.0, 1.0, 1.0, 0.0])
    assert label_images(outlier, torch.arange(4), config=config).tolist() == [0, 1]


def test_the_dead_feature_0_is_never_selected_and_ranks_last(synthetic: Synthetic) -> None:
    judged = feature_coherence(synthetic.scores, synthetic.embeddings, synthetic.prompts)
    nothing = np.full(len(FEATURES), np.nan)
    chosen = select_features(judged, nothing)
    assert 0 not in chosen
    assert all(FEATURES[feature] is not None for feature in chosen[: len(CONCEPTS)])
    density = (synthetic.scores > 0).float().mean(dim=0).double().numpy()
    ranked = rank_features(judged.coherence, judged.q_value, nothing, density)
    assert sorted(ranked) == list(range(len(FEATURES)))
    assert ranked[: len(chosen)] == chosen
    assert ranked[-1] == 0


def test_a_run_without_coherence_selects_nothing() -> None:
    judged = feature_coherence(torch.zeros(20, 3), unit_vectors(20), [str(i) for i in range(20)])
    assert select_features(judged, np.full(3, np.nan)) == []


def test_a_sure_label_breaks_the_tie_between_equally_coherent_features() -> None:
    order = rank_features(np.full(3, 0.5), np.zeros(3), np.array([0.1, 0.9, np.nan]), np.ones(3))
    assert order == [1, 0, 2]


def test_nearest_silent_images_are_silent_and_look_like_the_top(synthetic: Synthetic) -> None:
    feature = FEATURES.index(("thing", "star"))
    column = synthetic.scores[:, feature]
    top = top_unique(column, prompt_groups(synthetic.prompts), n=8)
    silent = nearest_silent_images(column, synthetic.embeddings, top, n=5)
    assert (column[silent] == 0).all()
    likeness = synthetic.embeddings @ synthetic.embeddings[top].mean(dim=0)
    assert likeness[silent].min() >= likeness[column == 0].median()


def test_scores_of_other_images_are_refused() -> None:
    with pytest.raises(FluxSaeError, match="20 rows of scores, 19 embeddings"):
        feature_coherence(torch.zeros(20, 3), unit_vectors(19), ["x"] * 20)


@pytest.mark.parametrize("values", [{"min_images": 1}, {"top_images": 3, "min_images": 4}, {"null_draws": 5}])
def test_a_config_that_cannot_judge_is_refused(values: dict[str, int]) -> None:
    with pytest.raises(FluxSaeError, match="min_images"):
        SelectionConfig(**values)
