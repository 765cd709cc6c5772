"""Many edits of one image at little more than the price of one: shared text, shared steps, then one batch."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    Snapshot,
    decode_latents,
    default_settings,
    denoise_to,
    execution_device,
    flux_identity,
    generate_from,
    schedule_sigmas,
    token_grid,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.presets import measure_machine
from fluxsae.flux.settings import GenerationSettings
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import DirectionOf, EditedCall, check_edits, edit_window, steer
from fluxsae.steering.edits import Recipe, SaeSource, SteeringEdit

MAX_VARIANTS: Final = 64
MAX_BATCH: Final = 32
_MEMORY_SHARE: Final = 0.5
_LIVE_WIDTHS: Final = 24
"""Activations alive at the peak of one block, in multiples of the residual stream (q, k, v, MLP, their copies)."""

OnProgress = Callable[[int, int], None]
OnEdit = Callable[[EditedCall, int], None]
"""(what an edited call did, index of the variant that is item 0 of its batch)."""


@dataclass(frozen=True)
class Origin:
    """Where the models of a recipe come from, so that it can be followed elsewhere."""

    flux_id: str
    flux_revision: str | None = None
    saes: tuple[SaeSource, ...] = ()


@dataclass(frozen=True, eq=False)
class Variant:
    """One image of a sweep, with the recipe that makes it again."""

    image: Image.Image
    latents: Float[Tensor, "tokens channels"]
    """Packed latents, on the CPU."""
    recipe: Recipe

    @property
    def edits(self) -> tuple[SteeringEdit, ...]:
        """The edits of this image."""
        return self.recipe.edits


def strength_variants(
    edits: SteeringEdit | Sequence[SteeringEdit], strengths: Sequence[float]
) -> list[tuple[SteeringEdit, ...]]:
    """The edits at each strength, led by no edit at all.

    Raises:
        FluxSaeError: a strength out of the mode's range, or none given.
    """
    chosen = (edits,) if isinstance(edits, SteeringEdit) else tuple(edits)
    if not strengths:
        raise FluxSaeError("strengths is empty; give at least one number.")
    return [(), *(tuple(with_strength(edit, strength) for edit in chosen) for strength in strengths)]


def with_strength(edit: SteeringEdit, strength: float) -> SteeringEdit:
    """The same edit at another strength."""
    return SteeringEdit.from_dict({**edit.to_dict(), "strength": strength})


def sweep(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    variants: Sequence[Sequence[SteeringEdit]],
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings | None = None,
    snapshot: Snapshot | None = None,
    origin: Origin | None = None,
    max_batch: int | None = None,
    allow_mismatch: Collection[Mismatch] = (),
    direction_of: DirectionOf | None = None,
    on_edit: OnEdit | None = None,
    on_progress: OnProgress | None = None,
) -> list[Variant]:
    """One image a variant (a list of edits; the empty one is the baseline), all from one prompt and seed.

    The prompt is encoded once and the steps before the first edited one run once, at batch 1; from there the
    variants run in batches of at most `max_batch` (None: as many as fit into half of the free memory).
    With a `snapshot` (`noised_picture`) they paint on from there, and a recipe does not make the images again.
    `on_progress(done, total)` counts steps and may raise to cancel.

    Raises:
        FluxSaeError: no or too many variants, or an edit that does not fit, before any model work.
    """
    settings = settings or default_settings(pipe)
    _check_variants(pipe, saes, variants, settings, allow_mismatch=allow_mismatch)
    size = batch_within_memory(pipe, settings) if max_batch is None else max_batch
    if size < 1:
        raise FluxSaeError(f"max_batch is {max_batch}; it is a whole number of at least 1.")
    first_step = first_edited_step(pipe, saes, variants, settings) if snapshot is None else snapshot.step
    batches = equal_batches(variants, size)
    n_shared = first_step if snapshot is None else 0
    clock = _Progress(on_progress, n_shared, settings.num_inference_steps - first_step, len(batches))
    if snapshot is None:
        snapshot = denoise_to(pipe, prompt, seeds=seed, settings=settings, step=first_step, on_step=clock.prefix_step)
    found: list[Variant] = []
    for batch in batches:
        recipe = _recipe(
            pipe, origin, prompt=prompt, seed=seed, settings=settings, batch=batch, shared_steps=first_step
        )
        with steer(
            pipe,
            saes,
            batch,
            settings=settings,
            allow_mismatch=allow_mismatch,
            direction_of=_shifted_direction(direction_of, len(found)),
            on_edit=_shifted_record(on_edit, len(found)),
        ):
            latents = generate_from(pipe, snapshot, repeat=len(batch), output_type="latent", on_step=clock.batch_step)
        assert isinstance(latents, Tensor)
        found += [
            Variant(_decoded(pipe, latents[index], settings), latents[index].cpu(), replace(recipe, index=index))
            for index in range(min(len(batch), len(variants) - len(found)))
        ]
    return found


def equal_batches(variants: Sequence[Sequence[SteeringEdit]], size: int) -> list[tuple[tuple[SteeringEdit, ...], ...]]:
    """The variants in batches of one size, at most `size`; the last one is filled up with unedited images.

    In bfloat16 a batch of another size changes pixels, so images that are compared come from batches of one size.
    """
    even = math.ceil(len(variants) / math.ceil(len(variants) / size))
    filled = [*map(tuple, variants), *[()] * (-len(variants) % even)]
    return [tuple(filled[start : start + even]) for start in range(0, len(filled), even)]


def reproduce(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    recipe: Recipe,
    *,
    allow_mismatch: Collection[Mismatch] = (),
    on_progress: OnProgress | None = None,
) -> Variant:
    """The image of a recipe: bit for bit on the machine that wrote it, since batch and shared steps are repeated."""
    settings, step = recipe.settings, recipe.shared_steps
    _check_recipe(pipe, saes, recipe, allow_mismatch)
    check_edits(pipe, saes, recipe.batch, settings=settings, allow_mismatch=allow_mismatch)
    clock = _Progress(on_progress, step, settings.num_inference_steps - step, 1)
    snapshot = denoise_to(
        pipe, recipe.prompt, seeds=recipe.seed, settings=settings, step=step, on_step=clock.prefix_step
    )
    with steer(pipe, saes, recipe.batch, settings=settings, allow_mismatch=allow_mismatch):
        latents = generate_from(
            pipe, snapshot, repeat=len(recipe.batch), output_type="latent", on_step=clock.batch_step
        )
    assert isinstance(latents, Tensor)
    own = latents[recipe.index]
    return Variant(_decoded(pipe, own, settings), own.cpu(), recipe)


def _check_recipe(
    pipe: Any, saes: Mapping[HookPoint, SparseAutoencoder], recipe: Recipe, allow_mismatch: Collection[Mismatch]
) -> None:
    found = recipe.differences(flux_identity(pipe), {str(place): sae.fingerprint for place, sae in saes.items()})
    refused = [name for name in found if name not in allow_mismatch]
    if refused:
        raise FluxSaeError(
            f"The recipe was made elsewhere: {'; '.join(found[name] for name in refused)}. Open the same FLUX "
            f"and SAEs, or allow what differs by name: {', '.join(refused)} (allow_mismatch)."
        )


def first_edited_step(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    variants: Sequence[Sequence[SteeringEdit]],
    settings: GenerationSettings,
) -> int:
    """The first step at which any variant is edited; the last step where none is."""
    sigmas = schedule_sigmas(pipe, settings)
    windows = [edit_window(edit, saes[edit.hookpoint], sigmas) for edits in variants for edit in edits]
    starts = [start for start, stop in windows if start < stop]
    return min(starts, default=len(sigmas) - 1)


def batch_within_memory(pipe: Any, settings: GenerationSettings, *, free_bytes: int | None = None) -> int:
    """How many images fit side by side into half of the free memory (of the pipeline's device), 1 to `MAX_BATCH`."""
    config = pipe.transformer.config
    tokens = token_grid(pipe, settings).n_tokens + settings.max_sequence_length
    width = config.num_attention_heads * config.attention_head_dim
    one_image = tokens * width * _LIVE_WIDTHS * pipe.transformer.dtype.itemsize
    free = measure_machine(execution_device(pipe)).free if free_bytes is None else free_bytes
    return max(1, min(MAX_BATCH, int(free * _MEMORY_SHARE / one_image)))


@dataclass
class _Progress:
    """Steps done of all steps to do: the shared ones once, the rest once a batch."""

    report: OnProgress | None
    n_shared: int
    n_own: int
    n_batches: int
    done: int = 0

    def prefix_step(self, step: int, n_steps: int) -> None:
        self.done += 1
        if self.report is not None:
            self.report(self.done, self.n_shared + self.n_batches * self.n_own)

    batch_step = prefix_step


def _check_variants(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    variants: Sequence[Sequence[SteeringEdit]],
    settings: GenerationSettings,
    *,
    allow_mismatch: Collection[Mismatch],
) -> None:
    if not 1 <= len(variants) <= MAX_VARIANTS:
        raise FluxSaeError(f"{len(variants)} variants were given; allowed are 1 to {MAX_VARIANTS} in one sweep.")
    check_edits(pipe, saes, [list(edits) for edits in variants], settings=settings, allow_mismatch=allow_mismatch)


def _decoded(pipe: Any, latents: Tensor, settings: GenerationSettings) -> Image.Image:
    # One by one: the autoencoder is the memory peak at 1024 px, and an image must not depend on its neighbours.
    return decode_latents(pipe, latents[None], settings)[0]


def _recipe(
    pipe: Any,
    origin: Origin | None,
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings,
    batch: tuple[tuple[SteeringEdit, ...], ...],
    shared_steps: int,
) -> Recipe:
    identity = flux_identity(pipe)
    origin = origin or Origin(identity.flux_id, identity.revision)
    return Recipe(
        prompt=prompt,
        seed=seed,
        settings=settings,
        flux_id=origin.flux_id,
        flux_revision=origin.flux_revision,
        saes=origin.saes,
        batch=batch,
        shared_steps=shared_steps,
        dtype=str(pipe.transformer.dtype).removeprefix("torch."),
        device=execution_device(pipe).type,
        flux_weights=identity.weights,
        adapters=identity.adapters,
        is_exact=identity.is_exact,
    )


def _shifted_direction(direction_of: DirectionOf | None, first: int) -> DirectionOf | None:
    if direction_of is None:
        return None
    return lambda edit, item: direction_of(edit, item + first)


def _shifted_record(on_edit: OnEdit | None, first: int) -> Callable[[EditedCall], None] | None:
    return None if on_edit is None else lambda call: on_edit(call, first)
