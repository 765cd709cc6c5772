"""Does `explain` predict what happens when a word or an earlier feature is taken away? Measured on the miniature.

    python -m train.benchmarks causes

Two questions. Over random pairs (feature, source): how do predicted and measured effects rank alike, beside two naive
predictions (for features the cosine of directions, for words the attention weight) and a shuffled control? And in
scenes of two things that differ: is the word with the largest measured effect the feature's own name?
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.sae.config import MISMATCHES
from train.benchmarks.options import CausesConfig

if TYPE_CHECKING:
    from jaxtyping import Float

ATTRIBUTES = ("thing", "colour", "texture")


@dataclass(frozen=True)
class Pair:
    """One source of one explanation."""

    image: int
    kind: str
    predicted: float
    naive: float
    measured: float


@dataclass(frozen=True)
class Naming:
    """Which word came first in one explanation."""

    image: int
    step: int
    attribute: str
    is_right: bool
    is_right_shuffled: bool


def main(config: CausesConfig) -> tuple[list[Pair], list[Naming]]:
    """Measures and prints two tables."""
    pairs, namings = _measure(config)
    print(pairs_text(pairs, draws=config.draws, seed=config.seed))
    print()
    print(namings_text(namings, draws=config.draws, seed=config.seed))
    return pairs, namings


def _measure(config: CausesConfig) -> tuple[list[Pair], list[Naming]]:
    from fluxsae.flux import load_flux
    from fluxsae.miniature import miniature_path
    from fluxsae.miniature.scenes import caption_scene, sample_scene
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder

    run = RunFolder(config.run or miniature_path("run"))
    pipe = load_flux("miniature")
    saes = {place: SparseAutoencoder.from_pretrained(run.sae_path(place)) for place in run.sae_names()}
    work = _Work(pipe, saes, run.load_features(run.hookpoints()[-1]), run.hookpoints()[-1], config)
    rng, pairs, namings = np.random.default_rng(config.seed), [], []
    for image in range(config.images):
        scene = sample_scene(rng, n_objects=2, held_out=None)
        prompt = caption_scene(scene, rng, keep=1.0)
        for attribute in ATTRIBUTES:
            values = [str(getattr(thing, attribute)) for thing in scene.objects]
            if len(set(values)) == 2:
                found = work.look_at(
                    image, prompt, attribute, values, step=config.steps[image % len(config.steps)], rng=rng
                )
                pairs += found[0]
                namings += found[1]
    return pairs, namings


@dataclass(frozen=True, eq=False)
class _Work:
    pipe: Any
    saes: Any
    table: Any
    place: Any
    config: CausesConfig

    def look_at(
        self, image: int, prompt: str, attribute: str, values: Sequence[str], *, step: int, rng: np.random.Generator
    ) -> tuple[list[Pair], list[Naming]]:
        """The pairs and the first word of one feature that is named after one of the two values and fires here."""
        from fluxsae.steering.attribution import Target, Word, explain

        feature = self._firing(prompt, image, step, values, rng)
        if feature is None:
            return [], []
        seed = self.config.seed + image
        target = Target(self.place, feature, step)
        with _attention(self.pipe, self.place.block_index + 1) as attention:
            asked: dict[str, Any] = {"prompt": prompt, "seed": seed, "limit": 10_000, "allow_mismatch": MISMATCHES}
            found = explain(self.pipe, self.saes, target, **asked)
            weights = attention.of_words(prompt, self.pipe.tokenizer_2)
        words = [
            Pair(image, "word", effect.predicted, weights[effect.source.position], effect.measured or 0.0)
            for effect in found.words
            if isinstance(effect.source, Word)
        ]
        target_row = self.saes[self.place].W_enc[feature]
        features = [
            Pair(image, "feature", effect.predicted, self._cosine(effect.source, target_row), effect.measured or 0.0)
            for effect in found.features
        ]
        first, other = found.words[0].source, found.words[int(rng.integers(len(found.words)))].source
        assert isinstance(first, Word)
        assert isinstance(other, Word)
        name = self.table[feature].label
        naming = Naming(image, step, attribute, first.text == name, other.text == name)
        return [*_drawn(words, self.config.pairs, rng), *_drawn(features, self.config.pairs, rng)], [naming]

    def _firing(
        self, prompt: str, image: int, step: int, values: Sequence[str], rng: np.random.Generator
    ) -> int | None:
        """A feature that is surely named after one of the values and reaches a third of its maximum here."""
        from fluxsae.flux import capture, generate

        with capture(self.pipe, [self.place], [step], stop_early=True) as captured:
            generate(self.pipe, prompt, seeds=self.config.seed + image)
        acts = self.saes[self.place].encode(captured.get(self.place, step), sigma=captured.sigma(step))
        strongest = acts[0].amax(0).detach()
        named = [
            feature
            for feature in range(len(self.table))
            for row in [self.table[feature]]
            if row.label in values
            and max(row.label_curve or [row.label_confidence or 0]) >= 0.6
            and strongest[feature].item() > row.max_act / 3
        ]
        return int(rng.choice(named)) if named else None

    def _cosine(self, source: Any, target_row: Any) -> float:
        from torch.nn.functional import cosine_similarity

        place, feature = source
        return float(cosine_similarity(self.saes[place].W_dec[feature], target_row, dim=0).detach())


def _drawn(pairs: list[Pair], n: int, rng: np.random.Generator) -> list[Pair]:
    return [pairs[at] for at in rng.permutation(len(pairs))[:n]]


class _Attention:
    """How much image tokens attend to each text token, summed over the blocks of one pass up to the target."""

    def __init__(self, n_blocks: int) -> None:
        self.weights: Any = None
        self._left = n_blocks

    def add(self, query: Any, key: Any, n_text: int) -> None:
        if not self._left:
            return
        self._left -= 1
        scores = (query[:, :, n_text:] @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        seen = scores.softmax(-1)[0, :, :, :n_text].mean((0, 1)).detach()
        self.weights = seen if self.weights is None else self.weights + seen

    def of_words(self, prompt: str, tokenizer: Any) -> dict[int, float]:
        """Position of each word -> the attention that its tokens get."""
        import re

        offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        spans = [match.span() for match in re.finditer(r"[\w'\u2019-]+", prompt)]
        return {
            at: sum(float(self.weights[i]) for i, (a, b) in enumerate(offsets) if a < stop and b > start)
            for at, (start, stop) in enumerate(spans)
        }


@contextmanager
def _attention(pipe: Any, n_blocks: int) -> Iterator[_Attention]:
    """While open, attention weights of the first differentiated pass are added up, by watching torch's attention."""
    import torch

    found, own = _Attention(n_blocks), torch.nn.functional.scaled_dot_product_attention
    n_text = pipe.generation_settings.max_sequence_length

    def watched(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and query.shape[-2] > n_text:
            found.add(query, key, n_text)
        return own(query, key, value, *args, **options)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        yield found
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


def pairs_text(pairs: Sequence[Pair], *, draws: int, seed: int) -> str:
    """Spearman correlations with the measured effects, by kind of source."""
    lines = [f"{'source':<10} {'pairs':>6} {'gradient':>22} {'naive':>24} {'shuffled':>24}"]
    for kind in ("word", "feature", "both"):
        chosen = [pair for pair in pairs if kind in (pair.kind, "both")]
        rng = np.random.default_rng(seed)
        measured = np.array([pair.measured for pair in chosen])
        columns = [
            np.array([pair.predicted for pair in chosen]),
            np.array([pair.naive for pair in chosen]),
            rng.permutation([pair.predicted for pair in chosen]),
        ]
        images = np.array([pair.image for pair in chosen])
        cells = [_with_interval(column, measured, images, draws=draws, rng=rng) for column in columns]
        lines.append(f"{kind:<10} {len(chosen):>6} {cells[0]:>22} {cells[1]:>24} {cells[2]:>24}")
    return "\n".join(lines)


def _with_interval(
    predicted: "Float[np.ndarray, ' pairs']",
    measured: "Float[np.ndarray, ' pairs']",
    images: "Float[np.ndarray, ' pairs']",
    *,
    draws: int,
    rng: np.random.Generator,
) -> str:
    from scipy.stats import spearmanr

    of_image = {image: np.flatnonzero(images == image) for image in np.unique(images)}
    resampled = []
    for _ in range(draws):
        rows = np.concatenate([of_image[image] for image in rng.choice(list(of_image), len(of_image))])
        resampled.append(spearmanr(predicted[rows], measured[rows]).statistic)
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    return f"{spearmanr(predicted, measured).statistic:.2f} [{low:.2f}, {high:.2f}]"


def namings_text(namings: Sequence[Naming], *, draws: int, seed: int) -> str:
    """Share of explanations whose first word is the feature's own name, by attribute and step."""
    lines = [f"{'attribute':<10} {'step':>5} {'cases':>6} {'first word right':>24} {'a random word':>16}"]
    steps: list[int | None] = [*sorted({naming.step for naming in namings}), None]
    for step in steps:
        for attribute in (*ATTRIBUTES, None):
            chosen = [n for n in namings if step in (n.step, None) and attribute in (n.attribute, None)]
            if chosen:
                right = np.array([naming.is_right for naming in chosen], dtype=float)
                weights = np.random.default_rng(seed).multinomial(
                    len(right), np.full(len(right), 1 / len(right)), draws
                )
                low, high = np.quantile(weights @ right / len(right), [0.025, 0.975])
                shuffled = np.mean([naming.is_right_shuffled for naming in chosen])
                lines.append(
                    f"{attribute or 'all':<10} {'all' if step is None else step:>5} {len(chosen):>6} "
                    f"{f'{right.mean():.2f} [{low:.2f}, {high:.2f}]':>24} {shuffled:>16.2f}"
                )
    return "\n".join(lines)
