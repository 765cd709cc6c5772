"""What the Directions tab and /directions ask for: the map, what is near, and layers compared."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.cards import CardIndex
from fluxsae.features.directions import nearest_features
from fluxsae.features.layers import LayerComparison
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.pictures.heatmaps import feature_colour, names_colour
from fluxsae.ui.kit import views
from fluxsae.ui.kit.desk import Desk
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.schemas import DirectionsRequest

if TYPE_CHECKING:
    from torch import Tensor

COMPARED = 14
PLACE_NAMES = 40


class DirectionsDesk(Desk):
    """The Directions tab's questions, answered from the run folder."""

    def answers(self) -> Answers:
        """/directions."""
        return {DirectionsRequest: self.directions}

    def directions(self, request: DirectionsRequest) -> tuple[list[dict[str, Any]], Any]:
        """The nearest features by cosine of what they write, and a plot of the map around them."""
        cards = self.bench.cards[request.hookpoint]
        near = self._near(request)
        found = [
            {**views.summary(cards, feature), "cosine": cosine, "position": self._position(cards, feature)}
            for feature, cosine in near
        ]
        return found, draw_plot(cards, request.feature, [feature for feature, _ in near])

    def map(self, hookpoint: Any, selection: Any = None) -> dict[str, Any]:
        """Every direction of a hook point on a plane, with the names of its neighbourhoods."""
        place = self._place(hookpoint)
        is_here = isinstance(selection, Mapping) and selection.get("hookpoint") == place
        return {**self._map(place), "selected": selection["feature"] if is_here else None}

    def near(self, selection: Any) -> dict[str, Any] | None:
        """What lies near the chosen feature."""
        if not isinstance(selection, Mapping) or selection.get("feature") is None:
            return None
        request = DirectionsRequest.pick(self.limits, selection)
        cards = self.bench.cards[request.hookpoint]
        card = cards[request.feature]
        return {
            **views.chip(cards, request.feature),
            "rows": cards.info.rows,
            "cols": cards.info.cols,
            "word": self.bench.word(request.hookpoint),
            "alignment": card.alignment,
            "pictures": views.card_pictures(cards, card, limit=3),
            "near": [{**views.named(cards, other), "cosine": cosine} for other, cosine in self._near(request)],
            **self.frame(DirectionsRequest, request.model_dump(), tab="directions"),
        }

    def linked(self, view: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any] | None]:
        """Hook point, map and neighbours of a link."""
        return view.get("hookpoint"), self.map(view.get("hookpoint"), view), self.near(view)

    def compare(self, first: Any, second: Any) -> dict[str, Any]:
        """Which features of one hook point live on at another, and what each alone has."""
        left, right = sorted(map(self._place, (first, second)), key=self.bench.hookpoints.index)
        if left == right:
            raise FluxSaeError(f"Both hook points are {left}. Choose two different ones.")
        comparison = self._comparison(left, right)
        one, two = self.bench.cards[left], self.bench.cards[right]
        return {
            "word_first": self.bench.word(left),
            "word_second": self.bench.word(right),
            "chance": comparison.null_correlation,
            "mean": float(comparison.correlations.mean()) if len(comparison.correlations) else 0.0,
            "least": comparison.counterpart,
            "n_first": int(np.isfinite(comparison.best_first).sum()),
            "pairs": self._pairs(comparison, one, two),
            "only_first": self._alone(one, comparison.only_first),
            "n_only_first": len(comparison.only_first),
            "only_second": self._alone(two, comparison.only_second),
            "n_only_second": len(comparison.only_second),
        }

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
        if not run.comparison_path(HookPoint.parse(left), HookPoint.parse(right)).is_file():
            raise FluxSaeError(f"These hook points were not compared yet. Compare them: {maker('compare_layers')}.")
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

    def _alone(self, cards: CardIndex, features: np.ndarray) -> list[dict[str, Any]]:
        alone = set(features.tolist())
        best = [feature for feature in cards.ranked if feature in alone]
        return [views.named(cards, feature) for feature in best[:COMPARED]]

    def _position(self, cards: CardIndex, feature: int) -> list[float] | None:
        return cards.directions["positions"][feature].tolist() if cards.directions else None


def place_names(cards: CardIndex, positions: np.ndarray) -> list[dict[str, Any]]:
    """Names for the map: each label once, at its feature in the midst of the others; the most frequent labels first."""
    counts = Counter(label for label in cards.labels if label)
    names = []
    for label, _ in counts.most_common(PLACE_NAMES):
        members = [feature for feature, other in enumerate(cards.labels) if other == label]
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
    others = [index for index in range(len(cards)) if index != feature and index not in set(near)]
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
