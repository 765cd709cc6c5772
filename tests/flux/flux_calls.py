"""What tests ask of the tiny FLUX: images, and which hooks and blocks were called for them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tiny_flux import N_TEXT, SETTINGS

from fluxsae.flux import (
    BlockCall,
    block_hooks,
    generate,
)
from fluxsae.flux.hookpoints import HookPoint

PROMPTS = ["a red circle", "a small blue star"]
WIDE = replace(SETTINGS, height=32, width=48)
CFG = replace(SETTINGS, true_cfg_scale=2.0, negative_prompt="a green ring")
IMAGE, TEXT = slice(N_TEXT, None), slice(None, N_TEXT)

# The hook-point table of DESIGN section 4, written out once more: how to take each stream from the module's raw output.
ROWS: dict[str, Callable] = {
    "transformer_blocks.1.ff": lambda out: out,
    "transformer_blocks.1.ff_context": lambda out: out,
    "transformer_blocks.1": lambda out: out[1],
    "transformer_blocks.1:text": lambda out: out[0],
    "transformer_blocks.1.attn": lambda out: out[0],
    "transformer_blocks.1.attn:text": lambda out: out[1],
    "single_transformer_blocks.0": lambda out: out[1],
    "single_transformer_blocks.0:text": lambda out: out[0],
    **{f"single_transformer_blocks.0.{name}": lambda out: out[:, IMAGE] for name in ("attn", "proj_mlp", "proj_out")},
    **{
        f"single_transformer_blocks.0.{name}:text": lambda out: out[:, TEXT]
        for name in ("attn", "proj_mlp", "proj_out")
    },
}


def pixels(pipe, prompts=PROMPTS, seeds=(1, 2), settings=SETTINGS, **arguments) -> np.ndarray:
    return generate(pipe, list(prompts), seeds=list(seeds), settings=settings, output_type="np", **arguments)


def count_hooks(pipe) -> int:
    modules = pipe.transformer.modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def count_calls(pipe, run: Callable[[], object]) -> dict[str, int]:
    """How often each block, and the decoder, ran inside `run`."""
    counts: dict[str, int] = {}
    watched = {
        **{f"double{i}": block for i, block in enumerate(pipe.transformer.transformer_blocks)},
        **{f"single{i}": block for i, block in enumerate(pipe.transformer.single_transformer_blocks)},
        "text": pipe.text_encoder,
        "decoder": pipe.vae.decoder,
    }

    def counter(name: str):
        return lambda *_: counts.update({name: counts.get(name, 0) + 1})

    handles = [module.register_forward_pre_hook(counter(name)) for name, module in watched.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return counts


def record(pipe, hookpoint: str, run: Callable[[], object]) -> list[BlockCall]:
    calls: list[BlockCall] = []
    with block_hooks(pipe, {HookPoint.parse(hookpoint): calls.append}):
        run()
    return calls
