"""Images from FLUX: whole generations, generations restarted from a snapshot, and their schedule."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux.clock import TransformerCall, step_clock
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.hooks import StopGeneration, free_after_abort
from fluxsae.flux.latents import Snapshot, embed_prompts, image_by_image
from fluxsae.flux.loading import default_settings
from fluxsae.flux.pipelines import AnyFlux
from fluxsae.flux.requests import check_channels, check_request, check_text_length, words_outside
from fluxsae.flux.schedules import (
    build_grid,
    build_schedule,
    check_step,
    full_schedule,
    refuse_unrestartable,
)
from fluxsae.flux.settings import GenerationSettings
from fluxsae.flux.sharing import generating

OutputType = Literal["pil", "latent", "np"]
Images = list[Image] | Tensor | np.ndarray
OnStep = Callable[[int, int], None]


def token_grid(pipe: AnyFlux, settings: GenerationSettings) -> TokenGrid:
    """The grid of image tokens at these settings' size.

    Raises:
        FluxSaeError: a side is not a multiple of the model's patch.
    """
    return build_grid(pipe, settings)


def schedule_sigmas(pipe: AnyFlux, settings: GenerationSettings) -> list[float]:
    """The noise level of every step of the full schedule, descending, without the final 0."""
    return [float(sigma) for sigma in build_schedule(pipe, settings).sigmas]


def generate(
    pipe: AnyFlux,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int],
    settings: GenerationSettings | None = None,
    output_type: OutputType = "pil",
    on_step: OnStep | None = None,
) -> Images:
    """One image per (prompt, seed): a list of PIL images, an array, or packed latents.

    Each image's noise comes from its own CPU generator, so (prompt, seed) names the same image in any batch.
    `on_step(step, n_steps)` is called after each step and may raise to cancel.

    Raises:
        FluxSaeError: a blank or overlong prompt, seeds that do not fit, a size off the patch, before any model work.
    """
    settings = settings or default_settings(pipe)
    prompts, seeds = _check_all(pipe, prompts, seeds, settings)
    return _run(
        pipe,
        settings,
        output_type=output_type,
        on_step=on_step,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **family_of(pipe).call_prompts(pipe, prompts, settings),
    )


def denoise_to(
    pipe: AnyFlux,
    prompts: str | Sequence[str],
    *,
    seeds: int | Sequence[int],
    settings: GenerationSettings | None = None,
    step: int,
    on_step: OnStep | None = None,
) -> Snapshot:
    """Runs steps 0 to `step` - 1 and keeps what is needed to go on: the prefix that images edited later share.

    Raises:
        FluxSaeError: a step outside the schedule, or a scheduler that cannot restart.
    """
    settings = settings or default_settings(pipe)
    prompts, seeds = _check_all(pipe, prompts, seeds, settings)
    refuse_unrestartable(pipe)
    check_step(step, settings)
    embeddings = embed_prompts(pipe, prompts, settings)
    latents: list[Tensor] = []
    stop = StopGeneration()

    def keep_latents(call: TransformerCall) -> None:
        if call.step == step:
            latents.append(call.inputs["hidden_states"].detach().clone())
            raise stop

    try:
        with step_clock(pipe, keep_latents):
            _run(
                pipe,
                settings,
                output_type="latent",
                on_step=on_step,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                **family_of(pipe).call_embeddings(embeddings),
            )
    except StopGeneration as stopped:
        if stopped is not stop:
            raise
    return Snapshot(latents[0], step, settings, embeddings)


def generate_from(
    pipe: AnyFlux,
    snapshot: Snapshot,
    *,
    repeat: int = 1,
    output_type: OutputType = "pil",
    on_step: OnStep | None = None,
) -> Images:
    """The images that the snapshot's generation would have made, each `repeat` times in a row.

    Bit-equal to the unbroken generation at equal batch size. Hooks see the steps of the full schedule.

    Raises:
        FluxSaeError: a scheduler that cannot restart, or `repeat` below 1.
    """
    refuse_unrestartable(pipe)
    if repeat < 1:
        raise FluxSaeError(f"repeat={repeat}: allowed is a whole number from 1.")
    settings, n_steps = snapshot.settings, snapshot.settings.num_inference_steps
    latents, family = snapshot.latents.repeat_interleave(repeat, dim=0), family_of(pipe)
    with full_schedule(pipe, build_schedule(pipe, settings)):
        return _run(
            pipe,
            settings,
            output_type=output_type,
            on_step=on_step,
            first_step=snapshot.step,
            latents=family.call_latents(latents, build_grid(pipe, settings)),
            sigmas=np.linspace(1.0, 1 / n_steps, n_steps)[snapshot.step :],
            **family.call_embeddings(snapshot.embeddings.repeat(repeat)),
        )


def unread_tokens(pipe: AnyFlux, prompt: str, settings: GenerationSettings) -> int:
    """How many tokens of a prompt FLUX does not read, since they lie beyond `settings.max_sequence_length`."""
    return max(0, len(family_of(pipe).token_spans(pipe, prompt)) - settings.max_sequence_length)


def unknown_words(pipe: AnyFlux, prompt: str) -> list[str]:
    """The prompt's words that a word-level vocabulary (the miniature's) lacks, once each, in order.

    Empty for FLUX's own tokenizers, which spell any word from pieces.
    """
    return words_outside(family_of(pipe).tokenizer(pipe), prompt)


def _run(
    pipe: AnyFlux,
    settings: GenerationSettings,
    *,
    output_type: OutputType,
    on_step: OnStep | None,
    first_step: int = 0,
    **arguments: Any,
) -> Images:
    """One call of the pipeline at these settings; whatever ends it early, the pipeline is ready for the next."""
    if output_type not in ("pil", "latent", "np"):
        raise FluxSaeError(f"output_type={output_type!r}: allowed are 'pil', 'latent' and 'np'.")

    packed: list[Tensor] = []

    def after_step(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        packed[:] = [values["latents"]]
        if on_step is not None:
            on_step(first_step + index, settings.num_inference_steps)
        return values

    running = nullcontext() if isinstance(pipe, AnyFlux) else generating(pipe)
    try:
        with running, image_by_image(pipe):
            images: Images = pipe(
                output_type=output_type,
                callback_on_step_end=after_step,
                **{**family_of(pipe).call_settings(pipe, settings), **arguments},
            ).images
    except BaseException:
        free_after_abort(pipe)
        raise
    # FLUX.2's pipeline hands on unpacked latents.
    return packed[0] if output_type == "latent" else images


def _check_all(
    pipe: AnyFlux,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int],
    settings: GenerationSettings,
) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of equal length, everything checked that can be before the model works."""
    check_channels(pipe.transformer.config)
    build_schedule(pipe, settings)
    family_of(pipe).check(pipe, settings)
    check_text_length(family_of(pipe).tokenizer(pipe), settings)
    return check_request(prompts, seeds)
