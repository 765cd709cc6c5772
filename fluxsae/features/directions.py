"""The geometry of decoder directions: neighbours, a map, alignment; and layers compared by what their features do."""

from collections.abc import Mapping, Sequence
from colorsys import hls_to_rgb
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import COUNTERPART

CHUNK = 2048
"""Features whose cosines with all the others are held at a time."""


@dataclass(frozen=True)
class Neighbours:
    """For each asked feature its nearest others, nearest first."""

    indices: Int[Tensor, "asked n"]
    cosines: Float[Tensor, "asked n"]


@dataclass(frozen=True)
class LayerComparison:
    """Two dictionaries over the same images, matched one to one by how alike their columns of S are."""

    pairs: Int[np.ndarray, "pairs 2"]
    """(feature of the first, feature of the second), the best match first."""
    correlations: Float[np.ndarray, " pairs"]
    """Pearson correlation of the two columns of S."""
    only_first: Int[np.ndarray, " only_first"]
    """Alive features of the first without a counterpart, i.e. no column of the second correlates above the bound."""
    only_second: Int[np.ndarray, " only_second"]
    best_first: Float[np.ndarray, " first"]
    """For each feature of the first the highest correlation with any of the second; NaN where it is not alive."""
    best_second: Float[np.ndarray, " second"]
    null_correlation: float
    """Mean matched correlation when the images of one side are shuffled: what a match is worth by chance."""
    counterpart: float = COUNTERPART
    """The bound: a correlation from which two features count as each other's counterpart."""

    def tensors(self) -> dict[str, Tensor]:
        """The comparison as the tensors of a file."""
        values = {field.name: np.atleast_1d(getattr(self, field.name)) for field in fields(self)}
        return {
            name: torch.from_numpy(value.astype(np.int32 if value.dtype.kind == "i" else np.float32))
            for name, value in values.items()
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The comparison from the tensors of a file.

        Raises:
            FluxSaeError: tensors are missing.
        """
        missing = [field.name for field in fields(cls) if field.name not in tensors and field.default is MISSING]
        if missing:
            raise FluxSaeError(f"the layer comparison lacks {', '.join(missing)}; run train.compare_layers again")
        values: dict[str, Any] = {
            field.name: tensors[field.name].numpy() for field in fields(cls) if field.name in tensors
        }
        for name in {"null_correlation", "counterpart"} & set(values):
            values[name] = float(values[name][0])
        return cls(**values)


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


def feature_map(
    W_dec: Float[Tensor, "features d_model"], *, perplexity: float = 30.0, seed: int = 0
) -> Float[np.ndarray, "features 2"]:
    """All decoder directions on a plane, near ones near: t-SNE by cosine from a PCA start, within [-1, 1].

    The same directions give the same map. t-SNE: van der Maaten & Hinton 2008.
    """
    from sklearn.manifold import TSNE

    directions = normalize(W_dec.detach().float(), dim=-1).cpu().numpy()
    if len(directions) < 4:
        raise FluxSaeError(f"a map of {len(directions)} features was asked; it needs at least 4")
    method = TSNE(perplexity=min(perplexity, (len(directions) - 1) / 3), init="pca", metric="cosine", random_state=seed)
    places = method.fit_transform(directions)
    centred = places - places.mean(axis=0)
    scaled: Float[np.ndarray, "features 2"] = (centred / np.abs(centred).max()).astype(np.float32)
    return scaled


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
    counts: dict[str, int] = {}
    for label in labels:
        for word in set(label.split()):
            counts[word] = counts.get(word, 0) + 1
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
    comparison: "LayerComparison", *, first: str, second: str, counterpart: float = COUNTERPART
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


def compare_layers(
    first: Float[Tensor, "images first"],
    second: Float[Tensor, "others second"],
    *,
    counterpart: float = COUNTERPART,
    min_images: int = 5,
    seed: int = 0,
) -> LayerComparison:
    """Features of two SAEs matched by their columns of S over the same images, never by equal index.

    The pairs maximise the summed correlation (assignment problem). A feature takes part when it fires on at least
    `min_images` images; one without any correlation above `counterpart` on the other side is what its layer alone has.

    Raises:
        FluxSaeError: the two matrices are of different images, or nothing fires often enough.
    """
    if first.shape[0] != second.shape[0]:
        raise FluxSaeError(
            f"scores of {first.shape[0]} and of {second.shape[0]} images were given; "
            "layers are compared on the same images"
        )
    alive_first, alive_second = _alive(first, min_images), _alive(second, min_images)
    if not len(alive_first) or not len(alive_second):
        raise FluxSaeError(
            f"no feature fires on {min_images} images on both sides; score more images or lower min_images"
        )
    columns_first, columns_second = _standardised(first[:, alive_first]), _standardised(second[:, alive_second])
    correlations = (columns_first.T @ columns_second).numpy()
    order = torch.randperm(first.shape[0], generator=torch.Generator().manual_seed(seed))
    _, chance = _assign((columns_first[order].T @ columns_second).numpy())
    pairs, values = _assign(correlations)
    best_first, best_second = correlations.max(axis=1), correlations.max(axis=0)
    first_ids, second_ids = alive_first.numpy(), alive_second.numpy()
    return LayerComparison(
        pairs=np.stack([first_ids[pairs[:, 0]], second_ids[pairs[:, 1]]], axis=1),
        correlations=values,
        only_first=first_ids[best_first < counterpart],
        only_second=second_ids[best_second < counterpart],
        best_first=_spread(best_first, first_ids, first.shape[1]),
        best_second=_spread(best_second, second_ids, second.shape[1]),
        null_correlation=float(chance.mean()),
        counterpart=counterpart,
    )


def _alive(scores: Tensor, min_images: int) -> Tensor:
    return ((scores > 0).sum(dim=0) >= min_images).nonzero().flatten()


def _standardised(columns: Tensor) -> Tensor:
    return normalize(columns.double() - columns.double().mean(dim=0), dim=0).float()


def _assign(correlations: Float[np.ndarray, "first second"]) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(correlations, maximize=True)
    order = np.argsort(-correlations[rows, columns], kind="stable")
    return np.stack([rows[order], columns[order]], axis=1), correlations[rows[order], columns[order]]


def _spread(values: np.ndarray, places: np.ndarray, size: int) -> Float[np.ndarray, " size"]:
    spread = np.full(size, np.nan, dtype=np.float32)
    spread[places] = values
    return spread
