"""The runs that are served side by side: each with a page and cards of its own, all with one lane for FLUX."""

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.ui.serve.arguments import shortened
from fluxsae.ui.serve.opening import INSTEAD, embedded_workbench, open_workbench
from fluxsae.ui.serve.session import EMBEDDED, Workbench

MAX_RUNS = 12


class Shelf:
    """Some runs in their order, each under its own name."""

    def __init__(self, benches: Sequence[Workbench]) -> None:
        self.runs: Mapping[str, Workbench] = _named(benches)
        lane, visitors = self.first.lane, self.first.visitors
        for bench in benches[1:]:
            bench.asked_as = bench.name
            bench.lane, bench.visitors, bench.fluxes = lane, visitors, self.first.fluxes

    @property
    def first(self) -> Workbench:
        """The run that is shown unless another is asked for."""
        return next(iter(self.runs.values()))

    def pick(self, name: Any) -> Workbench:
        """A run by its name; the first for None.

        Raises:
            FluxSaeError: there is no such run here.
        """
        if name is None or name == "":
            return self.first
        if not isinstance(name, str) or name not in self.runs:
            raise FluxSaeError(f"run is {shortened(name)}; give one of {', '.join(self.runs)}, or null for the first.")
        return self.runs[name]

    def end_visit(self) -> None:
        """Lets go of a visitor's own pictures when a page is closed."""
        for bench in self.runs.values():
            bench.end_visit()

    def path(self, bench: Workbench) -> str:
        """What follows this page's address for a run; nothing for the first."""
        return "" if bench is self.first else bench.slug

    def warm_up(self) -> None:
        """Loads what the first visitor would wait for, in the background."""
        threading.Thread(target=self.first.warm_up, name="warm-up", daemon=True).start()


def open_shelf(sources: str | None = None) -> Shelf:
    """The runs that `sources` or FLUXSAE_RUN names, separated by commas; the embedded one where there is none.

    A run that cannot be had is told on the first page, and left out where there are others. Where no run has a FLUX
    that can be run here, the miniature comes last, so that something can be painted.
    """
    text = sources if sources is not None else os.environ.get("FLUXSAE_RUN", "")
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(wanted) > MAX_RUNS:
        raise FluxSaeError(f"FLUXSAE_RUN names {len(wanted)} runs; give at most {MAX_RUNS}.")
    opened = [open_workbench(source) for source in wanted] or [embedded_workbench()]
    found = [bench for bench in opened if not _is_stand_in(bench)]
    if not found:
        return Shelf(opened[:1])
    lost = [bench.notice.removesuffix(INSTEAD) for bench in opened if _is_stand_in(bench)]
    found[0].notice = " ".join(filter(None, [found[0].notice, *lost]))
    if all(bench.lacks_flux for bench in found):
        found.append(embedded_workbench())
    return Shelf(found)


def _is_stand_in(bench: Workbench) -> bool:
    """Whether it is the miniature in place of a run that cannot be had."""
    return bench.source == EMBEDDED and bool(bench.notice)


def _named(benches: Sequence[Workbench]) -> dict[str, Workbench]:
    """The benches by their names; the second of one name has -2 behind it."""
    found: dict[str, Workbench] = {}
    for bench in benches:
        name, copy = bench.name, 2
        while bench.slug in {other.slug for other in found.values()}:
            bench.name, copy = f"{name}-{copy}", copy + 1
        found[bench.name] = bench
    return found
