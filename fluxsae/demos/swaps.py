"""Swaps: where one feature fires it is taken away and another is added, so that pink becomes red and the rest stays."""

import hashlib
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from fluxsae.artifacts import RunFolder
from fluxsae.cards import CardIndex
from fluxsae.demos.measured import load_limits, measured_sweep, run_origin
from fluxsae.demos.search import candidate_images
from fluxsae.edits import Recipe, SteeringEdit
from fluxsae.files import write_bytes, write_text
from fluxsae.flux import capture, flux_identity, generate, schedule_sigmas, token_grid
from fluxsae.grids import join_pictures
from fluxsae.hookpoints import HookPoint
from fluxsae.measurements import EditMeasurement
from fluxsae.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.sae import SparseAutoencoder
from fluxsae.scores import ScoreMatrix
from fluxsae.settings import GenerationSettings
from fluxsae.sweeps import first_edited_step
from fluxsae.tables import encode_webp

LEAST_CONFIDENCE: Final = 0.5
"""How far a label is trusted at least for its features to be added."""
SEEN: Final = 0.15
"""Share of the best demo's loss of its label, as CLIP sees it, from which a demo shows what its name says."""
Region = tuple[tuple[bool, ...], ...]
Candidate = tuple[int, int, str]
"""Feature that is taken away, image id, new name."""


@dataclass(frozen=True, kw_only=True)
class SwapConfig:
    """What is tried to swap one name for another."""

    suppress: tuple[float, ...] = (0.0, -1.0)
    """Strengths of mode scale for the feature that is taken away."""
    amplify: tuple[tuple[int, float], ...] = ((1, 0.3), (1, 0.6), (2, 0.3), (3, 0.2))
    """How many features of the new name are added, best ranked first, and the strength of mode add of each."""
    n_images: int = 3
    """Images tried for each feature beside its demo's: from one where it fires most down to one where it fires less."""
    n_names: int = 5
    """New names tried on each image: those most alike in use (see `alike`)."""
    alike: float = 0.7
    """Names are of one kind where the words they stand between in the run's prompts have at least this cosine."""
    steps: tuple[int, int] | None = None
    """Window of the edits, [start, stop); left out, the noise levels the SAE was trained on."""
    heat: float = 0.25
    """The region: patches where the old feature fires at least at this share of its strongest patch."""
    picture_side: int = 256
    """Longest side of a picture in the swap's strip, pixels."""


@dataclass(frozen=True)
class SwapScore:
    """How well a picture shows one name in place of another; CLIP cosines, and the run's perceptual measure."""

    score: float
    """The smaller of `gone` and `come`, times 1 - `collateral`; 0 beyond safe, or where CLIP reads another name of the
    kind. Higher is better."""
    gone: float
    """How much farther the picture came from its prompt, or from the old name alone if the prompt does not have it."""
    come: float
    """How much nearer it came to the same with the new name in the old one's place."""
    collateral: float
    """Distance outside the region as a share of outside and inside together."""


@dataclass(frozen=True)
class Swap:
    """One name put in place of another, on a picture that shows it."""

    hookpoint: str
    feature: int
    """The feature that is taken away."""
    label: str
    new_features: tuple[int, ...]
    new_label: str
    prompt: str
    seed: int
    score: SwapScore
    distance_name: str
    image: str
    """Name of the strip (before, after) in the run's demo folder."""
    recipe: Recipe
    measurement: EditMeasurement

    def to_dict(self) -> dict[str, Any]:
        """The swap as JSON values."""
        names = ("hookpoint", "feature", "label", "new_label", "prompt", "seed", "distance_name", "image")
        return {
            **{name: getattr(self, name) for name in names},
            "new_features": list(self.new_features),
            "score": asdict(self.score),
            "recipe": self.recipe.to_dict(),
            "measurement": self.measurement.to_dict(),
        }


def where_it_fires(
    pipe: Any,
    sae: SparseAutoencoder,
    place: HookPoint,
    feature: int,
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    config: SwapConfig,
) -> Region:
    """The patches of an unedited picture where a feature fires, at `config.heat` of its strongest patch or more.

    Mean over the steps from the first that is edited; all False where it never fires.
    """
    acts: list[Float[Tensor, " tokens"]] = []
    edit = SteeringEdit(place, feature, "scale", 0.0, steps=config.steps)
    first = first_edited_step(pipe, {place: sae}, [(edit,)], settings)
    steps = range(first, len(schedule_sigmas(pipe, settings)))
    with capture(pipe, [place], steps=steps, sink=lambda call: acts.append(_acts_of(sae, call, feature))):
        generate(pipe, prompt, seeds=seed, settings=settings)
    mean = torch.stack(acts).mean(dim=0)
    fires: Bool[Tensor, " tokens"] = (mean > 0) & (mean >= config.heat * mean.max())
    grid = token_grid(pipe, settings)
    return tuple(tuple(line) for line in fires.reshape(grid.rows, grid.cols).tolist())


def _acts_of(sae: SparseAutoencoder, call: Any, feature: int) -> Float[Tensor, " tokens"]:
    with torch.no_grad():
        return sae.encode(call.tokens[0])[:, feature].float().cpu()


def swap_variants(
    place: HookPoint, feature: int, new_features: Sequence[int], region: Region, config: SwapConfig
) -> list[tuple[SteeringEdit, ...]]:
    """Every way to take `feature` away and add others in a region that `config` names, without repeats."""
    found = [
        (
            SteeringEdit(place, feature, "scale", less, steps=config.steps, region=region),
            *(SteeringEdit(place, new, "add", more, steps=config.steps, region=region) for new in new_features[:count]),
        )
        for less in config.suppress
        for count, more in config.amplify
        if count <= len(new_features)
    ]
    return list(dict.fromkeys(found))


def swap_score(
    measured: EditMeasurement,
    texts: Float[Tensor, "names width"],
    pictures: Float[Tensor, "2 width"],
) -> SwapScore:
    """The score of a picture from CLIP's vectors of (before, after) and of texts with (old, new, every other) name."""
    near = pictures @ texts.T
    gone, come = float(near[0, 0] - near[1, 0]), float(near[1, 1] - near[0, 1])
    inside, outside = measured.distance_inside or 0.0, measured.distance_outside or 0.0
    collateral = outside / (inside + outside) if inside + outside > 0 else 0.0
    is_read = near.argmax(dim=1).tolist() == [0, 1]
    score = max(0.0, min(gone, come)) * (1 - collateral) if measured.is_safe and is_read else 0.0
    return SwapScore(score, gone, come, collateral)


Around = Counter[tuple[str, int]]
"""How often each word stands right before (-1) or right after (1) a name."""


def words_around(name: str, sentences: Sequence[Sequence[str]]) -> Around:
    """The words that a name stands between in sentences of lower-case words."""
    wanted, found = tuple(name.lower().split()), Counter[tuple[str, int]]()
    size = len(wanted)
    for words in sentences:
        for start in range(len(words) - size + 1):
            if tuple(words[start : start + size]) == wanted:
                found.update(
                    (words[at], side) for at, side in ((start - 1, -1), (start + size, 1)) if 0 <= at < len(words)
                )
    return found


def words_around_each(sentences: Sequence[Sequence[str]]) -> dict[str, Around]:
    """The words that every single word stands between."""
    found: defaultdict[str, Around] = defaultdict(Counter)
    for words in sentences:
        for first, second in itertools.pairwise(words):
            found[first][second, 1] += 1
            found[second][first, -1] += 1
    return dict(found)


def cosine(first: Around, second: Around) -> float:
    """Cosine of two counts, 0 where one is empty."""
    size = math.sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))
    return sum(count * second[word] for word, count in first.items()) / size if size else 0.0


def find_swaps(
    run: RunFolder,
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    *,
    distance: PerceptualDistance,
    embedder: ImageEmbedder,
    config: SwapConfig | None = None,
    max_batch: int | None = None,
    on_candidate: Callable[[int, int], None] | None = None,
) -> dict[HookPoint, list[Swap]]:
    """Swaps of the features whose steering demos show their labels go, best first, written into the run.

    What was measured is kept in the run's work folder after every candidate. `on_candidate(done, total)`.
    """
    config = config or SwapConfig()
    searches = [_Search(run, pipe, saes[place], place, distance, embedder, config, max_batch) for place in sorted(saes)]
    plans = [search.candidates() for search in searches]
    total, done, found = sum(map(len, plans)), 0, {}
    for search, plan in zip(searches, plans, strict=True):
        for candidate in plan:
            search.measure(candidate)
            done += 1
            if on_candidate is not None:
                on_candidate(done, total)
        found[search.place] = search.write_swaps()
    return found


@dataclass(eq=False)
class _Search:
    """The search at one hook point and what it keeps in the work folder."""

    run: RunFolder
    pipe: Any
    sae: SparseAutoencoder
    place: HookPoint
    distance: PerceptualDistance
    embedder: ImageEmbedder
    config: SwapConfig
    max_batch: int | None

    def __post_init__(self) -> None:
        self.settings = self.run.load_info().settings
        self.images = self.run.load_images()
        self.own_images, self.labels = self._going_labels()
        self.named = self._named_features()
        self.sentences = [re.findall(r"\w+", prompt.lower()) for prompt in self.images.prompts]
        self.around = words_around_each(self.sentences)
        self.limits = load_limits(self.run, self.place)
        self._regions: dict[tuple[int, int], Region] = {}
        self._kinds: dict[str, dict[str, float]] = {}
        self.done = self._load_checkpoint()

    def candidates(self) -> list[Candidate]:
        """What is still to be measured."""
        return [candidate for feature in self.labels for candidate in self._of(feature) if candidate not in self.done]

    def measure(self, candidate: Candidate) -> None:
        """Measures every way to put a new name in place of a feature's own on one image, and keeps the best."""
        feature, image_id, name = candidate
        images, measured, _ = self._sweep(image_id, self._variants(candidate))
        rivals = [other for other in self._kind(self.labels[feature]) if other != name]
        texts = [self._text(feature, image_id, other) for other in (self.labels[feature], name, *rivals)]
        names, seen = self.embedder.embed_texts(texts), self.embedder.embed_images(images)
        scores = [swap_score(measured[place], names, seen[[0, place]]) for place in range(1, len(images))]
        best = max(range(len(scores)), key=lambda place: scores[place].score)
        self.done[candidate] = (best, scores[best])
        rows = [
            {"candidate": candidate, "variant": variant, "score": asdict(score)}
            for candidate, (variant, score) in self.done.items()
        ]
        write_text(self._checkpoint_path, json.dumps(rows))

    def write_swaps(self) -> list[Swap]:
        """Each feature and new name on the image that shows it best, if CLIP sees it happen; best first."""
        tried = [
            (self.done[candidate][1].score, candidate) for feature in self.labels for candidate in self._of(feature)
        ]
        best: dict[tuple[int, str], Candidate] = {}
        for score, (feature, image_id, name) in sorted(tried, key=lambda pair: -pair[0]):
            if score > 0:
                best.setdefault((feature, name), (feature, image_id, name))
        swaps = [self._swap(candidate, *self.done[candidate]) for candidate in best.values()]
        self.run.save_swaps(self.place, [json.dumps(swap.to_dict()) for swap in swaps])
        named = {self.run.demo_image_path(self.place, swap.image) for swap in swaps}
        for old in set(self.run.swaps_path(self.place).parent.glob("swap-*.webp")) - named:
            old.unlink()
        return swaps

    def _going_labels(self) -> tuple[dict[int, int], dict[int, str]]:
        """Image and label of the features whose label CLIP sees go in their demo."""
        demos = self.run.load_demos(self.place)
        told = [demo for demo in demos if demo["label"] and demo["score"].get("label_less") is not None]
        least = SEEN * max((-demo["score"]["label_less"] for demo in told), default=0.0)
        shown = [demo for demo in told if -demo["score"]["label_less"] > max(least, 0.0)]
        ids = {key: image for image, key in enumerate(zip(self.images.prompts, self.images.seeds, strict=True))}
        images = {demo["feature"]: ids[demo["prompt"], demo["seed"]] for demo in shown}
        return images, {demo["feature"]: str(demo["label"]) for demo in shown}

    def _of(self, feature: int) -> list[Candidate]:
        scores = ScoreMatrix.load(self.run.scores_path(self.place)).feature(feature)
        label, prompts = self.labels[feature], self.images.prompts
        others = candidate_images(scores, prompts, label=label, n_wanted=self.config.n_images)
        images = dict.fromkeys([self.own_images[feature], *others])
        return [(feature, image, name) for image in images for name in self._new_names(label, prompts[image])]

    def _named_features(self) -> dict[str, list[int]]:
        """The features of each trusted label, best ranked first."""
        cards = CardIndex(self.run, self.place)
        found: dict[str, list[int]] = {}
        for feature in cards.ranked:
            row = cards.features[feature]
            if row.label and (row.label_confidence or 0.0) >= LEAST_CONFIDENCE and row.max_act > 0:
                found.setdefault(row.label, []).append(feature)
        return found

    def _new_names(self, label: str, prompt: str) -> list[str]:
        """The names most like a label in use, of those that a prompt does not have."""
        told, alike = set(prompt.lower().split()) | set(label.split()), self._kind(label)
        names = [name for name in self.named if name in alike and not told & set(name.split())]
        return sorted(names, key=lambda name: -alike[name])[: self.config.n_names]

    def _kind(self, label: str) -> dict[str, float]:
        """How alike a label in use are the names and the words of the run's prompts that are alike enough."""
        if label not in self._kinds:
            own = words_around(label, self.sentences)
            alike = {word: cosine(own, around) for word, around in self.around.items() if word != label}
            alike |= {name: cosine(own, words_around(name, self.sentences)) for name in self.named if name != label}
            self._kinds[label] = {name: value for name, value in alike.items() if value >= self.config.alike}
        return self._kinds[label]

    def _text(self, feature: int, image_id: int, name: str) -> str:
        """What an image shows with a name in place of a feature's own."""
        label, prompt = self.labels[feature], self.images.prompts[image_id]
        words = re.compile(rf"\b{re.escape(label)}\b", re.IGNORECASE)
        return words.sub(name, prompt) if words.search(prompt) else name

    def _variants(self, candidate: Candidate) -> list[tuple[SteeringEdit, ...]]:
        feature, image_id, name = candidate
        if (feature, image_id) not in self._regions:
            self._regions[feature, image_id] = where_it_fires(
                self.pipe,
                self.sae,
                self.place,
                feature,
                prompt=self.images.prompts[image_id],
                seed=self.images.seeds[image_id],
                settings=self.settings,
                config=self.config,
            )
        return swap_variants(self.place, feature, self.named[name], self._regions[feature, image_id], self.config)

    def _sweep(
        self, image_id: int, variants: Sequence[Sequence[SteeringEdit]]
    ) -> tuple[list[Image.Image], list[EditMeasurement], list[Recipe]]:
        """Pictures, measurements and recipes of the unedited picture and of each variant."""
        found, measured = measured_sweep(
            self.pipe,
            {self.place: self.sae},
            [(), *variants],
            prompt=self.images.prompts[image_id],
            seed=self.images.seeds[image_id],
            settings=self.settings,
            distance=self.distance,
            embedder=self.embedder,
            limits=None if self.limits is None else {self.place: self.limits},
            origin=run_origin(self.run, self.pipe),
            max_batch=self.max_batch,
        )
        return [variant.image for variant in found], measured, [variant.recipe for variant in found]

    def _swap(self, candidate: Candidate, variant: int, score: SwapScore) -> Swap:
        feature, image_id, name = candidate
        edits = self._variants(candidate)[variant]
        images, measured, recipes = self._sweep(image_id, [edits])
        picture = f"swap-{feature}-{edits[1].feature}"
        strip = encode_webp(join_pictures(images), longest_side=2 * self.config.picture_side, quality=92)
        write_bytes(self.run.demo_image_path(self.place, picture), strip)
        return Swap(
            hookpoint=str(self.place),
            feature=feature,
            label=self.labels[feature],
            new_features=tuple(edit.feature for edit in edits[1:]),
            new_label=name,
            prompt=self.images.prompts[image_id],
            seed=self.images.seeds[image_id],
            score=score,
            distance_name=self.distance.name,
            image=picture,
            recipe=recipes[1],
            measurement=measured[1],
        )

    # What is kept between calls

    @property
    def _checkpoint_path(self) -> Path:
        """Named after all that makes an earlier measurement comparable."""
        weights = {name: float(tensor.double().sum()) for name, tensor in self.sae.state_dict().items()}
        judges = (self.distance.name, self.embedder.name)
        parts = [asdict(self.config), self.settings.to_dict(), weights, judges, list(flux_identity(self.pipe))]
        text = json.dumps([*parts, list(self.labels.items()), self.named], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.run.work_path("demos") / str(self.place) / f"swaps-{name}.json"

    def _load_checkpoint(self) -> dict[Candidate, tuple[int, SwapScore]]:
        if not self._checkpoint_path.is_file():
            return {}
        rows = json.loads(self._checkpoint_path.read_text(encoding="utf-8"))
        return {tuple(row["candidate"]): (row["variant"], SwapScore(**row["score"])) for row in rows}
