"""The geometry of decoder directions: neighbours, a map, alignment; and pictures of the map and of compared layers."""

from collections import Counter
from collections.abc import Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import COUNTERPART
from fluxsae.features.layers import LayerComparison

CHUNK = 2048
"""Features whose cosines with all the others are held at a time."""
_EXAGGERATION = 12.0
"""Factor of the attraction in the first half of the map's iterations."""
_ANGLE = 0.8
"""How coarsely far features repel each other: 0.8 takes a third less time than 0.5, for 0.3 % more divergence."""


@dataclass(frozen=True)
class Neighbours:
    """For each asked feature its nearest others, nearest first."""

    indices: Int[Tensor, "asked n"]
    cosines: Float[Tensor, "asked n"]


def nearest_features(
    W_dec: Float[Tensor, "features d_model"], features: Int[Tensor, " asked"] | None = None, *, n: int = 10
) -> Neighbours:
    """The `n` nearest other features by cosine of decoder directions, for some features or for all.

    Raises:
        FluxSaeError: a feature outside the dictionary, or fewer than `n` others.
    """
    total = W_dec.shape[0]
    asked = torch.arange(total) if features is None else features
    if not 1 <= n < total:
        raise FluxSaeError(f"{n} neighbours of {total} features were asked; give 1 to {total - 1}")
    if asked.numel() and (int(asked.min()) < 0 or int(asked.max()) >= total):
        raise FluxSaeError(f"features {int(asked.min())} to {int(asked.max())} were asked; give 0 to {total - 1}")
    directions = normalize(W_dec.detach().float(), dim=-1)
    found = [_nearest(directions, chunk, n) for chunk in asked.split(CHUNK)]
    return Neighbours(torch.cat([indices for indices, _ in found]), torch.cat([cosines for _, cosines in found]))


def _nearest(directions: Tensor, asked: Tensor, n: int) -> tuple[Tensor, Tensor]:
    cosines = directions[asked] @ directions.T
    cosines[torch.arange(len(asked)), asked] = -torch.inf
    best = cosines.topk(n, dim=-1)
    return best.indices, best.values


def encoder_decoder_alignment(
    W_enc: Float[Tensor, "features d_model"], W_dec: Float[Tensor, "features d_model"]
) -> Float[Tensor, " features"]:
    """Cosine between what a feature reads and what it writes, in [-1, 1]."""
    return (normalize(W_enc.detach().float(), dim=-1) * normalize(W_dec.detach().float(), dim=-1)).sum(dim=-1)


def map_neighbours(n_features: int, *, perplexity: float) -> int:
    """How many neighbours of each feature its place on the map follows."""
    return min(n_features - 1, int(3 * perplexity) + 1)


def feature_map(
    W_dec: Float[Tensor, "features d_model"],
    *,
    perplexity: float = 30.0,
    seed: int = 0,
    near: Neighbours | None = None,
) -> Float[np.ndarray, "features 2"]:
    """All decoder directions on a plane, near ones near: t-SNE by cosine from a PCA start, within [-1, 1].

    `near` are the `map_neighbours` nearest of each feature, or more of them, where they are known.
    The same directions give the same map. t-SNE: van der Maaten & Hinton 2008, with the learning rates of Belkina et
    al. 2019 (a quarter of the features, since the library multiplies by 4), which need half of the usual iterations.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n_features = len(W_dec)
    if n_features < 4:
        raise FluxSaeError(f"a map of {n_features} features was asked; it needs at least 4")
    perplexity = min(perplexity, (n_features - 1) / 3)
    n = map_neighbours(n_features, perplexity=perplexity)
    distances = _distances(near or nearest_features(W_dec, n=n), n=n)
    places = PCA(n_components=2, svd_solver="randomized", random_state=seed).fit_transform(
        normalize(W_dec.detach().float(), dim=-1).cpu().numpy()
    )
    places = (places / places[:, 0].std() * 1e-4).astype(np.float32)
    for exaggeration in (_EXAGGERATION, 1.0):
        method = TSNE(
            perplexity=perplexity, metric="precomputed", init=places, early_exaggeration=exaggeration, max_iter=250,
            learning_rate=max(n_features / (4 * exaggeration), 50.0), angle=_ANGLE, random_state=seed,
        )  # fmt: skip
        places = method.fit_transform(distances)
    centred = places - places.mean(axis=0)
    scaled: Float[np.ndarray, "features 2"] = (centred / np.abs(centred).max()).astype(np.float32)
    return scaled


def _distances(near: Neighbours, *, n: int) -> Any:
    """1 - cosine of each feature and its `n` nearest, itself first, as a sparse matrix with rows in rising order."""
    from scipy.sparse import csr_array

    own = torch.arange(len(near.indices))[:, None]
    indices = torch.cat([own, near.indices[:, :n].cpu()], dim=1).numpy()
    distances = torch.cat([torch.zeros_like(own), (1 - near.cosines[:, :n].cpu()).clamp(min=0)], dim=1).numpy()
    starts = np.arange(0, indices.size + 1, n + 1)
    return csr_array((distances.ravel(), indices.ravel(), starts), shape=(len(own), len(own)))


@dataclass(frozen=True)
class Neighbourhood:
    """A region of the map and the word that its features' labels have in common."""

    name: str
    x: float
    """Place of its most central feature."""
    y: float
    features: tuple[int, ...]


def find_neighbourhoods(
    positions: Float[np.ndarray, "features 2"], labels: Sequence[str | None], *, n: int = 24, seed: int = 0
) -> list[Neighbourhood]:
    """Up to `n` regions of the map (k-means on the labelled features), named by their most telling label word.

    A word tells by its share of the region's labels minus its share of all; regions without a word in at least two
    labels have no name and are left out.
    """
    from sklearn.cluster import KMeans

    labelled = np.array([i for i, label in enumerate(labels) if label], dtype=np.int64)
    if len(labelled) < 2:
        return []
    regions = KMeans(min(n, len(labelled) // 2), n_init=4, random_state=seed).fit_predict(positions[labelled])
    overall = _word_shares([labels[i] or "" for i in labelled])
    found = []
    for region in range(regions.max() + 1):
        members = labelled[regions == region]
        shares = _word_shares([labels[i] or "" for i in members])
        common = {word: share - overall[word] for word, share in shares.items() if share * len(members) >= 2}
        if common:
            middle = positions[members].mean(axis=0)
            x, y = positions[members[np.linalg.norm(positions[members] - middle, axis=1).argmin()]]
            name = max(sorted(common), key=lambda word: common[word])
            found.append(Neighbourhood(name, float(x), float(y), tuple(int(i) for i in members)))
    return _joined(found)


def _joined(places: Sequence[Neighbourhood], *, apart: float = 0.3) -> list[Neighbourhood]:
    """Regions of one name that lie nearer than `apart` as one, at the place of the largest."""
    joined: list[Neighbourhood] = []
    for place in sorted(places, key=lambda place: -len(place.features)):
        near = [
            i
            for i, other in enumerate(joined)
            if other.name == place.name and np.hypot(other.x - place.x, other.y - place.y) < apart
        ]
        if near:
            joined[near[0]] = replace(joined[near[0]], features=joined[near[0]].features + place.features)
        else:
            joined.append(place)
    return joined


def _word_shares(labels: Sequence[str]) -> dict[str, float]:
    counts = Counter(word for label in labels for word in set(label.split()))
    return {word: count / len(labels) for word, count in counts.items()}


def draw_map(
    positions: Float[np.ndarray, "features 2"],
    labels: Sequence[str | None],
    *,
    is_alive: Sequence[bool],
    title: str,
) -> Image.Image:
    """The map as a picture: a dot a feature, coloured by named neighbourhood, without a label grey, the dead faint."""
    figure, axes = _figure(8.4, 8.0)
    alive = np.asarray(is_alive, dtype=bool)
    axes.scatter(*positions[~alive].T, s=5, c="#dfdfe4", linewidths=0)
    axes.scatter(*positions[alive].T, s=16, c="#a9a9b2", linewidths=0)
    places = find_neighbourhoods(positions, labels)
    for number, place in enumerate(places):
        colour = hls_to_rgb(number / len(places), 0.5, 0.6)
        axes.scatter(*positions[list(place.features)].T, s=22, color=colour, linewidths=0.3, edgecolors="white")
    for place in places:
        text = axes.text(place.x, place.y, place.name, fontsize=10, weight="bold", ha="center", va="center")
        text.set_path_effects([_halo()])
    axes.set_title(title, loc="left", fontsize=13, weight="bold")
    axes.set_axis_off()
    axes.set_aspect("equal")
    return _picture(figure)


def draw_comparison(
    comparison: LayerComparison, *, first: str, second: str, counterpart: float = COUNTERPART
) -> Image.Image:
    """How well the features of each layer find a counterpart in the other, and what chance gives."""
    figure, axes = _figure(8.4, 4.6)
    for best, name, colour in (
        (comparison.best_first, f"{first}: best match in {second}", "#3b6fb6"),
        (comparison.best_second, f"{second}: best match in {first}", "#e0902f"),
    ):
        known = best[~np.isnan(best)].clip(0, 1)
        label = f"{name} ({len(known)} features)"
        axes.hist(known, bins=np.linspace(0, 1, 41), histtype="step", linewidth=2, color=colour, label=label)
    for x, height, text in (
        (counterpart, 0.97, "counts as a counterpart"),
        (comparison.null_correlation, 0.9, "matches by chance"),
    ):
        axes.axvline(x, color="#77777f", linewidth=1, linestyle="--")
        axes.text(x + 0.01, height, text, transform=axes.get_xaxis_transform(), va="top", fontsize=9)
    axes.set_xlabel("correlation of the two columns of S")
    axes.set_ylabel("features")
    axes.set_title("Which features have a counterpart in the other layer", loc="left", fontsize=13, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return _picture(figure)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # the object interface: pyplot keeps global state, which threads of the app would share
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    return figure, figure.subplots()


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=3, foreground="white")


def _picture(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
