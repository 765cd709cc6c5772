import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_run import CONCEPTS, FEATURES, HOOKPOINT, SceneEmbedder, Synthetic, build

import train.directions
import train.embed
import train.render
import train.select
from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, varied
from fluxsae.features.labels import Label
from fluxsae.features.silencing import Dependence, WordEffect, dependences, silencing_words
from fluxsae.runs.tables import FeatureTable


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """The synthetic run after embed, select and directions."""
    synthetic = build(tmp_path_factory.mktemp("runs") / "synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fluxsae.pictures.perceptual.load_embedder", lambda *_, **__: SceneEmbedder())
        assert train.embed.main(train.embed.EmbedConfig(run=synthetic.run.path, model="scenes")).word == "done"
        assert train.select.main(train.select.SelectConfig(run=synthetic.run.path)).word == "done"
        assert train.select.main(train.select.SelectConfig(run=synthetic.run.path)).word == "skipped"
    train.directions.main(train.directions.DirectionsConfig(run=synthetic.run.path, n_neighbours=5))
    return synthetic


@pytest.fixture(scope="module")
def index(selected: Synthetic) -> CardIndex:
    return CardIndex(selected.run, HOOKPOINT)


def feature_of(concept: tuple[str, str]) -> int:
    return FEATURES.index(concept)


def test_cards_survive_json(index: CardIndex) -> None:
    for feature in (0, 1, len(index) - 1):
        values = index[feature].to_dict()
        assert json.loads(json.dumps(values, allow_nan=False)).keys() == values.keys()


def test_labels_on_the_cards_name_the_true_concepts(index: CardIndex) -> None:
    right = [concept[1] in (index[feature_of(concept)].label or "").split() for concept in CONCEPTS]
    assert np.mean(right) >= 0.9


def test_a_label_is_trusted_where_the_feature_fires_strongly(index: CardIndex) -> None:
    feature = feature_of(("colour", "red"))
    weak, strong = index.label_confidence_at(np.array([0.05, 1.0]), [feature, feature])
    assert weak < 0.2
    assert strong > 0.3
    every = index.label_confidence_at(np.full(len(index), 1.0))
    assert every[feature] == strong
    assert every[0] == 0  # dead, no label
    assert index.label_confidence_at(np.zeros(len(index))).max() == 0
    curve = index.features[feature].label_curve
    assert curve is not None
    (between,) = index.label_confidence_at(np.array([0.97]), [feature])
    assert between == pytest.approx(0.3 * curve[9] + 0.7 * curve[10])


def test_without_curves_a_label_is_trusted_in_proportion(index: CardIndex) -> None:
    feature = feature_of(("colour", "red"))
    older = copy.copy(index)
    older.__dict__.pop("_label_curves", None)
    older.features = FeatureTable(index.features.table.drop_columns(["label_curve"]))
    sure = index[feature].label_confidence
    assert sure is not None
    assert older.label_confidence_at(np.array([0.5]), [feature]).tolist() == pytest.approx([0.5 * sure])


def test_a_card_tells_how_its_name_was_checked_and_where_its_feature_fires(index: CardIndex) -> None:
    feature = feature_of(("colour", "red"))
    card = index[feature]
    assert card.name is not None
    assert card.name.base is not None
    assert card.name.q_value <= 0.05
    assert card.name.precision[-1] > 2 * card.name.base
    assert [level.level for level in card.name.levels] == ["strong", "middle", "weak"]
    assert (card.place, card.place_share) == ("inside", 1.0)
    precision, recall, lift = index.name_at(1.0, feature) or (0, 0, 0)
    assert (precision, recall) == (card.name.precision[-1], card.name.recall[-1])
    assert lift == pytest.approx(precision / card.name.base)
    assert index.name_at(1.0, 0) is None
    assert index[0].name is None


def test_a_run_without_checked_names_is_read_as_before(index: CardIndex) -> None:
    added = [name for name in index.features.table.column_names if name.startswith(("name_", "level_"))]
    older = copy.copy(index)
    older.features = FeatureTable(index.features.table.drop_columns(added))
    older.places = [None] * len(older)
    card = older[feature_of(("colour", "red"))]
    assert card.label == index[card.feature].label
    assert (card.name, card.place, older.name_at(1.0, card.feature)) == (None, None, None)


def test_a_card_holds_the_top_images_in_order_with_their_prompts(selected: Synthetic, index: CardIndex) -> None:
    feature = feature_of(("colour", "red"))
    card = index[feature]
    scores = [image.score for image in card.top_images]
    assert scores == sorted(scores, reverse=True)
    for image in card.top_images:
        assert image.prompt == selected.prompts[image.image_id]
        assert image.argmax_token == int(selected.argmax[image.image_id, feature])
        assert ("colour", "red") in selected.scenes[image.image_id].concepts()


def test_the_silent_images_of_a_card_are_silent(selected: Synthetic, index: CardIndex) -> None:
    feature = feature_of(("thing", "heart"))
    silent = index[feature].silent_images
    assert len(silent) == 6
    assert (selected.scores[list(silent), feature] == 0).all()


def test_a_dead_feature_has_a_card_that_says_so(index: CardIndex) -> None:
    card = index[0]
    assert card.feature_class == "dead"
    assert card.label is None
    assert card.coherence is None
    assert card.top_images == ()
    assert index.heatmaps(0) == {}


def test_features_that_mean_something_come_first_and_feature_0_does_not(index: CardIndex) -> None:
    assert sorted(index.ranked) == list(range(len(FEATURES)))
    assert all(FEATURES[feature] is not None for feature in index.ranked[: len(CONCEPTS)])
    assert index.ranked[-1] == 0


def test_the_best_of_each_label_comes_before_the_second_of_any() -> None:
    labels = ["red", "red", None, "blue", "red", "blue"]
    assert varied([2, 0, 1, 3, 4, 5], labels) == [0, 3, 1, 5, 4, 2]


def test_a_heatmap_of_a_card_glows_where_the_feature_fires(selected: Synthetic, index: CardIndex) -> None:
    feature = feature_of(("thing", "square"))
    maps = index.heatmaps(feature)
    assert list(maps) == [image.image_id for image in index[feature].top_images]
    for image, heatmap in maps.items():
        expected = selected.acts[image, feature].numpy().reshape(16, 16) / index[feature].max_act
        assert np.abs(heatmap - expected).max() <= 0.5 / 255 + 1e-6
    assert all(heatmap.max() == pytest.approx(1.0) for heatmap in index.heatmaps(feature, scale="image").values())


@pytest.mark.parametrize("query", ["12", "#12", "feature 12", "  FEATURE #12 "])
def test_search_finds_a_feature_by_its_number(index: CardIndex, query: str) -> None:
    assert [(hit.feature, hit.reason) for hit in index.search(query)] == [(12, "number")]


def test_search_finds_a_feature_by_its_label(index: CardIndex) -> None:
    for concept in (("texture", "striped"), ("colour", "green"), ("thing", "star")):
        best = index.search(concept[1])[0]
        assert (best.feature, best.reason) == (feature_of(concept), "label")


def test_search_finds_by_free_text_through_clip(index: CardIndex) -> None:
    hits = index.search("something purple", embedder=SceneEmbedder(), limit=5)
    assert feature_of(("colour", "purple")) in [hit.feature for hit in hits]
    assert len({hit.feature for hit in hits}) == len(hits) == 5
    assert any(hit.reason == "clip" for hit in hits)


def test_clip_takes_no_part_in_a_search_of_which_it_knows_no_word(index: CardIndex) -> None:
    for query in ("zebra", "the zebra crossing", "?!"):
        assert index.search(query, embedder=SceneEmbedder()) == []
    assert {hit.reason for hit in index.search("purple zebra", embedder=SceneEmbedder())} >= {"clip"}


def test_an_empty_search_gives_the_best_features(index: CardIndex) -> None:
    assert [hit.feature for hit in index.search("  ", limit=4)] == index.ranked[:4]


def test_searches_that_cannot_be_answered_are_refused_or_empty(index: CardIndex) -> None:
    assert index.search("zebra") == []
    with pytest.raises(FluxSaeError, match=r"0 to \d+"):
        index.search("999999")
    with pytest.raises(FluxSaeError, match="limit"):
        index.search("red", limit=0)


def test_a_hook_point_that_the_run_does_not_have_is_refused(selected: Synthetic) -> None:
    with pytest.raises(FluxSaeError, match="no SAE"):
        CardIndex(selected.run, "layer7")


def test_cards_are_there_before_labels_and_directions(tmp_path: Path) -> None:
    early = CardIndex(build(tmp_path / "early", n_images=20).run, HOOKPOINT)
    card = early[1]
    assert (card.label, card.coherence, card.position, card.neighbours) == (None, None, None, ())
    assert early[early.ranked[0]].max_act > 0
    assert early[early.ranked[-1]].max_act == 0


def test_browsing_cards_never_imports_diffusers(selected: Synthetic) -> None:
    code = (
        "import sys\n"
        "from fluxsae import RunFolder\n"
        "from fluxsae.features.cards import CardIndex\n"
        "import fluxsae.features.directions, fluxsae.features.selection, fluxsae.features.labels\n"
        "import fluxsae.pictures.heatmaps, fluxsae.pictures.perceptual\n"
        f"index = CardIndex(RunFolder({str(selected.run.path)!r}), {HOOKPOINT!r})\n"
        "index[1], index.search('red'), index.heatmaps(1), index.picture(0)\n"
        "assert not [name for name in sys.modules if name.split('.')[0] in ('diffusers', 'gradio')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_the_word_that_silences_a_feature_is_found() -> None:
    asked: list[Sequence[str]] = []

    def score(prompts: Sequence[str]) -> list[float]:
        asked.append(prompts)
        return [2.0 * ("red" in prompt) + 0.5 * ("star" in prompt) for prompt in prompts]

    effects = silencing_words("a red star on the left", score)
    assert (effects[0].word, effects[0].score) == ("red", 0.5)
    assert effects[0].change == pytest.approx(-0.8)
    assert asked == [["a red star on the left", "a star on the left", "a red on the left", "a red star on the"]]


def test_as_few_words_as_possible_tell_the_images_apart() -> None:
    def effects(**left: float) -> list[WordEffect]:
        return [WordEffect(word, share, share - 1) for word, share in left.items()]

    images = [effects(red=0.25, ring=0.0), effects(Red=0.0), effects(ring=0.5, star=1.5), effects(star=0.75)]
    found, rest = dependences(images, most=0.6)
    assert found == [Dependence("red", (0.25, 0.0)), Dependence("ring", (0.5,))]  # of two words for two images
    assert rest == [0.75]


def test_a_feature_that_is_silent_anyway_cannot_be_silenced() -> None:
    with pytest.raises(FluxSaeError, match="silent on this prompt"):
        silencing_words("a red star", lambda prompts: [0.0] * len(prompts))
    with pytest.raises(FluxSaeError, match="no word"):
        silencing_words("on the", lambda prompts: [1.0] * len(prompts))
    with pytest.raises(FluxSaeError, match="no word to take away"):
        silencing_words("star", lambda prompts: [1.0] * len(prompts))


def test_select_without_embeddings_says_what_to_run(tmp_path: Path) -> None:
    run = build(tmp_path / "bare", n_images=10).run
    run.embeddings_path.unlink()
    with pytest.raises(FluxSaeError, match=r"train\.embed"):
        train.select.main(train.select.SelectConfig(run=run.path))


def test_render_writes_sheets_of_the_best_features_and_overlays(selected: Synthetic, tmp_path: Path) -> None:
    config = train.render.RenderConfig(run=selected.run.path, n_features=4, rows=3, columns=4, cell=90)
    result = train.render.main(config)
    assert result is not None
    assert result.word == "done"
    sheets = [path.name for path in selected.run.sheets(HOOKPOINT) if path.name.startswith("features-")]
    assert sheets == ["features-01.png", "features-02.png"]
    chosen = train.render.RenderConfig(
        run=selected.run.path, hookpoints=(HOOKPOINT,), features=(3,), overlays=tmp_path, scale="image"
    )
    train.render.main(chosen)
    pictures = sorted((tmp_path / HOOKPOINT).glob("feature-3-image-*.png"))
    assert len(pictures) == 8
    assert Image.open(pictures[0]).width == 512


def test_rendering_a_dead_feature_is_refused(selected: Synthetic) -> None:
    with pytest.raises(FluxSaeError, match="never fire"):
        train.render.main(train.render.RenderConfig(run=selected.run.path, features=(0, 3)))


class _FixedLabeller:
    """Another source of names, as a user may bring one."""

    name = "mine"

    def label(self, scores: torch.Tensor) -> list[Label]:
        return [Label("my name", 1.0, 0.0, 1.0, self.name)] if scores.max() > 0 else []


def test_another_labeller_can_name_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(tmp_path / "named", n_images=30).run
    monkeypatch.setattr("fluxsae.pictures.perceptual.load_embedder", lambda *_, **__: SceneEmbedder())
    train.select.main(train.select.SelectConfig(run=run.path), labellers=[_FixedLabeller()])
    labels = CardIndex(run, HOOKPOINT).labels
    assert labels[0] is None
    assert set(labels[1:]) <= {"my name", None}
    assert "my name" in labels
