"""A random FluxPipeline of real classes that needs no download: for tests that ask how, not how well."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fluxsae.flux import FluxPipeline
from fluxsae.flux.settings import GenerationSettings

COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
SHAPES = ["circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart", "shape"]
OTHERS = ["large", "small", "striped", "dotted", "solid", "left", "right", "top", "bottom", "center", "background"]
WORDS = ["a", "an", "and", "on", "in", "at", "the", *COLOURS, *SHAPES, *OTHERS, "black", "white", "gray", "brown"]
N_DOUBLE, N_SINGLE, D_MODEL, N_TEXT = 3, 2, 32, 8
SETTINGS = GenerationSettings(height=32, width=32, num_inference_steps=4, max_sequence_length=N_TEXT)


def build_tokenizer(words: Sequence[str] = WORDS, *, max_length: int = N_TEXT) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer with one token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<bos>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


def build_tiny_flux(seed: int = 0, *, scheduler: dict[str, Any] | None = None, **transformer: Any) -> FluxPipeline:
    """A pipeline with random weights: 3 double and 2 single blocks, width 32, patch 8 px, 32 x 32 px in 4 steps."""
    arguments = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": N_DOUBLE,
        "num_single_layers": N_SINGLE,
        "attention_head_dim": 16,
        "num_attention_heads": D_MODEL // 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "axes_dims_rope": (4, 4, 8),
        "guidance_embeds": True,
    }
    n_words = len(WORDS) + 4
    clip = CLIPTextConfig(
        vocab_size=n_words, hidden_size=20, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=N_TEXT, pad_token_id=0, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=n_words, d_model=24, d_kv=8, d_ff=48, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=3
    )
    flow = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderTiny(
            latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
        )  # fmt: skip
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(**{**flow, **(scheduler or {})}),
            vae=vae.eval(),
            text_encoder=CLIPTextModel(clip).eval(),
            tokenizer=build_tokenizer(),
            text_encoder_2=T5EncoderModel(t5).eval(),
            tokenizer_2=build_tokenizer(),
            transformer=FluxTransformer2DModel(**{**arguments, **transformer}).eval(),
        )
    pipe.generation_settings = SETTINGS
    pipe.set_progress_bar_config(disable=True)
    return pipe
