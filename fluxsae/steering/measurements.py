"""What an edit did: to the picture, to the feature, and to the tokens that go on through FLUX."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Final, Self

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from fluxsae.errors import FluxSaeError
from fluxsae.features.silencing import prompts_without_words
from fluxsae.flux import BlockCall, block_hooks, capture, decode_latents, default_settings, generate
from fluxsae.flux.bad_numbers import LeftOut, bad_items, describe_bad, describe_bad_latents
from fluxsae.flux.families import family_of
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.pictures.perceptual import ImageEmbedder, PerceptualDistance
from fluxsae.sae.acts import tokens_at_once
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import EditedCall
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.naturalness import NaturalRange, denoising_errors
from fluxsae.steering.sweeps import batch_within_memory

QUANTILE: Final = 0.995
"""Clean tokens beyond this quantile of norm or residual count as out of distribution, by definition."""


@dataclass(frozen=True)
class TokenLimits:
    """How large and how well reconstructed clean tokens are, by noise level: what lies beyond is out of distribution.

    One entry a noise level; norms and residuals are in raw FLUX units, `norm_low` and the two upper bounds are the
    quantiles 1 - `quantile` and `quantile` over tokens.
    """

    sigmas: tuple[float, ...]
    norm_low: tuple[float, ...]
    norm_high: tuple[float, ...]
    residual_high: tuple[float, ...]
    quantile: float = QUANTILE
    natural: NaturalRange = field(default_factory=NaturalRange)
    """Up to where a picture edited at this hook point looks natural."""

    def to_dict(self) -> dict[str, Any]:
        """The limits as JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; limits of before the calibration have its defaults."""
        columns = {name: tuple(map(float, value)) for name, value in values.items() if isinstance(value, list | tuple)}
        natural = NaturalRange(**values.get("natural", {}))
        return cls(**columns, quantile=float(values["quantile"]), natural=natural)

    def is_outside(
        self, x: Float[Tensor, "*batch d_model"], sae: SparseAutoencoder, *, sigma: float
    ) -> Bool[Tensor, "*batch"]:
        """Whether each token is out of distribution at this noise level (the nearest recorded one)."""
        place = min(range(len(self.sigmas)), key=lambda index: abs(self.sigmas[index] - sigma))
        norms, residuals = norm_and_residual(x, sae, sigma=sigma)
        is_odd_size = (norms < self.norm_low[place]) | (norms > self.norm_high[place])
        return is_odd_size | (residuals > self.residual_high[place])


@torch.no_grad()
def norm_and_residual(
    x: Float[Tensor, "*batch d_model"], sae: SparseAutoencoder, *, sigma: float | None = None
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """||x|| and ||x - x_hat|| of each token, raw FLUX units; computed in chunks of tokens.

    At a noise level beyond an SAE's `sigma_table` the table's end is taken.
    """
    level = None if sigma is None else sae.nearest_sigma(sigma)
    rows: Tensor = x.reshape(-1, x.shape[-1])
    # Written into one tensor each: small results kept between the chunks leave holes in memory that no chunk fits into.
    norms, residuals = (torch.empty(len(rows), device=x.device) for _ in range(2))
    at_once = tokens_at_once(sae.config.n_features, x.device)
    for part, norm, residual in zip(*(each.split(at_once) for each in (rows, norms, residuals)), strict=True):
        values = part.float()
        norm.copy_(values.norm(dim=-1))
        residual.copy_((values - sae.reconstruct(values, sigma=level)).norm(dim=-1))
    return norms.reshape(x.shape[:-1]), residuals.reshape(x.shape[:-1])


def limits_of(samples: Mapping[float, Float[Tensor, "tokens 2"]], *, quantile: float = QUANTILE) -> TokenLimits:
    """The limits from (norm, residual) of clean tokens by noise level."""
    sigmas = tuple(sorted(samples, reverse=True))
    norms, residuals = ([_thinned(samples[sigma][:, column]) for sigma in sigmas] for column in (0, 1))
    return TokenLimits(
        sigmas=sigmas,
        norm_low=tuple(float(torch.quantile(values, 1 - quantile)) for values in norms),
        norm_high=tuple(float(torch.quantile(values, quantile)) for values in norms),
        residual_high=tuple(float(torch.quantile(values, quantile)) for values in residuals),
        quantile=quantile,
    )


@torch.no_grad()
def measure_token_limits(
    pipe: Any,
    sae: SparseAutoencoder,
    hookpoint: HookPoint,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings | None = None,
    steps: Sequence[int] | None = None,
    quantile: float = QUANTILE,
) -> TokenLimits:
    """The limits of a hook point's clean tokens, from unsteered generations of these prompts, in batches that fit.

    An image is left out, and logged, from the step on at which its activations are NaN or infinite.

    Raises:
        FluxSaeError: too many images are left out.
    """
    settings = settings or default_settings(pipe)
    samples: dict[float, list[Tensor]] = {}
    left_out = LeftOut(len(prompts))

    def keep(call: BlockCall, first: int) -> None:
        bad = bad_items(call.tokens)
        for place in bad:
            name = f"{prompts[first + place]!r:.60}"
            left_out.add(first + place, describe_bad(call.tokens, name, hookpoint=call.hookpoint, step=call.step))
        sound = [place for place in range(len(call.tokens)) if place not in bad]
        pair = torch.stack(norm_and_residual(call.tokens[sound], sae, sigma=call.sigma), dim=-1)
        samples.setdefault(call.sigma, []).append(pair.reshape(-1, 2).cpu())

    size = batch_within_memory(pipe, settings)
    for start in range(0, len(prompts), size):
        batch = slice(start, start + size)
        with capture(pipe, [hookpoint], steps, sink=partial(keep, first=start), stop_early=True):
            generate(pipe, list(prompts[batch]), seeds=list(seeds[batch]), settings=settings, output_type="latent")
    return limits_of({sigma: torch.cat(parts) for sigma, parts in samples.items()}, quantile=quantile)


@torch.no_grad()
def measure_unedited(
    pipe: Any,
    sae: SparseAutoencoder,
    hookpoint: HookPoint,
    limits: TokenLimits,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: GenerationSettings | None = None,
) -> list[tuple[float, float]]:
    """Share of odd tokens and ratio of denoising errors of pictures that nobody edited.

    As an edited picture is compared with the one before, FLUX's own picture of each prompt without one of its words,
    drawn in turn, is compared with that of the whole prompt at the same seed. Prompts of one word are passed over.
    A prompt of which either picture is of NaN or infinite numbers is left out and logged.

    Raises:
        FluxSaeError: too many prompts are left out.
    """
    settings = settings or default_settings(pipe)
    pairs = list(_without_one_word(prompts, seeds))
    found, size = list[tuple[float, float]](), batch_within_memory(pipe, settings)
    left_out = LeftOut(len(pairs))
    for start in range(0, len(pairs), size):
        whole, less, own = zip(*pairs[start : start + size], strict=True)
        outside: list[Tensor] = []

        def keep(call: BlockCall, outside: list[Tensor] = outside) -> None:
            if any(math.isclose(call.sigma, sigma, rel_tol=1e-4) for sigma in limits.sigmas):
                outside.append(limits.is_outside(call.tokens, sae, sigma=call.sigma).float().mean(dim=-1).cpu())

        asked: dict[str, Any] = {"seeds": list(own), "settings": settings, "output_type": "latent"}
        before = generate(pipe, list(whole), **asked)
        with capture(pipe, [hookpoint], None, sink=keep):
            after = generate(pipe, list(less), **asked)
        assert isinstance(before, Tensor)
        assert isinstance(after, Tensor)
        for latents, part in ((before, whole), (after, less)):
            for place in bad_items(latents):
                left_out.add(start + place, describe_bad_latents(latents, f"{part[place]!r:.60}"))
        sound = [place for place in range(len(own)) if start + place not in left_out.image_ids]
        if not sound:
            continue
        shares = torch.stack(outside).mean(dim=0)[sound].tolist()
        pictures = [decode_latents(pipe, latents[sound], settings) for latents in (before, after)]
        errors = zip(*(denoising_errors(pipe, each, settings) for each in pictures), strict=True)
        found += [(share, _ratio(*pair)) for share, pair in zip(shares, errors, strict=True)]
    return found


def _without_one_word(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """Each prompt, the same without its first, second, ... word in turn, and its seed."""
    for turn, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        try:
            others = list(prompts_without_words(prompt).values())
        except FluxSaeError:
            continue
        yield prompt, others[turn % len(others)], seed


@dataclass(frozen=True)
class EditMeasurement:
    """What one variant of a sweep did, against the sweep's unedited baseline."""

    distance: float
    """Perceptual distance to the baseline, whole picture."""
    distance_inside: float | None
    """... inside the region asked about, by default where tokens were edited; None where there is none."""
    distance_outside: float | None
    """... everywhere else; None where the region is all of it."""
    distance_name: str
    """What measured it: LPIPS, or the random-feature distance, which is not LPIPS."""
    clip_change: float | None
    """1 - cosine of the CLIP embeddings of steered and baseline picture; None without a CLIP."""
    clip_prompt_change: float | None
    """How much nearer to the prompt the picture came, cosine; None without a CLIP."""
    activation_before: float | None
    """Largest act of the edited feature over tokens, mean over edited steps, baseline; multiples of its reference."""
    activation_after: float | None
    """The same, read again from the edited tokens."""
    out_of_distribution: float
    """Share of edited tokens (summed over steps) whose norm or SAE residual lies beyond the clean tokens' limits."""
    relative_size: float | None
    """Edit's size behind the block's gate / size of the residual stream, mean over edited tokens; None where the
    hook point is not added to the stream directly."""
    edited_share: float
    """Share of tokens that were edited at any step."""
    denoising_error_ratio: float | None = None
    """How badly FLUX, without a prompt, denoises the steered picture laid under noise, over the same of the baseline:
    about 1 where FLUX could have painted it, more where the picture broke; None where it was not measured."""
    natural: NaturalRange = field(default_factory=NaturalRange)
    """Up to where a picture looks natural: the bounds of the run."""

    @property
    def looks_natural(self) -> bool:
        """Whether the edited tokens and the picture stay within what the run's own unedited pictures show."""
        return self.natural.holds(self.out_of_distribution, self.denoising_error_ratio)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON values."""
        return asdict(self)


@dataclass(eq=False)
class RecordedEdit:
    """What a recorder saw of one variant: sums over the edited calls."""

    touched: Bool[Tensor, " tokens"] | None = None
    n_edited: int = 0
    n_outside: int = 0
    relative_sizes: list[float] = field(default_factory=list)
    acts_after: list[float] = field(default_factory=list)
    acts_before: list[float] = field(default_factory=list)
    natural: NaturalRange = field(default_factory=NaturalRange)


class EditRecorder:
    """Watches a sweep whose first variant is the unedited baseline.

    Open `watch()` around the sweep and pass `record` as its `on_edit`. Without `limits` the baseline's own tokens at
    the same step are the measure of what is in distribution; with limits for every hook point the baseline may be
    left out, and the acts before the edit are then unknown.
    """

    def __init__(
        self,
        pipe: Any,
        saes: Mapping[HookPoint, SparseAutoencoder],
        variants: Sequence[Sequence[SteeringEdit]],
        *,
        limits: Mapping[HookPoint, TokenLimits] | None = None,
    ) -> None:
        self.pipe, self.saes, self.variants = pipe, saes, variants
        self.limits = dict(limits or {})
        self.hookpoints = sorted({edit.hookpoint for edits in variants for edit in edits})
        self.has_baseline = bool(variants) and not variants[0]
        if not self.has_baseline and not all(place in self.limits for place in self.hookpoints):
            raise FluxSaeError(
                "The first variant must be the unedited baseline (an empty list of edits), or limits of clean tokens "
                "must be given for every hook point."
            )
        self.recorded = [RecordedEdit(natural=self._natural(edits)) for edits in variants]
        self._own_limits: dict[tuple[HookPoint, int], TokenLimits] = {}
        self._clean_acts: dict[tuple[HookPoint, int, int], float] = {}
        self._gates: dict[HookPoint, Tensor] = {}
        self._waiting: dict[HookPoint, tuple[int, Tensor]] = {}
        """First variant and delta of the edited calls whose block has not ended."""

    def _natural(self, edits: Sequence[SteeringEdit]) -> NaturalRange:
        """The widest of the ranges of the hook points that are edited."""
        ranges = [self.limits[place].natural for place in {edit.hookpoint for edit in edits} if place in self.limits]
        return max(ranges, key=lambda found: found.out_of_distribution, default=NaturalRange())

    @contextmanager
    def watch(self) -> Iterator[None]:
        """While open, the block's gates and the residual stream behind it are seen; hooks are gone afterwards."""
        family = family_of(self.pipe)
        gates = {place: gate for place in self.hookpoints if (gate := family.gate(self.pipe, place)) is not None}
        with ExitStack() as stack:
            for place, (module, read) in gates.items():
                stack.callback(module.register_forward_hook(self._gate_hook(place, read)).remove)
            streams = {_block_output(place): self._compare for place in gates}
            stack.enter_context(block_hooks(self.pipe, streams))
            yield

    @torch.no_grad()
    def record(self, edited: EditedCall, first: int) -> None:
        """Takes one edited call of the sweep; `first` is the variant that is item 0 of its batch."""
        call, place, sae = edited.call, edited.call.hookpoint, self.saes[edited.call.hookpoint]
        if first == 0 and self.has_baseline:
            self._keep_clean_acts(call)
        limits = self._limits(edited, first)
        is_edited = edited.delta.any(dim=-1)
        is_outside = limits.is_outside(edited.edited, sae, sigma=call.sigma)
        for item, edits in enumerate(self.variants[first : first + len(is_edited)]):
            mine = self.recorded[first + item]
            mine.touched = is_edited[item].cpu() if mine.touched is None else mine.touched | is_edited[item].cpu()
            mine.n_edited += int(is_edited[item].sum())
            mine.n_outside += int((is_edited[item] & is_outside[item]).sum())
            self._record_acts(mine, edits, edited, item)
        self._keep_size(edited, first, place)

    def _limits(self, edited: EditedCall, first: int) -> TokenLimits:
        call = edited.call
        if call.hookpoint in self.limits:
            return self.limits[call.hookpoint]
        if first == 0:
            sae = self.saes[call.hookpoint]
            clean = torch.stack(norm_and_residual(call.tokens[0], sae, sigma=call.sigma), dim=-1)
            self._own_limits[call.hookpoint, call.step] = limits_of({call.sigma: clean})
        return self._own_limits[call.hookpoint, call.step]

    def _record_acts(self, mine: RecordedEdit, edits: Sequence[SteeringEdit], edited: EditedCall, item: int) -> None:
        call, sae = edited.call, self.saes[edited.call.hookpoint]
        if not edited.delta[item].any():
            return
        for feature in sorted({edit.feature for edit in edits if edit.hookpoint == call.hookpoint}):
            reference = float(sae.reference_acts[feature]) or 1.0
            if self.has_baseline:
                mine.acts_before.append(self._clean_acts[call.hookpoint, feature, call.step] / reference)
            acts = sae.encode_features(edited.edited[item], [feature], sigma=call.sigma)
            mine.acts_after.append(float(acts.max()) / reference)

    def _keep_clean_acts(self, call: BlockCall) -> None:
        edits = itertools.chain.from_iterable(self.variants)
        features = sorted({edit.feature for edit in edits if edit.hookpoint == call.hookpoint})
        sae = self.saes[call.hookpoint]
        acts = sae.encode_features(call.tokens[0], features, sigma=sae.nearest_sigma(call.sigma)).amax(dim=0)
        for feature, value in zip(features, acts.tolist(), strict=True):
            self._clean_acts[call.hookpoint, feature, call.step] = value

    def _keep_size(self, edited: EditedCall, first: int, place: HookPoint) -> None:
        if not place.submodule:
            for item, delta in enumerate(edited.delta):
                self._note_size(first + item, delta, edited.call.tokens[item].float())
        elif place in self._gates:
            self._waiting[place] = (first, edited.delta)

    def _compare(self, call: BlockCall) -> None:
        """Sees a block's output, which already holds the edit."""
        for place in [place for place in self._waiting if _block_output(place) == call.hookpoint]:
            first, deltas = self._waiting.pop(place)
            for item, (delta, gate) in enumerate(zip(deltas, self._gates[place], strict=True)):
                gated = delta * gate.float()
                self._note_size(first + item, gated, call.tokens[item].float() - gated)

    def _note_size(self, variant: int, delta: Tensor, stream: Tensor) -> None:
        is_edited = delta.any(dim=-1)
        if bool(is_edited.any()):
            shares = delta.norm(dim=-1) / stream.norm(dim=-1).clamp_min(1e-12)
            self.recorded[variant].relative_sizes.append(float(shares[is_edited].mean()))

    def _gate_hook(self, place: HookPoint, read: Callable[[Any], Tensor]) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self._gates[place] = read(output)

        return keep


def measure_edit(
    before: Image.Image,
    after: Image.Image,
    recorded: RecordedEdit,
    *,
    grid: TokenGrid,
    distance: PerceptualDistance,
    embedder: ImageEmbedder | None = None,
    prompt: str = "",
    region: Bool[Tensor, " tokens"] | None = None,
    denoising_errors: tuple[float, float] | None = None,
) -> EditMeasurement:
    """One variant's measurement from its picture, the baseline's, and what the recorder saw.

    Inside and outside are those of `region`, or of the tokens that the edit touched. `denoising_errors` are those of
    `naturalness.denoising_errors`, before and after.
    """
    pixel_distance = distance.distance_map([before], [after])[0]
    touched = recorded.touched if recorded.touched is not None else torch.zeros(grid.n_tokens, dtype=torch.bool)
    parted = touched if region is None else region
    inside = region_pixels(parted, grid, height=pixel_distance.shape[0], width=pixel_distance.shape[1])
    clip_change, prompt_change = _clip_changes(before, after, embedder, prompt)
    return EditMeasurement(
        distance=float(pixel_distance.mean()),
        distance_inside=_mean_where(pixel_distance, inside),
        distance_outside=_mean_where(pixel_distance, ~inside),
        distance_name=distance.name,
        clip_change=clip_change,
        clip_prompt_change=prompt_change,
        activation_before=_mean(recorded.acts_before),
        activation_after=_mean(recorded.acts_after),
        out_of_distribution=recorded.n_outside / recorded.n_edited if recorded.n_edited else 0.0,
        relative_size=_mean(recorded.relative_sizes),
        edited_share=float(touched.float().mean()),
        denoising_error_ratio=None if denoising_errors is None else _ratio(*denoising_errors),
        natural=recorded.natural,
    )


def _ratio(before: float, after: float) -> float:
    return after / max(before, 1e-12)


def region_pixels(
    tokens: Bool[Tensor, " tokens"], grid: TokenGrid, *, height: int, width: int
) -> Bool[Tensor, "height width"]:
    """The pixels that a set of image tokens covers."""
    if tokens.numel() != grid.n_tokens:  # text tokens have no place in the picture: all of it is theirs
        return torch.full((height, width), bool(tokens.any()))
    cells = tokens.reshape(1, 1, grid.rows, grid.cols).float()
    return interpolate(cells, size=(height, width), mode="nearest")[0, 0] > 0


def random_directions(d_model: int, n: int, *, seed: int) -> Float[Tensor, "n d_model"]:
    """Unit vectors uniform on the sphere: controls of the edit's own norm."""
    return normalize(torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed)), dim=1)


def random_features(sae: SparseAutoencoder, feature: int, n: int, *, seed: int) -> Float[Tensor, "n d_model"]:
    """Decoder rows of other features that are known to fire: controls that lie where features lie.

    Raises:
        FluxSaeError: no other feature of the SAE is known to fire.
    """
    others = [index for index in (sae.reference_acts > 0).nonzero().flatten().tolist() if index != feature]
    if not others:
        raise FluxSaeError("No other feature of this SAE is known to fire, so there is no random-feature control.")
    chosen = torch.randint(len(others), (n,), generator=torch.Generator().manual_seed(seed))
    return sae.W_dec[torch.tensor(others)[chosen].to(sae.W_dec.device)].detach()


def _block_output(place: HookPoint) -> HookPoint:
    return HookPoint(place.block_kind, place.block_index, "", place.stream)


def _clip_changes(
    before: Image.Image, after: Image.Image, embedder: ImageEmbedder | None, prompt: str
) -> tuple[float | None, float | None]:
    if embedder is None:
        return None, None
    old, new = embedder.embed_images([before, after])
    change = 1 - float(old @ new)
    if not prompt:
        return change, None
    text = embedder.embed_texts([prompt])[0]
    return change, float(new @ text - old @ text)


def _mean_where(values: Tensor, chosen: Tensor) -> float | None:
    return float(values[chosen].mean()) if bool(chosen.any()) else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _thinned(values: Tensor) -> Tensor:
    # torch.quantile refuses more than 16 million values; a stride keeps the quantiles of so many tokens
    return values[:: max(1, values.numel() // 10_000_000)]
