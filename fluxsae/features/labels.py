"""Names for features without a language model: words enriched in captions, phrases near in CLIP's space."""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fluxsae.features.config import SelectionConfig
from fluxsae.features.selection import label_images, prompt_groups
from fluxsae.runs.prompts import words_of

CURVE_LEVELS = np.linspace(0.0, 1.0, 11)
"""Shares of a feature's highest score at which precision and recall of its name are measured."""

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
    """How strong it is: log-odds of the word, or the chance that a top image lies nearer to the phrase than another."""
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

    def p_value(self, scores: Float[Tensor, " images"], text: str) -> float | None:
        """Chance that as many random captions as the feature has top images hold this term as often; no correction.

        The exact permutation test of one term. None for a text that is no term of the captions; 1 with too few images.
        """
        from scipy.stats import hypergeom

        holds = self._captions_with(text)
        if holds is None:
            return None
        top = label_images(scores, self.groups, config=self.config)
        if len(top) < self.config.min_images:
            return 1.0
        in_top = int(holds[self.groups[top].numpy()].sum())
        return float(hypergeom.sf(in_top - 1, len(holds), int(holds.sum()), len(top)))

    def holds(self, text: str) -> Bool[np.ndarray, " images"] | None:
        """For each image whether its caption has this term; None for a text that is no term of the captions."""
        held = self._captions_with(text)
        return None if held is None else held[self.groups.numpy()]

    def _captions_with(self, text: str) -> Bool[np.ndarray, " captions"] | None:
        at = bisect_left(self.terms, text)
        if at == len(self.terms) or self.terms[at] != text:
            return None
        found: Bool[np.ndarray, " captions"] = self.presence[:, [at]].toarray().ravel() > 0
        return found


def enrichment_log_p(
    in_top: Int[np.ndarray, " terms"], in_all: Int[np.ndarray, " terms"], n_top: int, n_all: int
) -> Float[np.ndarray, " terms"]:
    """Log of the chance that at least `in_top` of `n_top` captions drawn from `n_all` hold a term that `in_all` hold.

    The upper tail of the hypergeometric distribution, for all terms at once (scipy's own is a loop over the terms).
    """
    from scipy.special import logsumexp

    drawn, have = np.arange(n_top + 1)[None], in_all[:, None]
    is_possible = (drawn >= in_top[:, None]) & (drawn <= have) & (n_top - drawn <= n_all - have)
    log_pmf = _log_choose(have, drawn) + _log_choose(n_all - have, n_top - drawn) - _log_choose(n_all, n_top)
    log_p: Float[np.ndarray, " terms"] = logsumexp(np.where(is_possible, log_pmf, -np.inf), axis=1)
    return log_p


def _log_choose(n: Any, k: Any) -> Any:
    from scipy.special import gammaln

    return gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)


def _presence(found: Sequence[set[str]], terms: Sequence[str]) -> Any:
    """Captions by terms, as a scipy csr_array; scipy takes a second to import, and browsing needs none of it."""
    from scipy.sparse import csr_array

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
        self._row = {phrase: index for index, phrase in enumerate(self.vocabulary)}
        # centring takes away what all images and all texts share, the gap between CLIP's two cones among it
        similarity = (images - images.mean(dim=0)) @ (texts - texts.mean(dim=0)).T
        self.similarity = ((similarity - similarity.mean(dim=0)) / similarity.std(dim=0).clamp(min=1e-9)).numpy()
        self.ranks = prompt_ranks(self.similarity, self.groups.numpy())
        self.n_prompts = int(self.groups.max()) + 1 if len(self.groups) else 0

    def label(self, scores: Float[Tensor, " images"]) -> list[Label]:
        """The nearest phrases of one feature's top images, the nearest first; empty where none is significant."""
        top = label_images(scores, self.groups, config=self.config).numpy()
        if len(top) < self.config.min_images:
            return []
        nearness = self.similarity[top].mean(axis=0)
        above, log_p = rank_sum(self.ranks[top], n_prompts=self.n_prompts)
        p_values = np.minimum(np.exp(log_p) * len(self.vocabulary), 1.0)
        order = [i for i in np.argsort(-nearness, kind="stable")[:8] if p_values[i] < 0.05]
        return [
            Label(
                self.vocabulary[i], float((2 * above[i] - 1).clip(0, 1)), float(p_values[i]), float(above[i]), self.name
            )
            for i in order
        ]

    def p_value(self, scores: Float[Tensor, " images"], text: str) -> float | None:
        """Chance that as many random images as the feature has top images lie as near to this phrase; no correction.

        None for a text that is no phrase of the vocabulary; 1 with too few images.
        """
        if text not in self._row:
            return None
        top = label_images(scores, self.groups, config=self.config).numpy()
        if len(top) < self.config.min_images:
            return 1.0
        _, log_p = rank_sum(self.ranks[top][:, [self._row[text]]], n_prompts=self.n_prompts)
        return float(np.exp(log_p[0]))


def prompt_ranks(
    values: Float[np.ndarray, "images phrases"], groups: Int[np.ndarray, " images"]
) -> Float[np.ndarray, "images phrases"]:
    """Rank of each value among the prompts, from 1 up: a prompt's images weigh as much as one image together."""
    weights = 1.0 / np.bincount(groups)[groups]
    order = np.argsort(values, axis=0, kind="stable")
    ahead = weights[order]
    ranks = np.empty(values.shape, dtype=np.float32)
    np.put_along_axis(ranks, order, (ahead.cumsum(axis=0) - ahead / 2 + 0.5).astype(np.float32), axis=0)
    return ranks


def rank_sum(
    ranks: Float[np.ndarray, "top phrases"], *, n_prompts: int
) -> tuple[Float[np.ndarray, " phrases"], Float[np.ndarray, " phrases"]]:
    """The chance that a top image ranks above another one, and the log-chance that random images do so well.

    Mann and Whitney's permutation test (1947) by its normal approximation. Unlike means of the values themselves,
    ranks have no heavy tails, and the approximation is cautious for few images. Ranks are of `n_prompts`.
    """
    from scipy.special import log_ndtr

    n_top = len(ranks)
    n_rest = max(n_prompts - n_top, 1)
    above = (ranks.mean(axis=0, dtype=np.float64) - (n_top + 1) / 2) / n_rest
    spread = np.sqrt((n_prompts + 1) / (12 * n_top * n_rest))
    return above, log_ndtr((0.5 - above) / spread)


def caption_vocabulary(prompts: Sequence[str], *, limit: int) -> list[str]:
    """The most frequent words and phrases of the captions, each at least twice; ties in alphabetical order."""
    counts = Counter(term for caption in dict.fromkeys(prompts) for term in caption_terms(caption, longest=2))
    frequent = [term for term, count in counts.items() if count >= 2]
    return sorted(frequent, key=lambda term: (-counts[term], term))[:limit]
