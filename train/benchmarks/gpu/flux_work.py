"""What is measured on FLUX: steps plain, hooked, batched, compiled; early exit; shared prefix; scores in the hook."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fluxsae.features.scores import max_over_tokens
from fluxsae.flux import (
    AnyFlux,
    BlockCall,
    Embeddings,
    capture,
    compile_blocks,
    decode_latents,
    embed_prompts,
    generate,
    token_grid,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import steer
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.sweeps import strength_variants, sweep
from train.benchmarks.gpu.desk import Desk
from train.benchmarks.gpu.floors import (
    early_exit_share,
    encode_operations,
    step_operations,
    sweep_share,
)
from train.benchmarks.gpu.models import Scale
from train.benchmarks.gpu.report import Row, row_of

PROMPT = "a red circle"
MODES = ("scale", "add", "clamp", "ablate", "project_out")
_TIMED_STEPS = 4
_AT_CEILING = "operations at the bf16 ceiling"
_SWEEP_STEPS = 8


@dataclass
class FluxBench:
    """The pipeline on the bench."""

    pipe: AnyFlux
    desk: Desk

    @property
    def scale(self) -> Scale:
        """Its sizes."""
        return self.desk.scale

    @property
    def n_image(self) -> int:
        """Image tokens."""
        return token_grid(self.pipe, self.scale.settings).n_tokens

    def step_floor(self, batch: int = 1) -> float:
        """Seconds that the operations of one step take at the bf16 ceiling."""
        n_text = self.scale.settings.max_sequence_length
        return batch * step_operations(self.scale, n_text=n_text, n_image=self.n_image) / self.desk.ceilings.bf16

    @cached_property
    def embeddings(self) -> Embeddings:
        """The encoded prompt: text encoders are timed by themselves."""
        return embed_prompts(self.pipe, [PROMPT], self.scale.settings)

    def run(self, n_steps: int, *, batch: int = 1) -> Tensor:
        """One generation from the encoded prompt; packed latents."""
        embeddings = self.embeddings.repeat(batch)
        latents: Tensor = self.pipe(
            prompt_embeds=embeddings.prompt,
            pooled_prompt_embeds=embeddings.pooled,
            num_inference_steps=n_steps,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(batch)],
            output_type="latent",
        ).images
        return latents


def random_sae(bench: FluxBench, hookpoint: HookPoint) -> SparseAutoencoder:
    """A random top-k SAE of the usual size, scaled to the activations that this hook point really gives."""
    scale = bench.scale
    config = SaeConfig(architecture="topk", d_model=scale.d_model, n_features=scale.n_features, k=scale.k)
    with capture(bench.pipe, [hookpoint], [1], stop_early=True) as captured:
        bench.run(2)
    acts = captured.get(hookpoint, 1).float().flatten(0, 1)
    assert acts.isfinite().all(), "the random model's activations overflowed"
    sae = SparseAutoencoder(config)
    with torch.no_grad():
        sae.input_mean.copy_(acts.mean(0))
        sae.input_scale.copy_((acts - acts.mean(0)).square().mean().sqrt())
        sae.reference_acts.fill_(1.0)
    return sae.to(bench.desk.device).requires_grad_(False)


def measure_steps(bench: FluxBench) -> None:
    """A step plain, with capture at two hook points, with one edit of each mode, and with scores made in the hook."""
    scale, n_steps = bench.scale, _TIMED_STEPS
    places = [scale.first, scale.second]
    sae = random_sae(bench, scale.first)

    def plain() -> None:
        bench.run(n_steps)

    def captured() -> None:
        with capture(bench.pipe, places):
            bench.run(n_steps)

    def edited(mode: str) -> Callable[[], None]:
        edit = SteeringEdit(scale.first, 7, mode, 0.5, steps=(0, n_steps))

        def work() -> None:
            with steer(bench.pipe, {scale.first: sae}, [edit]):
                bench.run(n_steps)

        return work

    def scored() -> None:
        def score(call: BlockCall) -> None:
            max_over_tokens(sae.encode_sparse(call.tokens, sigma=call.sigma))

        with capture(bench.pipe, [scale.first], sink=score):
            bench.run(n_steps)

    works: dict[str, Callable[[], object]] = {"plain": plain, "capture": captured}
    works |= {mode: edited(mode) for mode in MODES} | {"scores": scored}
    timings = bench.desk.alternate(works)
    plain_time = timings["plain"]
    bench.desk.report.add(
        row_of("one step, plain", plain_time, per=n_steps, floor_seconds=bench.step_floor(), floor_note=_AT_CEILING)
    )
    ceilings, base = bench.desk.ceilings, plain_time.seconds / n_steps
    copied = 2 * len(places) * bench.n_image * scale.d_model * 2 / ceilings.memory
    encoded = encode_operations(bench.n_image, scale.d_model, scale.n_features) / ceilings.fp32
    name = "one step with capture at two hook points"
    bench.desk.add_ratio(name, timings["capture"], plain_time, floor=1 + copied / base, limit=1.02, note="copies")
    for mode in MODES:
        least, note = (encoded, "fp32 encode") if mode in ("scale", "clamp", "ablate") else (0.0, "")
        name = f"one step with one edit, {mode}"
        bench.desk.add_ratio(name, timings[mode], plain_time, floor=1 + least / base, limit=1.03, note=note)
    name = "one step with S made in the hook"
    bench.desk.add_ratio(name, timings["scores"], plain_time, floor=1 + encoded / base, note="fp32 encode")


def measure_early_exit(bench: FluxBench) -> None:
    """A full generation without decode against one that ends where nothing more is wanted."""
    scale, n_steps = bench.scale, bench.scale.settings.num_inference_steps

    def early() -> None:
        with capture(bench.pipe, [scale.second], [scale.captured_step], stop_early=True):
            bench.run(n_steps)

    timings = bench.desk.alternate({"full": lambda: bench.run(n_steps), "early": early}, repeats=3)
    bench.desk.report.add(
        row_of(f"{n_steps} steps without decode", timings["full"], floor_seconds=n_steps * bench.step_floor())
    )
    share = early_exit_share(scale, step=scale.captured_step, block=scale.second.block_index)
    name = f"early exit after step {scale.captured_step}, {scale.second}"
    bench.desk.add_ratio(
        name, timings["early"], timings["full"], floor=share, limit=share * 1.05, note="share of blocks"
    )


def measure_sweep(bench: FluxBench) -> None:
    """A baseline and six strengths from the middle on, against seven separate generations."""
    scale, n_steps = bench.scale, _SWEEP_STEPS
    settings = replace(scale.settings, num_inference_steps=n_steps)
    sae = random_sae(bench, scale.first)
    edit = SteeringEdit(scale.first, 7, "add", 1.0, steps=(n_steps // 2, n_steps))
    variants = strength_variants(edit, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])

    def shared() -> None:
        sweep(bench.pipe, {scale.first: sae}, variants, prompt=PROMPT, seed=0, settings=settings)

    def separate() -> None:
        for _ in variants:
            generate(bench.pipe, PROMPT, seeds=0, settings=settings)

    timings = bench.desk.alternate({"shared": shared, "separate": separate}, repeats=3)
    share = sweep_share(6, first_step=n_steps // 2, n_steps=n_steps)
    name = "baseline and 6 strengths from the middle, of seven runs"
    bench.desk.add_ratio(
        name, timings["shared"], timings["separate"], floor=share, limit=0.60, note="steps, decodes not shared"
    )


def measure_batches(bench: FluxBench) -> None:
    """A step for each image at several batch sizes."""
    sizes = (1, 2, 4)
    works = {str(size): partial(bench.run, _TIMED_STEPS, batch=size) for size in sizes}
    timings = bench.desk.alternate(works, repeats=3)
    for size in sizes:
        bench.desk.report.add(
            row_of(f"one step for each image, batch {size}", timings[str(size)], per=_TIMED_STEPS * size,
                   floor_seconds=bench.step_floor())
        )  # fmt: skip


def measure_ends(bench: FluxBench) -> None:
    """The text encoders before, and the decoder after the steps."""
    settings = bench.scale.settings
    latents = bench.run(1)
    works: dict[str, Callable[[], object]] = {
        "text": lambda: embed_prompts(bench.pipe, [PROMPT], settings),
        "decode": lambda: decode_latents(bench.pipe, latents, settings),
    }
    timings = bench.desk.alternate(works)
    weights = sum(p.numel() * p.element_size() for p in bench.pipe.text_encoder_2.parameters())
    floor = weights / bench.desk.ceilings.memory
    bench.desk.report.add(
        row_of("encode one prompt", timings["text"], floor_seconds=floor, floor_note="weights read once")
    )
    bench.desk.report.add(row_of("decode one image", timings["decode"]))


def measure_determinism(bench: FluxBench) -> None:
    """Whether the same call gives the same bits twice, and how far batch 2 is from batch 1 in this dtype."""
    first, second = bench.run(_TIMED_STEPS), bench.run(_TIMED_STEPS)
    both = bench.run(_TIMED_STEPS, batch=2)
    bench.desk.report.add(
        Row(
            name="same call twice, largest difference of latents",
            value=float((first - second).abs().max()),
            unit="",
            target="0",
            is_met=bool(torch.equal(first, second)),
        )
    )
    drift = float((both[:1].float() - first.float()).norm() / first.float().norm())
    bench.desk.report.add(Row(name="batch 2 against batch 1, relative difference of latents", value=drift, unit=""))


def measure_compiled(bench: FluxBench, **options: Any) -> None:
    """Steps of block-compiled FLUX, plain and with two tapped blocks; compiles in place, so comes last."""
    places = [bench.scale.first, bench.scale.second]
    eager = bench.run(_TIMED_STEPS)
    compile_blocks(bench.pipe, **options)
    compiled = bench.run(_TIMED_STEPS)

    def work(hooked: bool) -> Callable[[], object]:
        def run() -> None:
            with capture(bench.pipe, places) if hooked else nullcontext():
                bench.run(_TIMED_STEPS)

        return run

    timings = bench.desk.alternate({"plain": work(False), "capture": work(True)})
    plain, floor = timings["plain"], bench.step_floor()
    name = "one step, blocks compiled"
    bench.desk.report.add(row_of(name, plain, per=_TIMED_STEPS, floor_seconds=floor, floor_note=_AT_CEILING))
    name = "one compiled step with capture, two blocks eager"
    bench.desk.add_ratio(name, timings["capture"], timings["plain"], floor=1.0)
    drift = float((compiled.float() - eager.float()).norm() / eager.float().norm())
    bench.desk.report.add(Row(name="compiled against eager, relative difference of latents", value=drift, unit=""))
