"""The one hook mechanism: hooks on blocks inside a `with`, and capture with early exit."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxsae.errors import FluxSaeError
from fluxsae.flux.clock import FluxLike, TransformerCall, step_clock
from fluxsae.flux.compiled import eager
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import BlockOutput, HookPoint, Layout
from fluxsae.flux.requests import check_channels


@dataclass(frozen=True, eq=False)
class BlockCall:
    """What one hooked module returned: the tokens of the hook point's stream and where in the schedule they arose.

    `step` is the 0-based index in the full schedule of `n_steps`, `sigma` the noise level there; `is_conditional` is
    False in the second pass at a step, which classifier-free guidance (`true_cfg_scale`) makes with the negative
    prompt. `tokens` may be a view of the live tensor: copy what is kept, never write into it.
    """

    hookpoint: HookPoint
    step: int
    sigma: float
    n_steps: int
    is_conditional: bool
    tokens: Float[Tensor, "batch tokens d_model"]


BlockHandler = Callable[[BlockCall], Tensor | None]


class StopGeneration(BaseException):
    """Ends a generation from inside, never an error (hence no `Exception`).

    Whoever wants it raises an instance of their own and catches that one alone: contexts may be nested.
    """


@contextmanager
def block_hooks(
    pipe: FluxLike,
    handlers: Mapping[HookPoint, BlockHandler],
    *,
    on_call: Callable[[TransformerCall], None] | None = None,
) -> Iterator[None]:
    """While open, each handler sees its hook point's tokens at every pass; a tensor it returns replaces them.

    Handlers of contexts opened later see what earlier ones returned. Compiled blocks that are tapped run eager
    meanwhile. Everything is undone on exit, also after an exception. `on_call` sees every forward pass of the
    transformer before its first block runs, and may end it by raising.

    Raises:
        FluxSaeError: a model that needs more than a prompt, a step cache, a hook point the model does not have, a
            schedule whose steps cannot be told apart, a module whose output is not laid out as known, or a handler's
            tensor of another shape.
    """
    check_channels(getattr(pipe.transformer, "config", {}))
    _refuse_step_cache(pipe.transformer)

    modules, family = {hookpoint: find_module(pipe, hookpoint) for hookpoint in handlers}, family_of(pipe)

    def before_blocks(call: TransformerCall) -> None:
        _refuse_step_cache(pipe.transformer)  # one may also be enabled while hooks are open
        family.check_call(call.inputs)
        if on_call is not None:
            on_call(call)

    with ExitStack() as stack:
        now = stack.enter_context(step_clock(pipe, before_blocks))
        for block_path in sorted({hookpoint.block_path for hookpoint in handlers}):
            stack.enter_context(eager(pipe.transformer.get_submodule(block_path)))
        for hookpoint, handler in handlers.items():
            width, layout = family.width(pipe, hookpoint), family.layout(hookpoint)
            hook = _forward_hook(hookpoint, handler, now, width=width, layout=layout)
            handle = modules[hookpoint].register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def find_module(pipe: FluxLike, hookpoint: HookPoint) -> nn.Module:
    """The module of the transformer that `hookpoint` names.

    Raises:
        FluxSaeError: the model has no such block, or its family no such module in it.
    """
    family_of(pipe).layout(hookpoint)
    block_list = pipe.transformer.get_submodule(hookpoint.block_path.rpartition(".")[0])
    n_blocks = len(list(block_list.children()))
    if hookpoint.block_index >= n_blocks:
        raise FluxSaeError(
            f"This model has no {hookpoint}: it has {n_blocks} {hookpoint.block_kind}-stream blocks, "
            f"so allowed are {hookpoint.block_path.rpartition('.')[0]}.0 to .{n_blocks - 1}."
        )
    return pipe.transformer.get_submodule(hookpoint.path)


def _forward_hook(
    hookpoint: HookPoint, handler: BlockHandler, now: Callable[[], TransformerCall], *, width: int, layout: Layout
) -> Callable[[nn.Module, Any, BlockOutput], BlockOutput | None]:
    def after_forward(module: nn.Module, args: Any, output: BlockOutput) -> BlockOutput | None:
        here = now()
        stream = hookpoint.split(output, here.n_text, layout)
        _check_layout(hookpoint, stream, here, width)
        tokens = stream if hookpoint.stream == "text" else stream[:, : here.grid.n_tokens]
        call = BlockCall(hookpoint, here.step, here.sigma, len(here.sigmas), here.is_conditional, tokens)
        replacement = handler(call)
        if replacement is None:
            return None
        if replacement.shape != tokens.shape:
            raise FluxSaeError(
                f"A handler at {hookpoint} returned tokens of shape {tuple(replacement.shape)}; "
                f"it must keep the shape {tuple(tokens.shape)}."
            )
        rest = stream[:, tokens.shape[1] :]
        replaced = replacement.to(tokens)
        joined = torch.cat([replaced, rest], dim=1) if rest.shape[1] else replaced
        return hookpoint.join(output, joined, here.n_text, layout)

    return after_forward


def _check_layout(hookpoint: HookPoint, tokens: Tensor, call: TransformerCall, width: int) -> None:
    # A library that reorders or reshapes outputs would otherwise have the other stream captured, or garbage.
    n_tokens = call.n_text if hookpoint.stream == "text" else call.inputs["hidden_states"].shape[1]
    if tokens.shape[1:] != (n_tokens, width):
        raise FluxSaeError(
            f"{hookpoint} gave {' x '.join(map(str, tokens.shape[1:]))} ({hookpoint.stream} tokens x width), but this "
            f"call has {n_tokens} {hookpoint.stream} tokens and the width there is {width}. Its output is not laid out "
            "as in diffusers 0.42: install the version that fluxsae asks for, or remove what changed this module."
        )


def _refuse_step_cache(transformer: nn.Module) -> None:
    # A block that the cache skips hands its input on as its output, or its submodules do not run at all.
    if getattr(transformer, "is_cache_enabled", False):
        raise FluxSaeError(
            "A step cache is enabled on the transformer, which skips blocks: hooks would see their input as their "
            "output. Call pipe.transformer.disable_cache() first. Generating without hooks works with the cache."
        )


@dataclass(eq=False)
class Captured:
    """The activations of the last run inside a `capture`, by hook point and step."""

    hookpoints: tuple[HookPoint, ...]
    _acts: dict[tuple[HookPoint, int], Tensor] = field(default_factory=dict)
    _sigmas: dict[int, float] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """The steps that were reached and wanted, ascending."""
        return sorted(self._sigmas)

    def sigma(self, step: int) -> float:
        """The noise level at a captured step.

        Raises:
            FluxSaeError: that step was not captured.
        """
        if step not in self._sigmas:
            raise FluxSaeError(f"Step {step} was not captured. Captured are {self._describe_steps()}.")
        return self._sigmas[step]

    def get(self, hookpoint: HookPoint | str, step: int) -> Float[Tensor, "batch tokens d_model"]:
        """The tokens at one hook point and step, on the model's device and in its dtype.

        Raises:
            FluxSaeError: not captured.
        """
        wanted = HookPoint.parse(hookpoint)
        if (wanted, step) not in self._acts:
            places = ", ".join(map(str, self.hookpoints))
            raise FluxSaeError(
                f"No activations of {wanted} at step {step}. Captured are {places} at {self._describe_steps()}."
            )
        return self._acts[wanted, step]

    def keep(self, call: BlockCall) -> None:
        """Holds a copy of the call's tokens."""
        self._acts[call.hookpoint, call.step] = call.tokens.detach().clone()

    def _describe_steps(self) -> str:
        return "steps " + ", ".join(map(str, self.steps)) if self._sigmas else "no steps yet: run the pipeline first"


@dataclass(eq=False)
class _Recorder:
    """Takes what is wanted from each call and knows when all of it has been seen."""

    captured: Captured
    steps: frozenset[int] | None
    stop_early: bool
    sink: Callable[[BlockCall], object] | None
    stop: StopGeneration = field(default_factory=StopGeneration)
    _seen: set[HookPoint] = field(default_factory=set)
    _run: int = -1
    # Over all runs of the `with`: a sink keeps what each of them gave.
    _reached: set[int] = field(default_factory=set)
    _n_steps: int | None = None

    def on_call(self, call: TransformerCall) -> None:
        if call.is_first_of_run:
            self.captured._acts.clear()
            self.captured._sigmas.clear()
            self._refuse_steps_beyond(len(call.sigmas))
            self._run = call.run
        elif call.run < self._run and self.sink is None:
            raise FluxSaeError(
                "A second run took place inside the run that is captured here, which goes on now: what was captured "
                "would be a mixture. End the capture before the second run, or pass a sink, which gets every call."
            )
        self._n_steps = len(call.sigmas)
        self._seen.clear()

    def on_block(self, call: BlockCall) -> None:
        if not call.is_conditional or (self.steps is not None and call.step not in self.steps):
            return
        self.captured._sigmas[call.step] = call.sigma
        self._reached.add(call.step)
        if self.sink is not None:
            self.sink(call)
        else:
            self.captured.keep(call)
        self._seen.add(call.hookpoint)
        last_step = call.n_steps - 1 if self.steps is None else max(self.steps)
        if self.stop_early and call.step == last_step and len(self._seen) == len(self.captured.hookpoints):
            raise self.stop

    def refuse_unreached(self) -> None:
        """Raises a FluxSaeError where the model ran but never came to a wanted step."""
        unreached = sorted((self.steps or frozenset()) - self._reached)
        if self._n_steps is None or not unreached:
            return
        reached = ", ".join(map(str, sorted(self._reached))) or "none"
        raise FluxSaeError(
            f"Steps {', '.join(map(str, unreached))} were to be captured but never reached, in a schedule of "
            f"{self._n_steps} steps (reached of those wanted: {reached}). A generation taken up midway, or ended "
            "early, runs only some steps: ask for steps that it runs, or generate from step 0 to the end."
        )

    def _refuse_steps_beyond(self, n_steps: int) -> None:
        if self.steps and max(self.steps) >= n_steps:
            raise FluxSaeError(
                f"Step {max(self.steps)} was asked for, but this schedule has {n_steps} steps: "
                f"allowed are 0 to {n_steps - 1}."
            )


@contextmanager
def capture(
    pipe: FluxLike,
    hookpoints: Sequence[HookPoint | str],
    steps: Collection[int] | None = None,
    *,
    stop_early: bool = False,
    sink: Callable[[BlockCall], object] | None = None,
) -> Iterator[Captured]:
    """Collects the activations of what runs inside the `with`: the conditional pass, at `steps` (None: all of them).

    With a `sink` each call goes there and nothing is held. With `stop_early` the run ends after the last wanted step
    and block, without a VAE decode; the rest of the `with` body is then skipped, so read `captured` after it. A
    second run inside the same `with` replaces the first.

    Raises:
        FluxSaeError: no or unknown hook points, a step outside the schedule, or, when the `with` ends without another
            error, a wanted step that none of its runs came to.
    """
    wanted = parse_hookpoints(hookpoints)
    captured = Captured(wanted)
    recorder = _Recorder(captured, parse_steps(steps), stop_early, sink)
    try:
        with block_hooks(pipe, dict.fromkeys(wanted, recorder.on_block), on_call=recorder.on_call):
            yield captured
    except StopGeneration as stopped:
        if stopped is not recorder.stop:
            raise
        free_after_abort(pipe)
    recorder.refuse_unreached()


def free_after_abort(pipe: FluxLike) -> None:
    """Put a pipeline whose run was ended from inside back as after a full run: step caches and offloaded models."""
    if hasattr(pipe, "maybe_free_model_hooks"):
        pipe.maybe_free_model_hooks()


def parse_hookpoints(hookpoints: Sequence[HookPoint | str]) -> tuple[HookPoint, ...]:
    """The hook points without repetitions; raises a FluxSaeError for none, or for one text instead of a list."""
    if isinstance(hookpoints, str):
        raise FluxSaeError(f"Hook points are given as a list: write [{hookpoints!r}].")
    wanted = tuple(dict.fromkeys(HookPoint.parse(hookpoint) for hookpoint in hookpoints))
    if not wanted:
        raise FluxSaeError("No hook points to capture. Name at least one, for example ['layer15'].")
    return wanted


def parse_steps(steps: Collection[int] | None) -> frozenset[int] | None:
    """The steps without repetitions, None for all; raises a FluxSaeError for none or one below 0."""
    if steps is None:
        return None
    wanted = frozenset(steps)
    if not wanted or min(wanted) < 0:
        raise FluxSaeError(f"steps={sorted(wanted)}: name at least one step from 0 on, or None for all steps.")
    return wanted
