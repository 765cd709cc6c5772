"""One name put in place of another on the visitor's own picture: FLUX tries several strengths, CLIP chooses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import CONFIDENCE
from fluxsae.features.vocabulary import has_name, in_place
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.runs.names import SaeName
from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.serve.lane import OnStep
from fluxsae.ui.serve.session import Workbench

if TYPE_CHECKING:
    from fluxsae.steering.demos import SwapScore

N_PICTURES = 10
"""Pictures that are made at most: once to see where the old name fires, once unedited, and the tries."""
LEAST_SHARE = 0.1
"""Share of its maximum at which a feature fires at least where the prompt has its name."""
BYTES_A_PATCH = 64


@dataclass(frozen=True)
class FoundSwap:
    """The best edits that were found."""

    edits: tuple[SteeringEdit, ...]
    is_read: bool
    """Whether CLIP reads the old name in the picture before, and the new one in the picture that they make."""

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        return sum(BYTES_A_PATCH * len(line) for edit in self.edits for line in edit.to_dict()["region"] or ()) + 4096


@dataclass(frozen=True)
class SwapJob:
    """Find the edits that put one name in place of another where its features fire."""

    hookpoint: str
    old: str
    new: str
    old_features: tuple[int, ...]
    new_features: tuple[int, ...]
    """Those whose usual strength is known."""
    rivals: tuple[str, ...]
    """Other names of the kind, which the picture may come to show instead."""
    prompt: str
    seed: int
    num_inference_steps: int

    def n_passes(self, bench: Workbench) -> int:
        """Passes of the transformer over one image that it needs at most, its measuring included."""
        from fluxsae.steering.naturalness import NOISE_SEEDS

        return (self.num_inference_steps + len(NOISE_SEEDS)) * N_PICTURES

    @property
    def n_pictures(self) -> int:
        """Pictures that it makes at most."""
        return N_PICTURES

    def run(self, bench: Workbench, on_step: OnStep) -> FoundSwap:
        """The edits that CLIP sees work best, or come nearest.

        Raises:
            FluxSaeError: no feature of the old name fires in the picture, or there is no CLIP.
        """
        from fluxsae.steering.demos import SwapConfig, acts_in_window, hot_region, swap_variants, try_swaps

        if bench.embedder is None:
            raise FluxSaeError("Swaps need CLIP, which this run does not have. Use the sliders.")
        place, sae, config = SaeName.parse(self.hookpoint), bench.saes[self.hookpoint], SwapConfig()
        settings = bench.settings(self.num_inference_steps)
        picture: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "settings": settings}
        acts = acts_in_window(bench.pipe, sae, place, self.old_features, **picture, on_step=on_step)
        best = self._where_it_fires(bench, acts.amax(dim=(0, 2)).numpy())
        grid = TokenGrid(bench.limits.rows, bench.limits.cols)
        region = hot_region(acts[:, best].mean(dim=0), grid, heat=config.heat)
        variants = swap_variants(place, self.old_features[best], self.new_features, region, config)
        scores = try_swaps(
            bench.pipe,
            sae,
            place,
            variants,
            [in_place(self.prompt, self.old, name) for name in (self.old, self.new, *self.rivals)],
            **picture,
            distance=bench.distance,
            embedder=bench.embedder,
            limits=bench.token_limits,
            on_progress=lambda done, total: on_step(done - 1, total),
        )
        chosen = max(range(len(scores)), key=lambda at: _rank(scores[at]))
        return FoundSwap(variants[chosen], scores[chosen].is_read)

    def _where_it_fires(self, bench: Workbench, peaks: np.ndarray) -> int:
        """Which of the old features fires most for what it is, from their peaks in the picture: surely, or as told."""
        cards = bench.cards[self.hookpoint]
        shares = peaks / np.array([cards.features[feature].max_act for feature in self.old_features])
        sure = cards.label_confidence_at(shares, self.old_features)
        fires = (sure >= CONFIDENCE["sure"]) | (has_name(self.prompt, self.old) & (shares >= LEAST_SHARE))
        if not fires.any():
            raise FluxSaeError(
                f"No feature of “{self.old}” clearly fires in this image, so it cannot be replaced. Put the name into "
                "the prompt, or choose a name that the image shows."
            )
        return int(np.where(fires, shares, 0.0).argmax())


def _rank(score: "SwapScore") -> tuple[Any, ...]:
    """What is read comes before what looks natural, and that before how clear it is."""
    return score.is_read, score.looks_natural, min(score.gone, score.come) * (1 - score.collateral)
