"""FLUX.1-dev as an architecture: the whole pipeline with random weights, built on the device without a download."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from fluxsae.flux import FluxPipeline
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings

WORDS = ("a", "red", "blue", "circle", "star")


@dataclass(frozen=True)
class Scale:
    """Sizes of a pipeline and of what is measured on it."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    settings: GenerationSettings
    n_features: int
    k: int
    large_k: int
    hookpoints: tuple[str, str]
    captured_step: int
    training_tokens: int
    product_side: int

    @property
    def first(self) -> HookPoint:
        """The earlier hook point."""
        return HookPoint.parse(self.hookpoints[0])

    @property
    def second(self) -> HookPoint:
        """The later hook point."""
        return HookPoint.parse(self.hookpoints[1])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.transformer["attention_head_dim"] * self.transformer["num_attention_heads"])

    @property
    def n_blocks(self) -> int:
        """Blocks of both kinds."""
        return int(self.transformer["num_layers"] + self.transformer["num_single_layers"])


# As in the configuration files of black-forest-labs/FLUX.1-dev.
DEV = Scale(
    transformer={
        "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    vae={
        "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
        "norm_num_groups": 32, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
    clip={
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "projection_dim": 768,
    },
    t5={
        "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    },
    settings=GenerationSettings(),
    n_features=12288, k=64, large_k=1200, hookpoints=("layer5", "layer15"), captured_step=13, training_tokens=8192,
    product_side=8192,
)  # fmt: skip

TINY = Scale(
    transformer={
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
    vae={
        "block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": 4, "sample_size": 32,
        "norm_num_groups": 4, "scaling_factor": 0.3611, "shift_factor": 0.1159,
    },
    clip={
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 16, "projection_dim": 32,
    },
    t5={
        "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    },
    settings=GenerationSettings(height=32, width=32, num_inference_steps=4, max_sequence_length=16),
    n_features=64, k=4, large_k=32, hookpoints=("layer0", "layer1"), captured_step=2, training_tokens=64,
    product_side=128,
)  # fmt: skip


def build_pipeline(
    scale: Scale, *, device: torch.device, dtype: torch.dtype, seed: int = 0, words: Sequence[str] = WORDS
) -> FluxPipeline:
    """The whole FluxPipeline of this scale on the device: shapes first, on the meta device, then random weights.

    `words` are those that its tokenizers know.
    """
    n = len(scale.vae["block_out_channels"])
    vae = {
        **scale.vae, "use_quant_conv": False, "use_post_quant_conv": False,
        "down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n,
    }  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    generator = torch.Generator(device).manual_seed(seed)

    def fill(build: Callable[[], nn.Module]) -> Any:
        return filled(build, generator, dtype)

    flow = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**flow),
        vae=fill(lambda: AutoencoderKL(**vae)),
        text_encoder=fill(lambda: CLIPTextModel(CLIPTextConfig(**scale.clip, **special))),
        tokenizer=word_tokenizer(words, scale.clip["max_position_embeddings"]),
        text_encoder_2=fill(lambda: T5EncoderModel(T5Config(**scale.t5, pad_token_id=0, eos_token_id=2))),
        tokenizer_2=word_tokenizer(words, scale.settings.max_sequence_length),
        transformer=fill(lambda: FluxTransformer2DModel(**scale.transformer)),
    )
    pipe.generation_settings = scale.settings
    pipe.set_progress_bar_config(disable=True)
    return pipe


def filled(build: Callable[[], nn.Module], generator: torch.Generator, dtype: torch.dtype) -> nn.Module:
    """A module with random weights on the generator's device; its shapes are built on the meta device first."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=generator.device).eval().requires_grad_(False)
    if isinstance(module, PreTrainedModel):
        module.tie_weights()  # what shares its memory has lost it on the way
    for name, parameter in module.named_parameters():
        _fill_parameter(name, parameter, generator)
    for name, buffer in module.named_buffers():
        _fill_buffer(name, buffer)
    return module


def _fill_buffer(name: str, buffer: Tensor) -> None:
    """Positions count up; a batch norm changes nothing."""
    if name.endswith("position_ids"):
        buffer.copy_(torch.arange(buffer.numel(), device=buffer.device).reshape(buffer.shape))
    else:
        buffer.fill_({"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}[name.rpartition(".")[2]])


def _fill_parameter(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Weights that keep the size of what passes through, norms of 1, biases of 0: no value overflows on the way."""
    if parameter.ndim >= 2:
        parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def word_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, pad_token="<pad>", unk_token="<unk>",
        bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip


def parameter_count(scale: Scale) -> int:
    """Parameters of this scale's transformer, counted on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**scale.transformer)
    return sum(parameter.numel() for parameter in transformer.parameters())
