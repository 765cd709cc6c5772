"""A random FLUX.2 klein of real classes that needs no download: for tests that ask how, not how well."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from tiny_flux import WORDS, build_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fluxsae.flux import Flux2KleinPipeline, Flux2Pipeline
from fluxsae.flux.settings import GenerationSettings

N_DOUBLE, N_SINGLE, D_MODEL, N_TEXT, PATCH = 2, 3, 32, 12, 8
SETTINGS = GenerationSettings(
    height=32, width=48, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=N_TEXT
)
TEMPLATE = "user {{ messages[0]['content'] }}{% if add_generation_prompt %} assistant{% endif %}"
DEV_TEMPLATE = "{% for message in messages %}{{ message['content'][0]['text'] }} {% endfor %}"
N_LAYERS = 31
"""klein's prompt embeddings are the hidden states 9, 18 and 27, dev's 10, 20 and 30."""


def build_chat_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word, and a chat template."""
    tokenizer = build_tokenizer(["user", "assistant", *words], max_length=N_TEXT)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_text_encoder(n_words: int) -> Qwen3ForCausalLM:
    """A language model of klein's kind, 8 wide."""
    config = Qwen3Config(
        vocab_size=n_words, hidden_size=8, intermediate_size=16, num_hidden_layers=N_LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def build_tiny_flux2(seed: int = 0, *, is_distilled: bool = True, **transformer: Any) -> Flux2KleinPipeline:
    """A pipeline with random weights: 2 double and 3 single blocks, width 32, patch 8 px, 32 x 48 px in 4 steps."""
    arguments = {
        "in_channels": 16,
        "num_layers": N_DOUBLE,
        "num_single_layers": N_SINGLE,
        "attention_head_dim": 16,
        "num_attention_heads": D_MODEL // 16,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_guidance_channels": 16,
        "guidance_embeds": False,
    }
    tokenizer = build_chat_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=32,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=vae.eval(),
            text_encoder=build_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(**{**arguments, **transformer}).eval(),
            is_distilled=is_distilled,
        )
    pipe.generation_settings = SETTINGS
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_tiny_flux2_dev() -> Flux2Pipeline:
    """The same with distilled guidance, in dev's pipeline: another chat message, other layers of the text encoder."""
    parts = build_tiny_flux2(guidance_embeds=True).components
    parts.pop("is_distilled", None)
    parts["tokenizer"].chat_template = DEV_TEMPLATE
    pipe = Flux2Pipeline(**parts)
    pipe.system_message = "the"
    pipe.generation_settings = replace(SETTINGS, guidance_scale=4.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe
