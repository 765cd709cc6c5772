"""What every tab's desk has: the workbench, the endpoints it answers, and the frame of what it shows."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from fluxsae.errors import FluxSaeError
from fluxsae.ui.kit.links import encode_view
from fluxsae.ui.kit.snippets import snippets
from fluxsae.ui.serve.downloads import Downloads
from fluxsae.ui.serve.endpoints import Answers
from fluxsae.ui.serve.guard import current_visitor
from fluxsae.ui.serve.lane import Done, Event, StepDone
from fluxsae.ui.serve.reading import Reading
from fluxsae.ui.serve.schemas import FeatureRequest, Request
from fluxsae.ui.serve.session import Workbench

T = TypeVar("T")
Events = Iterator[Event[T]]
"""The steps of some work, then its result."""
Picture = tuple[str, int, int]
"""Prompt, seed and number of denoising steps."""


class Desk:
    """A tab's questions, answered from the workbench."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.limits = bench.limits
        self.files = f"downloads/{bench.slug}"
        """Where the run's files are offered."""

    def answers(self) -> Answers:
        """The endpoints of the tab: none of one that only shows, to which no link leads."""
        return {}

    def downloads(self) -> Downloads:
        """The files that the tab offers."""
        return {}

    def chosen(self, selection: Any) -> FeatureRequest:
        """The feature that the page says was chosen.

        Raises:
            FluxSaeError: it is none of this run.
        """
        if not isinstance(selection, Mapping):
            raise FluxSaeError("Choose a feature first: its hook point and number are missing.")
        return FeatureRequest.parse(self.limits, hookpoint=selection.get("hookpoint"), feature=selection.get("feature"))

    def frame(self, schema: type[Request], values: Mapping[str, Any], *, tab: str) -> dict[str, Any]:
        """What stands beside every view: the same as code, as a link, and the versions behind it."""
        return {
            "code": self.code(schema, values),
            "link": encode_view({"tab": tab, "saes": self.bench.fingerprints, **values}),
            "saes": self.bench.fingerprints,
            "versions": dict(self.bench.versions),
            "files": self.files,
        }

    def code(self, schema: type[Request], values: Mapping[str, Any]) -> dict[str, str]:
        """The call of an endpoint with these values, and else its defaults."""
        return snippets(schema, {**schema.defaults(self.limits), **values}, run=self.bench.asked_as)

    def readings(
        self, *pictures: Picture, take: Callable[[Reading], Any] = lambda reading: reading
    ) -> Events[list[Any]]:
        """What `take` keeps of what fires in each of some pictures, their steps counted together.

        Raises:
            FluxSaeError: they are more than the visitor may make now; each counts as it is made.
        """
        n_new = sum(self.bench.kept_reading(*picture) is None for picture in pictures)
        self.bench.visitors.check(current_visitor(), n_new)
        found: list[Any] = []
        for place, picture in enumerate(pictures):
            for event in self.bench.read(*picture):
                if isinstance(event, Done):
                    found.append(take(event.value))
                elif not isinstance(event, StepDone):
                    yield event
                else:
                    yield StepDone(place * event.n_steps + event.step, len(pictures) * event.n_steps)
        yield Done(found)


def then(
    events: Iterable[Event[Any]], make: Callable[[Any], T], *, see: Callable[[Any], Any] | None = None
) -> Events[T]:
    """The steps, with what `see` makes of what there is to see after each, and what is made of the result."""
    for event in events:
        match event:
            case Done(value=value):
                yield Done(make(value))
            case StepDone(view=view):
                yield replace(event, view=see(view) if see and view is not None else None)
            case _:
                yield event
