"""What the Gallery tab and its endpoints ask for, from the run folder alone."""

import functools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, CardNeighbour, FeatureCard
from fluxsae.features.naming import PLACES
from fluxsae.pictures.heatmaps import overlay
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.serve.downloads import Downloads, csv_bytes
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.pictures import thumbnail_url
from fluxsae.ui.serve.schemas import FeatureRequest, SearchRequest, SilenceRequest
from fluxsae.ui.serve.session import Workbench
from fluxsae.ui.tabs.gallery.words import WordsDesk

PAGE = 24
"""Cards shown at first, and added by each "show more"."""
TURNS = 32
"""Different searches at a time: who asks first searches; those who ask the same meanwhile wait for what is found."""
THUMBS = 3
PICTURES = 8
SORTS = {
    "best": "Most meaningful first",
    "strongest": "Strongest first",
    "frequent": "Fires most often first",
    "rare": "Fires most rarely first",
    "number": "By number",
}
COLUMNS = (
    "feature", "label", "label_confidence", "feature_class", "density", "image_density", "mean_act", "max_act",
    "coherence", "p_value", "q_value", "is_coherent", "monosemanticity", "spatial_spread", "family",
)  # fmt: skip
"""What the table of features tells of each."""
CLASSES = {"any": "Any", "rare": "Rare", "common": "Common", "very common": "Very common", "dead": "Dead"}


class GalleryDesk(Desk):
    """The Gallery tab's questions, answered from the cards."""

    def __init__(self, bench: Workbench) -> None:
        super().__init__(bench)
        self.words = WordsDesk(bench)
        self._turns = [threading.Lock() for _ in range(TURNS)]

    def answers(self) -> Answers:
        """/search_features, /feature and /silence."""
        return {
            SearchRequest: functools.partial(views.search, self.bench),
            FeatureRequest: self.feature,
            SilenceRequest: self.words.answer,
        }

    def downloads(self) -> Downloads:
        """features.csv: all features that a query and its filters find, in the order of the gallery."""
        return {"features.csv": self._features_csv}

    def _features_csv(self, asked: Mapping[str, str]) -> bytes:
        request = SearchRequest.parse(
            self.limits, query=asked.get("query", ""), hookpoint=asked.get("hookpoint"), limit=PAGE
        )
        cards, reasons = self.bench.cards[request.hookpoint], self._found(request.hookpoint, request.query)
        kept = _passing(cards, list(reasons), asked.get("class", "any"), asked.get("coherent") == "true")
        names = [name for name in COLUMNS if name in cards.features]
        columns = [cards.features.column(name).tolist() for name in names]
        rows = ([*(column[f] for column in columns), reasons[f]] for f in _sorted(cards, kept, asked.get("sort")))
        return csv_bytes([*names, "found_by"], rows)

    def gallery(  # noqa: PLR0917 - the order of the tab's inputs
        self, query: Any, hookpoint: Any, feature_class: Any, coherent_only: Any, sort: Any, start: Any = 0
    ) -> dict[str, Any]:
        """A page of cards for a query and its filters, from the card `start` on; the summary counts all of them."""
        chosen_class = feature_class if feature_class in CLASSES else "any"
        chosen_sort = sort if sort in SORTS else "best"
        first = start if isinstance(start, int) and start > 0 else 0
        try:
            request = SearchRequest.parse(self.limits, query=query, hookpoint=hookpoint, limit=PAGE)
            return self._gallery(request, chosen_class, bool(coherent_only), chosen_sort, first)
        except FluxSaeError as error:  # too long, or a number that no feature has
            return {"rows": 0, "cols": 0, "start": 0, "summary": str(error), "cards": [], "more": None, "code": None}

    @functools.lru_cache(maxsize=64)  # noqa: B019 - one desk a page, for as long as it is served
    def _gallery(
        self, request: SearchRequest, feature_class: str, coherent_only: bool, sort: str, start: int
    ) -> dict[str, Any]:
        cards = self.bench.cards[request.hookpoint]
        with self._turns[hash((request.hookpoint, request.query)) % TURNS]:
            reasons = self._found(request.hookpoint, request.query)
        kept = _passing(cards, list(reasons), feature_class, coherent_only)
        page = _sorted(cards, kept, sort)[start : start + PAGE]
        asked = {"query": request.query, "hookpoint": request.hookpoint, "class": feature_class, "sort": sort}
        asked |= {"coherent": "true"} if coherent_only else {}
        left = max(0, len(kept) - start - len(page))
        return {
            **views.thumb_grid(cards),
            "start": start,
            "summary": _summary_words(request.query, [reasons[feature] for feature in kept], len(cards)),
            "cards": [
                {
                    **views.chip(cards, feature),
                    "pictures": views.card_thumbs(cards, feature, limit=THUMBS),
                    "reason": reasons[feature],
                }
                for feature in page
            ],
            "more": f"Show {min(PAGE, left)} more of {left:,}" if left else None,
            "file": f"{self.files}/features.csv?{urlencode(asked)}",
            "code": self.code(SearchRequest, request.model_dump()),
        }

    def page(self, selection: Any) -> dict[str, Any]:
        """One feature's page."""
        request = self.chosen(selection)
        cards = self.bench.cards[request.hookpoint]
        card = cards[request.feature]
        return {
            **views.chip(cards, request.feature),
            "at": time.monotonic(),  # closed and chosen again, it is shown again
            "word": f"{self.bench.word(request.hookpoint)} ({request.hookpoint})",
            "rows": cards.info.rows,
            "cols": cards.info.cols,
            "sentence": sentence(card),
            "pictures": views.card_pictures(cards, card, limit=PICTURES),
            "levels": _levels(cards, card),
            "silent": [_plain(cards, image) for image in card.silent_images[:4]],
            "facts": facts(card),
            "silencing": self.words.cost_words(card),
            **_histogram(card),
            "steps": list(card.steps),
            "step_profile": list(card.step_profile),
            "neighbours": _similar(cards, card.neighbours),
            "coactive": _similar(cards, card.coactive),
            **self.frame(FeatureRequest, request.model_dump(), tab="gallery"),
        }

    def feature(self, request: FeatureRequest) -> tuple[dict[str, Any], list[tuple[Image.Image, str]]]:
        """A card as JSON, and its top images with overlays."""
        cards = self.bench.cards[request.hookpoint]
        card = cards[request.feature]
        heat = cards.heatmaps(request.feature)
        with views.DRAWING:
            pictures = [
                (
                    overlay(cards.picture(top.image_id), heat[top.image_id], min_side=views.OVERLAY_SIDE),
                    f"{top.prompt} (seed {top.seed}): {100 * top.score / card.max_act:.0f} % of its maximum",
                )
                for top in card.top_images[: views.MAX_OVERLAYS]
                if top.image_id in heat
            ]
        return card.to_dict(), pictures

    @functools.lru_cache(maxsize=16)  # noqa: B019 - one desk a page, for as long as it is served
    def _found(self, hookpoint: str, query: str) -> dict[int, str]:
        """Feature -> why it was found, best first; every feature for an empty query."""
        found = views.hits(self.bench, hookpoint, query, limit=self.limits.hookpoints[hookpoint])
        return {hit.feature: hit.reason for hit in found}


def _passing(cards: CardIndex, features: list[int], feature_class: str, coherent_only: bool) -> list[int]:
    table = cards.features
    if feature_class != "any":
        classes = table.column("feature_class")
        features = [feature for feature in features if classes[feature] == feature_class]
    if coherent_only:
        coherent = table.column("is_coherent") if "is_coherent" in table else [False] * len(table)
        features = [feature for feature in features if coherent[feature]]
    return features


def _sorted(cards: CardIndex, features: list[int], sort: Any) -> list[int]:
    density, strength = cards.features.column("image_density"), cards.features.column("max_act")
    keys: dict[Any, Any] = {
        "strongest": lambda f: -float(strength[f]),
        "frequent": lambda f: -float(density[f]),
        "rare": lambda f: (density[f] == 0, float(density[f])),
        "number": lambda f: f,
    }
    return sorted(features, key=keys[sort]) if sort in keys else features


def _summary_words(query: str, reasons: Sequence[str], n_all: int) -> str:
    """How many features a query found, and by what."""
    if not query:
        return f"{len(reasons):,} of {n_all:,} features; the most meaningful first"
    n_words, n_alike = reasons.count("words"), reasons.count("clip")
    parts = [f"{len(reasons) - n_words - n_alike:,} of {n_all:,} features match “{query}” by name"]
    parts += [f"{n_words:,} more by the captions of their best images"] if n_words else []
    parts += [f"{n_alike:,} more are most similar by their images (CLIP)"] if n_alike else []
    return "; ".join(parts)


def _similar(cards: CardIndex, others: Sequence[CardNeighbour]) -> list[dict[str, Any]]:
    return [{**views.named(cards, other.feature), "similarity": other.similarity} for other in others[:10]]


def _histogram(card: FeatureCard) -> dict[str, list[Any]]:
    """The bins of a card's histogram between the first and the last that hold something, with their edges."""
    filled = np.flatnonzero(card.histogram)
    if not len(filled):
        return {"histogram": [], "histogram_edges": []}
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = list(card.histogram_edges[first : last + 1])
    edges[-1] = card.max_act  # the outer bins are open
    edges[0] = min(edges[0], card.max_act)
    return {"histogram": list(card.histogram[first:last]), "histogram_edges": edges}


def _plain(cards: CardIndex, image_id: int) -> dict[str, Any]:
    images = cards.images
    return {
        "image": thumbnail_url(images, image_id),
        "prompt": images.prompts[image_id],
        "seed": images.seeds[image_id],
        "map": None,
    }


def _levels(cards: CardIndex, card: FeatureCard) -> list[dict[str, Any]]:
    """The name's precision at each level of activation that held-out images reach, with some of them."""
    return [
        {
            "words": f"{level.level.capitalize()}: {level.n_images} images, "
            f"“{card.label}” in {_share(level.precision)} of their captions",
            "pictures": [_plain(cards, image) for image in level.images],
        }
        for level in (card.name.levels if card.name else ())
        if level.precision is not None
    ]


def sentence(card: FeatureCard) -> str:
    """What is known of a feature, in plain words."""
    if card.max_act == 0:
        return "This feature never fired on the images of this run: it is dead."
    often = f"It fires on {_share(card.image_density)} of the images and {_share(card.density)} of all patches"
    words = ", ".join(f"“{word}”" for word in card.caption_words[:4])
    about = f". The captions of its top images contain {words} more often than others" if words else ""
    often += f". {where}" if (where := where_words(card)) else ""
    if card.coherence is None:
        return f"{often}{about}."
    is_sure = card.q_value is not None and card.q_value <= 0.05
    alike = "are more similar than random images" if is_sure else "are no more similar than random images"
    return f"{often}{about}. Its top images {alike}."


def where_words(card: FeatureCard) -> str:
    """Where a feature fires, in plain words: beside what it is named after, or else in the image."""
    if card.label and card.place is not None:
        often = (
            f" (in {_share(card.place_share)} of other images)" if card.place_share and card.place != "varies" else ""
        )
        return f"It goes with images of “{card.label}” and fires {PLACES[card.place]}{often}"
    if card.patch_share is None or card.centre_share is None or card.border_share is None:
        return ""
    return (
        f"Where it fires it covers {_share(card.patch_share)} of the patches; {_share(card.centre_share)} of its "
        f"activation lies in the middle quarter of images, {_share(card.border_share)} at their border"
    )


def _share(fraction: float) -> str:
    return f"{100 * fraction:.1f} %" if fraction < 0.1 else f"{100 * fraction:.0f} %"


def facts(card: FeatureCard) -> list[list[str]]:
    """Statistics with their meaning: term, value, explanation."""
    rows: list[tuple[str, Any, str]] = [
        ("Fires on images", _share(card.image_density), "share of images with at least one patch where it fires"),
        ("Fires on patches", _share(card.density), "share of all image patches (its density)"),
        ("Class", card.feature_class, "dead, rare, common or very common, by density"),
        ("Mean when it fires", f"{card.mean_act:.3g}", "activation units of the autoencoder"),
        ("Maximum", f"{card.max_act:.3g}", "activation units; the end of the heat scale"),
        ("Coherence", _number(card.coherence), "mean CLIP cosine between its top images"),
        (
            "p-value of coherence",
            _number(card.p_value),
            "share of random sets of images, on which features fire, that are as similar",
        ),
        (
            "Monosemanticity",
            _number(card.monosemanticity),
            "CLIP similarity of images, weighted by how strongly it fires",
        ),
        *_name_facts(card),
        ("Where it fires", _place(card.spatial_spread), "0: always the same place, 1: everywhere alike"),
        (
            "Encoder and decoder",
            _number(card.alignment),
            "cosine between its encoder and decoder directions (1: the same)",
        ),
    ]
    return [[term, value, help] for term, value, help in rows if value is not None]


def _name_facts(card: FeatureCard) -> list[tuple[str, Any, str]]:
    """How the name was checked, where its feature fires at its strongest."""
    name = card.name
    if name is None:
        return []
    rows: list[tuple[str, Any, str]] = [
        (
            "q-value of the name",
            _number(name.q_value),
            "permutation test on the half of the images not used to find the name, corrected for all features",
        )
    ]
    if name.base and name.precision and name.recall:
        at_half = len(name.recall) // 2
        rows += [
            (
                "Precision of the name",
                _share(name.precision[-1]),
                "share of captions with the name, where it fires most strongly",
            ),
            (
                "Recall of the name",
                _share(name.recall[at_half]),
                "share of images with the name in which it reaches half of its maximum",
            ),
            (
                "Lift of the name",
                f"{name.precision[-1] / name.base:.1f} ×",
                "its precision, divided by the share of all captions that have the name",
            ),
        ]
    return rows


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    if 0 < abs(value) < 0.001:
        return "below 0.001"
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def _place(spread: float) -> str:
    word = "always the same place" if spread < 0.5 else "some places more" if spread < 0.85 else "everywhere alike"
    return f"{word} ({spread:.2f})"
