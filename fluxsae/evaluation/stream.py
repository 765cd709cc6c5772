"""The activations of many images, a batch at a time: what every evaluation of an SAE looks at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux import AnyFlux, Captured, capture, generate, read_picture
from fluxsae.flux.bad_numbers import LeftOut, bad_items, check_finite, describe_bad
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many images are done and how many there are."""

FRESH_SEED = 1 << 40
"""Seeds from here on belong to evaluations: no collection or scoring counts so far."""


T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, `size` at a time."""
    yield from (items[start : start + size] for start in range(0, len(items), size))


@dataclass(frozen=True)
class ImageSet:
    """Images by prompt and seed; generated again whenever they are looked at."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.seeds):
            raise FluxSaeError(
                f"{len(self.prompts)} prompts and {len(self.seeds)} seeds: an evaluation needs at least one image and "
                "a seed for each prompt."
            )

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> "ImageSet":
        """The first `count` images."""
        return ImageSet(self.prompts[:count], self.seeds[:count])

    def of(self, rows: Sequence[int]) -> "ImageSet":
        """The images at some places."""
        return ImageSet(tuple(self.prompts[row] for row in rows), tuple(self.seeds[row] for row in rows))

    @classmethod
    def fresh(cls, prompts: Sequence[str], count: int) -> "ImageSet":
        """`count` images that no stage has seen: the prompts in turn, with seeds of their own."""
        repeated = tuple(prompts[index % len(prompts)] for index in range(count))
        return cls(repeated, tuple(range(FRESH_SEED, FRESH_SEED + count)))


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Some images' activations, fp32, and the pictures where they were asked for."""

    rows: Sequence[int]
    """The images' places among all images; those that are left out lack here, in the tokens and in the pictures."""
    tokens: dict[HookPoint, Float[Tensor, "images steps tokens d_model"]]
    pictures: list[Image] = field(default_factory=list)


def iter_activations(
    pipe: AnyFlux,
    images: ImageSet,
    steps: Mapping[HookPoint, Sequence[int]],
    *,
    settings: GenerationSettings,
    batch_size: int = 8,
    with_pictures: bool = False,
    on_progress: OnProgress | None = None,
    doing: str = "generating",
    left_out: LeftOut | None = None,
) -> Iterator[ActivationBatch]:
    """Generates the images batch by batch and gives their tokens at each hook point's steps.

    Without pictures a generation ends after the last step and block that is wanted. Images whose activations are not
    numbers go to `left_out`; a batch of such images alone is passed over.

    Raises:
        FluxSaeError: too many images are left out, or one would be and there is no `left_out`.
    """
    wanted = sorted({step for some in steps.values() for step in some})
    for start in range(0, len(images), batch_size):
        rows = range(start, min(start + batch_size, len(images)))
        prompts, seeds = images.prompts[rows.start : rows.stop], images.seeds[rows.start : rows.stop]
        pictures: list[Image] = []
        with capture(pipe, list(steps), wanted, stop_early=not with_pictures) as captured:
            made = generate(pipe, prompts, seeds=seeds, settings=settings)
            pictures = made if isinstance(made, list) else []
        names = [f"seed {seed} ({prompt!r:.60})" for prompt, seed in zip(prompts, seeds, strict=True)]
        yield from _sound_batch(captured, steps, names, rows=rows, pictures=pictures, left_out=left_out)
        if on_progress is not None:
            on_progress(doing, rows.stop, len(images))


def iter_read_activations(
    pipe: AnyFlux,
    pictures: Sequence[Image],
    steps: Mapping[HookPoint, Sequence[int]],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings,
    left_out: LeftOut,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
    doing: str = "reading",
) -> Iterator[ActivationBatch]:
    """As `iter_activations`, of pictures that are there already and are read, each with its caption and noise.

    Raises:
        FluxSaeError: too many pictures are left out.
    """
    wanted = sorted({step for some in steps.values() for step in some})
    for rows in batches(range(len(pictures)), batch_size):
        captured, part = Captured(tuple(steps)), [pictures[row] for row in rows]
        read_picture(
            pipe, part, prompt=[prompts[row] for row in rows], hookpoints=list(steps), steps=wanted,
            seeds=[seeds[row] for row in rows], settings=settings, sink=captured.keep,
        )  # fmt: skip
        names = [f"picture {row}" for row in rows]
        yield from _sound_batch(captured, steps, names, rows=rows, pictures=part, left_out=left_out)
        if on_progress is not None:
            on_progress(doing, rows[-1] + 1, len(pictures))


def _sound_batch(
    captured: Captured,
    steps: Mapping[HookPoint, Sequence[int]],
    names: Sequence[str],
    *,
    rows: Sequence[int],
    pictures: Sequence[Image],
    left_out: LeftOut | None,
) -> Iterator[ActivationBatch]:
    """What was captured of the images whose activations are numbers; nothing where there are none."""
    bad = _bad_places(captured, steps, names, rows=rows, left_out=left_out)
    sound = [place for place in range(len(rows)) if place not in bad]
    if sound:
        tokens = {
            hookpoint: torch.stack([captured.get(hookpoint, step) for step in some], dim=1)[sound].float()
            for hookpoint, some in steps.items()
        }
        shown = [pictures[place] for place in sound] if pictures else []
        yield ActivationBatch([rows[place] for place in sound], tokens, shown)


def _bad_places(
    captured: Captured,
    steps: Mapping[HookPoint, Sequence[int]],
    names: Sequence[str],
    *,
    rows: Sequence[int],
    left_out: LeftOut | None,
) -> set[int]:
    """The places in a batch of images whose activations are not numbers."""
    bad: set[int] = set()
    for hookpoint, some in steps.items():
        for step in some:
            tokens = captured.get(hookpoint, step)
            if left_out is None:
                check_finite(tokens, names, hookpoint=hookpoint, step=step)
                continue
            for place in bad_items(tokens):
                bad.add(place)
                left_out.add(rows[place], describe_bad(tokens, names[place], hookpoint=hookpoint, step=step))
    return bad
