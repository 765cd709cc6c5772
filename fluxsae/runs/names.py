"""The name of an SAE in a run: its hook point, and which of the SAEs there."""

import re
from dataclasses import dataclass
from typing import Self

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint

_VARIANT = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")


@dataclass(frozen=True, eq=False)
class SaeName(HookPoint):
    """The name of an SAE: `hookpoint` for the main one of a hook point, `hookpoint@variant` for each other one there.

    It is a hook point, so it can be captured, edited and used as a key wherever a hook point can; each variant is a
    key of its own. The name of a main SAE equals its hook point.

    Raises:
        FluxSaeError: the variant holds other signs than those that every file system and the Hub take.
    """

    variant: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant and not _VARIANT.fullmatch(self.variant):
            raise FluxSaeError(
                f"{self.variant[:80]!r} cannot name a variant of an SAE. Use 1 to 64 lower-case letters, digits, '.', "
                "'_' and '-', with a letter or digit at both ends, such as topk-1200."
            )

    @classmethod
    def parse(cls, text: str | HookPoint) -> Self:
        """The name that `text` writes: a hook point, or `hookpoint@variant`.

        Raises:
            FluxSaeError: `text` names no hook point, or no variant behind the @.
        """
        if isinstance(text, cls):
            return text
        path, at, variant = text.partition("@") if isinstance(text, str) else (text, "", "")
        if at and not variant:
            raise FluxSaeError(f"{str(text)[:80]!r} names no variant behind the @. Leave the @ out for the main SAE.")
        place = HookPoint.parse(path)
        return cls(place.block_kind, place.block_index, place.submodule, place.stream, variant)

    @property
    def place(self) -> HookPoint:
        """The hook point alone."""
        return HookPoint(self.block_kind, self.block_index, self.submodule, self.stream)

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """As of a hook point; a main SAE stands before the variants."""
        return (*super().key[:-1], self.variant)

    def __str__(self) -> str:
        place = super().__str__()
        return f"{place}@{self.variant}" if self.variant else place
