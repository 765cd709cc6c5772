"""Names of one kind: those that stand between the same words in prompts, such as red and pink."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from fluxsae.runs.prompts import phrase_pattern, words_of

Around = Counter[tuple[str, int]]
"""How often each word stands right before (-1) or right after (1) a name."""


def words_around(name: str, sentences: Sequence[Sequence[str]]) -> Around:
    """The words that a name stands between in sentences of lower-case words."""
    wanted, found = tuple(name.lower().split()), Counter[tuple[str, int]]()
    size = len(wanted)
    for words in sentences:
        for start in range(len(words) - size + 1):
            if tuple(words[start : start + size]) == wanted:
                found.update(
                    (words[at], side) for at, side in ((start - 1, -1), (start + size, 1)) if 0 <= at < len(words)
                )
    return found


def words_around_each(sentences: Sequence[Sequence[str]]) -> dict[str, Around]:
    """The words that every single word stands between."""
    found: defaultdict[str, Around] = defaultdict(Counter)
    for words in sentences:
        for first, second in itertools.pairwise(words):
            found[first][second, 1] += 1
            found[second][first, -1] += 1
    return dict(found)


def cosine(first: Around, second: Around) -> float:
    """Cosine of two counts, 0 where one is empty."""
    size = math.sqrt(sum(n * n for n in first.values()) * sum(n * n for n in second.values()))
    return sum(count * second[word] for word, count in first.items()) / size if size else 0.0


class NameKinds:
    """How alike names and words are in use, from the prompts of a run."""

    def __init__(self, prompts: Iterable[str], names: Iterable[str]) -> None:
        self._sentences = [words_of(prompt.lower()) for prompt in prompts]
        self._around = words_around_each(self._sentences)
        self._around |= {name: words_around(name, self._sentences) for name in names}

    def alike(self, name: str, *, least: float) -> dict[str, float]:
        """The names and words that a name has at least this cosine with, each with it, the most alike first.

        Neither those that hold a word of the name nor those that it holds: no picture is told by "black" from one by
        "black background".
        """
        own = words_around(name, self._sentences)
        told = set(name.lower().split())
        found = {other: cosine(own, around) for other, around in self._around.items() if not told & set(other.split())}
        return {other: found[other] for other in sorted(found, key=lambda each: -found[each]) if found[other] >= least}

    def rivals(self, old: str, new: str, *, least: float, limit: int) -> list[str]:
        """What a picture may be read as beside the old and the new name, the most alike first."""
        told = {*old.lower().split(), *new.lower().split()}
        return [other for other in self.alike(old, least=least) if not told & set(other.split())][:limit]


def has_name(prompt: str, name: str) -> bool:
    """Whether a prompt has a name as a word of its own."""
    return phrase_pattern(name).search(prompt) is not None


def in_place(prompt: str, old: str, new: str) -> str:
    """A prompt with one name in place of another; the new name alone where the prompt does not have the old one."""
    return phrase_pattern(old).sub(lambda _: new, prompt) if has_name(prompt, old) else new
