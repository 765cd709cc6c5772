"""How true what the page tells of an image is, on pictures that nothing was fitted or chosen on (`-m bench`)."""

import os
from dataclasses import dataclass

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from fluxsae.evaluation.intervals import bootstrap_weights, interval
from fluxsae.features.cards import CardIndex
from fluxsae.features.firing import CONFIDENCE, SparseMaps, ranked_features
from fluxsae.features.labels import caption_vocabulary
from fluxsae.features.naming import ON_IT, PLACES, NameChecker, kept_names
from fluxsae.features.scores import ScoreMatrix
from fluxsae.features.selection import iter_columns
from fluxsae.laboratory.naming import cover_of, is_true, places_of
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, caption_scene, read_scene, sample_scene
from fluxsae.pictures.perceptual import load_embedder
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.prompts import load_prompts
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.session import Workbench
from train.prompts import BUNDLED_PROMPTS

pytestmark = pytest.mark.bench

RUN = RunFolder(os.environ.get("FLUXSAE_NAMES_RUN") or miniature_path("run"))
"""The run that is judged: another one by setting FLUXSAE_NAMES_RUN to its folder."""
N_IMAGES, SEED = 100, 577_215
RANDOM_NAMED = 0.05
"""Share of random features that may get a name."""


@dataclass(frozen=True)
class Card:
    """One name told of a picture: how far to trust it there, and whether the picture bears it out."""

    label: str
    confidence: float
    is_true: bool
    is_there: bool
    """Whether the feature fires most where the card says: on what is named, where it says nothing else."""


@dataclass(frozen=True)
class Told:
    """What is told of one picture, and how often labels that are drawn blindly would be true of it."""

    cards: list[Card]
    chance: float


def told_of(scene: Scene, maps: SparseMaps, cards: CardIndex) -> Told:
    """The first ten named cards of a picture."""
    shown = [each for each in ranked_features(maps, cards, step=None, limit=10) if cards.labels[each.feature]]
    found = []
    for each in shown:
        label, place = cards.labels[each.feature], each.place or ON_IT
        cover = cover_of(label, scene, cards.grid)
        peak = int(maps.acts(each.feature, None).argmax())
        is_there = cover is not None and bool(places_of(peak, cover, cards.grid)[list(PLACES).index(place)])
        found.append(Card(label, each.label_confidence_here, is_true(label, scene), is_there))
    labels = [label for label in cards.labels if label]
    return Told(found, float(np.mean([is_true(label, scene) for label in labels])))


@pytest.fixture(scope="module", params=[0, 1], ids=["early", "late"])
def told(request: pytest.FixtureRequest) -> list[Told]:
    """What is told of each fresh image."""
    bench, rng = Workbench(RUN), np.random.default_rng(SEED)
    cards = bench.cards[bench.hookpoints[request.param]]
    known, found = set(bench.images.prompts), []
    while len(found) < N_IMAGES:
        prompt = caption_scene(sample_scene(rng, n_objects=1 + len(found) % 2), rng, keep=0.8)
        if prompt in known:
            continue
        *_, done = bench.read(prompt, SEED + len(found), bench.limits.default_steps)
        assert isinstance(done, Done)
        found.append(told_of(read_scene(done.value.image), done.value.maps[str(cards.hookpoint)], cards))
    print(f"\n\n{cards.hookpoint}: {np.mean([each.chance for each in found]):.2f} of labels drawn blindly are true")
    return found


def share(flags: list[list[bool]], what: str) -> float:
    """Prints and gives the share of cards for which something holds, with an interval over images."""
    true = np.array([sum(each) for each in flags], dtype=np.float64)
    every = np.array([len(each) for each in flags], dtype=np.float64)
    weights = bootstrap_weights(len(flags), draws=2000, seed=0)
    found = interval((weights @ true) / np.maximum(weights @ every, 1e-9))
    print(f"{what}: {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] of {int(every.sum())}")
    return found.value


def between(told: list[Told], low: float, high: float = 2.0) -> list[list[Card]]:
    """Each picture's cards whose confidence lies in a range."""
    return [[card for card in each.cards if low <= card.confidence < high] for each in told]


def test_what_is_told_first_is_truest(told: list[Told]) -> None:
    shares = [
        share([[card.is_true for card in each.cards[:n]] for each in told], f"first {n} names, true")
        for n in (3, 5, 10)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 2 * np.mean([each.chance for each in told])


def test_sure_names_are_true_and_guesses_are_not(told: list[Told]) -> None:
    bounds = [2.0, *CONFIDENCE.values()]
    sure, fairly, guesses = (
        share([[card.is_true for card in cards] for cards in between(told, low, high)], f"called {word}, true")
        for word, low, high in zip(CONFIDENCE, bounds[1:], bounds, strict=False)
    )
    assert sure >= 0.9
    assert sure > fairly > guesses


def test_sure_names_are_true_where_the_feature_fires(told: list[Told]) -> None:
    sure = between(told, CONFIDENCE["sure"])
    there = share([[card.is_there for card in cards] for cards in sure], "called sure, true of the place")
    share([[True] * len(cards) for cards in sure], f"sure names a picture: {np.mean([*map(len, sure)]):.2f}; all")
    for what, chosen in (("sure", sure), ("", [each.cards for each in told])):
        names = [len({card.label for card in cards if card.is_true}) >= 3 for cards in chosen]
        share([[flag] for flag in names], f"pictures with three true {what} names")
    assert there >= 0.9


def named_share(checker: NameChecker, columns: list[torch.Tensor], what: str) -> float:
    """Prints and gives the share of features that get a name."""
    names = kept_names([checker.check(each, checker.propose(each)) for each in columns], max_q=0.05)
    found = float(np.mean([name is not None for name in names]))
    print(f"{what}: {found:.3f} of {len(names)} features get a name")
    return found


@pytest.mark.parametrize("captions", ["own", "natural, untrained CLIP"])
def test_random_features_get_no_name(captions: str) -> None:
    images, rng = RUN.load_images(), np.random.default_rng(SEED)
    if captions == "own":
        prompts, vectors = images.prompts, torch.from_numpy(RUN.load_embeddings().vectors.astype(np.float32))
        phrases = caption_vocabulary(prompts, limit=2000)
        texts = load_embedder(RUN.load_embeddings().model).embed_texts(phrases)
    else:
        prompts = load_prompts(BUNDLED_PROMPTS)[: len(images)]
        phrases = caption_vocabulary(prompts, limit=2000)
        vectors, texts = untrained_clip([images.picture(i) for i in range(len(prompts))], phrases)
    subjects = [f"image {i}" for i in range(len(prompts))]
    checker = NameChecker(prompts, subjects, vocabulary=phrases, texts=texts, images=normalize(vectors, dim=1))
    scores = ScoreMatrix.load(RUN.scores_path(RUN.hookpoints()[-1])).stored()[: len(prompts)]
    columns = list(iter_columns(scores))
    rows = [column[rng.permutation(len(prompts))] for column in columns]
    assert named_share(checker, rows, f"\n\n{captions}: shuffled rows") <= RANDOM_NAMED
    together = kept_names([checker.check(each, checker.propose(each)) for each in [*columns, *rows]], max_q=0.05)
    found = float(np.mean([name is not None for name in together[len(columns) :]]))
    print(f"{captions}: shuffled rows beside the run's features: {found:.3f}")
    assert found <= RANDOM_NAMED


def untrained_clip(pictures: list[Image.Image], phrases: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of pictures and phrases by a CLIP with random weights."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt", pretrained=None)
        model.eval()
        tokenizer = open_clip.get_tokenizer("ViT-S-32-alt")
        texts = [model.encode_text(tokenizer(phrases[i : i + 64])) for i in range(0, len(phrases), 64)]
        images = [
            model.encode_image(torch.stack([preprocess(each) for each in pictures[i : i + 32]]))
            for i in range(0, len(pictures), 32)
        ]
    return normalize(torch.cat(images), dim=1), normalize(torch.cat(texts), dim=1)
