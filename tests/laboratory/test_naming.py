"""How true what the page tells of an image is, on pictures that nothing was fitted or chosen on (`-m bench`)."""

from dataclasses import dataclass

import numpy as np
import pytest

from fluxsae.evaluation.intervals import bootstrap_weights, interval
from fluxsae.features.firing import CONFIDENCE, ranked_features
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, caption_scene, read_scene, sample_scene
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.serve.lane import Done
from fluxsae.ui.serve.session import Workbench

pytestmark = pytest.mark.bench

N_IMAGES, SEED = 100, 271_828


@dataclass(frozen=True)
class Card:
    """One name told of a picture: how far to trust it there, and whether the picture bears it out."""

    confidence: float
    is_true: bool


@dataclass(frozen=True)
class Told:
    """What is told of one picture, and how often labels that are drawn blindly would be true of it."""

    cards: list[Card]
    chance: float


def is_true(label: str, scene: Scene) -> bool:
    """Whether every word of a label holds of one object of the scene, or of its background."""
    words = set(label.split())
    if "background" in words:
        return words == {scene.background, "background"}
    things = ({thing.thing, thing.colour, thing.texture, thing.size, thing.position} for thing in scene.objects)
    return any(words <= values for values in things)


@pytest.fixture(scope="module", params=[0, 1], ids=["early", "late"])
def told(request: pytest.FixtureRequest) -> list[Told]:
    """The first ten named cards of each fresh image."""
    bench, rng = Workbench(RunFolder(miniature_path("run"))), np.random.default_rng(SEED)
    cards = bench.cards[bench.hookpoints[request.param]]
    known, labels, found = set(bench.images.prompts), [label for label in cards.labels if label], []
    while len(found) < N_IMAGES:
        prompt = caption_scene(sample_scene(rng, n_objects=1 + len(found) % 2), rng, keep=0.8)
        if prompt in known:
            continue
        *_, done = bench.read(prompt, SEED + len(found), bench.limits.default_steps)
        assert isinstance(done, Done)
        scene, maps = read_scene(done.value.image), done.value.maps[str(cards.hookpoint)]
        shown = [each for each in ranked_features(maps, cards, step=None, limit=10) if cards.labels[each.feature]]
        told = [Card(each.label_confidence_here, is_true(cards.labels[each.feature], scene)) for each in shown]
        found.append(Told(told, float(np.mean([is_true(label, scene) for label in labels]))))
    print(f"\n\n{cards.hookpoint}: {np.mean([each.chance for each in found]):.2f} of labels drawn blindly are true")
    return found


def share_true(told: list[list[Card]], what: str) -> float:
    """Prints and gives the share of true names, with an interval over images."""
    true = np.array([sum(card.is_true for card in cards) for cards in told], dtype=np.float64)
    every = np.array([len(cards) for cards in told], dtype=np.float64)
    weights = bootstrap_weights(len(told), draws=2000, seed=0)
    found = interval((weights @ true) / (weights @ every))
    print(f"{what}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of {int(every.sum())} are true")
    return found.value


def test_what_is_told_first_is_truest(told: list[Told]) -> None:
    shares = [share_true([each.cards[:n] for each in told], f"first {n} names") for n in (3, 5, 10)]
    assert shares == sorted(shares, reverse=True)
    assert shares[1] > 2 * np.mean([each.chance for each in told])


def test_sure_names_are_true_and_guesses_are_not(told: list[Told]) -> None:
    def between(low: float, high: float) -> list[list[Card]]:
        return [[card for card in each.cards if low <= card.confidence < high] for each in told]

    bounds = [2.0, *CONFIDENCE.values()]
    sure, fairly, guesses = (
        share_true(between(low, high), f"called {word}")
        for word, low, high in zip(CONFIDENCE, bounds[1:], bounds, strict=False)
    )
    assert sure >= 0.9
    assert sure > fairly > guesses
