"""What is scored, and its parts in the work folder of the run: they survive a scoring that is stopped."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxsae.activations.collection import ImagePlan
from fluxsae.errors import FluxSaeError
from fluxsae.features.scores import left_out_images
from fluxsae.files import read_json, remove_leftovers, write_json
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName

_STAGE = "score"


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score and how the work is cut into parts."""

    plan: ImagePlan
    settings: GenerationSettings
    steps: Mapping[HookPoint, tuple[int, ...]]
    """Captured steps of each hook point; S is the maximum over them."""
    sae_hashes: Mapping[HookPoint, str]
    """Checksum of each SAE's weights: parts of other weights are never mixed in."""
    grids: Mapping[HookPoint, TokenGrid]
    """Token grid of each hook point's stream."""
    batch_size: int = 8
    images_per_part: int = 64
    n_top: int = 12
    """Images a feature whose heatmaps are kept."""
    thumbnail_side: int = 384
    """Longest side of the thumbnails, pixels."""

    def bytes_on_disk(self, n_features: int) -> int:
        """Room that the parts and the files made of them take at most, for `n_features` over all SAEs."""
        # An image and feature: S and token in the part (8 bytes), in the file (up to 8), half as much for map entries.
        return len(self.plan) * (20 * n_features + self.thumbnail_side**2)

    def shared(self) -> dict[str, Any]:
        """What decides the bytes of every SAE's parts, beside the images themselves, as plain JSON values."""
        return {
            "first_seed": self.plan.first_seed,
            "settings": self.settings.to_dict(),
            "batch_size": self.batch_size,
            "images_per_part": self.images_per_part,
            "n_top": self.n_top,
            "thumbnail_side": self.thumbnail_side,
        }

    def own(self, name: HookPoint) -> dict[str, Any]:
        """What decides the bytes of one SAE's parts."""
        return {"sae": self.sae_hashes[name], "steps": list(self.steps[name])}


class ScoreParts:
    """The parts of a scoring in the run's work folder; each is there or not, never half.

    They stay when the scoring is complete: another SAE, or more images, then adds parts. An SAE's part of images that
    the run has already is made without decoding them. With `anew` the run's images do not count.

    Raises:
        FluxSaeError: the work folder or the run holds the scores of other images, settings or SAEs.
    """

    def __init__(self, run: RunFolder, request: ScoreRequest, *, anew: bool = False) -> None:
        self.run, self.request = run, request
        self.path = run.work_path(_STAGE)
        if self.path.is_dir():
            remove_leftovers(self.path)
        known = read_json(self._plan_path) if self._plan_path.is_file() else {}
        present = known or self._present(anew=anew)
        bounds = [*present["bounds"]]
        self._check(present, bounds[-1])
        self.n_there: int = present["n_there"]
        """How many of the first images the run has."""
        while bounds[-1] < len(request.plan):
            bounds.append(min(bounds[-1] + request.images_per_part, len(request.plan)))
        self.bounds = tuple(bounds)
        """Where each part begins, and where the last one ends."""
        self._save_plan(known)
        for name in request.steps:
            if not self._own_path(name).is_file():
                write_json(self._own_path(name), request.own(name))

    def _present(self, *, anew: bool) -> dict[str, Any]:
        """The plan of a run whose parts are not here: it was pulled, or never scored."""
        request, size = self.request, self.request.images_per_part
        n_there = 0
        if not anew and self.run.images_path.is_file():
            images, plan = self.run.load_images(), request.plan
            n_there = len(images)
            seeds = [plan.seed(image_id) for image_id in range(len(plan))]
            if (list(plan.prompts[:n_there]), seeds[:n_there]) != (images.prompts, images.seeds):
                raise FluxSaeError(
                    f"{self.run.path} holds {n_there} images, and these are not the first of the {len(plan)} that were "
                    "asked for. Give the prompts, seed and number of images that it was scored with, or more images; "
                    "or pass --force to score all SAEs on other images."
                )
        bounds = [*range(0, n_there, size), n_there] if n_there else [0]
        return {
            **request.shared(), "bounds": bounds, "n_there": n_there,
            "prompts_hash": request.plan.first(bounds[-1]).prompts_hash,
        }  # fmt: skip

    def _check(self, present: dict[str, Any], count: int) -> None:
        wanted = {**self.request.shared(), "prompts_hash": self.request.plan.first(count).prompts_hash}
        differing = [name for name, value in wanted.items() if present[name] != value]
        if count > len(self.request.plan):
            differing.append(f"images ({count}, more than {len(self.request.plan)})")
        differing += [
            f"SAE of {name}"
            for name in self.request.steps
            if self._own_path(name).is_file() and read_json(self._own_path(name)) != self.request.own(name)
        ]
        if differing:
            raise FluxSaeError(
                f"{self.path} holds parts of a scoring with other settings or SAEs: {', '.join(differing)}. "
                "Finish that one with its own settings, or pass --force to start anew."
            )

    def _save_plan(self, known: dict[str, Any]) -> None:
        plan = {
            **self.request.shared(), "bounds": [*self.bounds], "n_there": self.n_there,
            "prompts_hash": self.request.plan.prompts_hash,
        }  # fmt: skip
        if plan != known:
            write_json(self._plan_path, plan)

    @property
    def _plan_path(self) -> Path:
        return self.path / "plan.json"

    def _own_path(self, name: HookPoint) -> Path:
        return self.path / str(name) / "plan.json"

    @property
    def n_parts(self) -> int:
        """Number of parts."""
        return len(self.bounds) - 1

    def image_ids(self, part: int) -> range:
        """The images of a part."""
        return range(self.bounds[part], self.bounds[part + 1])

    def scores_path(self, name: HookPoint, part: int) -> Path:
        """S, argmax tokens, sums and map entries of one part."""
        return self.path / str(name) / f"part-{part:05d}.safetensors"

    def images_path(self, part: int) -> Path:
        """Prompts, seeds and thumbnails of one part; written last, and gone when the run has them."""
        return self.path / f"images-{part:05d}.parquet"

    def all_scores(self, name: HookPoint) -> list[Path]:
        """The files of all parts of an SAE, in order."""
        return [self.scores_path(name, part) for part in range(self.n_parts)]

    def has_images(self, part: int) -> bool:
        """Whether the pictures of a part are there."""
        return self.bounds[part + 1] <= self.n_there or self.images_path(part).is_file()

    def missing_saes(self, part: int) -> list[HookPoint]:
        """The SAEs whose part has still to be made; all of them where the pictures have to be."""
        if not self.has_images(part):
            return list(self.request.steps)
        return [name for name in self.request.steps if not self.scores_path(name, part).is_file()]

    def missing(self) -> list[int]:
        """The parts that are not complete."""
        return [part for part in range(self.n_parts) if self.missing_saes(part)]

    def left_out(self) -> set[int]:
        """The images that the parts which are there leave out."""
        made = [path for name in self.request.steps for path in self.all_scores(name) if path.is_file()]
        return {image_id for path in made for image_id in left_out_images(path)}

    def forget_images(self) -> None:
        """Called when the run has all pictures: those of the parts are not needed any more."""
        self.n_there = len(self.request.plan)
        self._save_plan({})
        for part in range(self.n_parts):
            self.images_path(part).unlink(missing_ok=True)


def scored_saes(run: RunFolder) -> list[SaeName]:
    """The SAEs that were scored on the run's images."""
    return [name for name in run.sae_names() if run.scores_path(name).is_file()]


def forget_parts(run: RunFolder, names: Collection[HookPoint] | None = None) -> None:
    """Deletes the parts of some SAEs, or without `names` of all of them and the plan that they share."""
    folder = run.work_path(_STAGE)
    for path in [folder] if names is None else [folder / str(name) for name in names]:
        shutil.rmtree(path, ignore_errors=True)


def has_other_parts(run: RunFolder, name: HookPoint, digest: str) -> bool:
    """Whether there are parts of an SAE of this name with other weights."""
    plan = run.work_path(_STAGE) / str(name) / "plan.json"
    return plan.is_file() and read_json(plan)["sae"] != digest
