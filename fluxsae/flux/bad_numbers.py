"""Images whose activations are NaN or infinite: named with their step, left out, counted, refused when too many."""

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint

_log = logging.getLogger(__name__)

MAX_BAD_SHARE = 0.05
"""Of a stage's images may be left out since they hold NaN or infinite numbers; beyond it something is wrong."""

OnBad = Callable[[int, str], object]
"""Called with (image id, what is wrong) for an image that is to be left out; may raise to stop."""


class LeftOut:
    """The images that a stage of `n_images` leaves out; `known` are those of an earlier start of it."""

    def __init__(self, n_images: int, known: Iterable[int] = ()) -> None:
        self._n_images = n_images
        self.image_ids = set(known)

    def add(self, image_id: int, reason: str) -> None:
        """Leaves an image out and logs why, once.

        Raises:
            FluxSaeError: these are more than `MAX_BAD_SHARE` of the images.
        """
        if image_id not in self.image_ids:
            self.image_ids.add(image_id)
            _log.warning("image %d of %d is left out. %s", image_id, self._n_images, reason)
        self.check(reason)

    def check(self, reason: str) -> None:
        """Refuses to go on without too many of the images.

        Raises:
            FluxSaeError: more than `MAX_BAD_SHARE` of them are left out.
        """
        if len(self.image_ids) > MAX_BAD_SHARE * self._n_images:
            raise FluxSaeError(
                f"{len(self.image_ids)} of {self._n_images} images would be left out, too many to go on. {reason}"
            )


def bad_items(tokens: Float[Tensor, "batch ..."]) -> list[int]:
    """The items of a batch that hold NaN or an infinite number."""
    is_sound = tokens.flatten(1).isfinite().all(1).tolist()
    return [item for item, sound in enumerate(is_sound) if not sound]


def describe_bad(tokens: Float[Tensor, "batch ..."], names: str, *, hookpoint: HookPoint, step: int) -> str:
    """What is wrong with the activations of the images that `names` names, and what to do."""
    return (
        f"At step {step} of {hookpoint}, the activations of {names} hold NaN or infinite "
        f"numbers; nothing was made of them. {_remedy(tokens.dtype)}"
    )


def describe_bad_latents(latents: Float[Tensor, "batch ..."], name: str) -> str:
    """The same for an image that came out of FLUX so, whatever its activations were."""
    return f"The latents of {name} hold NaN or infinite numbers; they were not decoded. {_remedy(latents.dtype)}"


def _remedy(dtype: torch.dtype) -> str:
    return (
        f"FLUX ran in {str(dtype).removeprefix('torch.')}: float16 overflows in it, so load it in bfloat16 or "
        "float32; if it was loaded so, try another GPU."
    )


def check_finite(tokens: Float[Tensor, "batch ..."], names: Sequence[str], *, hookpoint: HookPoint, step: int) -> None:
    """Refuses activations that are not numbers, before anything is made of them; `names` says what each item is.

    Raises:
        FluxSaeError: an item of the batch holds NaN or an infinite number.
    """
    bad = [names[item] for item in bad_items(tokens)]
    if bad:
        raise FluxSaeError(describe_bad(tokens, ", ".join(bad), hookpoint=hookpoint, step=step))
