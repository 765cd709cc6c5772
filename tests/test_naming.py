"""How true what the page tells of an image is, on pictures that nothing was fitted or chosen on (`-m bench`)."""

from dataclasses import dataclass

import numpy as np
import pytest

from fluxsae.artifacts import RunFolder
from fluxsae.evaluation.intervals import bootstrap_weights, interval
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, caption_scene, read_scene, sample_scene
from fluxsae.ui.lane import Done
from fluxsae.ui.session import Workbench
from fluxsae.ui.views import ranked_features

pytestmark = pytest.mark.bench

N_IMAGES, SEED = 100, 271_828
SURE = 0.8
"""Confidence from which the page calls a name sure."""


@dataclass(frozen=True)
class Told:
    """One card: its label's confidence where the feature fires, and whether the picture bears the label out."""

    confidence: float
    is_true: bool


def is_true(label: str | None, scene: Scene) -> bool:
    """Whether every word of a label holds of the scene, of any of its objects."""
    words = set((label or "").split())
    if "background" in words:
        return words == {scene.background, "background"}
    return bool(words) and words <= {value for name, value in scene.concepts() if name != "background"}


@pytest.fixture(scope="module")
def told() -> list[list[Told]]:
    """The first ten cards of each fresh image, at the late hook point."""
    bench, rng = Workbench(RunFolder(miniature_path("run"))), np.random.default_rng(SEED)
    hookpoint = bench.limits.default_hookpoint
    found = []
    for seed in range(N_IMAGES):
        prompt = caption_scene(sample_scene(rng, n_objects=1 + seed % 2), rng, keep=0.8)
        *_, done = bench.read(prompt, SEED + seed, bench.limits.default_steps)
        assert isinstance(done, Done)
        scene = read_scene(done.value.image)
        cards = ranked_features(done.value.maps[hookpoint], bench.cards[hookpoint], step=None, limit=10)
        found.append([Told(card["label_confidence_here"], is_true(card["label"], scene)) for card in cards])
    return found


def share_true(told: list[list[Told]], what: str) -> float:
    """Prints and gives the share of true cards, with an interval over images."""
    true = np.array([sum(card.is_true for card in cards) for cards in told], dtype=np.float64)
    every = np.array([len(cards) for cards in told], dtype=np.float64)
    weights = bootstrap_weights(len(told), draws=2000, seed=0)
    found = interval((weights @ true) / (weights @ every))
    print(
        f"\n{what}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of {int(every.sum())} are true of the picture"
    )
    return found.value


def test_the_first_cards_are_true_of_the_picture(told: list[list[Told]]) -> None:
    for n in (3, 5, 10):
        shown = share_true([cards[:n] for cards in told], f"first {n} cards")
        assert shown >= {3: 0.9, 5: 0.8, 10: 0.4}[n]


def test_sure_names_are_true_and_guesses_are_not(told: list[list[Told]]) -> None:
    def between(low: float, high: float) -> list[list[Told]]:
        return [[card for card in cards if low <= card.confidence < high] for cards in told]

    sure = share_true(between(SURE, 2.0), "cards called sure")
    fairly = share_true(between(0.5, SURE), "cards called fairly sure")
    guesses = share_true(between(0.0, 0.5), "cards called a guess")
    assert sure >= 0.9
    assert sure > fairly > guesses
