"""Where an SAE sits in FLUX: module paths, token streams, output layouts and the token grid."""

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import TYPE_CHECKING, Literal, Self, Union, get_args

from fluxsae.errors import FluxSaeError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

BlockKind = Literal["double", "single"]
Stream = Literal["image", "text"]
Submodule = Literal["", "attn", "ff", "ff_context", "proj_mlp", "proj_out"]
BlockOutput = Union["Tensor", "tuple[Tensor, ...]"]

_BLOCK_LISTS: dict[BlockKind, str] = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
_SUBMODULES: tuple[Submodule, ...] = get_args(Submodule)

# What each kind of module carries, in every family; how its output is laid out is the family's affair.
_BOTH: frozenset[Stream] = frozenset(get_args(Stream))
_STREAMS: dict[tuple[BlockKind, Submodule], frozenset[Stream]] = {
    ("double", "ff"): frozenset({"image"}),
    ("double", "ff_context"): frozenset({"text"}),
    ("double", ""): _BOTH,
    ("double", "attn"): _BOTH,
    ("single", ""): _BOTH,
    ("single", "attn"): _BOTH,
    ("single", "proj_mlp"): _BOTH,
    ("single", "proj_out"): _BOTH,
}

_SHORT = re.compile(r"layer(?P<index>\d{1,4})")
_LONG = re.compile(
    r"(?P<blocks>transformer_blocks|single_transformer_blocks)\.(?P<index>\d{1,4})(?:\.(?P<submodule>\w+))?"
)
_SYNTAX = (
    "Write layer15 (short for transformer_blocks.15.ff), transformer_blocks.15, .attn, .ff or .ff_context, "
    "single_transformer_blocks.7, .attn, .proj_mlp or .proj_out; add :text for the text tokens"
)


@dataclass(frozen=True)
class Layout:
    """How the output of a module holds its streams: in this order, as a tuple or as one tensor along the token axis."""

    streams: tuple[Stream, ...]
    is_tuple: bool = False

    def __str__(self) -> str:
        return f"a tuple of {len(self.streams)} ({', '.join(self.streams)})" if self.is_tuple else "one tensor"


@total_ordering
@dataclass(frozen=True, eq=False)
class HookPoint:
    """One module of FLUX's transformer and one of its token streams.

    `str(hookpoint)` is the module path, with `.text` behind it where the module carries both streams and the text
    tokens are meant; `HookPoint.parse` reads it back, and it is safe as a folder name. Ordered by kind (double
    first), block number, submodule and stream.

    Raises:
        FluxSaeError: no such submodule in that kind of block, or it does not carry that stream.
    """

    block_kind: BlockKind
    block_index: int
    submodule: Submodule
    stream: Stream = "image"

    def __post_init__(self) -> None:
        if (self.block_kind, self.submodule) not in _STREAMS:
            raise FluxSaeError(f"A {self.block_kind}-stream block has no hook point {self.submodule!r}. {_SYNTAX}.")
        if self.stream not in self._streams:
            raise FluxSaeError(
                f"{self.path} carries {', '.join(self._streams)} tokens only, so its {self.stream} stream cannot be "
                "hooked. In a double-stream block ff holds the image tokens and ff_context the text tokens."
            )

    @classmethod
    def parse(cls, text: "str | HookPoint") -> Self:
        """The hook point that `text` names: a module path, `layer15`, with `:text` or `.text` for the text stream.

        Raises:
            FluxSaeError: `text` names no hook point.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise FluxSaeError(f"A hook point is written as text, not as {type(text).__name__}. {_SYNTAX}.")
        path, wanted = _split_stream(text.strip())
        short, long = _SHORT.fullmatch(path), _LONG.fullmatch(path)
        if short:
            kind, index, submodule = "double", int(short["index"]), "ff"
        elif long and (long["submodule"] or "") in _SUBMODULES:
            kind = "double" if long["blocks"] == "transformer_blocks" else "single"
            index, submodule = int(long["index"]), long["submodule"] or ""
        else:
            raise FluxSaeError(f"{text[:80]!r} names no hook point. {_SYNTAX}.")
        default = "text" if submodule == "ff_context" else "image"
        return cls(kind, index, submodule, wanted or default)  # type: ignore[arg-type]

    @property
    def place(self) -> "HookPoint":
        """The hook point itself, of a name that says more than where (`fluxsae.runs.names.SaeName`)."""
        return self

    @property
    def path(self) -> str:
        """The module's path below the transformer, for `transformer.get_submodule`."""
        return self.block_path + (f".{self.submodule}" if self.submodule else "")

    @property
    def block_path(self) -> str:
        """The path of the block that holds the module (the module itself where the whole block is hooked)."""
        return f"{_BLOCK_LISTS[self.block_kind]}.{self.block_index}"

    def split(self, output: BlockOutput, n_text: int, layout: Layout) -> 'Float[Tensor, "batch tokens d_model"]':
        """This stream's tokens in what the module returned, as a view where possible.

        `n_text` is the number of text tokens, which lead the sequence where both streams share one tensor.

        Raises:
            FluxSaeError: not laid out so.
        """
        # Longer tuples occur: with an IP-Adapter, attention returns a third part.
        if isinstance(output, tuple) != layout.is_tuple or (layout.is_tuple and len(output) < len(layout.streams)):
            given = f"a tuple of {len(output)}" if isinstance(output, tuple) else "one tensor"
            raise FluxSaeError(
                f"{self.path} returned {given}, not {layout} as in diffusers 0.42. Install the diffusers version that "
                "fluxsae asks for, or remove what replaced this module."
            )
        if isinstance(output, tuple):
            return output[layout.streams.index(self.stream)]
        if len(layout.streams) == 1:
            return output
        return output[:, :n_text] if self.stream == "text" else output[:, n_text:]

    def join(
        self, output: BlockOutput, tokens: 'Float[Tensor, "batch tokens d_model"]', n_text: int, layout: Layout
    ) -> BlockOutput:
        """What the module returned with this stream's tokens replaced: same type, layout and dtype; a new tensor."""
        import torch

        if isinstance(output, tuple):
            parts = list(output)
            parts[layout.streams.index(self.stream)] = tokens
            return tuple(parts)
        if len(layout.streams) == 1:
            return tokens
        if self.stream == "text":
            return torch.cat([tokens, output[:, n_text:]], dim=1)
        return torch.cat([output[:, :n_text], tokens], dim=1)

    @property
    def _streams(self) -> frozenset[Stream]:
        return _STREAMS[self.block_kind, self.submodule]

    def __str__(self) -> str:
        return f"{self.path}.text" if self.stream == "text" and len(self._streams) > 1 else self.path

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, HookPoint) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    def __lt__(self, other: object) -> bool:
        return self.key < other.key if isinstance(other, HookPoint) else NotImplemented

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """What it is compared and sorted by; the last part is the variant of an SAE's name."""
        return self.block_kind, self.block_index, self.submodule, self.stream, ""


def _split_stream(text: str) -> tuple[str, Stream | None]:
    """A hook point's text without its stream, and the stream if one is written."""
    for stream in get_args(Stream):
        for separator in ":.":
            if text.endswith(separator + stream):
                return text.removesuffix(separator + stream), stream
    return text, None


@dataclass(frozen=True)
class TokenGrid:
    """The image tokens' rows and columns: token = row * cols + column, row 0 at the top.

    Raises:
        FluxSaeError: a side is below 1.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise FluxSaeError(f"A token grid of {self.rows} x {self.cols} is empty. Both sides are at least 1.")

    @classmethod
    def from_size(cls, height: int, width: int, *, patch: int) -> Self:
        """The grid of an image of `height` x `width` pixels, one token a `patch` x `patch` square.

        Raises:
            FluxSaeError: a side is not a positive multiple of `patch`.
        """
        for name, side in (("height", height), ("width", width)):
            if side < patch or side % patch:
                below = max(patch, side // patch * patch)
                raise FluxSaeError(
                    f"{name}={side} does not fit: this model's tokens are {patch} x {patch} pixels, so {name} is a "
                    f"positive multiple of {patch}, for example {below}."
                )
        return cls(height // patch, width // patch)

    @property
    def n_tokens(self) -> int:
        """Image tokens in all."""
        return self.rows * self.cols

    def token(self, row: int, column: int) -> int:
        """The index of the token at `row`, `column` (0-based).

        Raises:
            FluxSaeError: outside the grid.
        """
        for name, value, size in (("row", row, self.rows), ("column", column, self.cols)):
            if not 0 <= value < size:
                raise FluxSaeError(f"{name}={value} is outside the token grid: allowed are 0 to {size - 1}.")
        return row * self.cols + column

    def position(self, token: int) -> tuple[int, int]:
        """(row, column) of the token with this index.

        Raises:
            FluxSaeError: outside the grid.
        """
        if not 0 <= token < self.n_tokens:
            raise FluxSaeError(f"token={token} is outside the token grid: allowed are 0 to {self.n_tokens - 1}.")
        return divmod(token, self.cols)
