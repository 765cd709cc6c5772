"""What the Directions tab and /directions ask for: the map, what is near, and layers compared."""

import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np

from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.cards import CardIndex
from fluxsae.features.directions import nearest_features
from fluxsae.features.layers import LayerComparison
from fluxsae.pictures.heatmaps import feature_colour, names_colour
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.serve.downloads import Downloads, csv_bytes, whole_number
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.schemas import DirectionsRequest, LayersRequest

if TYPE_CHECKING:
    from torch import Tensor

COMPARED = 14
PLACE_NAMES = 40


class DirectionsDesk(Desk):
    """The Directions tab's questions, answered from the run folder."""

    def answers(self) -> Answers:
        """/directions and /layers."""
        return {DirectionsRequest: self.directions, LayersRequest: self.layers}

    def directions(self, request: DirectionsRequest) -> tuple[list[dict[str, Any]], Any]:
        """The nearest features by cosine of what they write, and a plot of the map around them."""
        cards = self.bench.cards[request.hookpoint]
        near = self._near(request)
        found = [
            {**views.summary(cards, feature), "cosine": cosine, "position": self._position(cards, feature)}
            for feature, cosine in near
        ]
        return found, draw_plot(cards, request.feature, [feature for feature, _ in near])

    def downloads(self) -> Downloads:
        """neighbours.csv of a feature, map.csv of a hook point, layers.csv of two."""
        return {"neighbours.csv": self._neighbours_csv, "map.csv": self._map_csv, "layers.csv": self._layers_csv}

    def _neighbours_csv(self, asked: Mapping[str, str]) -> bytes:
        request = DirectionsRequest.parse(
            self.limits, hookpoint=asked.get("hookpoint"), feature=whole_number(asked, "feature"), n_neighbours=100
        )
        labels = self.bench.cards[request.hookpoint].labels
        rows = ((other, labels[other], cosine) for other, cosine in self._near(request))
        return csv_bytes(("feature", "label", "cosine"), rows)

    def _map_csv(self, asked: Mapping[str, str]) -> bytes:
        place = self._place(asked.get("hookpoint"))
        cards = self.bench.cards[place]
        self._map(place)  # refuses a run without a map
        positions = cards.directions["positions"].tolist()
        rows = ((f, cards.labels[f], cards.max_acts[f], x, y) for f, (x, y) in enumerate(positions))
        return csv_bytes(("feature", "label", "max_act", "x", "y"), rows)

    def _layers_csv(self, asked: Mapping[str, str]) -> bytes:
        left, right = self._two(self._place(asked.get("first")), self._place(asked.get("second")))
        found, one, two = self._comparison(left, right), self.bench.cards[left].labels, self.bench.cards[right].labels
        matched = zip(found.pairs.tolist(), found.correlations.tolist(), strict=True)
        rows = ((a, one[a], b, two[b], value) for (a, b), value in matched)
        names = ("feature", "label", "other_feature", "other_label", "correlation")
        return csv_bytes(names, rows)

    def layers(self, request: LayersRequest) -> dict[str, Any]:
        """Matched features of two hook points, and what each has alone."""
        left, right = self._two(request.first, request.second)
        comparison, one, two = self._comparison(left, right), self.bench.cards[left], self.bench.cards[right]
        matched = zip(comparison.pairs[: request.limit], comparison.correlations[: request.limit], strict=True)
        return {
            "first": left,
            "second": right,
            "pairs": [
                {"first": views.summary(one, int(a)), "second": views.summary(two, int(b)), "correlation": float(value)}
                for (a, b), value in matched
            ],
            "only_first": self._summaries(one, comparison.only_first, request.limit),
            "only_second": self._summaries(two, comparison.only_second, request.limit),
            "n_pairs": len(comparison.pairs),
            "n_only_first": len(comparison.only_first),
            "n_only_second": len(comparison.only_second),
            "counterpart": comparison.counterpart,
            "correlation_by_chance": comparison.null_correlation,
        }

    def map(self, hookpoint: Any, selection: Any = None) -> dict[str, Any]:
        """Every direction of a hook point on a plane, with the names of its neighbourhoods."""
        place = self._place(hookpoint)
        is_here = isinstance(selection, Mapping) and selection.get("hookpoint") == place
        return {**self._map(place), "selected": selection.get("feature") if is_here else None}

    def near(self, selection: Any) -> dict[str, Any] | None:
        """What lies near the chosen feature."""
        if not isinstance(selection, Mapping) or selection.get("feature") is None:
            return None
        request = DirectionsRequest.pick(self.limits, selection)
        cards = self.bench.cards[request.hookpoint]
        card = cards[request.feature]
        return {
            **views.chip(cards, request.feature),
            **views.thumb_grid(cards),
            "word": self.bench.word(request.hookpoint),
            "alignment": card.alignment,
            "pictures": views.card_thumbs(cards, request.feature, limit=3),
            "shown": [{"prompt": top.prompt, "seed": top.seed} for top in card.top_images[:3]],
            "near": [{**views.named(cards, other), "cosine": cosine} for other, cosine in self._near(request)],
            **self.frame(DirectionsRequest, request.model_dump(), tab="directions"),
        }

    def linked(self, view: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
        """Hook point, map and neighbours of a link."""
        return view.get("hookpoint"), self.map(view.get("hookpoint"), view), self.near(view)

    def compared(self, first: Any, second: Any) -> dict[str, Any]:
        """Which features of one hook point live on at another, and what each alone has."""
        left, right = self._two(self._place(first), self._place(second))
        comparison = self._comparison(left, right)
        one, two = self.bench.cards[left], self.bench.cards[right]
        return {
            "file": f"{self.files}/layers.csv?{urlencode({'first': left, 'second': right})}",
            "word_first": self.bench.word(left),
            "word_second": self.bench.word(right),
            "chance": comparison.null_correlation,
            "mean": float(comparison.correlations.mean()) if len(comparison.correlations) else 0.0,
            "least": comparison.counterpart,
            "n_first": int(np.isfinite(comparison.best_first).sum()),
            "names": self._names(comparison, one, two),
            "pairs": self._pairs(comparison, one, two),
            "only_first": self._alone(one, comparison.only_first),
            "n_only_first": len(comparison.only_first),
            "only_second": self._alone(two, comparison.only_second),
            "n_only_second": len(comparison.only_second),
        }

    def _two(self, first: str, second: str) -> list[str]:
        """Two hook points in FLUX's order."""
        if first == second:
            raise FluxSaeError(f"Both hook points are {first}. Choose two different ones.")
        return sorted((first, second), key=self.bench.hookpoints.index)

    def _place(self, hookpoint: Any) -> str:
        """A hook point of this run."""
        return DirectionsRequest.parse(self.limits, hookpoint=hookpoint, feature=0).hookpoint

    def _near(self, request: DirectionsRequest) -> list[tuple[int, float]]:
        cards = self.bench.cards[request.hookpoint]
        stored = cards.directions
        if stored and stored["neighbours"].shape[1] >= request.n_neighbours:
            neighbours = stored["neighbours"][request.feature][: request.n_neighbours].tolist()
            cosines = stored["similarities"][request.feature][: request.n_neighbours].tolist()
            return list(zip(neighbours, cosines, strict=True))
        import torch

        W_dec = self._written(request.hookpoint)
        n = min(request.n_neighbours, len(W_dec) - 1)
        found = nearest_features(W_dec, torch.tensor([request.feature]), n=n)
        return list(zip(found.indices[0].tolist(), found.cosines[0].tolist(), strict=True))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one desk a page, for as long as it is served
    def _written(self, hookpoint: str) -> "Tensor":
        """The decoder's directions, from the file: the SAEs beside FLUX may lie on a GPU that is lent."""
        from fluxsae.sae.model import SparseAutoencoder

        run = self.bench.run
        return SparseAutoencoder.from_pretrained(run.path, subfolder=run.sae_subfolder(hookpoint)).W_dec.detach()

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one desk a page, for as long as it is served
    def _map(self, hookpoint: str) -> dict[str, Any]:
        cards = self.bench.cards[hookpoint]
        if not cards.directions:
            raise FluxSaeError(f"This run has no map of {hookpoint}. Make it: {maker('directions')}.")
        positions = cards.directions["positions"].numpy().astype("<f4")
        alive = (cards.features.column("max_act") > 0).astype(np.uint8)
        return {
            "hookpoint": hookpoint,
            "file": f"{self.files}/map.csv?{urlencode({'hookpoint': hookpoint})}",
            "word": self.bench.word(hookpoint),
            "positions": views.base64_text(positions),
            "n_dead": int(len(alive) - alive.sum()),
            "alive": views.base64_text(alive),
            "labels": cards.labels,
            "colours": {label: feature_colour(label) for label in set(cards.labels) if names_colour(label)},
            "names": place_names(cards, positions),
        }

    def _comparison(self, left: str, right: str) -> LayerComparison:
        run = self.bench.run
        if not run.comparison_path(left, right).is_file():
            raise FluxSaeError(f"These SAEs were not compared yet. Compare them: {maker('compare_layers')}.")
        return LayerComparison.from_tensors(run.load_comparison(left, right))

    def _pairs(self, comparison: LayerComparison, one: CardIndex, two: CardIndex) -> list[dict[str, Any]]:
        shown = [
            (int(left), int(right), float(value))
            for (left, right), value in zip(comparison.pairs, comparison.correlations, strict=True)
            if value >= comparison.counterpart and (one.labels[int(left)] or two.labels[int(right)])
        ]
        told: set[tuple[str | None, str | None]] = set()
        first_of_kind: list[tuple[int, int, float]] = []
        others: list[tuple[int, int, float]] = []
        for pair in shown:
            kind = (one.labels[pair[0]], two.labels[pair[1]])
            (others if kind in told else first_of_kind).append(pair)
            told.add(kind)
        return [
            {"first": views.named(one, left), "second": views.named(two, right), "correlation": value}
            for left, right, value in [*first_of_kind, *others][:COMPARED]
        ]

    def _names(self, comparison: LayerComparison, one: CardIndex, two: CardIndex) -> list[dict[str, Any]]:
        """For the first one's best names: their features, how many of them live on, and the best one-to-one match."""
        matches = {
            int(left): (float(value), int(right))
            for (left, right), value in zip(comparison.pairs, comparison.correlations, strict=True)
        }
        found = []
        for features in itertools.islice(one.named().values(), COMPARED):
            best = max((feature for feature in features if feature in matches), key=lambda f: matches[f], default=None)
            if best is None:
                continue
            correlation, other = matches[best]
            found.append(
                {
                    "n_features": len(features),
                    "n_in_both": int((comparison.best_first[features] >= comparison.counterpart).sum()),
                    "first": views.named(one, best),
                    "second": views.named(two, other),
                    "correlation": correlation,
                }
            )
        return found

    def _alone(self, cards: CardIndex, features: np.ndarray) -> list[dict[str, Any]]:
        return [views.named(cards, feature) for feature in _best(cards, features)[:COMPARED]]

    def _summaries(self, cards: CardIndex, features: np.ndarray, limit: int) -> list[dict[str, Any]]:
        return [views.summary(cards, feature) for feature in _best(cards, features)[:limit]]

    def _position(self, cards: CardIndex, feature: int) -> list[float] | None:
        return cards.directions["positions"][feature].tolist() if cards.directions else None


def _best(cards: CardIndex, features: np.ndarray) -> list[int]:
    """Some features, the most meaningful first."""
    wanted = set(features.tolist())
    return [feature for feature in cards.ranked if feature in wanted]


def place_names(cards: CardIndex, positions: np.ndarray) -> list[dict[str, Any]]:
    """Names for the map: each label once, at its feature in the midst of the others; the most frequent labels first."""
    counts = Counter(label for label in cards.labels if label)
    by_label: dict[str, list[int]] = {}
    for feature, label in enumerate(cards.labels):
        by_label.setdefault(label or "", []).append(feature)
    names = []
    for label, _ in counts.most_common(PLACE_NAMES):
        members = by_label[label]
        middle = np.median(positions[members], axis=0)
        nearest = members[int(np.argmin(((positions[members] - middle) ** 2).sum(axis=1)))]
        names.append({"label": label, "feature": nearest})
    return names


def draw_plot(cards: CardIndex, feature: int, near: list[int]) -> Any:
    """The map as a plotly figure: the feature, what is near it, and all the others faint."""
    import plotly.graph_objects as go

    if not cards.directions:
        raise FluxSaeError(f"This run has no map of directions. Make it: {maker('directions')}.")
    positions = cards.directions["positions"].numpy()
    names = [f"feature {index}{f': {label}' if label else ''}" for index, label in enumerate(cards.labels)]
    shown = {feature, *near}
    others = [index for index in range(len(cards)) if index not in shown]
    figure = go.Figure(
        layout={"template": "plotly_white", "showlegend": False, "margin": {"l": 8, "r": 8, "t": 40, "b": 8}}
    )
    for members, size, opacity in ((others, 5, 0.25), (near, 10, 0.95), ([feature], 17, 1.0)):
        figure.add_scatter(
            x=positions[members, 0],
            y=positions[members, 1],
            mode="markers",
            text=[names[index] for index in members],
            hoverinfo="text",
            marker={
                "size": size,
                "opacity": opacity,
                "color": [feature_colour(cards.labels[index]) for index in members],
            },
        )
    figure.update_xaxes(visible=False).update_yaxes(visible=False, scaleanchor="x")
    return figure.update_layout(title=f"{names[feature]} and what writes in a similar direction ({cards.hookpoint})")
