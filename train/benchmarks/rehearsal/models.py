"""Writes the FLUX of a rehearsal: true widths, few blocks, random weights.

python -m train.benchmarks.rehearsal.models --out /somewhere/flux
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.prompts import load_prompts
from train.benchmarks.gpu.models import DEV, TINY, Scale, build_pipeline
from train.benchmarks.options import Model
from train.benchmarks.rehearsal.klein import KLEIN, KleinScale, build_klein
from train.prompts import BUNDLED_PROMPTS

N_BLOCKS = {"num_layers": 2, "num_single_layers": 2}
SCALES: dict[str, Scale | KleinScale] = {
    "flux1-dev": replace(
        DEV,
        transformer=DEV.transformer | N_BLOCKS,
        t5=DEV.t5 | {"num_layers": 1},
        settings=GenerationSettings(height=256, width=384, num_inference_steps=4),
    ),
    "flux2-klein": replace(KLEIN, transformer=KLEIN.transformer | N_BLOCKS),
    "tiny": replace(
        TINY,
        n_features=256,
        settings=GenerationSettings(height=64, width=96, num_inference_steps=4, max_sequence_length=16),
    ),
}
"""`tiny` is no model of anybody: it tries the rehearsal itself, in a minute."""
N_SPECIAL = 6
"""Of a vocabulary: padding, start, end, unknown, and the two speakers of a chat message."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which model, and where to."""

    out: Path
    """Folder for the pipeline, as diffusers saves it."""
    model: Model = "flux1-dev"
    """Whose dimensions."""


def main(config: Config) -> None:
    """Builds the pipeline in bfloat16 and saves it."""
    scale, device, dtype = SCALES[config.model], torch.device("cpu"), torch.bfloat16
    if isinstance(scale, KleinScale):
        build_klein(scale, device=device, dtype=dtype, words=known_words(scale)).save_pretrained(config.out)
    else:
        build_pipeline(scale, device=device, dtype=dtype, words=known_words(scale)).save_pretrained(config.out)


def known_words(scale: Scale | KleinScale) -> list[str]:
    """The words of the bundled prompts that fit the vocabularies, so that different prompts differ for the model."""
    words = re.findall(r"\w+|[^\w\s]+", "\n".join(load_prompts(BUNDLED_PROMPTS)))
    encoders = [scale.qwen] if isinstance(scale, KleinScale) else [scale.t5, scale.clip]
    room = min(encoder["vocab_size"] for encoder in encoders) - N_SPECIAL
    return list(dict.fromkeys(words))[:room]


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
