"""How an image is generated: everything beside the prompt and the seed that decides its pixels."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from fluxsae.errors import FluxSaeError

MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEQUENCE_LENGTH = 512
MAX_PROMPT_LENGTH = 2000


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of one generation; the defaults are FLUX.1-dev's own.

    Raises:
        FluxSaeError: a value of the wrong type or out of range.
    """

    height: int = 1024
    """Image height, pixels."""
    width: int = 1024
    """Image width, pixels."""
    num_inference_steps: int = 28
    """Denoising steps of the full schedule."""
    guidance_scale: float = 3.5
    """Distilled guidance, an input of the transformer (models without a guidance embedding ignore it)."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance with `negative_prompt`; 1 is off, above 1 the transformer runs twice a step."""
    negative_prompt: str = ""
    """What classifier-free guidance steers away from."""
    max_sequence_length: int = 512
    """Text tokens a prompt is padded or cut to."""

    def __post_init__(self) -> None:
        _check_integer("height", self.height, 1, MAX_SIDE)
        _check_integer("width", self.width, 1, MAX_SIDE)
        _check_integer("num_inference_steps", self.num_inference_steps, 1, MAX_STEPS)
        _check_number("guidance_scale", self.guidance_scale, 0.0, 100.0)
        _check_number("true_cfg_scale", self.true_cfg_scale, 1.0, 100.0)
        _check_integer("max_sequence_length", self.max_sequence_length, 1, MAX_SEQUENCE_LENGTH)
        if not isinstance(self.negative_prompt, str) or len(self.negative_prompt) > MAX_PROMPT_LENGTH:
            raise FluxSaeError(
                f"negative_prompt is {_describe(self.negative_prompt)}. "
                f"Allowed is text of at most {MAX_PROMPT_LENGTH} characters."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from `to_dict`'s form; what is left out takes its default.

        Raises:
            FluxSaeError: an unknown name, or a value out of range.
        """
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise FluxSaeError(f"Unknown generation settings {', '.join(unknown)}. Allowed are {', '.join(names)}.")
        return cls(**values)


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FluxSaeError(f"{name} is {_describe(value)}. Allowed is a whole number from {low} to {high}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FluxSaeError(f"{name} is {_describe(value)}. Allowed is a number from {low:g} to {high:g}.")
    if not low <= value <= high:
        raise FluxSaeError(f"{name} is {value}. Allowed is a number from {low:g} to {high:g}.")


def _describe(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({type(value).__name__})"
