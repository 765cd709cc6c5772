"""The laboratory's bench: unedited pictures that can be read, and what edits do to them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor

from fluxsae.evaluation.stream import OnProgress, batches
from fluxsae.flux import AnyFlux, decode_latents, denoise_to, generate, generate_from, token_grid
from fluxsae.flux.bad_numbers import LeftOut, bad_items, describe_bad_latents
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.arms import Arm, Controls
from fluxsae.laboratory.config import Direction, LaboratoryConfig
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.laboratory.outcomes import OBJECT_ATTRIBUTES, Outcome, Subject, draw_subject
from fluxsae.laboratory.truths import CONCEPTS, COVERED, Concept, coverage
from fluxsae.miniature.scenes import Scene, read_scene
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.sweeps import first_edited_step

_DRAWS_PER_SUBJECT: Final = 4
_EXACT_BITS: Final = 32
_UNEDITED: Final = Arm("unedited", ())

Read = Callable[[Sequence[Image.Image]], list[Scene]]
Saes = Mapping[HookPoint, SparseAutoencoder]


@contextmanager
def reading(n_processes: int) -> Iterator[Read]:
    """Reads pictures back, in this process or in others."""
    if n_processes < 1:
        yield lambda pictures: [read_scene(picture) for picture in pictures]
        return
    with ProcessPoolExecutor(n_processes, mp_context=get_context("spawn")) as pool:
        yield lambda pictures: list(pool.map(read_scene, pictures, chunksize=4))


@dataclass(frozen=True)
class Case:
    """A subject whose unedited picture could be read."""

    subject: Subject
    before: Scene
    at: int | None = None
    """The object that an edit is about; None for all of them."""

    def painted(self, attribute: str, grid: TokenGrid, *, all_of_it: bool = False) -> tuple[tuple[bool, ...], ...]:
        """The tokens on which an attribute lies, the object's or all others: rows of the token grid.

        With `all_of_it` the background has the tokens that it shares with the object, too.
        """
        scene = self.before if self.at is None else replace(self.before, objects=(self.before.objects[self.at],))
        own = OBJECT_ATTRIBUTES[0] if attribute == "background" and not all_of_it else attribute
        rows = [row for row, concept in enumerate(CONCEPTS) if concept.attribute == own]
        lies = coverage(scene, grid)[rows].max(axis=0) > COVERED
        lies = ~lies if attribute == "background" and not all_of_it else lies
        return tuple(tuple(line) for line in lies.reshape(grid.rows, grid.cols).tolist())


Key = tuple[str, Concept, Direction]
"""Stage, concept and direction."""
Compare = Callable[[Case, Scene | None, Scene | None], Outcome]
"""(case, unedited picture, edited picture) -> what the edit did; None is a picture of NaN or infinite numbers."""


@dataclass(eq=False)
class Bench:
    """Draws cases and applies edits to them, in full batches."""

    pipe: AnyFlux
    settings: GenerationSettings
    config: LaboratoryConfig
    allow_mismatch: Collection[Mismatch]
    read: Read
    on_progress: OnProgress | None
    cases: dict[Key, list[Case]] = field(default_factory=dict)
    unread: dict[Key, int] = field(default_factory=dict)
    """Attempts that could not be made, since their unedited picture cannot be read."""
    left_out: LeftOut = field(init=False)
    """Pictures of NaN or infinite numbers, counted among all that may be made."""
    n_made: int = 0
    """Pictures that were made so far, edited or not."""

    def __post_init__(self) -> None:
        self.left_out = LeftOut(self.config.most_pictures(len(CONCEPTS)))

    @property
    def is_exact(self) -> bool:
        """Whether a picture reads the same in a batch of any size: in single precision."""
        return torch.finfo(self.pipe.transformer.dtype).bits >= _EXACT_BITS

    def draw_cases(self, wanted: Mapping[Key, tuple[int, int]]) -> None:
        """Attempts by key -> (how many, first seed).

        A picture that already shows what an edit is to bring, or does not show what it is to take away, gives nothing
        to attempt and is drawn again; one that cannot be read, or does not show one object, is an attempt that failed.
        All that is still lacking is drawn together, so that the batches are full.
        """
        seeds = {key: iter(range(seed, seed + _DRAWS_PER_SUBJECT * count)) for key, (count, seed) in wanted.items()}
        self.cases |= {key: [] for key in wanted}
        self.unread |= dict.fromkeys(wanted, 0)
        while drawn := [
            (key, draw_subject(key[1], has_concept=key[2] == "suppress", seed=seed, named=self.config.named))
            for key, (count, _) in wanted.items()
            for seed in islice(seeds[key], count - len(self.cases[key]) - self.unread[key])
        ]:
            for part in batches(drawn, self.config.batch_size):
                scenes = self.plain_scenes([s.prompt for _, s in part], [s.seed for _, s in part])
                for (key, subject), scene in zip(part, scenes, strict=True):
                    self._take(key, subject, scene)
            done = sum(len(self.cases[key]) + self.unread[key] for key in wanted)
            self.tell("unedited pictures", done, sum(count for count, _ in wanted.values()))

    def _take(self, key: Key, subject: Subject, scene: Scene | None) -> None:
        _, concept, direction = key
        if scene is None or len(scene.objects) != 1 or scene.confidence < LEAST_CONFIDENCE:
            self.unread[key] += 1
        elif ((concept.attribute, concept.value) in scene.concepts()) == (direction == "suppress"):
            self.cases[key].append(Case(subject, scene))

    def plain_scenes(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Scene | None]:
        """The scenes of unedited pictures, generated together."""
        latents = generate(self.pipe, prompts, seeds=seeds, settings=self.settings, output_type="latent")
        assert isinstance(latents, Tensor)
        return self._scenes(latents, [f"seed {s} ({p!r:.60})" for p, s in zip(prompts, seeds, strict=True)])

    def _scenes(self, latents: Tensor, names: Sequence[str]) -> list[Scene | None]:
        """The scenes that latents show; None where they are not numbers, which is logged and counted."""
        bad, first = bad_items(latents), self.n_made
        self.n_made += len(latents)
        for item in bad:
            self.left_out.add(first + item, describe_bad_latents(latents, names[item]))
        if bad:
            latents = latents.clone()
            latents[bad] = 0
        scenes = self.read(decode_latents(self.pipe, latents, self.settings))
        return [None if item in bad else scene for item, scene in enumerate(scenes)]

    def outcomes(
        self, cases: Sequence[Case], arms: Sequence[Arm], *, attribute: str, saes: Saes, compare: Compare
    ) -> list[list[Outcome]]:
        """For each arm the outcome of each case; the steps before an arm's first edit run once a case."""
        firsts = [first_edited_step(self.pipe, saes, [arm.edits], self.settings) for arm in arms]
        found: dict[int, list[Outcome]] = {}
        for first in dict.fromkeys(firsts):
            places = [place for place, own in enumerate(firsts) if own == first]
            chosen = [arms[place] for place in places]
            columns = self._outcomes_from(first, cases, chosen, attribute=attribute, saes=saes, compare=compare)
            found |= dict(zip(places, columns, strict=True))
        return [found[place] for place in range(len(arms))]

    def _outcomes_from(
        self, first: int, cases: Sequence[Case], arms: Sequence[Arm], *, attribute: str, saes: Saes, compare: Compare
    ) -> list[list[Outcome]]:
        """For each arm the outcome of each case, where no arm edits before step `first`.

        In half precision a batch of another size changes pixels: there an edited picture is compared with an unedited
        one of its own batch.
        """
        tried = [*arms] if self.is_exact else [_UNEDITED, *arms]
        columns: list[list[Outcome]] = [[] for _ in arms]
        for part in batches(cases, max(1, self.config.batch_size // len(tried))):
            subjects = [case.subject for case in part]
            prompts, seeds = [s.prompt for s in subjects], [s.seed for s in subjects]
            snapshot = denoise_to(self.pipe, prompts, seeds=seeds, settings=self.settings, step=first)
            with steer(
                self.pipe,
                saes,
                [self._edits(case, attribute, arm) for case in part for arm in tried],
                settings=self.settings,
                allow_mismatch=self.allow_mismatch,
                direction_of=Controls(subjects, tried, saes, self.config.seed),
            ):
                latents = generate_from(self.pipe, snapshot, repeat=len(tried), output_type="latent")
            assert isinstance(latents, Tensor)
            names = [f"seed {s.seed} ({s.prompt!r:.60}), {arm.name}" for s in subjects for arm in tried]
            scenes = self._scenes(latents, names)
            for case, made in zip(part, batches(scenes, len(tried)), strict=True):
                before, after = (case.before, made) if self.is_exact else (made[0], made[1:])
                for column, scene in zip(columns, after, strict=True):
                    column.append(compare(case, before, scene))
        return columns

    def _edits(self, case: Case, attribute: str, arm: Arm) -> tuple[SteeringEdit, ...]:
        """An arm's edits on one picture: in its painted region where the arm asks for it."""
        if arm.where == "everywhere":
            return arm.edits
        grid = token_grid(self.pipe, self.settings)
        region = case.painted(attribute, grid, all_of_it=arm.where == "all of it")
        return tuple(replace(edit, region=region) for edit in arm.edits)

    def tell(self, doing: str, done: int, total: int) -> None:
        """Reports progress where somebody listens."""
        if self.on_progress is not None:
            self.on_progress(doing, done, total)

    def with_progress(self, doing: str, things: Sequence[Any]) -> Iterator[Any]:
        """The things in turn, each reported once it is done."""
        for done, thing in enumerate(things):
            yield thing
            self.tell(doing, done + 1, len(things))
