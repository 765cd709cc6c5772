"""What several tabs draw, as plain JSON values: pictures, heatmaps, and a feature in a line."""

import base64
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.features.cards import CardIndex, FeatureCard
from fluxsae.miniature.captions import nearest_word
from fluxsae.pictures.heatmaps import feature_colour
from fluxsae.runs.tables import encode_webp
from fluxsae.ui.serve.reading import Unread
from fluxsae.ui.serve.schemas import SearchRequest
from fluxsae.ui.serve.session import Workbench

OVERLAY_SIDE = 512
LONGEST_WORD = 30
BLANK = 2.0
"""Standard deviation of the colours of a picture, of 255, below which nothing is seen in it."""


def base64_text(data: bytes | np.ndarray) -> str:
    """Bytes as base64."""
    return base64.b64encode(data if isinstance(data, bytes) else data.tobytes()).decode("ascii")


def image_url(image: Image.Image) -> str:
    """A picture as a data address; small pictures stay exact."""
    return webp_url(encode_webp(image, longest_side=1024, quality=100 if max(image.size) <= 256 else 90))


def webp_url(data: bytes) -> str:
    """Webp bytes as a data address."""
    return f"data:image/webp;base64,{base64_text(data)}"


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
    return {"hookpoint": str(cards.hookpoint), "feature": feature, "label": label, "colour": feature_colour(label)}


def chip(cards: CardIndex, feature: int) -> dict[str, Any]:
    """What every card on the page shows of a feature."""
    row = cards.features[feature]
    return {
        **named(cards, feature),
        "confidence": row.label_confidence,
        "density": row.density,
        "image_density": row.image_density,
        "maximum": row.max_act,
    }


def search(bench: Workbench, request: SearchRequest) -> list[dict[str, Any]]:
    """Features that a query finds, best first, with the reason."""
    cards = bench.cards[request.hookpoint]
    is_words = bool(request.query) and not request.query.lstrip("#").isdigit()
    hits = cards.search(request.query, limit=request.limit, embedder=bench.embedder if is_words else None)
    return [{**summary(cards, hit.feature), "reason": hit.reason, "score": hit.score} for hit in hits]


def notices(unread: Unread, image: Image.Image) -> list[str]:
    """What the visitor should know of a picture: which words FLUX did not read, and whether it is blank."""
    found = []
    if unread.words:
        words = ", ".join(map(_with_known_word, unread.words[:8]))
        found.append(
            f"The miniature does not know {words}, so the image ignores it. Use its things, colours, textures, "
            "sizes, positions and places: “a large red striped cat on the left in a meadow”."
        )
    if unread.tokens:
        found.append(f"The prompt is too long: FLUX did not read its last {unread.tokens} words and signs (tokens).")
    if np.asarray(image, dtype=np.float32).std(axis=(0, 1)).max() < BLANK:
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
            "image": webp_url(cards.images.thumbnail(top.image_id)),
            "prompt": top.prompt,
            "source": top.source,
            "seed": top.seed,
            "relative": min(1.0, top.score / card.max_act) if card.max_act > 0 else 0.0,
            "map": base64_text(byte_map(heat[top.image_id], 1.0)) if top.image_id in heat else None,
        }
        for top in card.top_images[:limit]
    ]
