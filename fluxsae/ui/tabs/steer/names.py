"""The names that can be put in each other's place, and what the run knows against each, told before FLUX is asked."""

import functools
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.firing import CONFIDENCE, shares_of_maximum
from fluxsae.features.vocabulary import NameKinds, has_name
from fluxsae.files import map_array
from fluxsae.sae.fingerprint import WEIGHTS_NAME
from fluxsae.ui.serve.arguments import shortened
from fluxsae.ui.serve.session import Workbench

ALIKE: Final = 0.7
"""How alike in use names of one kind are at least, as in the search for swaps."""
MAX_NAMED: Final = 30
"""Names that a refusal lists."""
MAX_RIVALS: Final = 16
"""Other names of the kind that CLIP may read instead, and words of the kind that are told to have no feature."""
NO_FEATURE: Final = "no feature of this name"
UNSURE: Final = "no feature surely has this name"
TOO_RARE: Final = "its features fired too rarely to be added"
RARELY: Final = 0.5
"""Share of test swaps that worked: where the interval of a name ends below it, or at it, the choice says how many."""


class SwapNames:
    """The names of the features at one hook point, as Swap offers them."""

    def __init__(self, bench: Workbench, hookpoint: str) -> None:
        self.bench, self.hookpoint = bench, hookpoint

    @functools.cached_property
    def known(self) -> dict[str, list[int]]:
        """The names with their features, best ranked first."""
        return self.bench.cards[self.hookpoint].named()

    @functools.cached_property
    def addable(self) -> dict[str, list[int]]:
        """The names that can be put in another's place, with those of their features whose usual strength is known."""
        path = self.bench.run.sae_path(self.hookpoint) / WEIGHTS_NAME
        acts: Any = self.bench.readable(lambda: np.asarray(map_array(path, "reference_acts")), None)
        if acts is None:  # loading the SAE will say what is wrong with it
            return self.known
        kept = {name: [feature for feature in features if acts[feature] > 0] for name, features in self.known.items()}
        return {name: features for name, features in kept.items() if features}

    def replaceable(self, prompt: Any, seed: Any, steps: Any, name: Any) -> tuple[list[str], Any]:
        """The names, those of this image first; and the one on screen, or the first where it is none of the image.

        Of the image are those that the prompt has, and those that surely fire, where it was read lately.
        """
        fires = self._firing(prompt, seed, steps)
        own = [other for other in self.known if other in fires or has_name(str(prompt), other)]
        others = [other for other in self.known if other not in own]
        return [*own, *others], name if name in own or not own else own[0]

    def _firing(self, prompt: Any, seed: Any, steps: Any) -> set[str]:
        """The names that surely fire in an image; none where it was not read lately."""
        reading = self.bench.kept_reading(prompt, seed, steps)
        if reading is None:
            return set()
        cards = self.bench.cards[self.hookpoint]
        shares = shares_of_maximum(reading.maps[self.hookpoint].peaks(None), cards)
        is_sure = cards.label_confidence_at(shares) >= CONFIDENCE["sure"]
        return {name for name, features in self.known.items() if is_sure[features].any()}

    def choices(self, name: Any, shown: Any = None) -> list[tuple[str, str]]:
        """(Words, name) of what may replace a name; `shown` is on screen, and is offered in any case.

        Those that rarely work come after the others, and those that cannot be had last, each with the reason.
        """
        alike = self._alike(str(name))
        kin = [other for other in alike if other in self.known] or [other for other in self.known if other != name]
        lacking = [other for other in alike if other not in self.known][:MAX_RIVALS]
        kept = [shown] if shown in self.known and shown != name and shown not in kin else []
        told = [(other, self.against(other)) for other in (*kin, *kept, *lacking)]
        told.sort(key=lambda each: (each[0] not in self.addable, bool(each[1])))
        return [(f"{other} ({why})" if why else other, other) for other, why in told]

    def against(self, name: str) -> str:
        """Why a name cannot be put in another's place, or how rarely that worked; nothing where nothing is known."""
        if name not in self.known:
            return UNSURE if name in self._labels else NO_FEATURE
        if name not in self.addable:
            return TOO_RARE
        return self._failing.get(name, "")

    def check(self, old: str, new: str) -> None:
        """Refuses what cannot be swapped, with the reason and what can.

        Raises:
            FluxSaeError: no two different names of this run's features, or the new one cannot be added.
        """
        for name, allowed, verb in ((old, self.known, "be replaced"), (new, self.addable, "replace another")):
            if name not in allowed:
                kin = [other for other in self._alike(old) if other in allowed] if verb != "be replaced" else []
                instead = ", ".join((kin or list(allowed))[:MAX_NAMED])
                raise FluxSaeError(
                    f"{shortened(name)} cannot {verb}: {self.against(name)}. "
                    + (f"Choose one of {instead}." if instead else "This run has no name that can. Use the sliders.")
                )
        if old == new:
            raise FluxSaeError(f"“{old}” cannot replace itself; choose two different names.")

    def rivals(self, old: str, new: str) -> tuple[str, ...]:
        """Other names of the kind, which an image may come to show instead."""
        return tuple(self._kinds.rivals(old, new, least=ALIKE, limit=MAX_RIVALS))

    def _alike(self, name: str) -> list[str]:
        """Names and words that are used like a name in the run's prompts, the most alike first."""
        return list(self._kinds.alike(name, least=ALIKE))

    @functools.cached_property
    def _kinds(self) -> NameKinds:
        return NameKinds(self.bench.images.prompts, self.known)

    @functools.cached_property
    def _labels(self) -> frozenset[str | None]:
        return frozenset(self.bench.cards[self.hookpoint].labels)

    @functools.cached_property
    def _failing(self) -> dict[str, str]:
        return failing_swaps(self.bench.metrics(self.hookpoint))


def failing_swaps(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Name -> in how many of the laboratory's swaps to it by features it came, where that is surely few of them."""
    found = {}
    try:
        for swap in (metrics.get("steering") or {}).get("swaps") or ():
            attribute, _, value = str(swap["concept"]).partition(" ")
            tally = swap["arms"].get("features")
            if tally and tally["n"] and tally["success"]["high"] <= RARELY:
                name = f"{value} background" if attribute == "background" else value
                worked = round(tally["n"] * tally["success"]["value"])
                found[name] = f"rarely worked: {worked} of {tally['n']} test swaps"
    except (AttributeError, KeyError, TypeError, ValueError):  # another version's report: nothing is known
        return {}
    return found
