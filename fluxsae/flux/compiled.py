"""Compiled blocks and hooks: compiled code does not see hooks that come later."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fluxsae.errors import FluxSaeError

_COMPILED = "_compiled_call_impl"
"""Where torch keeps what `nn.Module.compile` made; no public name says it. Tests of compiled blocks notice a change."""


def refuse_whole_compile(transformer: nn.Module) -> None:
    """Raises a FluxSaeError for a transformer that was compiled as one piece."""
    # It ignores hooks that come later, silently (torch's skip_nnmodule_hook_guards).
    if hasattr(transformer, "_orig_mod") or getattr(transformer, _COMPILED, None) is not None:
        raise FluxSaeError(
            "The whole transformer is compiled, so hooks would be ignored without a word. Load it uncompiled and "
            "call fluxsae.flux.compile_blocks(pipe), which compiles block by block and leaves tapped blocks eager."
        )


@contextmanager
def eager(block: nn.Module) -> Iterator[None]:
    """While open, a block compiled by `compile_blocks` runs eager, since compiled code ignores new hooks."""
    compiled = getattr(block, _COMPILED, None)
    setattr(block, _COMPILED, None)
    try:
        yield
    finally:
        setattr(block, _COMPILED, compiled)
