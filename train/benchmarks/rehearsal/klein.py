"""FLUX.2 klein as an architecture: the whole pipeline with random weights, built without a download."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from fluxsae.flux import Flux2KleinPipeline
from fluxsae.flux.settings import GenerationSettings
from train.benchmarks.gpu.models import filled, word_tokenizer

CHAT_TEMPLATE = "user {{ messages[0]['content'] }}{% if add_generation_prompt %} assistant{% endif %}"


@dataclass(frozen=True)
class KleinScale:
    """Sizes of a pipeline, and of the SAEs of its rehearsal."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    qwen: dict[str, Any]
    settings: GenerationSettings
    n_features: int
    k: int


# As in the configuration files of black-forest-labs/FLUX.2-klein-4B; of the language model, the width that the
# transformer reads (three times 2560) and the layers up to the last that is read are the real ones, all else is small.
KLEIN = KleinScale(
    transformer={
        "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 7680, "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000, "guidance_embeds": False,
    },
    vae={},
    qwen={
        "vocab_size": 8192, "hidden_size": 2560, "intermediate_size": 256, "num_hidden_layers": 28,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "tie_word_embeddings": True,
    },
    settings=GenerationSettings(height=256, width=384, num_inference_steps=4, guidance_scale=0.0),
    n_features=12_288, k=64,
)  # fmt: skip


def build_klein(
    scale: KleinScale, *, device: torch.device, dtype: torch.dtype, words: Sequence[str], seed: int = 0
) -> Flux2KleinPipeline:
    """The distilled Flux2KleinPipeline of this scale on the device; `words` are those that its tokenizer knows."""
    generator = torch.Generator(device).manual_seed(seed)
    tokenizer = word_tokenizer(["user", "assistant", *words], scale.settings.max_sequence_length)
    tokenizer.chat_template = CHAT_TEMPLATE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = Qwen3ForCausalLM(Qwen3Config(**scale.qwen)).to(device, dtype).eval()
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=filled(lambda: AutoencoderKLFlux2(**scale.vae), generator, dtype),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=filled(lambda: Flux2Transformer2DModel(**scale.transformer), generator, dtype),
        is_distilled=True,
    )
    pipe.generation_settings = scale.settings
    pipe.set_progress_bar_config(disable=True)
    return pipe
