"""What several tabs draw, as plain JSON values: pictures, heatmaps, and a feature in a line."""

import base64
import threading
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.features.cards import CardIndex, FeatureCard, SearchHit
from fluxsae.miniature.captions import nearest_word
from fluxsae.pictures.heatmaps import feature_colour
from fluxsae.runs.tables import encode_webp
from fluxsae.ui.serve.pictures import made_url, thumbnail_url
from fluxsae.ui.serve.reading import Unread
from fluxsae.ui.serve.schemas import SearchRequest
from fluxsae.ui.serve.session import Workbench

OVERLAY_SIDE = 512
MAX_OVERLAYS = 16
"""Overlays of one answer: at 1024 px each takes half a second to draw and pack."""
DRAWING = threading.BoundedSemaphore(4)
"""Answers whose overlays are drawn at a time, so that many do not keep others from browsing."""
THUMB_PATCHES = 16
"""Patches along the longer side of a thumbnail's map: of 64, one would be a pixel."""
LONGEST_WORD = 30
BLANK = 2.0
"""Standard deviation of the colours of a picture, of 255, below which nothing is seen in it."""


def base64_text(data: bytes | np.ndarray) -> str:
    """Bytes as base64."""
    return base64.b64encode(data if isinstance(data, bytes) else data.tobytes()).decode("ascii")


def image_url(image: Image.Image, *, is_own: bool = False) -> str:
    """The address of a picture that was made; small pictures stay exact.

    A visitor's own picture, and what was made of it, is sent to that visitor and kept under no address.
    """
    data = encode_webp(image, longest_side=1024, quality=100 if max(image.size) <= 256 else 90)
    return data_url(data) if is_own else made_url(data)


def data_url(data: bytes, *, kind: str = "webp") -> str:
    """A picture as a data address."""
    return f"data:image/{kind};base64,{base64_text(data)}"


def byte_map(acts: np.ndarray, maximum: float) -> np.ndarray:
    """Activations as bytes, 255 standing for `maximum`."""
    scaled = np.clip(acts / maximum if maximum > 0 else np.zeros_like(acts), 0, 1)
    scaled_bytes: np.ndarray = np.rint(scaled * 255).astype(np.uint8)
    return scaled_bytes


def summary(cards: CardIndex, feature: int) -> dict[str, Any]:
    """A feature in one line: what lists and search results say about it."""
    row = cards.features[feature]
    return {
        "hookpoint": str(cards.hookpoint),
        "feature": feature,
        "label": row.label,
        "label_confidence": row.label_confidence,
        "label_by": row.label_by,
        "place": row.name_place,
        "feature_class": row.feature_class,
        "density": row.density,
        "image_density": row.image_density,
        "max_act": row.max_act,
        "coherence": row.coherence,
        "is_coherent": row.is_coherent,
    }


def named(cards: CardIndex, feature: int) -> dict[str, Any]:
    """What the page needs to name a feature and to open it."""
    label = cards.labels[feature]
    return {
        "hookpoint": str(cards.hookpoint),
        "feature": feature,
        "label": label,
        "place": cards.places[feature],
        "colour": feature_colour(label),
    }


def chip(cards: CardIndex, feature: int) -> dict[str, Any]:
    """What every card on the page shows of a feature."""
    row = cards.features[feature]
    return {
        **named(cards, feature),
        "confidence": row.label_confidence,
        "label_by": row.label_by,
        "density": row.density,
        "image_density": row.image_density,
        "maximum": row.max_act,
    }


def hits(bench: Workbench, hookpoint: str, query: str, *, limit: int) -> list[SearchHit]:
    """Features that a query finds, best first, with the reason; CLIP is loaded for words only."""
    is_words = bool(query) and not query.lstrip("#").isdigit()
    return bench.cards[hookpoint].search(query, limit=limit, embedder=bench.embedder if is_words else None)


def search(bench: Workbench, request: SearchRequest) -> list[dict[str, Any]]:
    """Features that a query finds, as the endpoint gives them."""
    cards, found = bench.cards[request.hookpoint], hits(bench, request.hookpoint, request.query, limit=request.limit)
    return [{**summary(cards, hit.feature), "reason": hit.reason, "score": hit.score} for hit in found]


def notices(unread: Unread, image: Image.Image | None) -> list[str]:
    """What the visitor should know of a picture: which words FLUX did not read, and whether what it made is blank."""
    found = []
    if unread.words:
        words = ", ".join(map(_with_known_word, unread.words[:8]))
        found.append(
            f"The miniature does not know {words}, so the image ignores it. Use the words that are offered under the "
            "prompt."
        )
    if unread.tokens:
        found.append(f"The prompt is too long: FLUX did not read its last {unread.tokens} words and signs (tokens).")
    if image is not None and np.asarray(image, dtype=np.float32).std(axis=(0, 1)).max() < BLANK:
        found.append("This image is only a background, which happens now and then. Try another seed.")
    return found


def _with_known_word(word: str) -> str:
    """An unknown word in quotes, with the known one that it is likely meant to be."""
    near = nearest_word(word.lower())
    shown = word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}…"
    return f"“{shown}”" + (f" (“{near}”?)" if near else "")


def card_pictures(cards: CardIndex, card: FeatureCard, *, limit: int) -> list[dict[str, Any]]:
    """A feature's best images with their maps, for the page to draw."""
    heat = cards.heatmaps(card.feature)
    return [
        {
            "image": thumbnail_url(cards.images, top.image_id),
            "prompt": top.prompt,
            "source": top.source,
            "seed": top.seed,
            "relative": min(1.0, top.score / card.max_act) if card.max_act > 0 else 0.0,
            "map": base64_text(byte_map(heat[top.image_id], 1.0)) if top.image_id in heat else None,
        }
        for top in card.top_images[:limit]
    ]


def card_thumbs(cards: CardIndex, feature: int, *, limit: int) -> list[dict[str, Any]]:
    """A feature's best images with maps coarse enough to be seen at the size of a thumbnail."""
    row, heat = cards.features[feature], cards.heatmaps(feature)
    return [
        {
            "image": thumbnail_url(cards.images, image),
            "map": base64_text(byte_map(coarse(heat[image], THUMB_PATCHES), 1.0)) if image in heat else None,
        }
        for image in row.top_images[:limit]
    ]


def coarse(heat: np.ndarray, most: int) -> np.ndarray:
    """A map of at most `most` rows and columns; each cell has the maximum of its patches."""
    size = -(-max(heat.shape) // most)
    over_rows = np.maximum.reduceat(heat, np.arange(0, heat.shape[0], size), axis=0)
    coarser: np.ndarray = np.maximum.reduceat(over_rows, np.arange(0, heat.shape[1], size), axis=1)
    return coarser


def thumb_grid(cards: CardIndex) -> dict[str, int]:
    """Rows and columns of the maps on thumbnails."""
    rows, cols = coarse(np.zeros((cards.info.rows, cards.info.cols)), THUMB_PATCHES).shape
    return {"rows": rows, "cols": cols}
