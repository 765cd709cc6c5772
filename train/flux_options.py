"""Flags that every script which runs FLUX shares, and what they open."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.prompts import load_prompts, sample_prompts

BUNDLED_PROMPTS = Path(__file__).parent / "prompts.txt"
Purpose = Literal["collect", "score"]


@dataclass(frozen=True, kw_only=True)
class FluxOptions:
    """Which FLUX, and how it generates."""

    flux: str = "miniature"
    """`miniature`, a local folder, or a Hub repository such as black-forest-labs/FLUX.1-dev."""
    revision: str | None = None
    """Commit or tag of the Hub repository."""
    device: str | None = None
    """cuda, mps or cpu; left out, the best that is there."""
    preset: Literal["full", "offload", "int8", "nf4"] | None = None
    """How FLUX is held in memory; left out, chosen from the free memory."""
    allow_inexact: bool = False
    """Accept a quantised or cached FLUX, whose activations are not the model's own; recorded in the run."""
    height: int | None = None
    """Image height, pixels; left out, the model's own."""
    width: int | None = None
    """Image width, pixels; left out, the model's own."""
    num_inference_steps: int | None = None
    """Steps of the schedule; left out, the model's own."""
    guidance_scale: float | None = None
    """Distilled guidance; left out, the model's own."""
    prompts: Path | None = None
    """Prompt file (.txt, .csv, .parquet); left out, the bundled prompts, or drawn scenes for the miniature."""
    prompt_column: str = "prompt"
    """Column of a .csv or .parquet prompt file."""
    seed: int = 0
    """Decides prompts, noise and everything else that is random."""

    def open(self) -> Any:
        """The FLUX pipeline.

        Raises:
            FluxSaeError: no such model, no room for it, or its activations would not be its own.
        """
        from fluxsae.flux import load_flux, why_inexact

        pipe = load_flux(self.flux, revision=self.revision, device=self.device, preset=self.preset)
        reason = why_inexact(pipe)
        if reason is not None and not self.allow_inexact:
            raise FluxSaeError(
                f"The activations of this FLUX are not the model's own: {reason}. "
                "Choose --preset full or offload, or pass --allow-inexact, which the run then records."
            )
        return pipe

    def settings(self, pipe: Any) -> GenerationSettings:
        """The model's own settings with what was asked for."""
        from fluxsae.flux import default_settings

        asked = {name: getattr(self, name) for name in ("height", "width", "num_inference_steps", "guidance_scale")}
        given = {name: value for name, value in asked.items() if value is not None}
        return GenerationSettings(**{**asdict(default_settings(pipe)), **given})

    def load_prompts(self, count: int, purpose: Purpose) -> list[str]:
        """`count` prompts of one purpose: from the file, or captions of drawn scenes for the miniature."""
        if self.prompts is None and self.flux == "miniature":
            return draw_captions(count, seed=self.seed, purpose=purpose)
        prompts = load_prompts(self.prompts or BUNDLED_PROMPTS, column=self.prompt_column)
        return sample_prompts(prompts, count, seed=2 * self.seed + (purpose == "score"))

    def identity(self) -> dict[str, Any]:
        """The values that decide what is generated, as plain JSON values."""
        names = (
            "flux",
            "revision",
            "height",
            "width",
            "num_inference_steps",
            "guidance_scale",
            "prompt_column",
            "seed",
        )
        return {**{name: getattr(self, name) for name in names}, "prompts": str(self.prompts) if self.prompts else None}


def draw_captions(count: int, *, seed: int, purpose: Purpose) -> list[str]:
    """Captions of random scenes of the miniature's world."""
    from fluxsae.miniature.scenes import caption_scene, sample_scene

    rng = np.random.default_rng([seed, ("collect", "score").index(purpose)])
    return [caption_scene(sample_scene(rng), rng) for _ in range(count)]


def default_hookpoints(pipe: Any) -> list[HookPoint]:
    """The `ff` of an early and a late double-stream block: layers 5 and 15 of FLUX.1's 19.

    The miniature's bundled recipe names its own.
    """
    n_blocks = len(pipe.transformer.transformer_blocks)
    return [HookPoint.parse(f"layer{n_blocks * block // 19}") for block in (5, 15)]


def default_steps(settings: GenerationSettings) -> list[int]:
    """Five steps spread over the schedule: 2, 6, 10, 14, 18 of 20."""
    return sorted({settings.num_inference_steps * part // 10 for part in (1, 3, 5, 7, 9)})


def open_flux(asked: str | None, recorded: str, revision: str | None, *, device: str | None, dtype: Any = None) -> Any:
    """The FLUX that was asked for, or else the one that a run or recipe records, at the revision it records."""
    from fluxsae.flux import load_flux

    return load_flux(asked or recorded, revision=None if asked else revision, device=device, dtype=dtype)
