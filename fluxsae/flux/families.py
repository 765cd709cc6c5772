"""What tells one family of FLUX from another, one class a family: all that the rest of the package asks of a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import diffusers
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import BlockKind, HookPoint, Layout, Submodule, TokenGrid
from fluxsae.flux.settings import GenerationSettings


@dataclass(frozen=True, eq=False)
class Embeddings:
    """Encoded prompts: token embeddings, pooled embeddings (none wide in FLUX.2), and the negative prompt's, if any."""

    prompt: Float[Tensor, "batch text d_text"]
    pooled: Float[Tensor, "batch d_pooled"]
    negative_prompt: Float[Tensor, "batch text d_text"] | None = None
    negative_pooled: Float[Tensor, "batch d_pooled"] | None = None

    def repeat(self, n: int) -> "Embeddings":
        """Every item n times in a row."""
        copies = [
            None if part is None else repeat(part, "batch ... -> (batch n) ...", n=n)
            for part in (self.prompt, self.pooled, self.negative_prompt, self.negative_pooled)
        ]
        return Embeddings(*copies)  # type: ignore[arg-type]


Latents = Float[Tensor, "batch tokens channels"]
Gate = tuple[nn.Module, Callable[[Any], Tensor]]
"""A module, and what takes the gate (batch, d_model) out of its output."""


class Family(ABC):
    """One family of FLUX models. `pipe` is always a diffusers pipeline around one of its transformers."""

    name: ClassVar[str]
    transformer: ClassVar[str]
    """Name of the transformer's class in diffusers."""
    layouts: ClassVar[Mapping[tuple[BlockKind, Submodule], Layout]]
    """How diffusers 0.42 lays out the output of each module that can be hooked."""

    def layout(self, hookpoint: HookPoint) -> Layout:
        """How a hooked module lays out its output.

        Raises:
            FluxSaeError: this family has no such module.
        """
        key = (hookpoint.block_kind, hookpoint.submodule)
        if key not in self.layouts:
            known = [HookPoint(kind, hookpoint.block_index, name).path for kind, name in self.layouts if kind == key[0]]
            raise FluxSaeError(f"{self.name} has no {hookpoint.path}. Allowed are {', '.join(known)}.")
        return self.layouts[key]

    @abstractmethod
    def width(self, pipe: Any, hookpoint: HookPoint) -> int:
        """d_model of a hook point's activations."""

    @abstractmethod
    def gate(self, pipe: Any, hookpoint: HookPoint) -> Gate | None:
        """What scales a hook point's output before it is added to the residual stream; None where nothing does."""

    @abstractmethod
    def default_settings(self, pipe: Any, *, flux_id: str) -> GenerationSettings:
        """What a model whose folder says nothing generates with."""

    @abstractmethod
    def check(self, pipe: Any, settings: GenerationSettings) -> None:
        """Raises a FluxSaeError for settings that this model cannot run."""

    @abstractmethod
    def check_call(self, inputs: Mapping[str, Any]) -> None:
        """Raises a FluxSaeError for a call of the transformer whose tokens are not laid out as `layouts` say."""

    @abstractmethod
    def mu(self, pipe: Any, *, n_tokens: int, n_steps: int) -> float:
        """The shift of the schedule's noise levels."""

    @abstractmethod
    def tokenizer(self, pipe: Any) -> Any:
        """The tokenizer of the text tokens that the transformer reads, or None."""

    @abstractmethod
    def token_spans(self, pipe: Any, prompt: str) -> list[tuple[int, int]]:
        """Where each text token stands in the prompt, in characters; (0, 0) for those that are not of its text."""

    @abstractmethod
    def embed(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
        """The prompts through the text encoders, with the negative prompt where `true_cfg_scale` is above 1."""

    @abstractmethod
    def call_settings(self, pipe: Any, settings: GenerationSettings) -> dict[str, Any]:
        """The settings as arguments of the pipeline's call."""

    @abstractmethod
    def call_prompts(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> dict[str, Any]:
        """The prompts as arguments of the pipeline's call."""

    @abstractmethod
    def call_embeddings(self, embeddings: Embeddings) -> dict[str, Any]:
        """Encoded prompts as arguments of the pipeline's call."""

    @abstractmethod
    def call_latents(self, packed: Latents, grid: TokenGrid) -> Tensor:
        """Packed latents as the pipeline's call takes them."""

    @abstractmethod
    def transformer_inputs(
        self, pipe: Any, latents: Latents, embeddings: Embeddings, *, grid: TokenGrid, settings: GenerationSettings
    ) -> dict[str, Any]:
        """What one pass of the transformer takes beside the timestep."""

    @abstractmethod
    def pack(self, pipe: Any, encoded: Any) -> Latents:
        """What the autoencoder's `encode` gave as packed latents, scaled as the transformer sees them."""

    @abstractmethod
    def unpack(self, pipe: Any, packed: Latents, grid: TokenGrid) -> Tensor:
        """Packed latents as the autoencoder's `decode` takes them."""


_BLOCKS: Final[dict[tuple[BlockKind, Submodule], Layout]] = {
    ("double", "ff"): Layout(("image",)),
    ("double", "ff_context"): Layout(("text",)),
    ("double", ""): Layout(("text", "image"), is_tuple=True),
    ("double", "attn"): Layout(("image", "text"), is_tuple=True),
    ("single", "attn"): Layout(("text", "image")),
}
"""What the families share."""


def token_places(grid: TokenGrid) -> Float[Tensor, "tokens 3"]:
    """What FLUX's rotary embedding takes of each image token: 0, its row and its column."""
    rows, cols = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.cols), indexing="ij")
    return rearrange([torch.zeros_like(rows), rows, cols], "part row col -> (row col) part").float()


def pack_cells(latents: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens packed"]:
    """Latents as the transformer takes them: a token for each 2 x 2 of them."""
    return rearrange(latents, "b c (row i) (col j) -> b (row col) (c i j)", i=2, j=2)


def unpack_cells(
    latents: Float[Tensor, "batch tokens packed"], grid: TokenGrid
) -> Float[Tensor, "batch channels height width"]:
    """Packed latents as the autoencoder takes them."""
    return rearrange(latents, "b (row col) (c i j) -> b c (row i) (col j)", row=grid.rows, i=2, j=2)


class Flux1(Family):
    """FLUX.1: dev, schnell, Krea, Kontext. CLIP and T5 read the prompt."""

    name = "FLUX.1"
    transformer = "FluxTransformer2DModel"
    layouts: ClassVar = {
        **_BLOCKS,
        ("single", ""): Layout(("text", "image"), is_tuple=True),
        ("single", "proj_mlp"): Layout(("text", "image")),
        ("single", "proj_out"): Layout(("text", "image")),
    }
    # As the models' own pages have it, where it is not FLUX.1-dev's.
    _guidance: ClassVar = {"black-forest-labs/flux.1-krea-dev": 4.5}

    def width(self, pipe: Any, hookpoint: HookPoint) -> int:
        """4 times the residual width at `proj_mlp`, else that width."""
        module: Any = pipe.transformer.get_submodule(hookpoint.path)
        return int(module.out_features if hookpoint.submodule == "proj_mlp" else pipe.transformer.inner_dim)

    def gate(self, pipe: Any, hookpoint: HookPoint) -> Gate | None:
        """Of the block's own norm: (x, gate_msa, shift_mlp, scale_mlp, gate_mlp), or (x, gate) of a single block."""
        block: Any = pipe.transformer.get_submodule(hookpoint.block_path)
        if hookpoint.block_kind == "single":
            return (block.norm, lambda output: output[1]) if hookpoint.submodule == "proj_out" else None
        if not hookpoint.submodule:
            return None
        place = 1 if hookpoint.submodule == "attn" else 4
        return (block.norm1_context if hookpoint.stream == "text" else block.norm1), lambda output: output[place]

    def default_settings(self, pipe: Any, *, flux_id: str) -> GenerationSettings:
        """Models without a guidance embedding are the distilled few-step ones (schnell: 4 steps, 256 text tokens)."""
        side = pipe.default_sample_size * pipe.vae_scale_factor
        if pipe.transformer.config.guidance_embeds:
            return GenerationSettings(height=side, width=side, guidance_scale=self._guidance.get(flux_id.lower(), 3.5))
        return GenerationSettings(
            height=side, width=side, num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256
        )

    def check(self, pipe: Any, settings: GenerationSettings) -> None:
        """Runs them all."""

    def check_call(self, inputs: Mapping[str, Any]) -> None:
        """Every call is laid out so."""

    def mu(self, pipe: Any, *, n_tokens: int, n_steps: int) -> float:
        """Linear in the image's tokens, as `calculate_shift` of diffusers' FluxPipeline has it."""
        config = pipe.scheduler.config
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        return float(n_tokens * slope + (low - slope * few))

    def tokenizer(self, pipe: Any) -> Any:
        """T5's: the transformer reads of CLIP only the pooled embedding."""
        return pipe.tokenizer_2

    def token_spans(self, pipe: Any, prompt: str) -> list[tuple[int, int]]:
        """Of T5's tokens."""
        return _spans(pipe.tokenizer_2, prompt)

    def embed(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
        """Through CLIP and T5."""
        length = settings.max_sequence_length
        prompt, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=length)
        if settings.true_cfg_scale <= 1:
            return Embeddings(prompt, pooled)
        negative = [settings.negative_prompt] * len(prompts)
        negative_prompt, negative_pooled, _ = pipe.encode_prompt(negative, max_sequence_length=length)
        return Embeddings(prompt, pooled, negative_prompt, negative_pooled)

    def call_settings(self, pipe: Any, settings: GenerationSettings) -> dict[str, Any]:
        """Distilled and classifier-free guidance are two arguments."""
        names = ("height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale", "max_sequence_length")
        return {name: getattr(settings, name) for name in names}

    def call_prompts(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> dict[str, Any]:
        """With the negative prompt where it is in use."""
        negative = [settings.negative_prompt] * len(prompts) if settings.true_cfg_scale > 1 else None
        return {"prompt": list(prompts), "negative_prompt": negative}

    def call_embeddings(self, embeddings: Embeddings) -> dict[str, Any]:
        """All four."""
        return {
            "prompt_embeds": embeddings.prompt,
            "pooled_prompt_embeds": embeddings.pooled,
            "negative_prompt_embeds": embeddings.negative_prompt,
            "negative_pooled_prompt_embeds": embeddings.negative_pooled,
        }

    def call_latents(self, packed: Latents, grid: TokenGrid) -> Tensor:
        """As they are."""
        return packed

    def transformer_inputs(
        self, pipe: Any, latents: Latents, embeddings: Embeddings, *, grid: TokenGrid, settings: GenerationSettings
    ) -> dict[str, Any]:
        """Text tokens all stand at position 0."""
        device, dtype = latents.device, latents.dtype
        return {
            "hidden_states": latents,
            "guidance": _distilled_guidance(pipe, latents, settings),
            "pooled_projections": embeddings.pooled,
            "encoder_hidden_states": embeddings.prompt,
            "txt_ids": torch.zeros(embeddings.prompt.shape[1], 3, device=device, dtype=dtype),
            "img_ids": token_places(grid).to(device, dtype),
        }

    def pack(self, pipe: Any, encoded: Any) -> Latents:
        """The mode, where the autoencoder is variational, shifted and scaled; a token is 2 x 2 cells."""
        raw = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        return pack_cells((raw - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor)

    def unpack(self, pipe: Any, packed: Latents, grid: TokenGrid) -> Tensor:
        """Inverse of `pack`."""
        cells: Tensor = unpack_cells(packed, grid) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return cells


class Flux2(Family):
    """FLUX.2: klein (Qwen3 reads the prompt) and dev (Mistral). Guidance is distilled in dev, classifier-free in
    klein's base models, and none in the distilled klein."""

    name = "FLUX.2"
    transformer = "Flux2Transformer2DModel"
    layouts: ClassVar = {**_BLOCKS, ("single", ""): Layout(("text", "image"))}

    def width(self, pipe: Any, hookpoint: HookPoint) -> int:
        """The residual width everywhere: a single block's `attn` is the output of its fused projections."""
        return int(pipe.transformer.inner_dim)

    def gate(self, pipe: Any, hookpoint: HookPoint) -> Gate | None:
        """Of modules that all blocks of a kind share: (shift, scale, gate), for attention and then for `ff`."""
        model = pipe.transformer
        if not hookpoint.submodule:
            return None
        if hookpoint.block_kind == "single":
            return model.single_stream_modulation, lambda output: output.chunk(3, dim=-1)[2]
        place = 2 if hookpoint.submodule == "attn" else 5
        is_text = hookpoint.stream == "text"
        module = model.double_stream_modulation_txt if is_text else model.double_stream_modulation_img
        return module, lambda output: output.chunk(6, dim=-1)[place]

    def default_settings(self, pipe: Any, *, flux_id: str) -> GenerationSettings:
        """klein: 4 steps; its base models and dev: 50 steps with guidance 4."""
        side = pipe.default_sample_size * pipe.vae_scale_factor
        if self._is_distilled(pipe):
            return GenerationSettings(height=side, width=side, num_inference_steps=4, guidance_scale=0.0)
        distilled, true_cfg = (4.0, 1.0) if pipe.transformer.config.guidance_embeds else (0.0, 4.0)
        return GenerationSettings(
            height=side, width=side, num_inference_steps=50, guidance_scale=distilled, true_cfg_scale=true_cfg
        )

    def check(self, pipe: Any, settings: GenerationSettings) -> None:
        """Classifier-free guidance needs a base model of klein."""
        if settings.true_cfg_scale > 1 and (pipe.transformer.config.guidance_embeds or self._is_distilled(pipe)):
            raise FluxSaeError(
                f"true_cfg_scale={settings.true_cfg_scale:g}: this FLUX.2 takes no classifier-free guidance and no "
                "negative prompt. Set true_cfg_scale=1, or use a base model such as FLUX.2-klein-base-4B."
            )

    def check_call(self, inputs: Mapping[str, Any]) -> None:
        """With a key-value cache, reference images stand before the image itself."""
        if inputs.get("kv_cache_mode") is not None:
            raise FluxSaeError(
                "This call keeps keys and values of reference images (Flux2KleinKVPipeline), whose tokens then stand "
                "before the image's own. Hooks need Flux2KleinPipeline, which takes reference images without a cache."
            )

    def _is_distilled(self, pipe: Any) -> bool:
        return bool(pipe.config.get("is_distilled", False))

    def mu(self, pipe: Any, *, n_tokens: int, n_steps: int) -> float:
        """Depends on the number of steps, too."""
        return float(compute_empirical_mu(image_seq_len=n_tokens, num_steps=n_steps))

    def tokenizer(self, pipe: Any) -> Any:
        """Of the language model; dev's pipeline holds it inside a processor."""
        return getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)

    def token_spans(self, pipe: Any, prompt: str) -> list[tuple[int, int]]:
        """The prompt stands inside a chat message, whose other tokens count, too."""
        text = self._message(pipe, prompt)
        other = self._message(pipe, ("+" if prompt.startswith("-") else "-") + prompt)
        start = next(at for at, (own, changed) in enumerate(zip(text, other, strict=False)) if own != changed)
        spans = ((first - start, behind - start) for first, behind in _spans(self.tokenizer(pipe), text))
        return [
            (max(0, first), min(len(prompt), behind)) if first < len(prompt) and behind > 0 else (0, 0)
            for first, behind in spans
        ]

    def _message(self, pipe: Any, prompt: str) -> str:
        """The chat message that the pipeline makes of a prompt."""
        system = getattr(pipe, "system_message", None)  # dev's alone
        if system is None:
            message, options = [{"role": "user", "content": prompt}], {"enable_thinking": False}
        else:
            (message,), options = format_input([prompt], system_message=system), {}
        text: str = pipe.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=system is None, **options
        )
        return text

    def embed(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> Embeddings:
        """Three layers of the language model beside each other; no pooled embedding."""
        prompt, _ = pipe.encode_prompt(list(prompts), max_sequence_length=settings.max_sequence_length)
        pooled = prompt.new_zeros(len(prompt), 0)
        if settings.true_cfg_scale <= 1:
            return Embeddings(prompt, pooled)
        negative, _ = pipe.encode_prompt(
            [settings.negative_prompt] * len(prompts), max_sequence_length=settings.max_sequence_length
        )
        return Embeddings(prompt, pooled, negative, pooled)

    def call_settings(self, pipe: Any, settings: GenerationSettings) -> dict[str, Any]:
        """The one guidance argument is distilled in dev and classifier-free in klein."""
        has_embedding = pipe.transformer.config.guidance_embeds
        names = ("height", "width", "num_inference_steps", "max_sequence_length")
        guidance = settings.guidance_scale if has_embedding else settings.true_cfg_scale
        return {**{name: getattr(settings, name) for name in names}, "guidance_scale": guidance}

    def call_prompts(self, pipe: Any, prompts: Sequence[str], settings: GenerationSettings) -> dict[str, Any]:
        """The pipeline takes a negative prompt as embeddings only."""
        if settings.true_cfg_scale <= 1:
            return {"prompt": list(prompts)}
        return self.call_embeddings(self.embed(pipe, prompts, settings))

    def call_embeddings(self, embeddings: Embeddings) -> dict[str, Any]:
        """Without the pooled ones."""
        negative = embeddings.negative_prompt
        named = {"prompt_embeds": embeddings.prompt}
        return named if negative is None else {**named, "negative_prompt_embeds": negative}

    def call_latents(self, packed: Latents, grid: TokenGrid) -> Tensor:
        """On the token grid."""
        return rearrange(packed, "batch (rows cols) channels -> batch channels rows cols", rows=grid.rows)

    def transformer_inputs(
        self, pipe: Any, latents: Latents, embeddings: Embeddings, *, grid: TokenGrid, settings: GenerationSettings
    ) -> dict[str, Any]:
        """Text tokens stand one behind the other."""
        ids = (pipe._prepare_latent_ids(self.call_latents(latents, grid)), pipe._prepare_text_ids(embeddings.prompt))
        return {
            "hidden_states": latents,
            "guidance": _distilled_guidance(pipe, latents, settings),
            "encoder_hidden_states": embeddings.prompt,
            "txt_ids": ids[1].to(latents.device),
            "img_ids": ids[0].to(latents.device),
        }

    def pack(self, pipe: Any, encoded: Any) -> Latents:
        """The mode in patches of 2 x 2 cells, normalised by the autoencoder's batch norm."""
        patches = pipe._patchify_latents(encoded.latent_dist.mode())
        mean, std = self._statistics(pipe, patches)
        packed: Tensor = rearrange((patches - mean) / std, "batch channels rows cols -> batch (rows cols) channels")
        return packed

    def unpack(self, pipe: Any, packed: Latents, grid: TokenGrid) -> Tensor:
        """Inverse of `pack`."""
        patches = self.call_latents(packed, grid)
        mean, std = self._statistics(pipe, patches)
        cells: Tensor = pipe._unpatchify_latents(patches * std + mean)
        return cells

    def _statistics(self, pipe: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        norm, epsilon = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        mean, variance = norm.running_mean.view(1, -1, 1, 1), norm.running_var.view(1, -1, 1, 1)
        return mean.to(like), torch.sqrt(variance + epsilon).to(like)


def _distilled_guidance(pipe: Any, latents: Latents, settings: GenerationSettings) -> Tensor | None:
    if not pipe.transformer.config.guidance_embeds:
        return None
    return torch.full([len(latents)], settings.guidance_scale, device=latents.device, dtype=torch.float32)


def _spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    if tokenizer is None:
        return []
    found = tokenizer(text, truncation=False, verbose=False, return_offsets_mapping=True)
    return [(int(start), int(stop)) for start, stop in found["offset_mapping"]]


KNOWN: Final = "Give a FLUX.1 or FLUX.2 model, for example black-forest-labs/FLUX.2-klein-4B."
FAMILIES: Final[tuple[Family, ...]] = (Flux1(), Flux2())


def family_of(pipe: Any) -> Family:
    """The family of a pipeline's transformer.

    Raises:
        FluxSaeError: it is of none.
    """
    for family in FAMILIES:
        if isinstance(pipe.transformer, getattr(diffusers, family.transformer)):
            return family
    raise FluxSaeError(f"{type(pipe.transformer).__name__} is not FLUX's transformer. {KNOWN}")
