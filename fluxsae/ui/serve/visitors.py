"""How much of the shared FLUX one visitor may use, so that all get their turn."""

import contextlib
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fluxsae.errors import FluxSaeError

WINDOW = 600.0
"""Seconds over which images are counted."""
SPACE_LIMIT = 60
"""Images in that time on a Space, unless FLUXSAE_VISITOR_LIMIT says otherwise."""
MAX_PENDING = 4
"""Requests of one visitor that wait for FLUX or are being answered, where there is a limit."""
MAX_VISITORS = 4096


@dataclass
class Share:
    """Work of a visitor that is under way."""

    take: Callable[[int], None]
    images: int
    """What it counts as when it is done."""
    taken: int = 0

    def made(self, fraction: float) -> None:
        """Counts what is made so far: an image as soon as it is begun."""
        due = math.ceil(self.images * min(1.0, fraction) - 1e-9)
        if due > self.taken:
            self.take(due - self.taken)
            self.taken = due


class VisitorLimits:
    """Counts each visitor's images over the last ten minutes and refuses those beyond the limit; 0 is no limit."""

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._times: dict[str, deque[float]] = {}
        self._n_pending: Counter[str] = Counter()
        self._images_pending: Counter[str] = Counter()
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> "VisitorLimits":
        """The limit that FLUXSAE_VISITOR_LIMIT names; without it 60 on a Space and none elsewhere.

        Raises:
            FluxSaeError: it is not a whole number of at least 0.
        """
        text = os.environ.get("FLUXSAE_VISITOR_LIMIT", "").strip()
        if not text:
            return cls(SPACE_LIMIT if os.environ.get("SPACE_ID") else 0)
        if not (text.isascii() and text.isdigit()):
            raise FluxSaeError(f"FLUXSAE_VISITOR_LIMIT is {text!r}; give a whole number, 0 for no limit.")
        return cls(int(text))

    @contextlib.contextmanager
    def share(self, visitor: str, images: int = 1) -> Iterator[Share]:
        """Work that counts as some images when it is done; until then they are set aside.

        Raises:
            FluxSaeError: the share is used up, or too much waits; the message says when it goes on.
        """
        if self.limit == 0:
            yield Share(lambda n: None, images)
            return
        with self._lock:
            self._check(visitor, images)
            self._n_pending[visitor] += 1
            self._images_pending[visitor] += images
        share = Share(lambda n: self._take(visitor, n), images)
        try:
            yield share
        finally:
            with self._lock:
                self._n_pending[visitor] -= 1
                self._images_pending[visitor] -= images - share.taken
                self._n_pending += Counter()  # forgets those with nothing
                self._images_pending += Counter()

    def check(self, visitor: str, images: int) -> None:
        """Refuses images that are asked for together and made one by one, each with a share of its own.

        Raises:
            FluxSaeError: they are more than the visitor may make now.
        """
        if not self.limit or not images:
            return
        if images > self.limit:
            raise FluxSaeError(
                f"This makes {images} images, and one visitor may make {self.limit} in ten minutes here. Ask for fewer."
            )
        with self._lock:
            self._check(visitor, images)

    def _check(self, visitor: str, images: int) -> None:
        now = self._clock()
        self._forget(now)
        if self._n_pending[visitor] >= MAX_PENDING:
            raise FluxSaeError(
                f"{self._n_pending[visitor]} of your requests wait for FLUX, and one visitor may have {MAX_PENDING}. "
                "Wait for one of them, or stop it."
            )
        times = self._times.get(visitor, deque())
        used = len(times) + self._images_pending[visitor]
        too_many = used + images - self.limit
        if used and too_many > 0:
            last = times[min(too_many, len(times)) - 1] if times else now
            wait = max(1, round(last + WINDOW - now))
            raise FluxSaeError(
                f"You made {used} images in ten minutes, and this is {images} more; one visitor may make "
                f"{self.limit} here. You can continue in {wait} s. On your own machine there is no limit."
            )

    def _take(self, visitor: str, images: int) -> None:
        with self._lock:
            self._images_pending[visitor] -= images
            self._times.setdefault(visitor, deque()).extend([self._clock()] * images)

    def _forget(self, now: float) -> None:
        for times in self._times.values():
            while times and times[0] < now - WINDOW:
                times.popleft()
        for visitor in [who for who, times in self._times.items() if not times]:
            del self._times[visitor]
        while len(self._times) > MAX_VISITORS:
            self._times.pop(next(iter(self._times)))
