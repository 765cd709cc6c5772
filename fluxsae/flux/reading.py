"""Pictures read by FLUX: encoded, noised to a step's level and passed through the transformer once."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from PIL.Image import Image

from fluxsae.errors import FluxSaeError
from fluxsae.flux.bad_numbers import check_finite
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.hooks import (
    BlockCall,
    Captured,
    StopGeneration,
    block_hooks,
    free_after_abort,
    parse_hookpoints,
    parse_steps,
)
from fluxsae.flux.latents import Snapshot, embed_prompts, encode_images, initial_noise, velocity
from fluxsae.flux.loading import default_settings
from fluxsae.flux.requests import check_channels, check_prompt, check_seed, check_text_length
from fluxsae.flux.schedules import build_schedule, check_step
from fluxsae.flux.settings import GenerationSettings

Value = TypeVar("Value", str, int)


@torch.no_grad()
def read_picture(
    pipe: Any,
    image: Image | Sequence[Image],
    *,
    prompt: str | Sequence[str] = "",
    hookpoints: Sequence[HookPoint | str],
    steps: Collection[int],
    seeds: int | Sequence[int] = 0,
    settings: GenerationSettings | None = None,
    sink: Callable[[BlockCall], object] | None = None,
) -> Captured:
    """The activations of a picture, or of several of one size: one pass a step, with the caption or without any.

    x_t = (1 - sigma) x0 + sigma noise, with the sigma of the step in the schedule at the picture's size. Each pass ends
    after the last wanted block. Steps are independent of each other: a step gives the same alone and among others.
    One prompt or seed serves all pictures; seed s draws the noise that `generate` starts from with seed s. With a
    `sink` each call goes there and nothing is held.

    Raises:
        FluxSaeError: a picture that is not RGB, a side off the patch, pictures of several sizes or of another size
            than `settings`, counts that differ, an overlong prompt, unknown hook points, a step outside the schedule;
            or, without a `sink`, activations that are NaN or infinite.
    """
    pictures = [image] if isinstance(image, Image) else list(image)
    settings = _sized_settings(pipe, pictures, settings)
    prompts, all_seeds = _spread(prompt, len(pictures), "prompts"), _spread(seeds, len(pictures), "seeds")
    wanted, chosen = parse_hookpoints(hookpoints), sorted(parse_steps(steps) or ())
    _check(pipe, prompts, all_seeds, chosen, settings)
    sigmas = build_schedule(pipe, settings).sigmas
    captured = Captured(wanted, {}, {step: float(sigmas[step]) for step in chosen})
    recorder = _PassRecorder(captured, sink)
    x0 = encode_images(pipe, pictures).float()
    embeddings = embed_prompts(pipe, prompts, settings)
    noise = initial_noise(pipe, all_seeds, settings)
    try:
        with block_hooks(pipe, dict.fromkeys(wanted, recorder.on_block)):
            for step in chosen:
                recorder.unseen = set(wanted)
                x_t = (1 - captured.sigma(step)) * x0 + captured.sigma(step) * noise.float()
                try:
                    velocity(pipe, x_t.to(noise.dtype), embeddings, step=step, settings=settings)
                except StopGeneration as stopped:
                    if stopped is not recorder.stop:  # somebody else's end of the run
                        raise
    finally:
        free_after_abort(pipe)
    return captured


@torch.no_grad()
def noised_picture(
    pipe: Any, image: Image, *, prompt: str, seed: int, settings: GenerationSettings, step: int
) -> Snapshot:
    """A picture with the noise of a step, from which `generate_from` paints on: what `read_picture` reads there.

    The later the step, the less noise, and the less of the picture can change.

    Raises:
        FluxSaeError: as `read_picture`.
    """
    settings = _sized_settings(pipe, [image], settings)
    _check(pipe, [prompt], [seed], [step], settings)
    sigma = float(build_schedule(pipe, settings).sigmas[step])
    noise = initial_noise(pipe, [seed], settings)
    latents = (1 - sigma) * encode_images(pipe, [image]).float() + sigma * noise.float()
    return Snapshot(latents.to(noise.dtype), step, settings, embed_prompts(pipe, [prompt], settings))


class _PassRecorder:
    """Takes the tokens of one pass and ends it when all wanted hook points have been seen."""

    def __init__(self, captured: Captured, sink: Callable[[BlockCall], object] | None) -> None:
        self.captured, self.sink = captured, sink
        self.unseen: set[HookPoint] = set()
        self.stop = StopGeneration()

    def on_block(self, call: BlockCall) -> None:
        if self.sink is not None:
            self.sink(call)
        else:
            names = [f"picture {number}" for number in range(len(call.tokens))]
            check_finite(call.tokens, names, hookpoint=call.hookpoint, step=call.step)
            self.captured.keep(call)
        self.unseen.discard(call.hookpoint)
        if not self.unseen:
            raise self.stop


def _sized_settings(pipe: Any, pictures: Sequence[Image], settings: GenerationSettings | None) -> GenerationSettings:
    """The settings at the pictures' size; classifier-free guidance is off, since one pass has no negative prompt."""
    if not pictures:
        raise FluxSaeError("No pictures given. Pass at least one.")
    modes = sorted({picture.mode for picture in pictures} - {"RGB"})
    if modes:
        raise FluxSaeError(
            f"A picture has the mode {', '.join(modes)}; FLUX reads RGB. Open picture files with "
            "fluxsae.pictures.open_picture, which also turns and sizes them, or call image.convert('RGB')."
        )
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        given = ", ".join(f"{width} x {height}" for width, height in sizes[:4])
        raise FluxSaeError(f"Pictures read together must have one size, these have {given}. Read them one by one.")
    width, height = sizes[0]
    if settings is not None and (settings.width, settings.height) != (width, height):
        raise FluxSaeError(
            f"The picture has {width} x {height} pixels and the settings say {settings.width} x {settings.height}. "
            "Crop it with fluxsae.pictures.fit_picture, or leave the settings out."
        )
    return replace(settings or default_settings(pipe), width=width, height=height, true_cfg_scale=1.0)


def _spread(given: Value | Sequence[Value], count: int, name: str) -> list[Value]:
    values = [given] * count if isinstance(given, str | int) else list(given)
    if len(values) != count:
        raise FluxSaeError(f"{count} pictures but {len(values)} {name}. Pass one for each picture, or one for all.")
    return values


def _check(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: Sequence[int],
    settings: GenerationSettings,
) -> None:
    check_channels(pipe.transformer.config)
    check_text_length(family_of(pipe).tokenizer(pipe), settings)
    for prompt in prompts:
        if prompt != "":
            check_prompt(prompt)
    for seed in seeds:
        check_seed(seed)
    for step in steps:
        check_step(step, settings)
