"""What the page serves: one run, its autoencoders, and FLUX behind the lane."""

import functools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import ATTRIBUTES
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance, load_distance, load_embedder
from fluxsae.runs.folder import RunFolder, library_versions
from fluxsae.runs.tables import ImageTable
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.ui.serve.arguments import Limits
from fluxsae.ui.serve.guard import current_visitor
from fluxsae.ui.serve.lane import Done, FluxLane, Job, OnStep, StepDone
from fluxsae.ui.serve.reading import Reading, read_image
from fluxsae.ui.serve.visitors import VisitorLimits

log = logging.getLogger("fluxsae.app")

CACHE_BYTES = 64 * 2**20
CACHE_ENTRIES = 48
UNRELATED_PAIRS = 8
WORDS = {1: ["the"], 2: ["early", "late"], 3: ["early", "middle", "late"]}


class ResultCache:
    """The latest results, within a memory bound; a repeated request is answered from here."""

    def __init__(self, *, max_bytes: int = CACHE_BYTES, max_entries: int = CACHE_ENTRIES) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any | None:
        """The result kept under this key, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, *, n_bytes: int) -> None:
        """Keeps a result and forgets the oldest ones beyond the bound."""
        with self._lock:
            self._entries[key] = (value, n_bytes)
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and (len(self._entries) > self.max_entries or self._size() > self.max_bytes):
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)

    def _size(self) -> int:
        return sum(n_bytes for _, n_bytes in self._entries.values())


@dataclass(frozen=True)
class ReadJob:
    """Make an image and read every hook point on the way."""

    prompt: str
    seed: int
    num_inference_steps: int

    @property
    def n_passes(self) -> int:
        """Passes of the transformer over one image that it needs at most."""
        return self.num_inference_steps

    @property
    def n_pictures(self) -> int:
        """Pictures that it makes at most."""
        return 1

    def run(self, bench: "Workbench", on_step: OnStep) -> Reading:
        """The reading."""
        settings = bench.settings(self.num_inference_steps)
        return read_image(
            bench.pipe, bench.saes, prompt=self.prompt, seed=self.seed, settings=settings, on_step=on_step
        )


class Workbench:
    """One run opened for visitors. Browsing reads the run folder only; FLUX is loaded by the first generation."""

    def __init__(self, run: RunFolder, *, source: str = "", notice: str = "") -> None:
        self.run = run
        self.source = source or str(run.path)
        self.notice = notice
        self.info = run.load_info()
        self.hookpoints = [str(hookpoint) for hookpoint in run.hookpoints()]
        self.cards: dict[str, CardIndex] = {name: CardIndex(run, name) for name in self.hookpoints}
        self.limits = Limits(
            hookpoints={name: len(cards) for name, cards in self.cards.items()},
            rows=self.info.rows,
            cols=self.info.cols,
            default_steps=self.info.settings.num_inference_steps,
        )
        self._embedder_lock = threading.Lock()
        self.lane = FluxLane()
        self.visitors = VisitorLimits.from_environment()
        self.cache = ResultCache()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def is_miniature(self) -> bool:
        """Whether the run's FLUX is the embedded one."""
        return self.info.flux_id == "miniature"

    @property
    def flux_source(self) -> str:
        """Where FLUX is loaded from: as the run says, or the folder that FLUXSAE_FLUX names."""
        return os.environ.get("FLUXSAE_FLUX", "").strip() or self.info.flux_id

    @property
    def has_local_flux(self) -> bool:
        """Whether FLUX is embedded or in a folder here, so that it needs no Hub."""
        return self.is_miniature or Path(self.flux_source).is_dir()

    def word(self, hookpoint: str) -> str:
        """A hook point in words: "early", "middle", "late", or its block number where there are more."""
        words = WORDS.get(len(self.hookpoints))
        place = self.hookpoints.index(hookpoint)
        return words[place] if words else f"block {HookPoint.parse(hookpoint).block_index}"

    def hookpoint_choices(self) -> list[tuple[str, str]]:
        """Hook points in words with their path, for menus."""
        return [(f"{self.word(name)} (block {HookPoint.parse(name).block_index})", name) for name in self.hookpoints]

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
    def pipe(self) -> Any:
        """FLUX; loading takes seconds (the miniature) to minutes (FLUX.1-dev). Used inside the lane only."""
        from fluxsae.flux import load_flux

        log.info("loading FLUX %s on %s", self.flux_source, self.device)
        # As the run was made, where it says so: thresholds and card values belong to that rounding.
        dtype = getattr(torch, self.info.dtype) if self.info.dtype else None
        revision = None if self.has_local_flux else self.info.flux_revision
        return load_flux(self.flux_source, revision=revision, device=self.device, dtype=dtype)

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
            return load_embedder(self.run.load_embeddings().model)
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
    def vocabulary(self) -> str:
        """The words that the miniature knows, kind by kind; empty for a FLUX that reads any."""
        if not self.is_miniature:
            return ""
        return "It knows: " + "; ".join(" ".join(values) for values in ATTRIBUTES.values()) + " background"

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

        limits = {place: load_limits(self.run, place) for place in self.run.hookpoints()}
        return {place: found for place, found in limits.items() if found is not None}

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """What made the pictures: libraries, run and FLUX."""
        flux = f"{self.info.flux_id}@{self.info.flux_revision}" if self.info.flux_revision else self.info.flux_id
        return {"run": self.source, "FLUX": flux, "device": self.device, **library_versions()}

    def settings(self, num_inference_steps: int) -> GenerationSettings:
        """The run's own settings at another number of steps."""
        return replace(self.info.settings, num_inference_steps=num_inference_steps)

    def read(self, prompt: str, seed: int, num_inference_steps: int) -> Iterator[StepDone | Done[Reading]]:
        """An image and what fires in it at every hook point; repeated requests are answered at once."""
        return self.cached(ReadJob(prompt, seed, num_inference_steps))

    def kept_reading(self, prompt: str, seed: int, num_inference_steps: int) -> Reading | None:
        """The reading of an image that was made lately, without making it again."""
        found: Reading | None = self.cache.get(ReadJob(prompt, seed, num_inference_steps))
        return found

    def cached(self, job: Any) -> Iterator[StepDone | Done[Any]]:
        """The steps and result of a job (hashable data), or only its result where that is still kept.

        What is made counts against the visitor's share, from its first step on: nothing that is kept or refused does.
        """
        found = self.cache.get(job)
        if found is not None:
            yield Done(found)
            return
        visitor = current_visitor()
        self.visitors.check(visitor)
        is_counted = False
        for event in self.lane.stream(job, self):
            if not is_counted:
                self.visitors.take(visitor, self.images_of(job))
                is_counted = True
            if isinstance(event, Done):
                self.cache.put(job, event.value, n_bytes=event.value.n_bytes)
            yield event

    def images_of(self, job: Job) -> int:
        """How many images a job counts as: those it makes, or as many as its passes would make if those are more."""
        return max(1, job.n_pictures, round(job.n_passes / self.limits.default_steps))

    def load_models(self) -> None:
        """FLUX and the autoencoders, ready to use."""
        _ = (self.pipe, self.saes)

    def prepare(self) -> None:
        """Imports what the first image needs; once the page is served this would fight it for the interpreter."""
        try:
            if self._runs_flux:
                import fluxsae.flux  # noqa: F401
        except Exception:  # browsing needs none of it, and the visitor who does gets the same error, in words
            log.exception("FLUX cannot be imported")

    @property
    def _runs_flux(self) -> bool:
        return self.has_local_flux or self.device != "cpu"

    def warm_up(self) -> None:
        """Loads what the first visitor would wait for, in the background: FLUX in its lane first, then CLIP."""
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def _warm_up(self) -> None:
        try:
            if self._runs_flux:
                self.lane.call(self.load_models)
            _ = self.embedder
        except Exception:  # the visitor who needs it gets the same error, in words
            log.exception("warming up failed")


def open_workbench(source: str | None = None) -> Workbench:
    """The run that `source` or the environment variable FLUXSAE_RUN names; the embedded miniature where neither does.

    `source` is a folder or a Hub repository, with `@revision` if wanted. Where it cannot be used here (no token, no
    licence accepted, no GPU, no network), the miniature is opened and `notice` says why and what lifts the limit.
    """
    wanted = source if source is not None else os.environ.get("FLUXSAE_RUN", "").strip()
    if not wanted:
        return Workbench(RunFolder(miniature_path("run")), source="embedded")
    try:
        bench = Workbench(_fetch_run(wanted), source=wanted)
        require_flux(bench)
    except FluxSaeError as error:
        log.warning("%s cannot be served: %s", wanted, error)
        notice = f"{wanted} cannot be used here: {error} This page shows the miniature instead."
        return Workbench(RunFolder(miniature_path("run")), source="embedded", notice=notice)
    return bench


def _fetch_run(wanted: str) -> RunFolder:
    if Path(wanted).is_dir():
        return RunFolder(wanted)
    from fluxsae.publishing.publish import pull_run

    return pull_run(wanted)


def require_flux(bench: Workbench) -> None:
    """Refuses a run whose FLUX cannot be loaded here, before a visitor waits for it.

    Raises:
        FluxSaeError: no GPU, no access, or no network; the message says what to do.
    """
    flux_id = bench.flux_source
    if bench.has_local_flux:
        return
    if bench.device == "cpu" and not os.environ.get("SPACES_ZERO_GPU"):
        raise FluxSaeError(f"its FLUX, {flux_id}, needs a GPU with 48 GB, and this machine has none.")
    _require_access(flux_id, bench.info.flux_revision)


def _require_access(flux_id: str, revision: str | None) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        hf_hub_download(flux_id, "model_index.json", revision=revision)
    except GatedRepoError as error:
        raise FluxSaeError(
            f"its FLUX, {flux_id}, is gated: accept the licence at https://huggingface.co/{flux_id} and give this app "
            "a token that may read it (HF_TOKEN, on a Space: Settings, Secrets)."
        ) from error
    except RepositoryNotFoundError as error:
        raise FluxSaeError(
            f"its FLUX, {flux_id}, was not found; a private or gated model needs a token (HF_TOKEN)."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FluxSaeError(f"its FLUX, {flux_id}, could not be reached; check the network and HF_TOKEN.") from error
