"""The laboratory's ways of changing a picture: edits, and the same edits along other directions of equal norm."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fluxsae.flux.hookpoints import HookPoint
from fluxsae.laboratory.config import Control, Where
from fluxsae.laboratory.outcomes import Subject
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.measurements import random_directions, random_features


@dataclass(frozen=True)
class Arm:
    """One way of changing a picture."""

    name: str
    edits: tuple[SteeringEdit, ...]
    where: Where = "everywhere"
    control: Control | None = None
    """In place of the feature's decoder row: a random direction, or another feature's row, of equal norm."""


class Controls:
    """The direction of each edit of a batch: subjects one after the other, each with every arm."""

    def __init__(
        self, subjects: Sequence[Subject], arms: Sequence[Arm], saes: Mapping[HookPoint, SparseAutoencoder], seed: int
    ) -> None:
        self.subjects, self.arms, self.saes, self.seed = subjects, arms, saes, seed
        self._known: dict[tuple[int, HookPoint, int], Tensor] = {}

    def __call__(self, edit: SteeringEdit, item: int) -> Tensor | None:
        """The direction that batch item `item` is edited along, (d_model,); None for the feature's own."""
        subject, place = divmod(item, len(self.arms))
        control = self.arms[place].control
        if control is None:
            return None
        key = (item, edit.hookpoint, edit.feature)
        if key not in self._known:
            sae = self.saes[edit.hookpoint]
            seed = control_seed(self.subjects[subject], edit, control, self.seed)
            rows = (
                random_directions(sae.config.d_model, 1, seed=seed)
                if control == "random direction"
                else random_features(sae, edit.feature, 1, seed=seed)
            )
            self._known[key] = rows[0].to(sae.W_dec.device)
        return self._known[key]


def control_seed(subject: Subject, edit: SteeringEdit, control: str, seed: int) -> int:
    """Another direction for each picture, edited feature and kind of control: those of a group are not one push."""
    place = f"{edit.hookpoint} {edit.feature}"  # noise seeds alone recur from concept to concept
    return zlib.crc32(f"{seed} {subject.seed} {place} {control} {subject.prompt}".encode())
