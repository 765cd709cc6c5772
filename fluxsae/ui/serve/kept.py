"""What the page keeps in memory: its latest results, and the FLUX models that are loaded."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

log = logging.getLogger("fluxsae.app")

CACHE_BYTES = 64 * 2**20
CACHE_ENTRIES = 48


class ResultCache:
    """The latest results, within a memory bound; a repeated request is answered from here."""

    def __init__(self, *, max_bytes: int = CACHE_BYTES, max_entries: int = CACHE_ENTRIES) -> None:
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._visits: dict[Hashable, str] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any | None:
        """The result kept under this key, or None."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, value: Any, *, n_bytes: int, visit: str = "") -> None:
        """Keeps a result, of one visit alone where that is named, and forgets the oldest ones beyond the bound."""
        with self._lock:
            self._entries[key] = (value, n_bytes)
            self._visits[key] = visit
            self._entries.move_to_end(key)
            while len(self._entries) > 1 and (len(self._entries) > self.max_entries or self._size() > self.max_bytes):
                oldest, _ = self._entries.popitem(last=False)
                del self._visits[oldest]

    def forget(self, visit: str) -> None:
        """Lets go of what was kept for a visit."""
        with self._lock:
            for key in [key for key, whose in self._visits.items() if whose == visit]:
                del self._entries[key], self._visits[key]

    def __len__(self) -> int:
        return len(self._entries)

    def _size(self) -> int:
        return sum(n_bytes for _, n_bytes in self._entries.values())


class LoadedFlux:
    """The FLUX models in memory: one at a time, since a GPU holds no two of FLUX.1-dev's size."""

    def __init__(self, *, most: int = 1) -> None:
        self.most = most
        self._pipes: OrderedDict[tuple[str | None, ...], Any] = OrderedDict()

    def find(self, source: str, revision: str | None, device: str, dtype: str | None) -> Any | None:
        """A model, if it is loaded."""
        return self._pipes.get((source, revision, device, dtype))

    def get(self, source: str, revision: str | None, device: str, dtype: str | None) -> Any:
        """A model, loaded unless it is there; others make room first."""
        key = (source, revision, device, dtype)
        if key not in self._pipes:
            from fluxsae.flux import load_flux

            while len(self._pipes) >= self.most:
                self._pipes.popitem(last=False)
            log.info("loading FLUX %s on %s", source, device)
            kind = getattr(torch, dtype) if dtype else None
            self._pipes[key] = load_flux(source, revision=revision, device=device, dtype=kind)
        return self._pipes[key]
