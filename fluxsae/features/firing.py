"""What fires in one image: its sparse activations, which features say most about it, and the image that shows most."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, varied
from fluxsae.sae.acts import SparseActs

CONFIDENCE: Final[Mapping[str, float]] = {"sure": 0.75, "fairly sure": 0.5, "a guess": 0.0}
"""In words how far to trust a name -> the confidence from which they hold, the highest first."""
LEAST_EXAMPLE: Final = 4
"""Names that the best example shows at least, if any image has as many."""


@dataclass(frozen=True, eq=False)
class SparseMaps:
    """One hook point's activations over an image, step by step: only what fires is kept."""

    steps: tuple[int, ...]
    """Steps that were read: every one near enough to a noise level the SAE was trained on."""
    sigmas: tuple[float, ...]
    own_steps: tuple[int, ...]
    """Steps nearest to the noise levels the SAE was trained on: what is shown unless a step is asked for."""
    rows: Int[np.ndarray, " entries"]
    """Token of each entry, ascending; those of the p-th step begin at p * n_tokens."""
    features: Int[np.ndarray, " entries"]
    values: Float[np.ndarray, " entries"]
    n_tokens: int
    n_features: int

    @classmethod
    def build(
        cls, by_step: Mapping[int, SparseActs], *, sigmas: Sequence[float], own_steps: Sequence[int]
    ) -> "SparseMaps":
        """The maps of acts (tokens, n_features) by step; `sigmas` are those of the steps."""
        parts = list(by_step.values())
        n_tokens, n_features = parts[0].shape
        acts = SparseActs.joined(parts, (len(parts), n_tokens, n_features))
        return cls(
            steps=tuple(by_step),
            sigmas=tuple(sigmas),
            own_steps=tuple(own_steps),
            rows=acts.tokens.int().cpu().numpy(),
            features=acts.features.int().cpu().numpy(),
            values=acts.values.float().cpu().numpy(),
            n_tokens=n_tokens,
            n_features=n_features,
        )

    @property
    def n_bytes(self) -> int:
        """Memory that the entries take."""
        return self.rows.nbytes + self.features.nbytes + self.values.nbytes

    def acts(self, feature: int, step: int | None) -> Float[np.ndarray, " tokens"]:
        """One feature's activation on every token: at a step, or the most over the SAE's own steps."""
        acts = np.zeros(self.n_tokens, dtype=np.float32)
        order, begins = self._by_feature
        entries = order[begins[feature] : begins[feature + 1]]
        for part in self._chosen(step):
            own = entries[slice(*np.searchsorted(entries, [part.start, part.stop]))]
            np.maximum.at(acts, self.rows[own] % self.n_tokens, self.values[own])
        return acts

    @functools.cached_property
    def _by_feature(self) -> tuple[np.ndarray, np.ndarray]:
        """(places of the entries, feature by feature, ascending in each; where each feature's begin)."""
        order = np.argsort(self.features, kind="stable").astype(np.int32)
        return order, np.searchsorted(self.features[order], np.arange(self.n_features + 1))

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """Where the entries of each step begin, and where the last one's end."""
        return np.searchsorted(self.rows, np.arange(len(self.steps) + 1) * self.n_tokens)

    def peaks(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's highest activation over the image."""
        peaks = np.zeros(self.n_features, dtype=np.float32)
        for part in self._chosen(step):
            np.maximum.at(peaks, self.features[part], self.values[part])
        return peaks

    def means(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Each feature's mean activation over all patches (and steps)."""
        totals, chosen = np.zeros(self.n_features), self._chosen(step)
        for part in chosen:
            np.add.at(totals, self.features[part], self.values[part].astype(np.float64))
        means: Float[np.ndarray, " n_features"] = totals / (len(chosen) * self.n_tokens)
        return means

    def spreads(self, step: int | None) -> Float[np.ndarray, " n_features"]:
        """Share of all patches (and steps) on which each feature fires with more than half of its peak."""
        counts, chosen, peaks = np.zeros(self.n_features, dtype=np.int64), self._chosen(step), self.peaks(step)
        for part in chosen:
            strong = self.features[part][self.values[part] > 0.5 * peaks[self.features[part]]]
            counts += np.bincount(strong, minlength=self.n_features)
        spreads: Float[np.ndarray, " n_features"] = counts / (len(chosen) * self.n_tokens)
        return spreads

    def strongest(self, step: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, features, activations) of all that fires: at a step, or the most over the SAE's own steps."""
        parts = self._chosen(step)
        keys = np.concatenate(
            [self.rows[part].astype(np.int64) % self.n_tokens * self.n_features + self.features[part] for part in parts]
        )
        unique, place = np.unique(keys, return_inverse=True)
        acts = np.zeros(len(unique), dtype=np.float32)
        np.maximum.at(acts, place, np.concatenate([self.values[part] for part in parts]))
        return unique // self.n_features, unique % self.n_features, acts

    def at(self, token: int, step: int | None) -> dict[int, float]:
        """Feature -> activation at one token, of those that fire there."""
        found: dict[int, float] = {}
        for part in self._chosen(step):
            first = int(self.rows[part.start]) // self.n_tokens * self.n_tokens if part.start < part.stop else 0
            low, high = part.start + np.searchsorted(self.rows[part], [first + token, first + token + 1])
            for feature, value in zip(self.features[low:high].tolist(), self.values[low:high].tolist(), strict=True):
                found[feature] = max(found.get(feature, 0.0), value)
        return found

    def _chosen(self, step: int | None) -> list[slice]:
        """Where the entries of a step, or of each of the SAE's own steps, stand."""
        if step is not None and step not in self.steps:
            raise FluxSaeError(
                f"step is {step}; this autoencoder was trained at other noise levels. Give one of "
                f"{', '.join(map(str, self.steps))}, or null for the steps it was trained on."
            )
        places = [self.steps.index(each) for each in (self.own_steps if step is None else (step,))]
        return [slice(int(self._edges[place]), int(self._edges[place + 1])) for place in places]


@dataclass(frozen=True)
class Fired:
    """A feature that fires in an image or at a patch."""

    feature: int
    activation: float
    relative: float
    """The activation as a share of the feature's maximum in the run."""
    label_confidence_here: float | None
    """How far to trust its label where it fires this strongly; None without a label."""
    label_precision_here: float | None
    """Share of held-out images scored like this whose captions hold the label; None where it was not measured."""
    label_recall_here: float | None
    """Share of the held-out images whose captions hold the label that score at least this."""
    label_lift_here: float | None
    """The precision over the share of all held-out images whose captions hold the label."""
    place: str | None
    """Where it fires beside what its label names ("inside", "below", ...); None where that is not known."""
    score: float
    """How much it says about the image: the ranking."""


def ranked_features(maps: SparseMaps, cards: CardIndex, *, step: int | None, limit: int) -> list[Fired]:
    """The features that fire in an image: the most telling of each label, then the second of each, and so on.

    Those before others that show where something is, by `standing_out`.
    """
    peaks, levels = maps.peaks(step), shares_of_maximum(maps.means(step), cards)
    scores = telling(peaks, cards) * standing_out(levels, maps.spreads(step))
    order = [int(feature) for feature in np.argsort(-scores, kind="stable") if peaks[feature] > 0]
    return [fired(cards, f, float(peaks[f]), score=float(scores[f])) for f in varied(order, cards.labels)[:limit]]


def features_at(maps: SparseMaps, cards: CardIndex, *, token: int, step: int | None, limit: int) -> list[Fired]:
    """The features that fire at one patch: the most telling of each label, then the second of each, and so on."""
    found = maps.at(token, step)
    scores = dict(zip(found, telling(np.array(list(found.values())), cards, list(found)).tolist(), strict=True))
    order = varied(sorted(found, key=lambda feature: (-scores[feature], feature)), cards.labels)[:limit]
    return [fired(cards, feature, found[feature], score=scores[feature]) for feature in order]


def fired(cards: CardIndex, feature: int, activation: float, *, score: float = 0.0) -> Fired:
    """A feature at this activation."""
    share = shares_of_maximum(np.array([activation]), cards, [feature])
    sure = float(cards.label_confidence_at(share, [feature])[0]) if cards.labels[feature] else None
    precision, recall, lift = cards.name_at(float(share[0]), feature) or (None, None, None)
    return Fired(feature, activation, float(share[0]), sure, precision, recall, lift, cards.places[feature], score)


def telling(acts: np.ndarray, cards: CardIndex, features: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """How much activations of `features` (of all, where None) say: more, the surer the name where it fires like this.

    What fires in almost every image says little; a feature without a name counts by its activation, behind the named.
    """
    shares = shares_of_maximum(acts, cards, features)
    rarity = cards.rarity if features is None else cards.rarity[features]
    sure = cards.label_confidence_at(shares, features)
    scores: np.ndarray = (np.square(sure) + 0.01 * np.square(shares)) * np.maximum(rarity, 0.02)
    return scores


def shares_of_maximum(
    acts: np.ndarray, cards: CardIndex, features: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Activations as shares of each feature's maximum in the run, at most 1."""
    maxima = cards.max_acts if features is None else cards.max_acts[features]
    shares: np.ndarray = np.minimum(1.0, np.divide(acts, maxima, out=np.zeros(len(maxima)), where=maxima > 0))
    return shares


def standing_out(levels: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """How well heatmaps show where something is: of mean activation `levels`, and high on `spreads` of the patches.

    A speck at an edge shows little (its label is borrowed from the image around it), and neither does a map that is
    high everywhere; but that counts something too. Both are shares: of the feature's maximum, and of the patches above
    half of the peak.
    """
    shown: np.ndarray = np.sqrt(levels) * np.maximum(np.square(1 - spreads), 0.1)
    return shown


def differing_features(pair: Sequence[SparseMaps], cards: CardIndex, *, limit: int) -> list[int]:
    """The features that say most about one of two images and not about the other, each label first once."""
    first, second = (telling(maps.peaks(None), cards) for maps in pair)
    change = np.abs(second - first)
    differing = [int(feature) for feature in np.argsort(-change, kind="stable") if change[feature] > 0]
    return varied(differing, cards.labels)[:limit]


def first_thing(features: Sequence[int], cards: CardIndex) -> int | None:
    """The first of some ranked features that is not named after a background; else the first."""
    things = [feature for feature in features if "background" not in (cards.labels[feature] or "").split()]
    return next(iter([*things, *features]), None)


def best_example(cards: CardIndex, limit: int) -> tuple[int | None, list[int]]:
    """The image about which the best features say most, each label once, and those features, the most telling first.

    Where there is one, an image of several names that are sure.
    """
    by_image: dict[tuple[int, bool], dict[str, tuple[float, int]]] = {}
    for feature in cards.ranked[:200]:
        label, maps = cards.labels[feature], cards.acts(feature)
        if not label or not maps:
            continue
        acts, n = np.array(list(maps.values())).reshape(len(maps), -1), [feature] * len(maps)
        peaks = acts.max(axis=1)
        spreads = (acts > 0.5 * peaks[:, None]).mean(axis=1)
        scores = telling(peaks, cards, n) * standing_out(shares_of_maximum(acts.mean(axis=1), cards, n), spreads)
        sure = cards.label_confidence_at(shares_of_maximum(peaks, cards, n), n)
        for image, said, confidence in zip(maps, scores.tolist(), sure.tolist(), strict=True):
            found = by_image.setdefault((image, confidence >= CONFIDENCE["sure"]), {})
            found[label] = max(found.get(label, (0.0, feature)), (said, feature))
    if not by_image:
        return None, []
    told = {image: found for (image, is_sure), found in by_image.items() if is_sure and len(found) >= LEAST_EXAMPLE}
    every = {image: by_image.get((image, False), {}) | by_image.get((image, True), {}) for image, _ in by_image}
    ranked = {image: sorted(found.values(), reverse=True)[:limit] for image, found in (told or every).items()}
    best = max(ranked, key=lambda image: (sum(said for said, _ in ranked[image]), -image))
    return best, [feature for _, feature in ranked[best]]
