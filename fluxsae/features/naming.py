"""Names that hold: put forward from one half of the images, checked on the other, at every strength."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from fluxsae.features.config import SelectionConfig
from fluxsae.features.labels import CURVE_LEVELS, CaptionLabeller, Label, Labeller, PhraseLabeller
from fluxsae.features.selection import prompt_groups, q_values

STRENGTHS: Final = {"strong": 2 / 3, "middle": 1 / 3, "weak": 0.0}
"""Levels of activation -> the share of a feature's highest score above which they begin, the strongest first."""
OFTEN: Final = 0.5
"""Share of the images from which a feature that fires is no sure sign of what fewer images show."""
NEVER_SURE: Final = 0.7
"""Most that such a name is trusted as a whole, and where its feature does not fire strongly."""
PLACES: Final = {
    "inside": "on it",
    "above": "above it",
    "below": "below it",
    "left": "to the left of it",
    "right": "to the right of it",
    "edge": "at its edge",
    "away": "away from it",
    "varies": "in no fixed place beside it",
}
"""Where a feature fires beside what it is named after -> in words; the first one that holds is told."""
ON_IT: Final = "inside"
"""The place that a name alone promises; every other one is told beside it."""
_WIDTH, _PRIOR, _BINS = 0.1, 2.0, 100


@dataclass(frozen=True)
class StrengthLevel:
    """How a name does on the held-out images that score at one level of activation."""

    n_images: int
    precision: float | None
    """Share of them whose captions hold the name; None without such images."""
    images: list[int]
    """Ids of some of them, drawn evenly from the strongest to the weakest."""


@dataclass(frozen=True)
class NamePlace:
    """Where a feature fires beside what it is named after, found on one half of the images."""

    place: str
    """One of `PLACES`."""
    share: float
    """Share of the held-out images that show what is named in which it fires there most."""
    n_images: int


@dataclass(frozen=True)
class NameCheck:
    """A name put forward from one half of the images, and what the other half says of it."""

    label: Label
    p_value: float
    """Chance that this name fits as many of as many random images of that half: a permutation test, for one name."""
    q_value: float = float("nan")
    """The p-value corrected for all features that were checked: the false discovery rate at which it is kept."""
    base: float | None = None
    """Share of the held-out images whose captions hold the name; None for a name that captions never hold."""
    precision: list[float] | None = None
    """Share of images scored near each of `CURVE_LEVELS` whose captions hold the name; never falling with the level."""
    recall: list[float] | None = None
    """Share of the images whose captions hold the name that reach each of `CURVE_LEVELS`."""
    confidence: float = 0.0
    """How far to trust the name wherever the feature fires, weighted by how strongly: 0 is chance, 1 certainty."""
    curve: list[float] | None = None
    """How far to trust the name at `CURVE_LEVELS`: 0 is chance, 1 certainty."""
    levels: tuple[StrengthLevel, ...] = ()
    """In the order of `STRENGTHS`."""
    place: NamePlace | None = None
    """Where it fires beside what it names; None where no masks are known, or too few images show it."""

    def at(self, place: NamePlace | None) -> "NameCheck":
        """The name with the place of its feature: never sure where that is not fixed."""
        if place is None or place.place != "varies":
            return replace(self, place=place)
        curve = None if self.curve is None else np.minimum(self.curve, NEVER_SURE).tolist()
        return replace(self, place=place, curve=curve, confidence=min(self.confidence, NEVER_SURE))


def held_out_half(prompts: Sequence[str], subjects: Sequence[str], *, seed: int) -> Bool[np.ndarray, " images"]:
    """Half of the prompts, as the images that names are checked on; images of one prompt stay on one side.

    Pictures without a prompt are told apart by their `subjects`.
    """
    groups = prompt_groups([prompt or subject for prompt, subject in zip(prompts, subjects, strict=True)]).numpy()
    n_groups = int(groups.max(initial=-1)) + 1
    is_out = np.random.default_rng(seed).permutation(n_groups) % 2 == 1
    held_out: Bool[np.ndarray, " images"] = is_out[groups]
    return held_out


class NameChecker:
    """Puts names forward from one half of a run's images and checks them on the other."""

    def __init__(
        self,
        prompts: Sequence[str],
        subjects: Sequence[str],
        *,
        vocabulary: Sequence[str],
        texts: Float[Tensor, "phrases width"],
        images: Float[Tensor, "images width"],
        others: Sequence[Labeller] = (),
        config: SelectionConfig | None = None,
    ) -> None:
        """`others` are further sources of names, asked first and with all images; `images` are CLIP embeddings."""
        self.config = config or SelectionConfig()
        self.others = list(others)
        self.held_out = held_out_half(prompts, subjects, seed=self.config.seed)
        self._captions, self._phrases = [], []
        for half in (~self.held_out, self.held_out):
            chosen = np.flatnonzero(half).tolist()
            said, told = ([texts_[i] for i in chosen] for texts_ in (prompts, subjects))
            self._captions.append(CaptionLabeller(said, config=self.config))
            self._phrases.append(PhraseLabeller(vocabulary, texts, images[chosen], told, config=self.config))

    def propose(self, scores: Float[Tensor, " images"]) -> tuple[list[Label], list[Label]]:
        """The words of captions and the phrases of CLIP that stand out on the half that names are taken from."""
        chosen = scores[~self.held_out]
        return self._captions[0].label(chosen), self._phrases[0].label(chosen)

    def check(self, scores: Float[Tensor, " images"], proposed: Sequence[Sequence[Label]]) -> NameCheck | None:
        """What the held-out half says of the first name put forward; None without one, or where it cannot be checked.

        A name of another source that neither captions nor CLIP's phrases hold keeps the p-value that came with it.
        """
        theirs = [found for labeller in self.others if (found := labeller.label(scores))]
        named = [*theirs, *(labels for labels in proposed if labels)]
        if not named:
            return None
        label, own = named[0][0], scores[self.held_out]
        p_value = self._p_value(label, own)
        if p_value is None:
            return None if not theirs else self._in_proportion(label, label.p_value, scores)
        holds = self._captions[1].holds(label.text)
        if holds is None:
            return self._in_proportion(label, p_value, scores)
        maximum, ids = float(scores.max()), np.flatnonzero(self.held_out)
        return measured_name(label, p_value, own.numpy() / max(maximum, 1e-12), holds, ids=ids)

    def _p_value(self, label: Label, own: Float[Tensor, " held_out"]) -> float | None:
        for labeller in (self._captions[1], self._phrases[1]):
            found = labeller.p_value(own, label.text)
            if found is not None:
                return found
        return None

    @staticmethod
    def _in_proportion(label: Label, p_value: float, scores: Float[Tensor, " images"]) -> NameCheck:
        """A name that captions never hold, trusted in proportion to the activation."""
        curve = label.confidence * CURVE_LEVELS
        shares = (scores / scores.max().clamp(min=1e-12)).double().numpy()
        confidence = label.confidence * float((shares**2).sum() / max(shares.sum(), 1e-12))
        return NameCheck(label, p_value, confidence=confidence, curve=curve.tolist())


def kept_names(checks: Sequence[NameCheck | None], *, max_q: float) -> list[NameCheck | None]:
    """The names that hold at a false discovery rate of `max_q` over all features checked; None for the others."""
    p_values = np.array([np.nan if check is None else check.p_value for check in checks])
    judged = zip(checks, q_values(p_values).tolist(), strict=True)
    return [None if check is None or q > max_q else replace(check, q_value=q) for check, q in judged]


def random_named(
    checker: NameChecker,
    columns: Sequence[Float[Tensor, " images"]],
    names: Sequence[NameCheck | None],
    *,
    seed: int,
) -> float:
    """Share of random features that would get a name beside those that have one: `columns` with their images shuffled.

    NaN without columns.
    """
    bar = max((name.p_value for name in names if name is not None), default=-1.0)
    rng = np.random.default_rng(seed)
    shuffled = [column[rng.permutation(len(column))] for column in columns]
    found = [checker.check(column, checker.propose(column)) for column in shuffled]
    return float(np.mean([name is not None and name.p_value <= bar for name in found])) if found else float("nan")


def measured_name(
    label: Label,
    p_value: float,
    shares: Float[np.ndarray, " images"],
    holds: Bool[np.ndarray, " images"],
    *,
    ids: np.ndarray,
) -> NameCheck:
    """A name with its precision and recall on held-out images, whose captions hold it or not; `ids` are theirs.

    `shares` are their scores as shares of the feature's highest in the whole run.
    """
    base, precision = float(holds.mean()), precision_curve(shares, holds)
    trust = np.clip((precision - base) / max(1.0 - base, 1e-12), 0.0, 1.0)
    fires = shares > 0
    most = NEVER_SURE if float(fires.mean()) >= OFTEN > base else 1.0
    trust = np.where(STRENGTHS["strong"] > CURVE_LEVELS, np.minimum(trust, most), trust)
    weights = shares[fires]
    return NameCheck(
        label,
        p_value,
        base=base,
        precision=precision.tolist(),
        recall=[float((shares[holds] >= max(level, 1e-12)).mean()) if holds.any() else 0.0 for level in CURVE_LEVELS],
        confidence=min(most, float(np.interp(weights, CURVE_LEVELS, trust) @ weights / max(weights.sum(), 1e-12))),
        curve=trust.tolist(),
        levels=strength_levels(shares, holds, ids=ids),
    )


def precision_curve(
    shares: Float[np.ndarray, " images"], holds: Bool[np.ndarray, " images"]
) -> Float[np.ndarray, " levels"]:
    """Share of images that hold a name, among those scored near each of `CURVE_LEVELS`; rising with the level.

    `shares` are scores as shares of the highest. A few images more, of which as many hold it as of all, keep few images
    from making a certainty. Where a lower level does better, both get their mean, weighted by their images.
    """
    from scipy.optimize import isotonic_regression

    base, fires = float(holds.mean()) if len(holds) else 0.0, shares > 0
    bins = np.minimum((shares[fires] * _BINS).astype(np.int64), _BINS - 1)
    n_near, n_held = (np.bincount(bins, weights=w, minlength=_BINS) for w in (None, holds[fires]))
    centres = (np.arange(_BINS) + 0.5) / _BINS
    near = np.exp(-0.5 * np.square((CURVE_LEVELS[:, None] - centres) / _WIDTH))
    weights = near @ n_near + _PRIOR
    rising = isotonic_regression((near @ n_held + _PRIOR * base) / weights, weights=weights)
    found: Float[np.ndarray, " levels"] = rising.x
    return found


def strength_levels(
    shares: Float[np.ndarray, " images"], holds: Bool[np.ndarray, " images"], *, ids: np.ndarray, n_images: int = 4
) -> tuple[StrengthLevel, ...]:
    """Precision and some images of each of `STRENGTHS`; `shares` are scores as shares of the highest."""
    found, above = [], np.inf
    for least in STRENGTHS.values():
        inside = np.flatnonzero((shares > least) & (shares <= above))
        ordered = inside[np.argsort(-shares[inside], kind="stable")]
        places = np.linspace(0, len(ordered) - 1, min(n_images, len(ordered))).astype(np.int64)
        precision = float(holds[inside].mean()) if len(inside) else None
        found.append(StrengthLevel(len(inside), precision, [int(i) for i in ids[ordered[places]]]))
        above = least
    return tuple(found)


def name_columns(names: Sequence[NameCheck | None]) -> dict[str, list[Any]]:
    """The names of all features as columns of `features.parquet`."""

    def column(value: Callable[[NameCheck], Any]) -> list[Any]:
        return [None if name is None else value(name) for name in names]

    return {
        "label": column(lambda name: name.label.text),
        "label_confidence": column(lambda name: name.confidence),
        "label_curve": column(lambda name: name.curve),
        "name_p_value": column(lambda name: name.p_value),
        "name_q_value": column(lambda name: name.q_value),
        "name_base": column(lambda name: name.base),
        "name_precision": column(lambda name: name.precision),
        "name_recall": column(lambda name: name.recall),
        "level_images": column(lambda name: [level.images for level in name.levels] or None),
        "level_counts": column(lambda name: [level.n_images for level in name.levels] or None),
        "level_precision": column(lambda name: [level.precision for level in name.levels] or None),
        "name_place": column(lambda name: name.place and name.place.place),
        "name_place_share": column(lambda name: name.place and name.place.share),
    }
