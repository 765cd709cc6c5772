"""diffusers' pipelines whose plain call uses the model's own size, steps, guidance and text length."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import diffusers

from fluxsae.flux.families import family_of
from fluxsae.flux.models import SETTINGS_FILE
from fluxsae.flux.settings import GenerationSettings
from fluxsae.flux.sharing import generating


class _OwnSettings:
    """A pipeline that knows its settings: a model folder keeps them in `generation_settings.json`. Without them,
    diffusers' defaults hold.

    The classes below carry diffusers' names, so that a saved folder opens with diffusers alone.
    """

    generation_settings: GenerationSettings | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with this model's defaults."""
        call = super().__call__  # type: ignore[misc]
        if self.generation_settings is not None:
            given = inspect.signature(call).bind_partial(*args, **kwargs).arguments
            defaults = family_of(self).call_settings(self, self.generation_settings)
            kwargs |= {name: value for name, value in defaults.items() if name not in given}
        with generating(self):
            return call(*args, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As diffusers', with the generation settings beside the model."""
        super().save_pretrained(str(save_directory), **kwargs)  # type: ignore[misc]
        if self.generation_settings is not None:
            text = json.dumps(self.generation_settings.to_dict(), indent=2) + "\n"
            (Path(save_directory) / SETTINGS_FILE).write_text(text, encoding="utf-8")


class FluxPipeline(_OwnSettings, diffusers.FluxPipeline):  # type: ignore[misc]
    """FLUX.1."""


class Flux2KleinPipeline(_OwnSettings, diffusers.Flux2KleinPipeline):  # type: ignore[misc]
    """FLUX.2 klein and its base models."""


class Flux2Pipeline(_OwnSettings, diffusers.Flux2Pipeline):  # type: ignore[misc]
    """FLUX.2 dev."""


AnyFlux = FluxPipeline | Flux2KleinPipeline | Flux2Pipeline

PIPELINES: Final[Mapping[str, Mapping[str, type[AnyFlux]]]] = {
    "FLUX.1": {"FluxPipeline": FluxPipeline},
    "FLUX.2": {"Flux2KleinPipeline": Flux2KleinPipeline, "Flux2Pipeline": Flux2Pipeline},
}
"""By family, and by the class that a model folder names."""
