"""What the Heatmap tab draws: an image with its features, a ready example from the run, and two images compared."""

import base64
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.features.firing import (
    CONFIDENCE,
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
from fluxsae.pictures.grids import split_pictures
from fluxsae.pictures.heatmaps import feature_colour, overlay, token_heatmap
from fluxsae.runs.folder import RunFolder
from fluxsae.ui.kit import views
from fluxsae.ui.serve.arguments import MAX_RESULTS
from fluxsae.ui.serve.pictures import made_url, thumbnail_url
from fluxsae.ui.serve.reading import Reading

log = logging.getLogger("fluxsae.app")

PER_PATCH = 4
"""Features of a patch that the page knows without asking the server."""


def features_json(cards: CardIndex, features: Sequence[Fired]) -> list[dict[str, Any]]:
    """Ranked features as the endpoints give them."""
    return [{**views.summary(cards, each.feature), **asdict(each)} for each in features]


def doubted(features: Sequence[Fired], reading: Reading) -> list[Fired]:
    """The features without sure names, where a visitor's picture is unlike the run's own or may be."""
    if reading.picture is None or (reading.familiarity is not None and not _is_unlike(reading)):
        return list(features)
    most = 0.0 if _is_unlike(reading) else CONFIDENCE["sure"] - 0.01
    return [
        each
        if each.label_confidence_here is None
        else replace(each, label_confidence_here=min(most, each.label_confidence_here))
        for each in features
    ]


def _is_unlike(reading: Reading) -> bool:
    return reading.strangest is not None and reading.strangest.is_unlike


def given_notices(reading: Reading) -> list[str]:
    """What a visitor should know of the picture that was given."""
    found, strangest = views.notices(reading.unread, None), reading.strangest
    if strangest is None:
        found.append("This run does not say how well it describes its own images, so no name is called sure here.")
    elif strangest.is_unlike:
        found.append(
            "This picture is unlike anything this FLUX knows, so every name here is a guess. The features describe it "
            f"worse than 99 of 100 of the run's own images (unexplained share {strangest.fvu:.2g}, theirs is up to "
            f"{strangest.limit:.2g})."
        )
    return found


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
    """The first features' overlays on the image, at the scale of each one's run-wide maximum, with a caption."""
    maps = reading.maps[str(cards.hookpoint)]
    with views.DRAWING:
        return [_overlay(reading, cards, maps, each, step=step) for each in features[: views.MAX_OVERLAYS]]


def _overlay(
    reading: Reading, cards: CardIndex, maps: SparseMaps, each: Fired, *, step: int | None
) -> tuple[Image.Image, str]:
    import torch

    acts, maximum = torch.from_numpy(maps.acts(each.feature, step)), cards.features[each.feature].max_act
    heat = token_heatmap(acts, reading.grid, reference=maximum)
    label, number = cards.labels[each.feature], f"feature {each.feature}"
    caption = f"{f'{label} ({number})' if label else number}: {100 * each.relative:.0f} % of its maximum"
    return overlay(reading.image, heat, min_side=views.OVERLAY_SIDE), caption


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
    features = doubted(features, reading)
    count = Counter(cards.labels[int(feature)] for feature in np.flatnonzero(maps.peaks(None)))
    return {
        "kind": "live",
        "image": views.image_url(reading.image, is_own=reading.picture is not None),
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
        **_patches(cards, *telling_patches(maps, cards)),
        "previews": {
            str(step): views.data_url(preview) if reading.picture else made_url(preview)
            for step, preview in reading.previews.items()
        },
        "picture": reading.picture and reading.picture.digest,
        "changed": list(reading.picture.notes) if reading.picture else [],
        "notices": views.notices(reading.unread, reading.image) if reading.picture is None else given_notices(reading),
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
    return _example(cards, planes, shown, image=thumbnail_url(cards.images, image_id), prompt=row.prompt, seed=row.seed)


def opening_lab(run: RunFolder, cards: CardIndex) -> dict[str, Any] | None:
    """What the page opens on, recorded with the run's demos: a swap at rising strength, and its image's features."""
    try:
        opening = run.load_opening(cards.hookpoint)
        if opening is None:
            return None
        turns, prompt, seed = list(map(float, opening["turns"])), str(opening["prompt"]), int(opening["seed"])
        with Image.open(run.demo_image_path(cards.hookpoint, "opening")) as strip:
            pictures = [views.image_url(one) for one in split_pictures(strip.convert("RGB"), len(turns))]
        n_tokens = cards.info.rows * cards.info.cols
        planes = {
            int(each["feature"]): np.frombuffer(base64.b64decode(each["map"]), dtype=np.uint8).reshape(n_tokens)
            for each in opening["features"]
        }
        words = {"old": str(opening["label"]), "new": str(opening["new_label"])}
        shown = [fired(cards, f, float(plane.max()) / 255 * cards.features[f].max_act) for f, plane in planes.items()]
    except (KeyError, TypeError, ValueError, OSError, FluxSaeError) as error:
        log.warning("the opening of %s is passed over: %s", cards.hookpoint, error)
        return None
    page = _example(cards, planes, shown, image=pictures[0], prompt=prompt, seed=seed)
    return {**page, "opening": {"pictures": pictures, "turns": turns, **words}, "selected": None}


def _example(
    cards: CardIndex, planes: Mapping[int, np.ndarray], shown: Sequence[Fired], *, image: str, prompt: str, seed: int
) -> dict[str, Any]:
    """A page of what the run folder has: an image with the maps of some features, as bytes."""
    return {
        "kind": "example",
        "image": image,
        "prompt": prompt,
        "seed": seed,
        "num_inference_steps": cards.info.settings.num_inference_steps,
        "hookpoint": str(cards.hookpoint),
        "rows": cards.info.rows,
        "cols": cards.info.cols,
        "steps": [],
        "sigmas": [],
        "features": [{**fired_chip(cards, f), "maps": views.base64_text(planes[f.feature])} for f in shown],
        **_patches(cards, *_strongest_patches(planes)),
        "previews": {},
        "picture": None,
        "notices": [],
        "selected": first_thing([each.feature for each in shown], cards),
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


def telling_patches(maps: SparseMaps, cards: CardIndex) -> tuple[np.ndarray, np.ndarray]:
    """The most telling features of each token and their share of their maximum, as (features, bytes)."""
    tokens, features, acts = maps.strongest(None)
    order = np.lexsort((features, -telling(acts, cards, features), tokens))
    tokens, features, acts = tokens[order], features[order], acts[order]
    names = {label: number for number, label in enumerate(dict.fromkeys(filter(None, cards.labels)))}
    labels = np.array([names.get(label or "", -1) for label in cards.labels])[features]
    # the first of every label, then the second of each; those without one at the end
    turns = np.where(labels < 0, len(features), _ranks(tokens * (len(names) + 1) + labels + 1))
    order = np.lexsort((np.arange(len(tokens)), turns, tokens))
    tokens, features, acts = tokens[order], features[order], acts[order]
    places = _ranks(tokens)
    shown = places < PER_PATCH
    patches = np.zeros((maps.n_tokens, PER_PATCH), dtype=np.int64)
    values = np.zeros((maps.n_tokens, PER_PATCH), dtype=np.uint8)
    patches[tokens[shown], places[shown]] = features[shown]
    shares = shares_of_maximum(acts[shown], cards, features[shown])
    values[tokens[shown], places[shown]] = np.maximum(1, np.rint(shares * 255))
    return patches, values


def _ranks(keys: np.ndarray) -> np.ndarray:
    """How many equal keys stand before each."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(keys) else np.zeros(0, dtype=np.int64)
    counts = np.diff(np.r_[begins, len(keys)])
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(begins, counts)
    return ranks


def _strongest_patches(planes: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The strongest of some features at each token, from their bytes, as (features, bytes)."""
    features = np.array(list(planes))
    stacked = np.stack(list(planes.values()), axis=1)
    order = np.argsort(-stacked.astype(np.int64), axis=1, kind="stable")[:, :PER_PATCH]
    return features[order], np.take_along_axis(stacked, order, axis=1)
