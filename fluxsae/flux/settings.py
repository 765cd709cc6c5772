"""How an image is generated: everything beside the prompt and the seed that decides its pixels."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field

from fluxsae.checked import checked

MAX_SIDE = 4096
MAX_STEPS = 1000
MAX_SEQUENCE_LENGTH = 512
MAX_PROMPT_LENGTH = 2000


@checked()
class GenerationSettings:
    """The settings of one generation; the defaults are FLUX.1-dev's own.

    Raises:
        FluxSaeError: a value of the wrong type or out of range.
    """

    height: Annotated[int, Field(ge=1, le=MAX_SIDE)] = 1024
    """Image height, pixels."""
    width: Annotated[int, Field(ge=1, le=MAX_SIDE)] = 1024
    """Image width, pixels."""
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 28
    """Denoising steps of the full schedule."""
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 3.5
    """Distilled guidance, an input of the transformer (models without a guidance embedding ignore it)."""
    true_cfg_scale: Annotated[float, Field(ge=1, le=100)] = 1.0
    """Classifier-free guidance with `negative_prompt`; 1 is off, above 1 the transformer runs twice a step."""
    negative_prompt: Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)] = ""
    """What classifier-free guidance steers away from."""
    max_sequence_length: Annotated[int, Field(ge=1, le=MAX_SEQUENCE_LENGTH)] = 512
    """Text tokens a prompt is padded or cut to."""

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from `to_dict`'s form; what is left out takes its default.

        Raises:
            FluxSaeError: an unknown name, or a value out of range.
        """
        return cls(**values)
