"""The miniature's parts, untrained: tokenizer, text encoders, transformer, autoencoder, CLIP."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from open_clip.model import CLIP
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature.captions import folds, vocabulary
from fluxsae.miniature.grounds import IMAGE_SIZE

TEXT_TOKENS = 24
"""Length of every tokenised prompt."""
PAD, UNKNOWN, START, END = "[pad]", "[unknown]", "[start]", "[end]"
SPECIAL = (PAD, UNKNOWN, START, END)
END_ID = SPECIAL.index(END)
TEXT_WIDTH = 64
LATENT_CHANNELS = 16

SETTINGS = GenerationSettings(
    height=IMAGE_SIZE,
    width=IMAGE_SIZE,
    num_inference_steps=20,
    guidance_scale=3.5,
    max_sequence_length=TEXT_TOKENS,
)
"""How the miniature is meant to be run; travels with its weights."""

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    # A small ResNet: a transformer of this size was right about half of the things after as many pictures.
    "vision_cfg": {"image_size": IMAGE_SIZE, "width": 16, "layers": [1, 1, 1, 1], "head_width": 64},
    "text_cfg": {
        "context_length": TEXT_TOKENS,
        "vocab_size": 64,
        "width": 64,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": END_ID,
        "hf_tokenizer_name": ".",
    },
}
CLIP_PREPROCESSING = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the miniature's language: folds known forms and ends every prompt with `[end]`."""
    ids = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    replacing = [normalizers.Replace(Regex(pattern), known) for pattern, known in folds()]
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), *replacing])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, END_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        model_max_length=TEXT_TOKENS,
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids (captions, TEXT_TOKENS) as uint8, padded as the pipeline pads them."""
    ids = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    padded: torch.Tensor = ids.input_ids
    return padded.to(torch.uint8)


def build_text_encoder(vocab_size: int) -> CLIPTextModel:
    """The encoder whose pooled output tells the transformer the gist of the prompt."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            eos_token_id=END_ID,
            bos_token_id=SPECIAL.index(START),
            pad_token_id=0,
        )
    )


def build_text_encoder_2(vocab_size: int) -> T5EncoderModel:
    """The encoder whose tokens the transformer attends to."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 4,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=END_ID,
            is_encoder_decoder=False,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """4 double-stream and 4 single-stream blocks of width 128, guidance embedding on."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def build_autoencoder() -> AutoencoderTiny:
    """A convolutional autoencoder without norms: 8 times smaller in each direction, 16 latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 2, 2),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=LATENT_CHANNELS,
    )


def build_generator() -> nn.ModuleDict:
    """All that is trained together to turn noise and words into latents."""
    vocab_size = len(build_tokenizer())
    return nn.ModuleDict(
        {
            "transformer": build_transformer(),
            "text_encoder": build_text_encoder(vocab_size),
            "text_encoder_2": build_text_encoder_2(vocab_size),
        }
    )


def load_autoencoder(folder: Path) -> AutoencoderTiny:
    """The autoencoder of a pipeline folder, in fp32."""
    autoencoder: AutoencoderTiny = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return autoencoder


def load_generator(folder: Path) -> nn.ModuleDict:
    """Transformer and text encoders of a pipeline folder, in fp32.

    Raises:
        FluxSaeError: its tokenizer knows other words.
    """
    if PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer").get_vocab() != build_tokenizer().get_vocab():
        raise FluxSaeError(f"{folder} was trained on other words. Leave --origin out, to begin with fresh weights.")
    kinds = {"transformer": FluxTransformer2DModel, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    parts = {name: kind.from_pretrained(folder / name, torch_dtype=torch.float32) for name, kind in kinds.items()}
    return nn.ModuleDict(parts)


def build_clip() -> CLIP:
    """A small CLIP of open_clip's own class."""
    towers = {name: CLIP_CONFIG[name] for name in ("embed_dim", "vision_cfg", "text_cfg")}
    return open_clip.model.CLIP(**towers)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps, their noise levels shifted up as FLUX shifts them for large images: the words decide there."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)


def assemble_pipeline(generator: nn.ModuleDict, autoencoder: AutoencoderTiny) -> FluxPipeline:
    """A FluxPipeline of the trained parts, in fp32."""
    tokenizer = build_tokenizer()
    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=autoencoder,
        text_encoder=generator["text_encoder"],
        tokenizer=tokenizer,
        text_encoder_2=generator["text_encoder_2"],
        tokenizer_2=tokenizer,
        transformer=generator["transformer"],
    )


def save_flux(pipe: FluxPipeline, folder: Path) -> None:
    """Write the pipeline folder: transformer and autoencoder in fp16, the tiny text encoders in fp32.

    Text encoders load in the precision they were saved in, whatever the transformer's is; fp32 fits any. The folders
    that the parts came from are not written.
    """
    for part in (pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path="")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.config._name_or_path = ""
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder)
    pipe.transformer.float()
    pipe.vae.float()
    (folder / "generation_settings.json").write_text(json.dumps(SETTINGS.to_dict(), indent=2) + "\n")
