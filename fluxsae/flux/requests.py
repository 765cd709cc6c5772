"""What is asked of FLUX, checked before any model work."""

from collections.abc import Mapping, Sequence
from typing import Any

from fluxsae.errors import FluxSaeError
from fluxsae.flux.settings import MAX_PROMPT_LENGTH, GenerationSettings

MAX_SEED = 2**63 - 1


def check_request(prompts: str | Sequence[str], seeds: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of equal length.

    Raises:
        FluxSaeError: none given, lengths that differ, a blank or overlong prompt, a seed out of range.
    """
    all_prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    all_seeds = [seeds] if isinstance(seeds, int) else list(seeds)
    if not all_prompts:
        raise FluxSaeError("No prompts given. Pass at least one.")
    if len(all_prompts) != len(all_seeds):
        raise FluxSaeError(f"{len(all_prompts)} prompts but {len(all_seeds)} seeds. Pass one seed for each prompt.")
    for prompt in all_prompts:
        check_prompt(prompt)
    for seed in all_seeds:
        check_seed(seed)
    return all_prompts, all_seeds


def check_prompt(prompt: object) -> None:
    """Raises a FluxSaeError for what is not text, blank, or longer than any text encoder reads."""
    if not isinstance(prompt, str):
        raise FluxSaeError(f"A prompt is text, not {type(prompt).__name__}.")
    if not prompt.strip():
        raise FluxSaeError("The prompt is blank. Describe the image in a few words.")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise FluxSaeError(f"The prompt has {len(prompt)} characters. Allowed are at most {MAX_PROMPT_LENGTH}.")


def check_seed(seed: object) -> None:
    """Raises a FluxSaeError for what is not a whole number that a generator takes."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise FluxSaeError(f"seed={str(seed)[:40]}: allowed is a whole number from 0 to {MAX_SEED}.")


def check_channels(config: Mapping[str, Any]) -> None:
    """Raises a FluxSaeError for a transformer that reads more than the noisy latents: FLUX.1 Fill, Depth and Canny.

    `config` is the transformer's own; without `out_channels` it returns as many channels as it takes.
    """
    n_in, n_out = config.get("in_channels"), config.get("out_channels")
    if n_in is not None and n_out is not None and n_in > n_out:
        raise FluxSaeError(
            f"This transformer takes {n_in} channels and returns {n_out}: it needs a mask, a depth map or another "
            "image beside the noise (FLUX.1 Fill, Depth, Canny), and makes garbage from a prompt alone. Allowed are "
            "text-to-image models, which return as many channels as they take, for example FLUX.1-dev."
        )


def check_text_length(tokenizer: Any, settings: GenerationSettings) -> None:
    """Raises a FluxSaeError where the settings ask for more text tokens than the tokenizer gives."""
    limit = settings.max_sequence_length if tokenizer is None else tokenizer.model_max_length
    if settings.max_sequence_length > limit:
        raise FluxSaeError(
            f"max_sequence_length={settings.max_sequence_length}: this model reads at most {limit} text tokens."
        )


def words_outside(tokenizer: Any, prompt: str) -> list[str]:
    """The prompt's words that a word-level vocabulary lacks, once each, in order; empty for other tokenizers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "WordLevel":
        return []
    text = backend.normalizer.normalize_str(prompt) if backend.normalizer else prompt
    words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
    return [word for word in dict.fromkeys(words) if backend.token_to_id(word) is None]
