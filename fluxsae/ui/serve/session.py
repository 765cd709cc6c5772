"""What the page serves: one run, its autoencoders, and FLUX behind the lane."""

import functools
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch

from fluxsae.errors import FluxSaeError, maker
from fluxsae.features.cards import CardIndex
from fluxsae.features.scores import sae_changed
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature.scenes import ATTRIBUTES, PHRASES
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance, load_distance, load_embedder
from fluxsae.runs.folder import RunFolder, library_versions
from fluxsae.runs.names import SaeName
from fluxsae.runs.tables import ImageTable
from fluxsae.sae.fingerprint import file_fingerprint
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.arguments import Limits
from fluxsae.ui.serve.given import GivenPicture
from fluxsae.ui.serve.guard import current_visit, current_visitor, without_folders
from fluxsae.ui.serve.kept import LoadedFlux, ResultCache
from fluxsae.ui.serve.lane import Done, Event, FluxLane, Job, OnStep, StepDone
from fluxsae.ui.serve.reading import Reading, read_given, read_image
from fluxsae.ui.serve.visitors import VisitorLimits

log = logging.getLogger("fluxsae.app")

T = TypeVar("T")
EMBEDDED: Final = "embedded"
"""Source of the miniature's own run."""
HUB_ID: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
GIVEN_BYTES = 256 * 2**20
"""Memory for the pictures of all visitors who are here."""
GIVEN_ENTRIES = 1024
PREVIEW_IMAGES = 8
"""Images of the run to which the colours of previews are fitted."""
UNRELATED_PAIRS = 8
SLOW_SECONDS: Final = 3.0
"""Of a picture, from which a model is slow."""
JOBS_TIMED: Final = 8
"""Latest jobs whose quickest tells how fast the model is."""
WORDS = {1: ["the"], 2: ["early", "late"], 3: ["early", "middle", "late"]}


@dataclass(frozen=True)
class ReadJob:
    """Make an image, or take the visitor's own picture, and read every hook point."""

    prompt: str
    seed: int
    num_inference_steps: int
    picture: GivenPicture | None = None
    has_previews: bool = False
    """Whether what each step shows is drawn and kept, and sent while it is made."""

    def n_passes(self, bench: "Workbench") -> int:
        """Passes of the transformer over one image that it needs at most."""
        return self.num_inference_steps

    @property
    def n_pictures(self) -> int:
        """Pictures that it makes at most."""
        return 1 if self.picture is None else 0

    def run(self, bench: "Workbench", on_step: OnStep) -> Reading:
        """The reading."""
        asked: dict[str, Any] = {
            "prompt": self.prompt,
            "seed": self.seed,
            "settings": bench.settings(self.num_inference_steps),
            "colours": bench.preview_colours if self.has_previews else None,
            "has_previews": self.has_previews,
            "on_step": on_step,
        }
        if self.picture is None:
            return read_image(bench.pipe, bench.saes, **asked)
        metrics = {name: bench.run.load_metrics(name) for name in bench.hookpoints}
        return read_given(bench.pipe, bench.saes, self.picture, metrics=metrics, **asked)


def described_saes(run: RunFolder) -> list[SaeName]:
    """The SAEs that can be shown: one that was trained or adopted and not scored yet has no features to show."""
    names = run.sae_names()
    return [n for n in names if run.features_path(n).is_file() or run.scores_path(n).is_file()] or names


class Workbench:
    """One run opened for visitors. Browsing reads the run folder only; FLUX is loaded by the first generation."""

    def __init__(self, run: RunFolder, *, source: str = "", notice: str = "") -> None:
        self.run = run
        self.source = source or str(run.path)
        self.name = _run_name(self.source)
        self.notice = notice
        self.asked_as: str | None = None
        """What endpoints take as `run` for it; None where it is the first on the shelf."""
        self.lacks_flux = ""
        """Why no FLUX can be run for it, if none can."""
        self.info = run.load_info()
        self.problems: dict[str, None] = {}
        """What is wrong with files of the run, each once; what they hold is left out."""
        self.cards: dict[str, CardIndex] = self._open_cards()
        self.hookpoints = list(self.cards)
        self.limits = Limits(
            hookpoints={name: len(cards) for name, cards in self.cards.items()},
            rows=self.info.rows,
            cols=self.info.cols,
            default_steps=self.info.settings.num_inference_steps,
            height=self.info.settings.height,
            width=self.info.settings.width,
        )
        self._embedder_lock = threading.Lock()
        self.lane = FluxLane()
        self.visitors = VisitorLimits.from_environment()
        self.cache = ResultCache()
        self.pass_times: deque[float] = deque(maxlen=JOBS_TIMED)
        """Seconds of a pass of the transformer in the latest jobs."""
        self.fluxes = LoadedFlux()
        self.given = ResultCache(max_bytes=GIVEN_BYTES, max_entries=GIVEN_ENTRIES)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def _open_cards(self) -> dict[str, CardIndex]:
        """The cards of every hook point that can be opened.

        Raises:
            FluxSaeError: there is none.
        """
        found = {}
        for name in described_saes(self.run):
            try:
                cards = CardIndex(self.run, name)
                self._check_size(name, len(cards))
                found[str(name)] = cards
            except FluxSaeError as error:
                self.problems[str(error)] = None
        if not found:
            raise FluxSaeError(" ".join(self.problems) or "its run.json names no hook point. Restore it.")
        for cards in found.values():
            self.problems.update(dict.fromkeys(cards.problems))
        return found

    def _check_size(self, name: SaeName, n_features: int) -> None:
        """Refuses features that are described beside an SAE with more or fewer of them."""
        if not self.run.has_sae(name):
            return
        config: dict[str, Any] = self.readable(functools.partial(self.run.load_sae_config, name), {})
        said = config.get("n_features", n_features)
        if said != n_features:
            raise FluxSaeError(
                f"The SAE of {name} has {said} features, and {n_features} are described, which are another SAE's. "
                f"Describe them again: {maker('score')}."
            )

    def readable(self, load: Callable[[], T], otherwise: T) -> T:
        """What a file that a page can do without holds; something else where it is damaged, which is then told."""
        try:
            return load()
        except FluxSaeError as error:
            if str(error) not in self.problems:
                log.warning("left out: %s", error)
            self.problems[str(error)] = None
            return otherwise

    def demos(self, hookpoint: str) -> list[dict[str, Any]]:
        """The steering demos of a hook point."""
        return self.readable(lambda: self.run.load_demos(hookpoint), [])

    def swaps(self, hookpoint: str) -> list[dict[str, Any]]:
        """The swaps of a hook point."""
        return self.readable(lambda: self.run.load_swaps(hookpoint), [])

    def metrics(self, hookpoint: str) -> dict[str, Any]:
        """The measured quality of a hook point's SAE."""
        return self.readable(lambda: self.run.load_metrics(hookpoint), {})

    @property
    def slug(self) -> str:
        """Its name as a part of an address."""
        return re.sub(r"[^a-zA-Z0-9._-]+", "-", self.name).strip("-") or "run"

    @property
    def is_miniature(self) -> bool:
        """Whether the run's FLUX is the embedded one."""
        return self.info.flux_id == "miniature"

    @property
    def flux_source(self) -> str:
        """Where FLUX is loaded from: as the run says, or the folder that FLUXSAE_FLUX names."""
        named = "" if self.source == EMBEDDED else os.environ.get("FLUXSAE_FLUX", "").strip()
        return named or self.info.flux_id

    @property
    def has_local_flux(self) -> bool:
        """Whether FLUX is embedded or in a folder here, so that it needs no Hub."""
        return self.is_miniature or Path(self.flux_source).is_dir()

    def word(self, hookpoint: str) -> str:
        """A hook point in words: "early", "middle", "late", or its block number where there are more."""
        name = SaeName.parse(hookpoint)
        places = sorted({SaeName.parse(other).place for other in self.hookpoints})
        words = WORDS.get(len(places))
        word = words[places.index(name.place)] if words else f"block {name.block_index}"
        return f"{word}, {name.variant}" if name.variant else word

    def hookpoint_choices(self) -> list[tuple[str, str]]:
        """Hook points in words with their path, for menus."""
        return [(f"{self.word(name)} (block {SaeName.parse(name).block_index})", name) for name in self.hookpoints]

    @property
    def example_edit(self) -> dict[str, Any]:
        """An edit that this run knows: its most meaningful feature, suppressed."""
        hookpoint = self.limits.default_hookpoint
        return {"hookpoint": hookpoint, "feature": self.cards[hookpoint].ranked[0], "mode": "scale", "strength": 0.0}

    @functools.cached_property
    def saes(self) -> dict[str, SparseAutoencoder]:
        """The autoencoder of every hook point, on the device FLUX runs on."""
        path = str(self.run.path)
        return {
            name: SparseAutoencoder.from_pretrained(path, subfolder=self.run.sae_subfolder(name), device=self.device)
            for name in self.hookpoints
        }

    @functools.cached_property
    def fingerprints(self) -> dict[str, str]:
        """What tells the SAE of each hook point from another of the same name."""
        found = {
            name: self.readable(functools.partial(file_fingerprint, self.run.sae_path(name)), None)
            for name in self.hookpoints
        }
        return {name: fingerprint for name, fingerprint in found.items() if fingerprint is not None}

    @functools.cached_property
    def changed_saes(self) -> list[str]:
        """What is told of the SAEs that are not those whose features are shown."""
        made_with = {name: cards.features.sae_fingerprint for name, cards in self.cards.items()}
        told = [
            self.readable(functools.partial(sae_changed, self.run, name, fingerprint), "")
            for name, fingerprint in made_with.items()
        ]
        return list(filter(None, told))

    @property
    def pipe(self) -> Any:
        """FLUX; loading takes seconds (the miniature) to minutes (FLUX.1-dev). Used inside the lane only."""
        return self.fluxes.get(*self._flux_key)

    @property
    def _flux_key(self) -> tuple[str, str | None, str, str | None]:
        # As the run was made, where it says so: thresholds and card values belong to that rounding.
        revision = None if self.has_local_flux else self.info.flux_revision
        return self.flux_source, revision, self.device, self.info.dtype

    @property
    def flux_remarks(self) -> list[str]:
        """How the FLUX in memory differs from one that is whole and exact; nothing while none is loaded."""
        pipe = self.fluxes.find(*self._flux_key)
        if pipe is None:
            return []
        from fluxsae.flux import is_offloaded, why_inexact

        inexact = why_inexact(pipe)
        return [
            *([f"here {inexact}: its activations are not the model's own"] if inexact else []),
            *(["offloaded here: exact, but each part comes to the GPU in its turn, so images take longer"]
              if is_offloaded(pipe) else []),
        ]  # fmt: skip

    @property
    def embedder(self) -> ImageEmbedder | None:
        """The CLIP model that embedded the run's images; None where it cannot be had (search is then by words)."""
        if "_embedder" in self.__dict__:  # without the lock: it may be held when ZeroGPU forks this process
            return self._embedder
        with self._embedder_lock:
            return self._embedder

    @functools.cached_property
    def _embedder(self) -> ImageEmbedder | None:
        if not self.run.embeddings_path.is_file():
            return None
        try:
            embeddings = self.run.load_embeddings()
            if len(embeddings.vectors) != len(self.images):
                raise FluxSaeError(
                    f"{self.run.embeddings_path} is of another number of images. Make it again: {maker('embed')}."
                )
            return load_embedder(embeddings.model)
        except FluxSaeError as error:
            log.warning("search works without CLIP: %s", error)
            return None

    @functools.cached_property
    def distance(self) -> PerceptualDistance:
        """What measures how far an edit moved the picture: LPIPS, or offline a random-feature distance, called that."""
        if not self.has_local_flux:
            try:
                return load_distance("lpips", device=self.device)
            except FluxSaeError as error:
                log.warning("LPIPS cannot be had: %s", error)
        return load_distance("random-features", device=self.device)

    @property
    def images(self) -> ImageTable:
        """The run's images: prompts, seeds, thumbnails."""
        return self.cards[self.limits.default_hookpoint].images

    @property
    def vocabulary(self) -> dict[str, dict[str, str]]:
        """The words that the miniature knows, by kind, each as a prompt says it; none for a FLUX that reads any."""
        kinds = ATTRIBUTES if self.is_miniature else {}
        return {kind: {word: PHRASES.get(word, word) for word in words} for kind, words in kinds.items()}

    @functools.cached_property
    def preview_colours(self) -> Any:
        """Colours of previews where the autoencoder is slow, fitted to images of the run; None where it is not."""
        from fluxsae.flux import fit_colours, is_quick_to_decode
        from fluxsae.pictures.sources import fit_picture

        if is_quick_to_decode(self.pipe):
            return None
        images, patch = self.images, self.info.settings.width // self.info.cols
        chosen = [images.picture(image) for image in range(min(PREVIEW_IMAGES, len(images)))]
        sides = [max(patch, side // patch * patch) for side in chosen[0].size]
        return fit_colours(self.pipe, [fit_picture(one, width=sides[0], height=sides[1]) for one in chosen])

    @functools.cached_property
    def unrelated_distance(self) -> float | None:
        """Median distance between two images of different prompts, to compare with; None of fewer than two.

        Thumbnails are enlarged to the run's own size, since distances of small and of large pictures differ.
        """
        images, size = self.images, (self.info.settings.width, self.info.settings.height)
        by_prompt = {
            images.prompts[image]: image for image in np.random.default_rng(0).permutation(len(images)).tolist()
        }
        chosen = list(by_prompt.values())[: 2 * UNRELATED_PAIRS]
        pictures = [images.picture(image).resize(size) for image in chosen]
        half = len(pictures) // 2
        if not half:
            return None
        return float(self.distance.distance(pictures[:half], pictures[half : 2 * half]).median())

    @functools.cached_property
    def token_limits(self) -> dict[HookPoint, Any]:
        """What clean tokens look like at each hook point, where the run has measured it."""
        from fluxsae.steering.demos import load_limits

        places: list[HookPoint] = [SaeName.parse(name) for name in self.hookpoints]
        limits = {place: self.readable(functools.partial(load_limits, self.run, place), None) for place in places}
        return {place: found for place, found in limits.items() if found is not None}

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """What made the pictures: libraries, run and FLUX."""
        flux = f"{self.info.flux_id}@{self.info.flux_revision}" if self.info.flux_revision else self.info.flux_id
        return {"run": self.name, "FLUX": without_folders(flux), "device": self.device, **library_versions()}

    def settings(self, num_inference_steps: int) -> GenerationSettings:
        """The run's own settings at another number of steps."""
        return replace(self.info.settings, num_inference_steps=num_inference_steps)

    def read(
        self,
        prompt: str,
        seed: int,
        num_inference_steps: int,
        *,
        picture: GivenPicture | None = None,
        has_previews: bool = False,
    ) -> Iterator[Event[Reading]]:
        """An image and what fires in it at every hook point; repeated requests are answered at once.

        With a picture of the visitor's own that is read, and nothing painted.
        """
        kept = self.kept_reading(prompt, seed, num_inference_steps, picture)
        if kept is not None and (kept.previews or not has_previews):
            return iter([Done(kept)])
        return self.cached(ReadJob(prompt, seed, num_inference_steps, picture, has_previews))

    def kept_reading(
        self, prompt: str, seed: int, num_inference_steps: int, picture: GivenPicture | None = None
    ) -> Reading | None:
        """The reading of an image that was made, or of a picture that was read, lately, without doing it again."""
        jobs = [ReadJob(prompt, seed, num_inference_steps, picture, has_previews) for has_previews in (True, False)]
        return next((found for job in jobs if (found := self.cache.get(self._key(job))) is not None), None)

    def receive(self, picture: GivenPicture) -> None:
        """Keeps a visitor's picture, in memory and for this visit, so that the page can go on asking about it."""
        self.given.put((current_visit(), picture.digest), picture, n_bytes=picture.n_bytes, visit=current_visit())

    def received(self, digest: str) -> GivenPicture:
        """The picture of this visit that the page calls so.

        Raises:
            FluxSaeError: it is not kept any more.
        """
        found: GivenPicture | None = self.given.get((current_visit(), digest))
        if found is None:
            raise FluxSaeError("Your picture is not kept here any more. Choose it again.")
        return found

    def end_visit(self) -> None:
        """Lets go of a visitor's pictures, and of what was read in them, when the page is closed."""
        for kept in (self.given, self.cache):
            kept.forget(current_visit())

    def cached(self, job: Any) -> Iterator[Event[Any]]:
        """The steps and result of a job (hashable data), or only its result where that is still kept.

        What is made counts against the visitor's share, as far as it was made: nothing that is kept or refused does.
        What is made of a visitor's own picture is kept for the visit, and after a call from code not at all.
        """
        key = self._key(job)
        found = self.cache.get(key)
        if found is not None:
            yield Done(found)
            return
        if self.lacks_flux:
            raise FluxSaeError(f"This needs FLUX. {self.lacks_flux[:1].upper()}{self.lacks_flux[1:]}")
        picture = getattr(job, "picture", None)
        is_kept = picture is None or self.given.get((current_visit(), picture.digest)) is not None
        with self.visitors.share(current_visitor(), self.images_of(job)) as share:
            begun = None
            for event in self.lane.stream(job, self):
                if isinstance(event, StepDone):
                    begun = begun or time.monotonic()
                    share.made(event.step / event.n_steps)
                elif isinstance(event, Done):
                    share.made(1.0)
                    self._time(job, begun)
                    if is_kept:
                        visit = "" if picture is None else current_visit()
                        self.cache.put(key, event.value, n_bytes=event.value.n_bytes, visit=visit)
                yield event

    def _time(self, job: Job, begun: float | None) -> None:
        """Remembers what a pass took, from the first step on: what comes before may be FLUX's loading."""
        if begun is not None and job.n_pictures and job.n_passes(self) > 1:
            self.pass_times.append((time.monotonic() - begun) / (job.n_passes(self) - 1))

    @property
    def pass_seconds(self) -> float | None:
        """Seconds of a pass in the quickest of the latest jobs: what else the machine did meanwhile does not count."""
        return min(self.pass_times, default=None)

    def seconds_of(self, job: Job) -> float | None:
        """About how long a job takes when nothing else runs; None before there was one."""
        return None if self.pass_seconds is None else job.n_passes(self) * self.pass_seconds

    @property
    def is_slow(self) -> bool:
        """Whether a picture takes so long that sliders should wait for a press of the button."""
        if self.pass_seconds is None or len(self.pass_times) == 1:  # the first may have waited for CLIP to load
            return not self.is_miniature
        return self.limits.default_steps * self.pass_seconds > SLOW_SECONDS

    def _key(self, job: Any) -> Hashable:
        """What a result is kept under: one of a visitor's own picture is found in that visit alone."""
        return job if getattr(job, "picture", None) is None else (current_visit(), job)

    def images_of(self, job: Job) -> int:
        """How many images a job counts as: those it makes, or as many as its passes would make if those are more."""
        return max(1, job.n_pictures, round(job.n_passes(self) / self.limits.default_steps))

    def load_models(self) -> None:
        """FLUX and the autoencoders, ready to use."""
        _ = (self.pipe, self.saes)

    @property
    def _runs_flux(self) -> bool:
        return not self.lacks_flux and (self.has_local_flux or self.device != "cpu")

    def warm_up(self) -> None:
        """Loads what the first visitor would wait for: FLUX in its lane first, then CLIP and what searches need."""
        try:
            if self._runs_flux:
                self.lane.call(self.load_models)
            for cards in self.cards.values():
                cards.search("any", limit=1, embedder=self.embedder)
        except Exception:  # the visitor who needs it gets the same error, in words
            log.exception("warming up failed")


def _run_name(source: str) -> str:
    """What a run is called on the page and by `run`: its Hub repository, or the name of its folder, never the path."""
    if source == EMBEDDED:
        return "miniature"
    return source if HUB_ID.fullmatch(source) and not Path(source).is_dir() else Path(source).resolve().name
