"""One name put in place of another on the visitor's own picture: FLUX tries several strengths, CLIP chooses."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.edits import SteeringEdit
from fluxsae.errors import FluxSaeError
from fluxsae.hookpoints import HookPoint, TokenGrid
from fluxsae.ui.lane import OnStep
from fluxsae.ui.session import Workbench

if TYPE_CHECKING:
    from fluxsae.demos import SwapScore

N_VARIANTS = 9
"""Pictures that are made at most, the unedited one among them."""
LEAST_SHARE = 0.1
"""Share of its maximum at which a feature fires at least where the prompt has its name."""
LEAST_CONFIDENCE = 0.25
"""How far a name is trusted at least, where its feature fires this strongly, if the prompt does not have it."""


@dataclass(frozen=True)
class FoundSwap:
    """The best edits that were found."""

    edits: tuple[SteeringEdit, ...]
    is_read: bool
    """Whether CLIP reads the new name in the picture that they make."""

    @property
    def n_bytes(self) -> int:
        """Memory held, roughly."""
        return 4096 * len(self.edits)


@dataclass(frozen=True)
class SwapJob:
    """Find the edits that put one name in place of another where its features fire."""

    hookpoint: str
    old: str
    new: str
    old_features: tuple[int, ...]
    new_features: tuple[int, ...]
    rivals: tuple[str, ...]
    """Other names of the kind, which the picture may come to show instead."""
    prompt: str
    seed: int
    num_inference_steps: int

    @property
    def seconds(self) -> float:
        """GPU seconds it may need."""
        return 15 + 0.6 * self.num_inference_steps * (N_VARIANTS + 1)

    def run(self, bench: Workbench, on_step: OnStep) -> FoundSwap:
        """The edits that CLIP sees work best, or come nearest.

        Raises:
            FluxSaeError: no feature of the old name fires in the picture, or there is no CLIP.
        """
        from fluxsae.demos import SwapConfig, has_name, hot_region, in_place, mean_acts, swap_variants, try_swaps

        if bench.embedder is None:
            raise FluxSaeError("This page has no CLIP to see what a swap does; use the sliders.")
        place, sae, config = HookPoint.parse(self.hookpoint), bench.saes[self.hookpoint], SwapConfig()
        settings = bench.settings(self.num_inference_steps)
        picture: dict[str, Any] = {"prompt": self.prompt, "seed": self.seed, "settings": settings}
        acts = mean_acts(bench.pipe, sae, place, self.old_features, **picture)
        cards = bench.cards[self.hookpoint]
        maxima = np.array([cards.features[feature].max_act for feature in self.old_features])
        shares = acts.max(dim=1).values.numpy() / maxima
        sure = cards.label_confidence_at(shares, self.old_features)
        is_named = has_name(self.prompt, self.old)
        fires = (sure >= LEAST_CONFIDENCE) | (is_named & (shares >= LEAST_SHARE))
        if not fires.any():
            raise FluxSaeError(
                f"No feature of “{self.old}” surely fires in this picture, so nothing can take its place. Name it in "
                "the prompt, or choose what the picture shows."
            )
        best = int(np.where(fires, shares, 0.0).argmax())
        region = hot_region(acts[best], TokenGrid(bench.limits.rows, bench.limits.cols), heat=config.heat)
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


def _rank(score: "SwapScore") -> tuple[Any, ...]:
    """What is read comes before what is safe, and that before how clear it is."""
    return score.is_read, score.is_safe, min(score.gone, score.come) * (1 - score.collateral)
