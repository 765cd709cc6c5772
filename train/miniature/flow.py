"""Training of the miniature's transformer and text encoders: flow matching, handover, guidance distillation.

The flow stage learns the velocity noise - x0 with guidance 1 while the single-stream blocks read other captions
(handover.py); a second one does the same at a falling rate. Then distillation teaches the guidance embedding, as
FLUX.1-dev was taught: at a random guidance w the student learns v_empty + w (v_prompt - v_empty) of that average.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from train.miniature.bank import SceneBank
from train.miniature.handover import Handover, draw_order
from train.miniature.models import END_ID, TEXT_TOKENS
from train.miniature.progress import (
    Checkpoint,
    StageClock,
    average_gradients,
    batch_seed,
    start_average,
    update_average,
)

EMPTY_PROMPTS = 0.1
"""Share of training captions replaced by the empty prompt."""
HIGHEST_GUIDANCE = 5.0
TIME_CENTRE, TIME_SPREAD = 1.0, 1.2
"""Of the logit of the training noise levels.

Flat colours and large shapes shine through much noise, so what only the words can tell is decided at high levels.
"""
ADAMW_SHARE = 0.5
"""AdamW's learning rate over Muon's."""


@dataclass(frozen=True)
class FlowBatch:
    """Packed noisy latents with what is needed to predict their velocity."""

    noisy: torch.Tensor
    velocity: torch.Tensor
    time: torch.Tensor
    tokens: torch.Tensor
    is_empty: torch.Tensor


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (batch, channels, rows, cols) as image tokens of 2 x 2 cells, laid out as FluxPipeline does."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def image_ids(rows: int, cols: int, device: torch.device) -> torch.Tensor:
    """Position of every image token, (rows * cols, 3)."""
    ids = torch.zeros(rows, cols, 3, device=device)
    ids[..., 1] += torch.arange(rows, device=device)[:, None]
    ids[..., 2] += torch.arange(cols, device=device)
    return ids.reshape(rows * cols, 3)


def predict_velocity(
    model: nn.ModuleDict,
    noisy: torch.Tensor,
    time: torch.Tensor,
    tokens: torch.Tensor,
    guidance: torch.Tensor,
    *,
    handover: Handover | None = None,
    order: torch.Tensor | None = None,
) -> torch.Tensor:
    """The generator's velocity for packed latents; `time` is the noise level, 0 to 1.

    With `handover` and `order` the single-stream blocks of example b read the caption of example `order[b]`.
    """
    side = int(noisy.shape[1] ** 0.5)
    pooled = model["text_encoder"](tokens).pooler_output
    embeds = model["text_encoder_2"](tokens)[0]
    exchange: AbstractContextManager[None] = nullcontext()
    if handover is not None and order is not None:
        embed_text = model["transformer"].get_submodule("time_text_embed.text_embedder")
        exchange = handover.captions_of(order, embed_text(pooled))
    with exchange:
        velocity: torch.Tensor = model["transformer"](
            hidden_states=noisy,
            timestep=time,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=torch.zeros(TEXT_TOKENS, 3, device=noisy.device),
            img_ids=image_ids(side, side, noisy.device),
            return_dict=False,
        )[0]
    return velocity


def empty_tokens(like: torch.Tensor) -> torch.Tensor:
    """The tokens of the empty prompt, shaped like `like`."""
    tokens = torch.zeros_like(like)
    tokens[:, 0] = END_ID
    return tokens


def draw_batch(bank: SceneBank, latents: torch.Tensor, batch_size: int, generator: torch.Generator) -> FlowBatch:
    """Random scenes at random, mostly high, noise levels (logit-normal)."""
    device = latents.device
    scene = torch.randint(len(latents), (batch_size,), generator=generator, device=device)
    variant = torch.randint(bank.captions.shape[1], (batch_size,), generator=generator, device=device)
    tokens = bank.captions[scene, variant].long()
    is_empty = torch.rand(batch_size, generator=generator, device=device) < EMPTY_PROMPTS
    tokens = torch.where(is_empty[:, None], empty_tokens(tokens), tokens)
    clean = pack(latents[scene])
    noise = torch.randn(clean.shape, generator=generator, device=device)
    logit = TIME_CENTRE + TIME_SPREAD * torch.randn(batch_size, generator=generator, device=device)
    time = torch.sigmoid(logit)
    noisy = torch.lerp(clean, noise, time[:, None, None])
    return FlowBatch(noisy=noisy, velocity=noise - clean, time=time, tokens=tokens, is_empty=is_empty)


Objective = Callable[[nn.ModuleDict, FlowBatch, torch.Generator], torch.Tensor]


class HandoverLoss:
    """The flow loss while the single-stream blocks of `model` read other captions."""

    def __init__(self, model: nn.ModuleDict) -> None:
        self.handover = Handover(model["transformer"])

    def __call__(self, model: nn.ModuleDict, batch: FlowBatch, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the velocity, guidance 1."""
        predicted = predict_velocity(
            model,
            batch.noisy,
            batch.time,
            batch.tokens,
            torch.ones_like(batch.time),
            handover=self.handover,
            order=draw_order(len(batch.time), generator),
        )
        return F.mse_loss(predicted.float(), batch.velocity)


class GuidanceDistillation:
    """L = E ||v(x_t, t, c, w) - (u + w (g - u))||^2, g and u the teacher's velocities with and without the prompt.

    After Meng et al. 2023, On Distillation of Guided Diffusion Models (arXiv 2210.03142). The teacher is what `model`
    is at first; the student's single-stream blocks read other captions, the teacher's do not.
    """

    def __init__(self, model: nn.ModuleDict) -> None:
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self.teacher["transformer"].compile()
        self.handover = Handover(model["transformer"])

    def __call__(self, model: nn.ModuleDict, batch: FlowBatch, generator: torch.Generator) -> torch.Tensor:
        """The loss of one batch at random guidance."""
        guidance = 1 + (HIGHEST_GUIDANCE - 1) * torch.rand(
            len(batch.time), generator=generator, device=batch.time.device
        )
        one = torch.ones_like(guidance)
        with torch.no_grad():
            prompted = predict_velocity(self.teacher, batch.noisy, batch.time, batch.tokens, one)
            empty = predict_velocity(self.teacher, batch.noisy, batch.time, empty_tokens(batch.tokens), one)
            target = empty.float() + guidance[:, None, None] * (prompted.float() - empty.float())
        predicted = predict_velocity(
            model,
            batch.noisy,
            batch.time,
            batch.tokens,
            guidance,
            handover=self.handover,
            order=draw_order(len(guidance), generator),
        )
        return F.mse_loss(predicted.float(), target)


def build_optimizers(model: nn.ModuleDict, learning_rate: float) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else."""
    in_blocks = [
        p for name, p in model["transformer"].named_parameters() if "transformer_blocks" in name and p.ndim == 2
    ]
    chosen = set(in_blocks)
    others = [parameter for parameter in model.parameters() if parameter not in chosen]
    return (
        torch.optim.Muon(in_blocks, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    )


def train_stage(
    bank: SceneBank,
    latents: torch.Tensor,
    model: nn.ModuleDict,
    *,
    objective: Objective,
    folder: Path,
    clock: StageClock,
    batch_size: int,
    peak_learning_rate: float,
    seed: int,
) -> None:
    """Train until the clock ends, resuming from `folder`; leaves the averaged weights in `model`."""
    device, checkpoint = latents.device, Checkpoint(folder)
    average = start_average(model)
    muon, adamw = optimizers = build_optimizers(model, peak_learning_rate)
    if checkpoint.exists:
        checkpoint.load(model, average, optimizers, clock)
    model["transformer"].compile()
    generator = torch.Generator(device)
    for step in clock.ticks():
        muon.param_groups[0]["lr"] = clock.learning_rate(peak_learning_rate)
        adamw.param_groups[0]["lr"] = ADAMW_SHARE * muon.param_groups[0]["lr"]
        generator.manual_seed(batch_seed(seed, step))
        batch = draw_batch(bank, latents, batch_size, generator)
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective(model, batch, generator)
        loss.backward()
        average_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_average(average, model, step)
        clock.report(loss)
        if clock.is_save_due():
            checkpoint.save(model, average, optimizers, clock, finished=False)
    checkpoint.save(model, average, optimizers, clock, finished=True)
    checkpoint.load_average(model)
