"""How much of the shared FLUX one visitor may use, so that all get their turn."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from fluxsae.errors import FluxSaeError

WINDOW = 600.0
"""Seconds over which generations are counted."""
SPACE_LIMIT = 60
"""Generations in that time on a Space, unless FLUXSAE_VISITOR_LIMIT says otherwise."""
MAX_VISITORS = 4096


class VisitorLimits:
    """Counts each visitor's generations over the last ten minutes and refuses those beyond the limit; 0 is no limit."""

    def __init__(self, limit: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit = limit
        self._clock = clock
        self._times: dict[str, deque[float]] = {}
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
        if not text.isdigit():
            raise FluxSaeError(f"FLUXSAE_VISITOR_LIMIT is {text!r}; give a whole number, 0 for no limit.")
        return cls(int(text))

    def check(self, visitor: str) -> None:
        """Refuses a visitor who has used up the share.

        Raises:
            FluxSaeError: the share is used up; the message says when it goes on.
        """
        if self.limit == 0:
            return
        now = self._clock()
        with self._lock:
            self._forget(now)
            times = self._times.get(visitor, deque())
            if len(times) >= self.limit:
                wait = max(1, round(times[0] + WINDOW - now))
                raise FluxSaeError(
                    f"You made {len(times)} images in ten minutes; one visitor may make {self.limit} here. "
                    f"You can continue in {wait} s. On your own machine there is no limit."
                )

    def take(self, visitor: str, images: int = 1) -> None:
        """Counts images, or work that takes as long, of a visitor."""
        if self.limit == 0:
            return
        now = self._clock()
        with self._lock:
            self._forget(now)
            self._times.setdefault(visitor, deque()).extend([now] * images)

    def _forget(self, now: float) -> None:
        for visitor in [who for who, times in self._times.items() if not times or times[-1] < now - WINDOW]:
            del self._times[visitor]
        for times in self._times.values():
            while times and times[0] < now - WINDOW:
                times.popleft()
        while len(self._times) > MAX_VISITORS:
            self._times.pop(next(iter(self._times)))
