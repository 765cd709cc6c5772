"""Edits of SAE features applied inside a `with`: only the edit's own delta is added, nothing is reconstructed."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.flux import (
    BlockCall,
    Ground,
    block_hooks,
    call_ground,
    hookpoint_width,
    schedule_sigmas,
    settings_ground,
    token_grid,
)
from fluxsae.flux.clock import TransformerCall
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from fluxsae.sae.config import Mismatch
from fluxsae.sae.ground import check_names
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.conditions import Condition
from fluxsae.steering.edits import NEEDS_REFERENCE, HeatmapRegion, SteeringEdit, check_count, is_batched

_READS_ACTS: Final = ("scale", "clamp", "ablate")
DirectionOf = Callable[[SteeringEdit, int], Float[Tensor, " d_model"] | None]
"""(edit, batch item) -> the unit vector to write in place of the feature's decoder row, or None for the row itself."""


@dataclass(frozen=True)
class EditedCall:
    """What an edit did at one call of one block: for measurements."""

    call: BlockCall
    """The block's call, with the unedited tokens; where several SAEs of a hook point edit, one for each of them."""
    delta: Float[Tensor, "batch tokens d_model"]
    """What was added, fp32."""
    edited: Float[Tensor, "batch tokens d_model"]
    """The tokens that go on through the model."""


def edit_coefficient(
    mode: str,
    strength: float,
    *,
    acts: Float[Tensor, "*tokens"],
    projection: Float[Tensor, "*tokens"],
    reference: float,
    input_scale: float,
) -> Float[Tensor, "*tokens"]:
    """How much of the unit direction u_f one edit adds to each token, in raw FLUX units.

    `acts` is z_f, `projection` is (x - input_mean) . u_f (raw units), `reference` is a_f; those that the mode does
    not use only give the shape. The formulas are those of the modes' table; d_f = u_f * input_scale.
    """
    if mode == "scale":
        return (strength - 1.0) * acts * input_scale
    if mode == "add":
        return torch.full_like(acts, strength * reference * input_scale)
    if mode == "clamp":
        return (strength * reference - acts) * input_scale
    if mode == "ablate":
        return -strength * acts * input_scale
    assert mode == "project_out", mode
    return -strength * projection


def add_delta(x: Float[Tensor, "*shape"], delta: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """x + delta, summed in fp32 and rounded once to x's dtype; bit for bit x where delta is zero, also for x = -0.0."""
    summed = torch.where(delta == 0, x.to(delta.dtype), x.to(delta.dtype) + delta)
    return summed.to(x.dtype)


def edit_delta(
    edit: SteeringEdit,
    sae: SparseAutoencoder,
    x: Float[Tensor, "batch tokens d_model"],
    *,
    acts: Float[Tensor, "batch tokens"] | None = None,
    sigma: float | None = None,
    direction: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, "batch tokens d_model"]:
    """What one edit adds to raw FLUX tokens `x`, fp32, window left aside.

    `acts` are the feature's exact acts at `x` where already known; otherwise an SAE with a `sigma_table` needs `sigma`.
    A unit `direction` is written in place of the decoder row; how much of it is still read from the feature, so that a
    control has the edit's own norm.
    """
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    u = _unit_row(sae, edit.feature, values)
    if acts is None and _needs_acts(edit):
        acts = sae.encode_features(x, [edit.feature], sigma=sigma)[..., 0]
    z = values.new_zeros(values.shape[:-1]) if acts is None else acts.to(values)
    projection = (values - sae.input_mean.to(values)) @ u if edit.mode == "project_out" else z
    reference = float(sae.reference_acts[edit.feature])
    coefficient = edit_coefficient(
        edit.mode,
        edit.strength,
        acts=z,
        projection=projection,
        reference=reference,
        input_scale=float(sae.input_scale),
    )
    written = u if direction is None else direction.to(values)
    return (coefficient * region_mask(edit, z, reference=reference))[..., None] * written


def region_mask(
    edit: SteeringEdit, acts: Float[Tensor, "batch tokens"], *, reference: float
) -> Float[Tensor, "#batch #tokens"]:
    """1 where the edit acts and 0 elsewhere."""
    if edit.region is None:
        return acts.new_ones((1, 1))
    if isinstance(edit.region, HeatmapRegion):
        return (acts > edit.region.threshold * reference).to(acts.dtype)
    return acts.new_tensor(list(itertools.chain.from_iterable(edit.region)))[None]


Edits = Sequence[SteeringEdit] | Sequence[Sequence[SteeringEdit]]


@contextmanager
def steer(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    edits: Edits,
    *,
    settings: GenerationSettings | None = None,
    allow_mismatch: Collection[Mismatch] = (),
    direction_of: DirectionOf | None = None,
    on_edit: Callable[[EditedCall], None] | None = None,
) -> Iterator[None]:
    """Applies `edits` to every generation of `pipe` inside the `with`, on the conditional pass.

    Args:
        pipe: a FLUX pipeline; its hooks are gone when the `with` ends, however it ends.
        saes: the SAE of each hook point (or `hookpoint@variant`) that an edit names; they move to the device on which
            FLUX computes.
        edits: one flat list for all images of a batch, or one list an image.
        settings: those of the generations to come, where known: windows, regions and SAEs are then checked against
            them here, and otherwise before the first block of each generation runs.
        allow_mismatch: what may differ from the ground that an SAE was trained on, by name: `fluxsae.sae.ground`.
        direction_of: vectors to write in place of decoder rows (controls).
        on_edit: called after each edited call, with what was added.

    Raises:
        FluxSaeError: an edit does not fit the SAE, the SAE not the pipeline, or window and region not the images.
    """
    saes = {SaeName.parse(name): sae for name, sae in saes.items()}
    check_edits(pipe, saes, edits, settings=settings, allow_mismatch=allow_mismatch)
    per_item = _per_item(edits)
    hookpoints = sorted({edit.hookpoint for item in per_item for edit in item})
    handlers = {
        place: _SteeredHookpoint(
            saes={name: saes[name] for name in hookpoints if name.place == place},
            per_item=[sorted((e for e in item if e.hookpoint.place == place), key=_order) for item in per_item],
            is_flat=not is_batched(edits),
            direction_of=direction_of,
            on_edit=on_edit,
        )
        for place in sorted({name.place for name in hookpoints})
    }

    begun: defaultdict[int, set[tuple[int, SteeringEdit]]] = defaultdict(set)

    def check_run(call: TransformerCall) -> None:
        for handler in handlers.values():  # at every call, since another run may lie inside this one
            handler.began = begun[call.run]
        if call.is_first_of_run:
            _check_batch(edits, len(call.inputs["hidden_states"]))
            _check_facts(saes, per_item, _RunFacts.from_call(pipe, call, hookpoints), allow_mismatch=allow_mismatch)

    with block_hooks(pipe, handlers, on_call=check_run):
        yield


def check_edits(
    pipe: Any,
    saes: Mapping[HookPoint, SparseAutoencoder],
    edits: Edits,
    *,
    settings: GenerationSettings | None = None,
    allow_mismatch: Collection[Mismatch] = (),
) -> None:
    """Refuses edits that cannot be applied, before any model work.

    Raises:
        FluxSaeError: what is wrong, what is allowed and what to do.
    """
    check_names(allow_mismatch)
    per_item = _per_item(edits)
    for item in per_item:
        check_count(item)
        for edit in item:
            _check_edit(pipe, saes, edit)
    if settings is not None:
        hookpoints = {edit.hookpoint for item in per_item for edit in item}
        facts = _RunFacts.from_settings(pipe, settings, hookpoints)
        _check_facts(saes, per_item, facts, allow_mismatch=allow_mismatch)


def edit_window(edit: SteeringEdit, sae: SparseAutoencoder, sigmas: Sequence[float]) -> tuple[int, int]:
    """The half-open window of steps in which an edit acts on a schedule: its own, or the SAE's trained sigmas.

    The trained range is widened by the tolerance that the SAE records.

    Raises:
        FluxSaeError: the window ends outside the schedule, or no step lies in the trained range.
    """
    if edit.steps is not None:
        _check_window(edit, len(sigmas))
        return edit.steps
    low, high = _trained_range(edit, sae)
    steps = [step for step, sigma in enumerate(sigmas) if low <= sigma <= high]
    if not steps:
        raise FluxSaeError(
            f"The SAE at {edit.hookpoint} was trained at sigma {low:.3f} to {high:.3f} (with its tolerance), and none "
            f"of this schedule's {len(sigmas)} steps lies there. Give the edit a window with steps=[start, stop], or "
            "use the number of steps that the SAE was trained with."
        )
    return steps[0], steps[-1] + 1


@dataclass(eq=False)
class _SteeredHookpoint:
    """The handler of one hook point: every item of the batch gets its own edits' deltas, summed in canonical order.

    Edits through several SAEs there read the same unedited tokens.
    """

    saes: Mapping[HookPoint, SparseAutoencoder]
    per_item: list[list[SteeringEdit]]
    is_flat: bool
    direction_of: DirectionOf | None
    on_edit: Callable[[EditedCall], None] | None
    began: set[tuple[int, SteeringEdit]] = field(default_factory=set)
    """Place in the batch and edit, for conditions on the image that have held in the run of the present call."""

    @torch.no_grad()
    def __call__(self, call: BlockCall) -> Tensor | None:
        if not call.is_conditional:
            return None
        # Image by image: what is added to a batch is large in fp32, and kept only where somebody looks at it.
        edited, dtype = torch.empty_like(call.tokens), torch.promote_types(call.tokens.dtype, torch.float32)
        deltas = None if self.on_edit is None else torch.empty_like(call.tokens, dtype=dtype)
        for place, tokens in enumerate(call.tokens.split(1)):
            item = 0 if self.is_flat else place
            active = [edit for edit in self.per_item[item] if _is_active(edit, self.saes[edit.hookpoint], call)]
            delta = self._summed_delta(tokens.to(dtype), active, item, place, sigma=call.sigma)
            edited[place : place + 1] = add_delta(tokens, delta)
            if deltas is not None:
                deltas[place : place + 1] = delta
        if self.on_edit is not None and deltas is not None:
            for name in self.saes:
                self.on_edit(EditedCall(replace(call, hookpoint=name), deltas, edited))
        return edited

    def _summed_delta(self, x: Tensor, edits: list[SteeringEdit], item: int, place: int, *, sigma: float) -> Tensor:
        delta = torch.zeros_like(x)
        acts: dict[HookPoint, dict[int, Tensor]] = {}
        for name, sae in self.saes.items():
            features = sorted({each for edit in edits if edit.hookpoint == name for each in _read_features(edit)})
            found = sae.encode_features(x, features, sigma=sigma) if features else x[..., :0]
            acts[name] = dict(zip(features, found.unbind(-1), strict=True))
        for edit in edits:
            direction = None if self.direction_of is None else self.direction_of(edit, item)
            sae, known = self.saes[edit.hookpoint], acts[edit.hookpoint]
            change = edit_delta(edit, sae, x, acts=known.get(edit.feature), direction=direction)
            if edit.when is not None:
                change *= self._holds(edit, edit.when, known, place)[..., None]
            delta += change
        return delta

    def _holds(
        self, edit: SteeringEdit, condition: Condition, acts: Mapping[int, Tensor], place: int
    ) -> Bool[Tensor, "#batch #tokens"]:
        """Where one image's edit may act."""
        present = condition.where_present(acts, self.saes[edit.hookpoint].reference_acts)
        if condition.at == "token":
            return present
        if bool(present.any()):
            self.began.add((place, edit))
        return present.new_full((1, 1), (place, edit) in self.began)


@dataclass(frozen=True)
class _RunFacts:
    """What a generation is, as far as edits and SAEs care."""

    grid: TokenGrid
    sigmas: tuple[float, ...]
    grounds: Mapping[HookPoint, Ground]

    @classmethod
    def from_settings(cls, pipe: Any, settings: GenerationSettings, hookpoints: Collection[HookPoint]) -> "_RunFacts":
        grounds = {hookpoint: settings_ground(pipe, settings, hookpoint) for hookpoint in hookpoints}
        return cls(token_grid(pipe, settings), tuple(schedule_sigmas(pipe, settings)), grounds)

    @classmethod
    def from_call(cls, pipe: Any, call: TransformerCall, hookpoints: Collection[HookPoint]) -> "_RunFacts":
        grounds = {hookpoint: call_ground(pipe, call.inputs, call.grid, hookpoint) for hookpoint in hookpoints}
        return cls(call.grid, call.sigmas, grounds)


def _per_item(edits: Edits) -> list[list[SteeringEdit]]:
    return [list(item) for item in edits] if is_batched(edits) else [list(edits)]  # type: ignore[arg-type]


def _order(edit: SteeringEdit) -> tuple[HookPoint, int, str]:
    # Beyond (hookpoint, feature) any fixed order will do: floating-point sums must not depend on the caller's order.
    return edit.hookpoint, edit.feature, edit.to_json()


def _needs_acts(edit: SteeringEdit) -> bool:
    return edit.mode in _READS_ACTS or isinstance(edit.region, HeatmapRegion)


def _read_features(edit: SteeringEdit) -> set[int]:
    """The features whose acts an edit asks for."""
    return {*([edit.feature] if _needs_acts(edit) else []), *(edit.when.features if edit.when else ())}


def _unit_row(sae: SparseAutoencoder, feature: int, like: Tensor) -> Tensor:
    return sae.W_dec[feature].detach().to(like)


def _is_active(edit: SteeringEdit, sae: SparseAutoencoder, call: BlockCall) -> bool:
    if edit.steps is not None:
        return edit.steps[0] <= call.step < edit.steps[1]
    low, high = _trained_range(edit, sae)
    return low <= call.sigma <= high


def _trained_range(edit: SteeringEdit, sae: SparseAutoencoder) -> tuple[float, float]:
    ground = sae.config.trained_on
    if ground is None:
        raise FluxSaeError(
            f"The edit of feature {edit.feature} has no steps, and the SAE at {edit.hookpoint} does not say at which "
            "noise levels it was trained. Give the edit a window with steps=[start, stop]."
        )
    return min(ground.sigmas) - ground.sigma_tolerance, max(ground.sigmas) + ground.sigma_tolerance


def _check_edit(pipe: Any, saes: Mapping[HookPoint, SparseAutoencoder], edit: SteeringEdit) -> None:
    hookpoint = edit.hookpoint
    if hookpoint not in saes:
        raise FluxSaeError(
            f"There is no SAE for hook point {hookpoint}; there is one for: {', '.join(map(str, sorted(saes)))}."
        )
    config, width = saes[hookpoint].config, hookpoint_width(pipe, hookpoint)
    if config.d_model != width:
        raise FluxSaeError(
            f"The SAE reads activations of width {config.d_model}, but {hookpoint} of this model gives {width}. "
            "Use the SAE that was trained at this hook point of this model."
        )
    if edit.feature >= config.n_features:
        raise FluxSaeError(
            f"feature is {edit.feature}; the SAE at {hookpoint} has features 0 to {config.n_features - 1}."
        )
    if edit.mode in NEEDS_REFERENCE and not float(saes[hookpoint].reference_acts[edit.feature]) > 0:
        raise FluxSaeError(
            f"Mode {edit.mode} counts in multiples of the reference activation, and that of feature {edit.feature} at "
            f"{hookpoint} is unknown (it never fired on held-out images). Use scale, ablate or project_out, or score "
            "the SAE again on more images."
        )
    if edit.when is not None:
        edit.when.check(saes[hookpoint].reference_acts, hookpoint=hookpoint)
    threshold = edit.region.threshold if isinstance(edit.region, HeatmapRegion) else 0.0
    if threshold > 0 and not float(saes[hookpoint].reference_acts[edit.feature]) > 0:
        raise FluxSaeError(
            f"The region's threshold {threshold:g} is a fraction of the reference activation, and that of "
            f"feature {edit.feature} at {hookpoint} is unknown. Use threshold 0, every token where the feature fires."
        )
    if hookpoint.stream == "text" and isinstance(edit.region, tuple):
        raise FluxSaeError(f"{hookpoint} holds text tokens, which have no grid. Leave region out, or use a heatmap.")
    if edit.steps is None:
        _trained_range(edit, saes[hookpoint])


def _check_facts(
    saes: Mapping[HookPoint, SparseAutoencoder],
    per_item: list[list[SteeringEdit]],
    facts: _RunFacts,
    *,
    allow_mismatch: Collection[Mismatch],
) -> None:
    for edit in itertools.chain.from_iterable(per_item):
        start, stop = edit_window(edit, saes[edit.hookpoint], facts.sigmas)
        for sigma in facts.sigmas[start:stop]:
            saes[edit.hookpoint].check_sigma(sigma)
        _check_region(edit, facts.grid)
    # An SAE without a record is let in: its edits already have to say in which steps they act.
    for hookpoint, ground in facts.grounds.items():
        saes[hookpoint].require_ground(ground, allow_mismatch=[*allow_mismatch, "unknown"])


def _check_window(edit: SteeringEdit, n_steps: int) -> None:
    if edit.steps is not None and edit.steps[1] > n_steps:
        raise FluxSaeError(
            f"steps is {list(edit.steps)}, but the schedule has {n_steps} steps. "
            f"Allowed is 0 <= start <= stop <= {n_steps}."
        )


def _check_region(edit: SteeringEdit, grid: TokenGrid) -> None:
    if not isinstance(edit.region, tuple):
        return
    rows, cols = len(edit.region), len(edit.region[0])
    if (rows, cols) != (grid.rows, grid.cols):
        raise FluxSaeError(
            f"region has {rows} rows of {cols}, but the images' token grid has {grid.rows} rows of {grid.cols}. "
            "Give one value a token."
        )


def _check_batch(edits: Edits, batch: int) -> None:
    if is_batched(edits) and len(edits) != batch:
        raise FluxSaeError(
            f"{len(edits)} lists of edits were given for a batch of {batch} images. Give one list an image, or one "
            "flat list for all of them."
        )
