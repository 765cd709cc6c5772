"""Prompts of our own: a bundled file, and a grammar that goes on without end. `iter_prompts` gives both in turn."""

import random
from collections.abc import Iterator
from pathlib import Path

from fluxsae.runs.prompts import load_prompts
from train.prompts.grammar import draw_prompts

BUNDLED_PROMPTS = Path(__file__).parent / "prompts.txt"


def iter_prompts(seed: int | str) -> Iterator[str]:
    """Different prompts without end, in an order that the seed decides: the bundled file's, then the grammar's."""
    bundled = load_prompts(BUNDLED_PROMPTS)
    random.Random(f"bundled/{seed}").shuffle(bundled)
    yield from bundled
    present = {prompt.casefold() for prompt in bundled}
    yield from (prompt for prompt in draw_prompts(seed) if prompt.casefold() not in present)
