"""Pictures by address, which browsers keep: those of runs, and those made lately. No page holds their bytes."""

import functools
import hashlib
import threading
from collections import OrderedDict
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fluxsae.errors import FluxSaeError
from fluxsae.runs.tables import ImageTable

MADE_BYTES: Final = 256 * 2**20
"""Memory for pictures that were made lately; the oldest go first."""
MADE: Final = "made"
TYPES: Final = {"webp": "image/webp", "png": "image/png"}
FOR_GOOD: Final = {"Cache-Control": "public, max-age=31536000, immutable"}
"""An address holds the hash of what it leads to, so browsers need never ask again."""


class KeptPictures:
    """Bytes by the hash of what they are, within a memory bound."""

    def __init__(self, max_bytes: int = MADE_BYTES) -> None:
        self.max_bytes = max_bytes
        self._found: OrderedDict[str, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def put(self, data: bytes, kind: str) -> str:
        """Keeps a picture and gives its name."""
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{kind}"
        with self._lock:
            if name not in self._found:
                self._found[name] = data
                self._size += len(data)
            self._found.move_to_end(name)
            while self._size > self.max_bytes and len(self._found) > 1:
                self._size -= len(self._found.popitem(last=False)[1])
        return name

    def get(self, name: str) -> bytes | None:
        """The picture of a name, if it is still kept."""
        with self._lock:
            if name in self._found:
                self._found.move_to_end(name)
            return self._found.get(name)


_made = KeptPictures()
_tables: dict[str, ImageTable] = {}
"""Image tables of the runs of this process, by the hash in their pictures' addresses."""


def made_url(data: bytes, *, kind: str = "webp") -> str:
    """The address of a picture that was made just now, from its bytes."""
    return f"pictures/{MADE}/{_made.put(data, kind)}"


def thumbnail_url(images: ImageTable, image_id: int) -> str:
    """The address of an image of a run."""
    return f"pictures/{_table_key(images)}/{image_id}.webp"


@functools.lru_cache(maxsize=256)
def _table_key(images: ImageTable) -> str:
    file = images.path.stat()
    key = hashlib.sha256(f"{images.path.resolve()} {file.st_mtime_ns} {file.st_size}".encode()).hexdigest()[:16]
    _tables.setdefault(key, images)
    return key


def _answer(request: Request) -> Response:
    place, name = request.path_params["place"], request.path_params["name"]
    stem, _, kind = name.partition(".")
    data: bytes | None = None
    if place == MADE:
        data = _made.get(name)
    elif place in _tables and stem.isascii() and stem.isdigit() and len(stem) < 10:
        try:
            data = _tables[place].thumbnail(int(stem))
        except FluxSaeError:  # an image that the run does not have
            data = None
    if data is None or kind not in TYPES:
        return PlainTextResponse("There is no such picture here any more. Make it again.", status_code=404)
    return Response(data, media_type=TYPES[kind], headers=FOR_GOOD)


def picture_route() -> Route:
    """What the served app answers for pictures; Starlette calls it on a thread of its own."""
    return Route("/pictures/{place}/{name}", _answer, methods=["GET", "HEAD"])
