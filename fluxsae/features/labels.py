"""Names for features without a language model: words enriched in captions, phrases near in CLIP's space."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.special import gammaln, logsumexp, ndtr  # scipy.stats has more of it, and takes a second to import
from torch import Tensor

from fluxsae.features.config import SelectionConfig
from fluxsae.features.selection import label_images, prompt_groups
from fluxsae.runs.prompts import words_of

CURVE_LEVELS = np.linspace(0.0, 1.0, 11)
"""Shares of a feature's highest score at which `label_curve` tells how far to trust its name."""
_CURVE_WIDTH, _CURVE_PRIOR, _CURVE_BINS = 0.1, 4.0, 100

STOP_WORDS = frozenset(
    {"a", "an", "the", "of", "on", "in", "at", "and", "or", "with", "to", "by", "for", "from", "is", "are", "it", "its"}
)


@dataclass(frozen=True)
class Label:
    """A name for a feature and how far to trust it."""

    text: str
    confidence: float
    """From 0 (chance) to 1."""
    p_value: float
    """Chance of an enrichment this strong among all words tried, by the source's own test."""
    effect: float
    """How strong it is: log-odds of the word, or the shift in CLIP's space in standard deviations."""
    source: str
    """Which labeller said so: "captions", "clip", ..."""


class Labeller(Protocol):
    """Anything that names features from the images they like."""

    name: str

    def label(self, scores: Float[Tensor, " images"]) -> list[Label]:
        """Names for the feature with these scores, best first; empty where nothing stands out."""
        ...


def caption_terms(prompt: str, *, longest: int = 3) -> set[str]:
    """The words and phrases of a caption, in lower case, that neither begin nor end with a function word."""
    terms: set[str] = set()
    for clause in re.split(r"[.,;:!?()]", prompt.lower()):
        words = words_of(clause)
        for start in range(len(words)):
            for stop in range(start + 1, min(start + longest, len(words)) + 1):
                if words[start] not in STOP_WORDS and words[stop - 1] not in STOP_WORDS:
                    terms.add(" ".join(words[start:stop]))
    return terms


class CaptionLabeller:
    """Words and phrases enriched in the captions of the top images against the captions of all other images.

    delta = log-odds(top) - log-odds(rest), both with the pseudo-counts of an informative Dirichlet prior;
    the pseudo-counts are those of `prior` average captions (Monroe, Colaresi & Quinn 2008). Ranked by significance
    in the exact hypergeometric test: delta / sd(delta), its normal approximation, puts words that occur in the top
    images only behind weaker ones.
    """

    name = "captions"

    def __init__(
        self, prompts: Sequence[str], *, config: SelectionConfig | None = None, prior: float = 10.0, min_count: int = 3
    ) -> None:
        """`prior` is in captions: how many average captions it weighs; rarer terms than `min_count` are left out."""
        self.config = config or SelectionConfig()
        self.prior = prior
        self.groups = prompt_groups(prompts)
        captions = list(dict.fromkeys(prompts))
        found = [caption_terms(caption) for caption in captions]
        counts = Counter(term for terms in found for term in terms)
        self.terms = sorted(term for term, count in counts.items() if min_count <= count < len(captions))
        self.presence = _presence(found, self.terms)
        self.counts = np.asarray(self.presence.sum(axis=0)).ravel()

    def label(self, scores: Float[Tensor, " images"]) -> list[Label]:
        """The enriched terms of one feature's top images, the strongest first; empty where none is significant."""
        top = label_images(scores, self.groups, config=self.config)
        if len(top) < self.config.min_images or not self.terms:
            return []
        n_top, n_rest = len(top), self.presence.shape[0] - len(top)
        in_top = np.asarray(self.presence[self.groups[top].numpy()].sum(axis=0)).ravel()
        seen = np.flatnonzero(in_top)
        in_top, in_all = in_top[seen], self.counts[seen]
        log_p = enrichment_log_p(in_top, in_all, n_top, n_top + n_rest)
        p_values = np.minimum(np.exp(log_p) * len(self.terms), 1.0)
        prior = self.prior * in_all / (n_top + n_rest)
        delta = _log_odds(in_top, n_top, prior=prior, total=self.prior)
        delta -= _log_odds(in_all - in_top, n_rest, prior=prior, total=self.prior)
        lift = (in_top / n_top - (in_all - in_top) / max(n_rest, 1)).clip(0, 1)
        found = [self.terms[term] for term in seen]
        order = sorted(np.flatnonzero(p_values < 0.05), key=lambda i: (round(float(log_p[i]), 6), -len(found[i])))
        return [Label(found[i], float(lift[i]), float(p_values[i]), float(delta[i]), self.name) for i in order[:8]]

    def holds(self, text: str) -> np.ndarray | None:
        """For each image whether its caption has this term; None for a text that is no term of the captions."""
        at = bisect_left(self.terms, text)
        if at == len(self.terms) or self.terms[at] != text:
            return None
        found: np.ndarray = self.presence[:, [at]].toarray().ravel()[self.groups.numpy()] > 0
        return found


def label_curve(scores: Float[np.ndarray, " images"], holds: Bool[np.ndarray, " images"]) -> list[float]:
    """How far to trust a feature's name at `CURVE_LEVELS` of its highest score: 0 is chance, 1 certainty.

    A feature that barely fires often means nothing of what it is named after. So at each level: the share of images
    scored near it whose captions hold the name, above the share in all images; never lower at a higher level.
    """
    shares, base = scores / max(float(scores.max()), 1e-12), float(holds.mean())
    fires = shares > 0
    bins = np.minimum((shares[fires] * _CURVE_BINS).astype(np.int64), _CURVE_BINS - 1)
    n_near, n_held = (np.bincount(bins, weights=w, minlength=_CURVE_BINS) for w in (None, holds[fires]))
    centres = (np.arange(_CURVE_BINS) + 0.5) / _CURVE_BINS
    near = np.exp(-0.5 * np.square((CURVE_LEVELS[:, None] - centres) / _CURVE_WIDTH))
    held = (near @ n_held + _CURVE_PRIOR * base) / (near @ n_near + _CURVE_PRIOR)
    lift = np.clip((held - base) / max(1.0 - base, 1e-12), 0.0, 1.0)
    return [float(value) for value in np.maximum.accumulate(lift)]


def enrichment_log_p(
    in_top: Int[np.ndarray, " terms"], in_all: Int[np.ndarray, " terms"], n_top: int, n_all: int
) -> Float[np.ndarray, " terms"]:
    """Log of the chance that at least `in_top` of `n_top` captions drawn from `n_all` hold a term that `in_all` hold.

    The upper tail of the hypergeometric distribution, for all terms at once (scipy's own is a loop over the terms).
    """
    drawn, have = np.arange(n_top + 1)[None], in_all[:, None]
    is_possible = (drawn >= in_top[:, None]) & (drawn <= have) & (n_top - drawn <= n_all - have)
    log_pmf = _log_choose(have, drawn) + _log_choose(n_all - have, n_top - drawn) - _log_choose(n_all, n_top)
    log_p: Float[np.ndarray, " terms"] = logsumexp(np.where(is_possible, log_pmf, -np.inf), axis=1)
    return log_p


def _log_choose(n: Any, k: Any) -> Any:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)


def _presence(found: Sequence[set[str]], terms: Sequence[str]) -> csr_array:
    number = {term: index for index, term in enumerate(terms)}
    pairs = [(row, number[term]) for row, present in enumerate(found) for term in present if term in number]
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return csr_array((np.ones(len(pairs), np.int32), (rows, columns)), shape=(len(found), len(terms)))


def _log_odds(
    count: Int[np.ndarray, " terms"], captions: int, *, prior: Float[np.ndarray, " terms"], total: float
) -> Float[np.ndarray, " terms"]:
    odds: Float[np.ndarray, " terms"] = np.log((count + prior) / (captions - count + total - prior))
    return odds


class PhraseLabeller:
    """Phrases of a vocabulary whose CLIP-text vectors lie nearest to the top images, against all images of the run."""

    name = "clip"

    def __init__(
        self,
        vocabulary: Sequence[str],
        texts: Float[Tensor, "phrases width"],
        images: Float[Tensor, "images width"],
        prompts: Sequence[str],
        *,
        config: SelectionConfig | None = None,
    ) -> None:
        self.config = config or SelectionConfig()
        self.vocabulary = list(vocabulary)
        self.groups = prompt_groups(prompts)
        # centring takes away what all images and all texts share, the gap between CLIP's two cones among it
        similarity = (images - images.mean(dim=0)) @ (texts - texts.mean(dim=0)).T
        self.similarity = ((similarity - similarity.mean(dim=0)) / similarity.std(dim=0).clamp(min=1e-9)).numpy()

    def label(self, scores: Float[Tensor, " images"]) -> list[Label]:
        """The nearest phrases of one feature's top images, the nearest first; empty where none is significant."""
        top = label_images(scores, self.groups, config=self.config).numpy()
        if len(top) < self.config.min_images:
            return []
        mean = self.similarity[top].mean(axis=0)
        p_values = np.minimum(ndtr(-mean * np.sqrt(len(top))) * len(self.vocabulary), 1.0)
        order = [i for i in np.argsort(-mean, kind="stable")[:8] if p_values[i] < 0.05]
        # a shift of d standard deviations separates top from rest with probability Phi(d / sqrt 2)
        sure = 2 * ndtr(mean / np.sqrt(2)) - 1
        return [
            Label(self.vocabulary[i], float(sure[i].clip(0, 1)), float(p_values[i]), float(mean[i]), self.name)
            for i in order
        ]


def combined_label(labels: Sequence[Sequence[Label]]) -> Label | None:
    """One name from several labellers: the first one that has any, surer where another names the same thing."""
    named = [candidates for candidates in labels if candidates]
    if not named:
        return None
    best = named[0][0]
    doubt = 1.0 - best.confidence
    words = set(best.text.split())
    for others in named[1:]:
        if words & set(others[0].text.split()):
            doubt *= 1.0 - others[0].confidence
    return replace(best, confidence=1.0 - doubt)


def caption_vocabulary(prompts: Sequence[str], *, limit: int) -> list[str]:
    """The most frequent words and phrases of the captions, each at least twice; ties in alphabetical order."""
    counts = Counter(term for caption in dict.fromkeys(prompts) for term in caption_terms(caption, longest=2))
    frequent = [term for term, count in counts.items() if count >= 2]
    return sorted(frequent, key=lambda term: (-counts[term], term))[:limit]
