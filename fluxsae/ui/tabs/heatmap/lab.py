"""What the Heatmap tab draws: an image with its features, a ready example from the run, and two images compared."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.features.cards import CardIndex, varied
from fluxsae.features.firing import (
    Fired,
    SparseMaps,
    best_example,
    differing_features,
    fired,
    first_thing,
    ranked_features,
    shares_of_maximum,
    telling,
)
from fluxsae.pictures.heatmaps import feature_colour, overlay, token_heatmap
from fluxsae.ui.kit import views
from fluxsae.ui.serve.arguments import MAX_RESULTS
from fluxsae.ui.serve.pictures import thumbnail_url
from fluxsae.ui.serve.reading import Reading

PER_PATCH = 4
"""Features of a patch that the page knows without asking the server."""


def features_json(cards: CardIndex, features: Sequence[Fired]) -> list[dict[str, Any]]:
    """Ranked features as the endpoints give them."""
    return [{**views.summary(cards, each.feature), **asdict(each)} for each in features]


def fired_chip(cards: CardIndex, feature: Fired) -> dict[str, Any]:
    """What a card shows of a feature in an image: how strongly it fires there, and how far to trust its label there."""
    return {
        **views.chip(cards, feature.feature),
        "confidence": feature.label_confidence_here,
        "activation": feature.activation,
        "relative": feature.relative,
    }


def overlays(
    reading: Reading, cards: CardIndex, features: Sequence[Fired], *, step: int | None
) -> list[tuple[Image.Image, str]]:
    """Each feature's overlay on the image, at the scale of the feature's run-wide maximum, with a caption."""
    import torch

    maps = reading.maps[str(cards.hookpoint)]
    made = []
    for each in features:
        acts, maximum = torch.from_numpy(maps.acts(each.feature, step)), cards.features[each.feature].max_act
        heat = token_heatmap(acts, reading.grid, reference=maximum)
        label, number = cards.labels[each.feature], f"feature {each.feature}"
        caption = f"{f'{label} ({number})' if label else number}: {100 * each.relative:.0f} % of its maximum"
        made.append((overlay(reading.image, heat, min_side=views.OVERLAY_SIDE), caption))
    return made


def with_alike(features: Sequence[Fired], limit: int, labels: Sequence[str | None]) -> list[Fired]:
    """The first `limit` of some ranked features, then those of the rest that share a label with one of them."""
    first, rest = list(features[:limit]), features[limit:]
    shown = {labels[each.feature] for each in first} - {None}
    return [*first, *(each for each in rest if labels[each.feature] in shown)]


def lab(reading: Reading, cards: CardIndex, *, limit: int, pinned: int | None = None) -> dict[str, Any]:
    """The image, its ranked features with their maps at every step, and what fires at each patch."""
    maps = reading.maps[str(cards.hookpoint)]
    features = with_alike(ranked_features(maps, cards, step=None, limit=MAX_RESULTS), limit, cards.labels)
    if pinned is not None and pinned not in {each.feature for each in features}:
        features = [fired(cards, pinned, float(maps.acts(pinned, None).max())), *features]
    count = Counter(cards.labels[int(feature)] for feature in np.flatnonzero(maps.peaks(None)))
    return {
        "kind": "live",
        "image": views.image_url(reading.image),
        "prompt": reading.prompt,
        "seed": reading.seed,
        "num_inference_steps": reading.settings.num_inference_steps,
        "hookpoint": str(cards.hookpoint),
        "rows": reading.grid.rows,
        "cols": reading.grid.cols,
        "steps": list(maps.steps),
        "sigmas": list(maps.sigmas),
        "features": [
            {
                **fired_chip(cards, f),
                "alike": count[cards.labels[f.feature]] - 1,
                "maps": _planes(maps, cards, f.feature),
            }
            for f in features
        ],
        **_patches(cards, *_telling_patches(maps, cards)),
        "notices": views.notices(reading.unread, reading.image),
        "selected": first_thing([each.feature for each in features], cards) if pinned is None else pinned,
    }


def example_lab(cards: CardIndex, *, limit: int) -> dict[str, Any] | None:
    """A ready heatmap from the run folder alone: the image about which its best features say most."""
    image_id, features = best_example(cards, limit)
    if image_id is None:
        return None
    row = cards.images[image_id]
    heat = {feature: cards.heatmaps(feature)[image_id] for feature in features}
    planes = {feature: views.byte_map(heat[feature].ravel(), 1.0) for feature in features}
    shown = [fired(cards, f, float(heat[f].max()) * cards.features[f].max_act) for f in features]
    return {
        "kind": "example",
        "image": thumbnail_url(cards.images, image_id),
        "prompt": row.prompt,
        "seed": row.seed,
        "num_inference_steps": cards.info.settings.num_inference_steps,
        "hookpoint": str(cards.hookpoint),
        "rows": cards.info.rows,
        "cols": cards.info.cols,
        "steps": [],
        "sigmas": [],
        "features": [{**fired_chip(cards, f), "maps": views.base64_text(planes[f.feature])} for f in shown],
        **_patches(cards, *_strongest_patches(planes)),
        "notices": [],
        "selected": first_thing(features, cards),
    }


def diff(readings: Sequence[Reading], cards: CardIndex, *, limit: int) -> dict[str, Any]:
    """Two images and the features whose peaks differ most between them, with their maps on both."""
    pair = [reading.maps[str(cards.hookpoint)] for reading in readings]
    shares = [shares_of_maximum(maps.peaks(None), cards) for maps in pair]
    sure = cards.label_confidence_at(np.maximum(*shares))
    return {
        "hookpoint": str(cards.hookpoint),
        "rows": readings[0].grid.rows,
        "cols": readings[0].grid.cols,
        "images": [{"image": views.image_url(each.image), "prompt": each.prompt} for each in readings],
        "features": [
            {
                **views.chip(cards, f),
                "confidence": float(sure[f]) if cards.labels[f] else None,
                "relatives": [float(share[f]) for share in shares],
                "maps": [views.base64_text(views.byte_map(m.acts(f, None), float(cards.max_acts[f]))) for m in pair],
            }
            for f in differing_features(pair, cards, limit=limit)
        ],
        "notices": [f"“{each.prompt}”: {text}" for each in readings for text in views.notices(each.unread, each.image)],
    }


def _planes(maps: SparseMaps, cards: CardIndex, feature: int) -> str:
    """One feature's maps as bytes: over the SAE's own steps, then at each step."""
    maximum = cards.features[feature].max_act
    planes = [views.byte_map(maps.acts(feature, step), maximum) for step in (None, *maps.steps)]
    return views.base64_text(np.stack(planes))


def _patches(cards: CardIndex, features: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """What fires at each patch, for the page: feature numbers, their bytes, labels and colours."""
    known = sorted({int(feature) for feature in np.unique(features)})
    return {
        "patch_features": views.base64_text(features.astype("<u4")),
        "patch_values": views.base64_text(values),
        "labels": {str(feature): cards.labels[feature] for feature in known if cards.labels[feature]},
        "colours": {str(feature): feature_colour(cards.labels[feature]) for feature in known},
    }


def _telling_patches(maps: SparseMaps, cards: CardIndex) -> tuple[np.ndarray, np.ndarray]:
    """The most telling features of each token and their share of their maximum, as (features, bytes)."""
    n_tokens = maps.n_tokens
    patches = np.zeros((n_tokens, PER_PATCH), dtype=np.int64)
    values = np.zeros((n_tokens, PER_PATCH), dtype=np.uint8)
    for token in range(n_tokens):
        found = maps.at(token, None)
        acts, features = np.array(list(found.values())), list(found)
        scores = dict(zip(features, telling(acts, cards, features), strict=True))
        shares = dict(zip(features, shares_of_maximum(acts, cards, features), strict=True))
        best = varied(sorted(features, key=lambda f: -scores[f]), cards.labels)[:PER_PATCH]
        patches[token, : len(best)] = best
        values[token, : len(best)] = [max(1, round(shares[f] * 255)) for f in best]
    return patches, values


def _strongest_patches(planes: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The strongest of some features at each token, from their bytes, as (features, bytes)."""
    features = np.array(list(planes))
    stacked = np.stack(list(planes.values()), axis=1)
    order = np.argsort(-stacked.astype(np.int64), axis=1, kind="stable")[:, :PER_PATCH]
    return features[order], np.take_along_axis(stacked, order, axis=1)
