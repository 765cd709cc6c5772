"""What is on screen as text for an address, and back."""

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

from fluxsae.errors import FluxSaeError

FRAGMENT = "#view="
MAX_VIEW_BYTES = 400_000
"""Longest view that a link may unpack to."""


def encode_view(values: Mapping[str, Any]) -> str:
    """What is on screen as text for an address."""
    packed = zlib.compress(json.dumps(values, separators=(",", ":")).encode(), 9)
    return base64.urlsafe_b64encode(packed).decode("ascii").rstrip("=")


def decode_view(text: str) -> dict[str, Any]:
    """Inverse of `encode_view`.

    Raises:
        FluxSaeError: the text is no such link, or a damaged one.
    """
    try:
        packed = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unpacked = zlib.decompressobj().decompress(packed, MAX_VIEW_BYTES)
        values = json.loads(unpacked)
    except (ValueError, zlib.error, RecursionError) as error:
        raise FluxSaeError("This link is damaged and cannot be read. Ask for the whole link again.") from error
    if not isinstance(values, dict):
        raise FluxSaeError("This link is damaged: it holds no view. Ask for the whole link again.")
    return values


def view_of(query: Mapping[str, str], fragment: Any = "") -> dict[str, Any]:
    """What a link asks to show: `#view=...` as the page writes it, or `?hookpoint=...&feature=...` by hand.

    `?view=...` is of links that were made before views stood behind the #.
    """
    if isinstance(fragment, str) and fragment.startswith(FRAGMENT):
        return decode_view(fragment.removeprefix(FRAGMENT))
    if query.get("view"):
        return decode_view(query["view"])
    if query.get("feature"):
        number = query["feature"]
        feature = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else number
        return {"tab": query.get("tab", "gallery"), "hookpoint": query.get("hookpoint"), "feature": feature}
    return {}


def check_view(view: Mapping[str, Any], fingerprints: Mapping[str, str]) -> None:
    """Refuses a link that was made where a hook point has another SAE; older links and those by hand do not say.

    `fingerprints` are those of the SAEs here, by name.
    """
    made_with = view.get("saes")
    if not isinstance(made_with, Mapping):
        return
    others = [name for name, fingerprint in fingerprints.items() if made_with.get(name, fingerprint) != fingerprint]
    if others:
        raise FluxSaeError(
            f"This link was made with another SAE of {', '.join(others)}: its feature numbers mean something else "
            "here. Open it on the page of the run where it was made."
        )
