"""One feature's page as data, from the run folder alone, and the search for features."""

import functools
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.labels import CURVE_LEVELS, STOP_WORDS
from fluxsae.features.naming import STRENGTHS
from fluxsae.features.selection import rank_features
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.pictures.heatmaps import token_heatmap
from fluxsae.pictures.perceptual import ImageEmbedder
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.prompts import words_of
from fluxsae.runs.tables import FeatureRow, Heatmaps

LEAST_BEGINNING: Final = 2
"""Letters from which a search finds labels by the beginnings of their words."""


@dataclass(frozen=True)
class TopImage:
    """One of a feature's best images."""

    image_id: int
    """Row of the image in the run's tables."""
    prompt: str
    seed: int
    score: float
    """S: the feature's highest activation on this image's tokens, in activation units."""
    argmax_token: int
    """The image token where it fires most."""
    source: str | None = None
    """Name of the picture that was read; None for a generated image."""

    @property
    def title(self) -> str:
        """The prompt or caption; the picture's name where it has none."""
        return self.prompt or self.source or ""


@dataclass(frozen=True)
class CardNeighbour:
    """A feature that is near another one."""

    feature: int
    similarity: float
    label: str | None


@dataclass(frozen=True)
class CardLevel:
    """How a feature's label does on held-out images at one level of activation."""

    level: str
    """strong, middle or weak: above two thirds, one third, and 0 of the highest score."""
    n_images: int
    precision: float | None
    """Share of them whose captions hold the label; None without such images, or without a check by captions."""
    images: tuple[int, ...]
    """Ids of some of them, the strongest first."""


@dataclass(frozen=True)
class CardName:
    """How the label was checked on the half of the images that it was not taken from."""

    p_value: float
    """Chance that it fits random images as well: a permutation test of one name."""
    q_value: float
    """The p-value corrected for all features that were checked."""
    base: float | None
    """Share of all held-out images whose captions hold it; None where captions never do."""
    precision: tuple[float, ...]
    """Share of images scored near 0, 10, ..., 100 % of `max_act` whose captions hold it; lift is this over `base`."""
    recall: tuple[float, ...]
    """Share of the images whose captions hold it that score at least so much."""
    levels: tuple[CardLevel, ...]


@dataclass(frozen=True)
class FeatureCard:
    """Everything that a feature's page shows, as plain values; what no stage has computed yet is None or empty."""

    hookpoint: str
    feature: int
    label: str | None
    label_confidence: float | None
    """From 0 (chance) to 1: where it fires, weighted by how strongly."""
    feature_class: str
    """dead, rare, common or very common."""
    density: float
    """Share of scored tokens where it fires."""
    image_density: float
    """Share of images where it fires."""
    mean_act: float
    max_act: float
    coherence: float | None
    p_value: float | None
    q_value: float | None
    monosemanticity: float | None
    spatial_spread: float
    """0: always the same place, 1: everywhere alike."""
    alignment: float | None
    """Cosine of what it reads and what it writes."""
    label_by: str | None = None
    """"person" where somebody gave the label (labels.csv)."""
    name: CardName | None = None
    """How the label was checked; None without a label, and in runs of before."""
    place: str | None = None
    """Where it fires beside what the label names: a key of `PLACES`; None where no masks are known."""
    place_share: float | None = None
    """Share of held-out images in which it fires there most."""
    patch_share: float | None = None
    """Mean share of the patches on which it fires, in images where it fires."""
    centre_share: float | None = None
    """Share of its activation in the middle quarter of images."""
    border_share: float | None = None
    """Share of its activation in the outermost eighth on each side."""
    caption_words: tuple[str, ...] = ()
    """Words of the captions enriched in its top images, the strongest first."""
    clip_phrases: tuple[str, ...] = ()
    """Phrases nearest to its top images in CLIP's space."""
    top_images: tuple[TopImage, ...] = ()
    silent_images: tuple[int, ...] = ()
    """Images that look most like its top images although it stays silent on them."""
    steps: tuple[int, ...] = ()
    step_profile: tuple[float, ...] = ()
    """Mean activation a token at each of `steps`."""
    histogram: tuple[int, ...] = ()
    histogram_edges: tuple[float, ...] = ()
    neighbours: tuple[CardNeighbour, ...] = ()
    """Features that write in the same direction (cosine of decoder directions)."""
    coactive: tuple[CardNeighbour, ...] = ()
    """Features that fire on the same images."""
    family: int = -1
    """Number of the group of features that fire together; -1 for a feature on its own."""
    position: tuple[float, float] | None = None
    """Its place on the map of directions."""

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SearchHit:
    """A feature that a query found."""

    feature: int
    reason: Literal["number", "label", "words", "clip", "best"]
    """What matched: its number, its label, words of its captions, CLIP similarity; "best" for an empty query."""
    score: float
    """Within one reason, higher is nearer."""


class CardIndex:
    """The cards of one hook point, made as they are asked for; opened from the run folder alone, without FLUX."""

    def __init__(self, run: RunFolder, hookpoint: HookPoint | str) -> None:
        """Opens the tables of a hook point.

        Raises:
            FluxSaeError: the run has no such hook point, or its features were not analysed yet.
        """
        self.run = run
        self.info = run.load_info()
        self.hookpoint = run.check_sae(hookpoint)
        self.features = run.load_features(self.hookpoint)
        self.images = run.load_images()
        self.labels: list[str | None] = self._column("label")
        self.places: list[str | None] = self._column("name_place")
        self._text_centres: dict[str, Float[np.ndarray, " width"]] = {}
        self.problems: list[str] = []
        """What is wrong with files that a card can do without; it then lacks what they hold."""
        self.directions = self._load_directions()
        self._heatmaps = self._load_heatmaps()

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, feature: int) -> FeatureCard:
        row = self.features[feature]
        return FeatureCard(
            hookpoint=str(self.hookpoint),
            feature=feature,
            label=row.label,
            label_confidence=row.label_confidence,
            label_by=row.label_by,
            feature_class=row.feature_class,
            density=row.density,
            image_density=row.image_density,
            mean_act=row.mean_act,
            max_act=row.max_act,
            coherence=row.coherence,
            p_value=row.p_value,
            q_value=row.q_value,
            monosemanticity=row.monosemanticity,
            spatial_spread=row.spatial_spread,
            alignment=float(self.directions["alignment"][feature]) if "alignment" in self.directions else None,
            name=_card_name(row),
            place=row.name_place,
            place_share=row.name_place_share,
            patch_share=row.patch_share,
            centre_share=row.centre_share,
            border_share=row.border_share,
            caption_words=tuple(row.caption_words or ()),
            clip_phrases=tuple(row.clip_phrases or ()),
            top_images=self._top_images(row),
            silent_images=tuple(row.silent_images or ()),
            steps=tuple(self.features.steps),
            step_profile=tuple(row.step_profile),
            histogram=tuple(row.histogram),
            histogram_edges=tuple(self.features.histogram_edges),
            neighbours=self._named(self._direction("neighbours", feature), self._direction("similarities", feature)),
            coactive=self._named(row.neighbours, row.neighbour_similarities),
            family=row.family,
            position=tuple(self._direction("positions", feature)) or None,
        )

    @functools.cached_property
    def ranked(self) -> list[int]:
        """All features, those that mean something first: coherent and labelled, then alive, then dead.

        Among the coherent ones the best of each label comes before the second of any, so that a page shows variety.
        """
        ranked = rank_features(
            self._floats("coherence"),
            self._floats("q_value"),
            self._floats("label_confidence"),
            self._floats("image_density"),
        )
        is_coherent = [bool(value) for value in self._column("is_coherent")]
        coherent = [feature for feature in ranked if is_coherent[feature]]
        return [*varied(coherent, self.labels), *(feature for feature in ranked if not is_coherent[feature])]

    def named(self) -> dict[str, list[int]]:
        """The features of each label, best ranked first, whose label is trusted at least by half at their strongest."""
        found: dict[str, list[int]] = {}
        is_trusted = (self._label_curves[:, -1] >= 0.5) & (self.max_acts > 0)
        for feature in self.ranked:
            label = self.labels[feature]
            if label and is_trusted[feature]:
                found.setdefault(label, []).append(feature)
        return found

    def label_confidence_at(
        self, shares: Float[np.ndarray, " n"], features: Sequence[int] | np.ndarray | None = None
    ) -> Float[np.ndarray, " n"]:
        """How far to trust a feature's label where it fires at this share of its maximum; 0 without a label.

        One share for each of `features`, or for every feature of the hook point.
        """
        curves = self._label_curves if features is None else self._label_curves[np.asarray(features, dtype=np.int64)]
        at = np.clip(shares, 0.0, 1.0) * (len(CURVE_LEVELS) - 1)
        low = np.minimum(at.astype(np.int64), len(CURVE_LEVELS) - 2)
        every, beyond = np.arange(len(curves)), at - low
        found = curves[every, low] * (1 - beyond) + curves[every, low + 1] * beyond
        return np.where(shares > 0, found, 0.0)

    @functools.cached_property
    def _label_curves(self) -> Float[np.ndarray, "features levels"]:
        sure = np.nan_to_num(self._floats("label_confidence"), nan=0.0)
        in_proportion = sure[:, None] * CURVE_LEVELS  # of a run that was selected before there were curves
        known = self._column("label_curve")
        return np.array([line if curve is None else curve for curve, line in zip(known, in_proportion, strict=True)])

    def name_at(self, share: float, feature: int) -> tuple[float, float, float] | None:
        """Precision, recall and lift of a label where its feature fires at this share of its maximum.

        On held-out images, by their captions; None where these were not measured.
        """
        row = self.features[feature]
        if row.name_precision is None or row.name_recall is None or not row.name_base:
            return None
        precision, recall = (
            float(np.interp(share, CURVE_LEVELS, curve)) for curve in (row.name_precision, row.name_recall)
        )
        return precision, recall, precision / row.name_base

    @functools.cached_property
    def max_acts(self) -> Float[np.ndarray, " features"]:
        """Each feature's highest activation in the run; 0 for a dead one."""
        return self._floats("max_act")

    @functools.cached_property
    def rarity(self) -> Float[np.ndarray, " features"]:
        """Share of the run's images in which each feature is silent."""
        return 1.0 - self._floats("image_density")

    @property
    def grid(self) -> TokenGrid:
        """The token grid of the run's images."""
        return TokenGrid(self.info.rows, self.info.cols)

    def acts(self, feature: int) -> dict[int, Float[np.ndarray, " tokens"]]:
        """Image id -> activations on the tokens of the feature's top images, best first."""
        return self._heatmaps.acts(feature) if self._heatmaps is not None else {}

    def heatmaps(
        self, feature: int, *, scale: Literal["feature", "image"] = "feature"
    ) -> dict[int, Float[np.ndarray, "rows cols"]]:
        """Image id -> heatmap of the feature's top images, best first; empty for a feature that never fired.

        `scale` "feature": fractions of the feature's run-wide maximum; "image": of each image's own.
        """
        row_maximum = self.features[feature].max_act
        return {
            image_id: token_heatmap(
                torch.from_numpy(acts), self.grid, reference=row_maximum if scale == "feature" else float(acts.max())
            )
            for image_id, acts in self.acts(feature).items()
        }

    def picture(self, image_id: int) -> Image.Image:
        """The picture of an image of the run."""
        return self.images.picture(image_id)

    def search(self, query: str, *, limit: int = 20, embedder: ImageEmbedder | None = None) -> list[SearchHit]:
        """Features by number ("12", "#12", "feature 12"), by label and caption words, and by free text through CLIP.

        An empty query gives the best features. CLIP takes part when `embedder` is the model that embedded the run and
        knows a word of the query.

        Raises:
            FluxSaeError: `limit` below 1, or the number of a feature that does not exist.
        """
        if limit < 1:
            raise FluxSaeError(f"limit is {limit}; it must be at least 1")
        text = " ".join(query.lower().split())
        if not text:
            return [SearchHit(feature, "best", 1.0) for feature in self.ranked[:limit]]
        number = re.fullmatch(r"(?:feature\s*)?#?\s*(\d{1,9})", text)
        if number:
            feature = int(number[1])
            self.features[feature]  # refuses what does not exist
            return [SearchHit(feature, "number", 1.0)]
        hits = self._by_label(text)
        if embedder is not None and self.run.embeddings_path.is_file():
            hits += self._by_clip(text, embedder)
        unique: dict[int, SearchHit] = {}
        for hit in hits:  # what matched first tells why
            unique.setdefault(hit.feature, hit)
        return list(unique.values())[:limit]

    def _by_label(self, text: str) -> list[SearchHit]:
        wanted = _content_words(text)
        hits = []
        for feature in self.ranked:
            label, label_words, caption_words = self._words[feature]
            in_label = len(wanted & label_words) / len(wanted)
            if not in_label and len(text) >= LEAST_BEGINNING and any(word.startswith(text) for word in label_words):
                in_label = len(text) / max(len(word) for word in label_words if word.startswith(text))
            if in_label > 0:
                hits.append(SearchHit(feature, "label", in_label + (0.5 if label == text else 0.0)))
            elif wanted <= caption_words:
                hits.append(SearchHit(feature, "words", 1.0))
        return sorted(hits, key=lambda hit: (hit.reason != "label", -hit.score))

    @functools.cached_property
    def _words(self) -> list[tuple[str, frozenset[str], frozenset[str]]]:
        """For each feature its label, the label's words and the words of its captions, in lower case."""
        captions = [frozenset(" ".join(words or ()).split()) for words in self._column("caption_words")]
        labels = [(label or "").lower() for label in self.labels]
        return [(label, frozenset(label.split()), words) for label, words in zip(labels, captions, strict=True)]

    def _by_clip(self, text: str, embedder: ImageEmbedder) -> list[SearchHit]:
        # All unknown words share one vector. It lies as near to some features (cosine 0.6 in the miniature) as the
        # vectors of known words do (0.3 to 0.8), so that no threshold on the cosine could tell them apart.
        pieces = {piece for word in _content_words(text) for piece in re.findall(r"\w+", word)}
        if all(embedder.unknown_words(piece) for piece in pieces):
            return []
        query = embedder.embed_texts([text])[0].numpy() - self._text_centre(embedder)
        similarity = self._clip_vectors @ (query / max(float(np.linalg.norm(query)), 1e-9))
        best = np.argsort(-similarity, kind="stable")
        return [SearchHit(int(i), "clip", float(similarity[i])) for i in best[:200] if similarity[i] > 0]

    @functools.cached_property
    def _clip_vectors(self) -> Float[np.ndarray, "features width"]:
        """Unit vectors from the middle of all images to that of each feature's top images; 0 for dead features."""
        vectors = self.run.load_embeddings().vectors.astype(np.float32)
        centred = vectors - vectors.mean(axis=0)
        means = np.zeros((len(self), vectors.shape[1]), dtype=np.float32)
        for feature, images in enumerate(self.features.column("top_images")):
            if images:
                means[feature] = centred[np.asarray(images)].mean(axis=0)
        means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
        return means

    def _text_centre(self, embedder: ImageEmbedder) -> Float[np.ndarray, " width"]:
        """Mean text vector of some of the run's prompts: what all texts share, the gap of CLIP's two cones among it."""
        if embedder.name not in self._text_centres:
            prompts = list(dict.fromkeys(filter(None, self.images.prompts)))[:64] or [""]
            self._text_centres[embedder.name] = embedder.embed_texts(prompts).mean(dim=0).numpy()
        return self._text_centres[embedder.name]

    def _load_directions(self) -> dict[str, torch.Tensor]:
        path = self.run.directions_path(self.hookpoint)
        if not path.is_file():
            return {}
        try:
            found = self.run.load_directions(self.hookpoint)
            if any(len(tensor) != len(self.features) for tensor in found.values()):
                raise FluxSaeError(f"{path} is of another number of features. Make it again: {maker('directions')}.")
        except FluxSaeError as error:
            self.problems.append(str(error))
            return {}
        return found

    def _load_heatmaps(self) -> Heatmaps | None:
        try:
            found = self.run.load_heatmaps(self.hookpoint)
            if found.rows * found.cols != self.grid.n_tokens:
                path, grid = self.run.heatmaps_path(self.hookpoint), f"{self.info.rows} x {self.info.cols}"
                raise FluxSaeError(
                    f"{path} has maps of {found.rows} x {found.cols} patches, and the run's images have {grid}. "
                    f"Make them again: {maker('score')}."
                )
        except FluxSaeError as error:
            self.problems.append(str(error))
            return None
        return found

    def _top_images(self, row: FeatureRow) -> tuple[TopImage, ...]:
        images = self.images
        return tuple(
            TopImage(image, images.prompts[image], images.seeds[image], score, token, images.sources[image])
            for image, score, token in zip(row.top_images, row.top_scores, row.top_tokens, strict=True)
        )

    def _direction(self, name: str, feature: int) -> list[Any]:
        """A feature's line of a table of the directions file; empty where there is no such file."""
        return self.directions[name][feature].tolist() if self.directions else []

    def _named(self, features: Sequence[int], similarities: Sequence[float]) -> tuple[CardNeighbour, ...]:
        return tuple(
            CardNeighbour(int(other), float(similarity), self.labels[other])
            for other, similarity in zip(features, similarities, strict=True)
        )

    def _column(self, name: str) -> list[Any]:
        return list(self.features.column(name)) if name in self.features else [None] * len(self.features)

    def _floats(self, name: str) -> Float[np.ndarray, " features"]:
        return np.array(self._column(name), dtype=np.float64)  # NaN where there is none


def _card_name(row: FeatureRow) -> CardName | None:
    if row.name_p_value is None or row.name_q_value is None:
        return None
    counts, images = row.level_counts or [], row.level_images or []
    levels = zip(STRENGTHS, counts, row.level_precision or [], images, strict=False)
    return CardName(
        row.name_p_value,
        row.name_q_value,
        row.name_base,
        tuple(row.name_precision or ()),
        tuple(row.name_recall or ()),
        tuple(CardLevel(level, count, precision, tuple(ids)) for level, count, precision, ids in levels),
    )


def _content_words(text: str) -> set[str]:
    """The words of a query without function words; where it has nothing else, all of it."""
    return set(words_of(text)) - STOP_WORDS or set(text.split())


def varied(features: Sequence[int], labels: Sequence[str | None]) -> list[int]:
    """The first feature of every label, then the second of each, and so on; those without a label at the end."""
    turns: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
    labelled = ((feature, labels[feature]) for feature in features)
    turn_of = {feature: math.inf if label is None else next(turns[label]) for feature, label in labelled}
    return sorted(features, key=lambda feature: turn_of[feature])
