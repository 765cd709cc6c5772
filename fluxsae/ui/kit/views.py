"""What the page's elements draw, as plain JSON values computed from cards and readings."""

import base64
import difflib
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex, FeatureCard, varied
from fluxsae.miniature.captions import SYNONYMS
from fluxsae.miniature.drawing import ATTRIBUTES
from fluxsae.pictures.heatmaps import feature_colour, heat_colours, overlay, token_heatmap
from fluxsae.runs.tables import encode_webp
from fluxsae.ui.serve.reading import Reading, SparseMaps, Unread
from fluxsae.ui.serve.schemas import MAX_RESULTS

PER_PATCH = 4
"""Features a patch tells about without asking the server."""
OVERLAY_SIDE = 512
SURE = 0.8
"""Confidence from which the page calls a name sure."""
LONGEST_WORD = 30
BLANK = 2.0
"""Standard deviation of the colours of a picture, of 255, below which nothing is seen in it."""
LEAST_EXAMPLE = 4
"""Names that the ready example tells at least, if any image has as many."""
MAX_VIEW_BYTES = 400_000
"""Longest view that a link may unpack to."""


def base64_text(data: bytes | np.ndarray) -> str:
    """Bytes as base64."""
    return base64.b64encode(data if isinstance(data, bytes) else data.tobytes()).decode("ascii")


def heat_table() -> str:
    """The heat colours of 0 to 255 as base64 of 768 bytes: the page paints with the library's own map."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    return base64_text(np.ascontiguousarray(heat_colours(ramp)[0]))


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


def encode_view(values: Mapping[str, Any]) -> str:
    """What is on screen as text for an address."""
    packed = zlib.compress(json.dumps(values, separators=(",", ":")).encode(), 9)
    return base64.urlsafe_b64encode(packed).decode("ascii").rstrip("=")


def decode_view(text: str) -> dict[str, Any]:
    """Inverse of `encode_view`.

    Raises:
        FluxSaeError: the text is no such link, or a damaged one.
    """
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unpacked = zlib.decompressobj().decompress(packed, MAX_VIEW_BYTES)
        values = json.loads(unpacked)
    except (ValueError, zlib.error, RecursionError) as error:
        raise FluxSaeError("This link is damaged: it cannot be read. Ask for it again, whole.") from error
    if not isinstance(values, dict):
        raise FluxSaeError("This link is damaged: it holds no view. Ask for it again, whole.")
    return values


def view_of(query: Mapping[str, str]) -> dict[str, Any]:
    """What a link asks to show: `?view=...` as the page writes it, or `?hookpoint=...&feature=...` by hand."""
    if query.get("view"):
        return decode_view(query["view"])
    if query.get("feature"):
        number = query["feature"]
        feature = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else number
        return {"tab": query.get("tab", "gallery"), "hookpoint": query.get("hookpoint"), "feature": feature}
    return {}


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


def telling(acts: np.ndarray, cards: CardIndex, features: Sequence[int] | None = None) -> np.ndarray:
    """How telling activations of `features` (of all, where None) are: the surer the name where it fires this strongly.

    What fires in almost every image says little; a feature without a name counts by its activation, behind the named.
    """
    shares = shares_of_maximum(acts, cards, features)
    rarity = cards.rarity if features is None else cards.rarity[features]
    sure = cards.label_confidence_at(shares, features)
    scores: np.ndarray = (np.square(sure) + 0.01 * np.square(shares)) * np.maximum(rarity, 0.02)
    return scores


def shares_of_maximum(acts: np.ndarray, cards: CardIndex, features: Sequence[int] | None = None) -> np.ndarray:
    """Activations as shares of each feature's maximum in the run, at most 1."""
    maxima = cards.max_acts if features is None else cards.max_acts[features]
    shares: np.ndarray = np.minimum(1.0, np.divide(acts, maxima, out=np.zeros(len(maxima)), where=maxima > 0))
    return shares


def ranked_features(maps: SparseMaps, cards: CardIndex, *, step: int | None, limit: int) -> list[dict[str, Any]]:
    """The features that fire in an image: the most telling of each label, then the second of each, and so on.

    Those before others that show where something is, by `standing_out`.
    """
    peaks, levels = maps.peaks(step), shares_of_maximum(maps.means(step), cards)
    scores = telling(peaks, cards) * standing_out(levels, maps.spreads(step))
    fired = [int(f) for f in np.argsort(-scores, kind="stable") if peaks[f] > 0]
    return [
        {**summary(cards, f), **_activation(cards, f, float(peaks[f])), "score": float(scores[f])}
        for f in varied(fired, cards.labels)[:limit]
    ]


def standing_out(levels: np.ndarray, spreads: np.ndarray) -> np.ndarray:
    """How well heatmaps show where something is: of mean activation `levels` and glowing on `spreads` of the patches.

    A speck at an edge shows little (its label is borrowed from the image around it), and neither does what glows
    everywhere; but that counts something too. Both are shares: of the feature's maximum, and of the patches above half
    of the peak.
    """
    shown: np.ndarray = np.sqrt(levels) * np.maximum(np.square(1 - spreads), 0.1)
    return shown


def with_alike(features: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The first `limit` of some ranked features, then those of the rest that share a label with one of them."""
    first, rest = list(features[:limit]), features[limit:]
    labels = {feature["label"] for feature in first} - {None}
    return [*first, *(feature for feature in rest if feature["label"] in labels)]


def features_at(
    maps: SparseMaps, cards: CardIndex, *, token: int, step: int | None, limit: int
) -> list[dict[str, Any]]:
    """The features that fire at one patch: the most telling of each label, then the second of each, and so on."""
    found = maps.at(token, step)
    scores = dict(zip(found, telling(np.array(list(found.values())), cards, list(found)).tolist(), strict=True))
    order = varied(sorted(found, key=lambda f: (-scores[f], f)), cards.labels)[:limit]
    return [{**summary(cards, f), **_activation(cards, f, found[f]), "score": scores[f]} for f in order]


def _activation(cards: CardIndex, feature: int, value: float) -> dict[str, float | None]:
    maximum = cards.features[feature].max_act
    share = min(1.0, value / maximum) if maximum > 0 else 0.0
    sure = float(cards.label_confidence_at(np.array([share]), [feature])[0]) if cards.labels[feature] else None
    return {"activation": value, "relative": share, "label_confidence_here": sure}


def overlays(
    reading: Reading, cards: CardIndex, features: Sequence[Mapping[str, Any]], *, step: int | None
) -> list[tuple[Image.Image, str]]:
    """Each feature's overlay on the image, at the scale of the feature's run-wide maximum, with a caption."""
    import torch

    maps = reading.maps[str(cards.hookpoint)]
    made = []
    for feature in features:
        acts = torch.from_numpy(maps.acts(feature["feature"], step))
        heat = token_heatmap(acts, reading.grid, reference=feature["max_act"])
        made.append((overlay(reading.image, heat, min_side=OVERLAY_SIDE), caption(feature)))
    return made


def caption(feature: Mapping[str, Any]) -> str:
    """A feature in words: number, label, and how strongly it fires."""
    name = f"{feature['label']} (feature {feature['feature']})" if feature["label"] else f"feature {feature['feature']}"
    return f"{name}: {100 * feature['relative']:.0f} % of its maximum" if "relative" in feature else name


def chip(feature: Mapping[str, Any]) -> dict[str, Any]:
    """What every card on the page shows of a feature."""
    return {
        "hookpoint": feature["hookpoint"],
        "feature": feature["feature"],
        "label": feature["label"],
        "confidence": feature.get("label_confidence_here", feature["label_confidence"]),
        "class": feature["feature_class"],
        "density": feature["density"],
        "image_density": feature["image_density"],
        "maximum": feature["max_act"],
        "coherent": feature["is_coherent"],
        "colour": feature_colour(feature["label"]),
        **{key: feature[key] for key in ("activation", "relative") if key in feature},
    }


def lab(
    reading: Reading, cards: CardIndex, *, step: int | None, limit: int, pinned: int | None = None
) -> dict[str, Any]:
    """The heatmap tab: image, ranked features with their maps at every step, and what fires at each patch."""
    maps = reading.maps[str(cards.hookpoint)]
    features = with_alike(ranked_features(maps, cards, step=step, limit=MAX_RESULTS), limit)
    if pinned is not None and pinned not in {feature["feature"] for feature in features}:
        peak = float(maps.acts(pinned, step).max())
        features = [{**summary(cards, pinned), **_activation(cards, pinned, peak)}, *features]
    fired = Counter(cards.labels[int(feature)] for feature in np.flatnonzero(maps.peaks(step)))
    patches, values = _patches(maps, cards, step)
    known = sorted({int(feature) for feature in np.unique(patches)})
    return {
        "kind": "live",
        "image": image_url(reading.image),
        "prompt": reading.prompt,
        "seed": reading.seed,
        "num_inference_steps": reading.settings.num_inference_steps,
        "hookpoint": str(cards.hookpoint),
        "rows": reading.grid.rows,
        "cols": reading.grid.cols,
        "steps": list(maps.steps),
        "sigmas": list(maps.sigmas),
        "features": [
            {**chip(f), "alike": fired[f["label"]] - 1, "maps": _planes(maps, f["feature"], f["max_act"], step)}
            for f in features
        ],
        "patch_features": base64_text(patches.astype("<u4")),
        "patch_values": base64_text(values),
        "labels": {str(feature): cards.labels[feature] for feature in known if cards.labels[feature]},
        "colours": {str(feature): feature_colour(cards.labels[feature]) for feature in known},
        "notices": notices(reading.unread, reading.image),
        "selected": first_thing(features) if pinned is None else pinned,
    }


def notices(unread: Unread, image: Image.Image) -> list[str]:
    """What the visitor should know of a picture: what its prompt could not tell FLUX, and whether it is blank."""
    found = []
    if unread.words:
        words = ", ".join(map(_with_known_word, unread.words[:8]))
        found.append(
            f"The miniature does not know {words}, so the image ignores it. It speaks of shapes, colours, textures, "
            "sizes, places and backgrounds: “a large red striped circle on the left on a black background”."
        )
    if unread.tokens:
        found.append(f"The prompt is too long: its last {unread.tokens} words and signs (tokens) were not read.")
    if np.asarray(image, dtype=np.float32).std(axis=(0, 1)).max() < BLANK:
        found.append("FLUX painted nothing but a background here, as it does now and then: try another seed.")
    return found


def _with_known_word(word: str) -> str:
    """An unknown word in quotes, with the known one that it is likely meant to be."""
    known = [name for values in ATTRIBUTES.values() for name in values]
    near = difflib.get_close_matches(word.lower(), [*known, *SYNONYMS], n=1, cutoff=0.75)
    shown = word if len(word) <= LONGEST_WORD else f"{word[:LONGEST_WORD]}…"
    return f"“{shown}”" + (f" (“{near[0]}”?)" if near else "")


def diff(first: Reading, second: Reading, cards: CardIndex, *, limit: int) -> dict[str, Any]:
    """Two images and the features whose peaks differ most between them, with their maps on both."""
    pair = [reading.maps[str(cards.hookpoint)] for reading in (first, second)]
    shares = [shares_of_maximum(m.peaks(None), cards) for m in pair]
    change = np.abs(telling(pair[1].peaks(None), cards) - telling(pair[0].peaks(None), cards))
    sure = cards.label_confidence_at(np.maximum(*shares))
    differing = [int(f) for f in np.argsort(-change, kind="stable") if change[f] > 0]
    return {
        "hookpoint": str(cards.hookpoint),
        "rows": first.grid.rows,
        "cols": first.grid.cols,
        "images": [{"image": image_url(reading.image), "prompt": reading.prompt} for reading in (first, second)],
        "features": [
            {
                **chip({**summary(cards, f), "label_confidence_here": float(sure[f]) if cards.labels[f] else None}),
                "relatives": [float(share[f]) for share in shares],
                "maps": [base64_text(byte_map(m.acts(f, None), float(cards.max_acts[f]))) for m in pair],
            }
            for f in varied(differing, cards.labels)[:limit]
        ],
        "notices": [
            f"“{each.prompt}”: {text}" for each in (first, second) for text in notices(each.unread, each.image)
        ],
    }


def _planes(maps: SparseMaps, feature: int, maximum: float, step: int | None) -> str:
    planes = [maps.acts(feature, step), *(maps.acts(feature, each) for each in maps.steps)]
    return base64_text(np.stack([byte_map(plane, maximum) for plane in planes]))


def _patches(maps: SparseMaps, cards: CardIndex, step: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The most telling features of each token and their share of their maximum, as (features, bytes)."""
    n_tokens = maps.values.shape[1]
    patches = np.zeros((n_tokens, PER_PATCH), dtype=np.int64)
    values = np.zeros((n_tokens, PER_PATCH), dtype=np.uint8)
    for token in range(n_tokens):
        found = maps.at(token, step)
        acts, features = np.array(list(found.values())), list(found)
        scores = dict(zip(features, telling(acts, cards, features), strict=True))
        shares = dict(zip(features, shares_of_maximum(acts, cards, features), strict=True))
        best = varied(sorted(features, key=lambda f: -scores[f]), cards.labels)[:PER_PATCH]
        patches[token, : len(best)] = best
        values[token, : len(best)] = [max(1, round(shares[f] * 255)) for f in best]
    return patches, values


def example_lab(cards: CardIndex, *, limit: int) -> dict[str, Any] | None:
    """A ready heatmap from the run folder alone: the image that most of the best features have a map of."""
    image_id, features = best_example(cards, limit)
    if image_id is None:
        return None
    row = cards.images[image_id]
    shown, planes = [], {}
    for feature in features:
        heat = cards.heatmaps(feature)[image_id]
        peak = float(heat.max()) * cards.features[feature].max_act
        found = {**summary(cards, feature), **_activation(cards, feature, peak)}
        planes[feature] = byte_map(heat.ravel(), 1.0)
        shown.append({**chip(found), "maps": base64_text(planes[feature])})
    patches, values = _example_patches(planes)
    return {
        "kind": "example",
        "image": webp_url(row.thumbnail),
        "prompt": row.prompt,
        "seed": row.seed,
        "num_inference_steps": cards.info.settings.num_inference_steps,
        "hookpoint": str(cards.hookpoint),
        "rows": cards.info.rows,
        "cols": cards.info.cols,
        "steps": [],
        "sigmas": [],
        "features": shown,
        "patch_features": base64_text(patches.astype("<u4")),
        "patch_values": base64_text(values),
        "labels": {str(feature): cards.labels[feature] for feature in features if cards.labels[feature]},
        "colours": {str(feature): feature_colour(cards.labels[feature]) for feature in features},
        "notices": [],
        "selected": first_thing(shown),
    }


def first_thing(features: Sequence[Mapping[str, Any]]) -> int | None:
    """The feature whose heat is shown first: the most telling one that is not named after a background."""
    things = [feature for feature in features if "background" not in (feature["label"] or "").split()]
    first = next(iter([*things, *features]), None)
    return None if first is None else int(first["feature"])


def best_example(cards: CardIndex, limit: int) -> tuple[int | None, list[int]]:
    """The image about which the best features say most, each label once, and those features, most telling first.

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
            found = by_image.setdefault((image, confidence >= SURE), {})
            found[label] = max(found.get(label, (0.0, feature)), (said, feature))
    if not by_image:
        return None, []
    told = {image: found for (image, is_sure), found in by_image.items() if is_sure and len(found) >= LEAST_EXAMPLE}
    every = {image: by_image.get((image, False), {}) | by_image.get((image, True), {}) for image, _ in by_image}
    ranked = {image: sorted(found.values(), reverse=True)[:limit] for image, found in (told or every).items()}
    best = max(ranked, key=lambda image: (sum(said for said, _ in ranked[image]), -image))
    return best, [feature for _, feature in ranked[best]]


def _example_patches(planes: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    features = np.array(list(planes))
    stacked = np.stack(list(planes.values()), axis=1)
    order = np.argsort(-stacked.astype(np.int64), axis=1, kind="stable")[:, :PER_PATCH]
    return features[order], np.take_along_axis(stacked, order, axis=1)


def card_pictures(cards: CardIndex, card: FeatureCard, *, limit: int) -> list[dict[str, Any]]:
    """A feature's best images with their maps, for the page to draw."""
    heat = cards.heatmaps(card.feature)
    return [
        {
            "image": webp_url(cards.images.thumbnail(top.image_id)),
            "image_id": top.image_id,
            "prompt": top.prompt,
            "source": top.source,
            "seed": top.seed,
            "score": top.score,
            "relative": min(1.0, top.score / card.max_act) if card.max_act > 0 else 0.0,
            "map": base64_text(byte_map(heat[top.image_id], 1.0)) if top.image_id in heat else None,
        }
        for top in card.top_images[:limit]
    ]
