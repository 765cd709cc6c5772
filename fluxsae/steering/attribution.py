"""Why a feature fires: the share that each word of the prompt and each earlier feature has in it, at one step."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fluxsae.errors import FluxSaeError
from fluxsae.features.labels import STOP_WORDS
from fluxsae.flux import (
    AnyFlux,
    BlockCall,
    block_hooks,
    capture,
    default_settings,
    embed_prompts,
    schedule_sigmas,
    token_grid,
)
from fluxsae.flux.families import Embeddings, family_of
from fluxsae.flux.generation import denoise_to
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.hooks import StopGeneration, free_after_abort
from fluxsae.flux.latents import Snapshot, differentiable_velocity, velocity
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.names import SaeName
from fluxsae.sae.config import Mismatch
from fluxsae.sae.kernels import pair_products
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import check_edits, steer
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.sweeps import batch_within_memory

Saes = Mapping[HookPoint, SparseAutoencoder]


@dataclass(frozen=True)
class Target:
    """The feature that is explained, at one step: at one token, or over the whole image where `token` is None.

    Its *drive* is its pre-activation at the token, or the sum of its positive pre-activations over the image tokens.
    """

    hookpoint: HookPoint
    feature: int
    step: int
    token: int | None = None

    def drive(
        self, sae: SparseAutoencoder, x: Float[Tensor, "batch tokens d_model"], *, sigma: float | None = None
    ) -> Float[Tensor, " batch"]:
        """The feature's drive for each image, in SAE activation units."""
        sae.check_sigma(sigma)
        read = sae.encoder_input(sae.normalise(x), sigma) - sae.b_dec
        pre_acts = read @ sae.W_enc[self.feature] + sae.b_enc[self.feature]
        return pre_acts.relu().sum(dim=1) if self.token is None else pre_acts[:, self.token]


@dataclass(frozen=True)
class Word:
    """One word of the prompt as a source."""

    text: str
    position: int
    """0-based, among all words of the prompt."""
    start: int
    """Of the word in the prompt, in characters; `stop` is behind its last."""
    stop: int


@dataclass(frozen=True)
class Effect:
    """What one source adds to the target's drive: predicted by the gradient, and measured by taking it away."""

    source: Word | tuple[HookPoint, int]
    predicted: float
    """Gradient times (what is there less what is there without the source). Of a word: with the mean of the gradients
    with it and without it, since taking a word away is a large step."""
    measured: float | None = None
    """Drive with the source less drive without it, at this step; None where it was not tried."""
    on_features: Mapping[tuple[HookPoint, int], float] | None = None
    """Of a word: what is missing of each earlier feature's summed acts without it, as a share of them."""

    @property
    def size(self) -> float:
        """The measured effect where there is one, else the predicted one."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True)
class Explanation:
    """What made a feature fire at one step of one generation. Effects overlap: they need not sum to the drive."""

    target: Target
    sigma: float
    drive: float
    words: tuple[Effect, ...]
    """The largest first."""
    features: tuple[Effect, ...]
    """Those that were measured, the largest first."""
    without_prompt: float
    """The drive that is left at this step when all of the prompt is taken away: what the image so far holds."""
    unexplained: Mapping[HookPoint, float]
    """Predicted effect of what the SAE at an earlier hook point does not reconstruct (x - x_hat)."""
    explained: Mapping[HookPoint, float]
    """Predicted effect of all features of an earlier hook point together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; shares are of the drive."""
        return {
            "hookpoint": str(self.target.hookpoint),
            "feature": self.target.feature,
            "step": self.target.step,
            "sigma": self.sigma,
            "token": self.target.token,
            "drive": self.drive,
            "without_prompt": self.without_prompt,
            "words": [self._effect(effect) for effect in self.words],
            "features": [self._effect(effect) for effect in self.features],
            "hookpoints": [
                {"hookpoint": str(place), "features": self.explained[place], "not_reconstructed": missing}
                for place, missing in self.unexplained.items()
            ],
        }

    def _effect(self, effect: Effect) -> dict[str, Any]:
        share = effect.size / self.drive if self.drive else 0.0
        values = {"share": share, "predicted": effect.predicted, "measured": effect.measured}
        if isinstance(effect.source, Word):
            acts_on = [
                {"hookpoint": str(place), "feature": feature, "share": lost}
                for (place, feature), lost in (effect.on_features or {}).items()
            ]
            return {"word": effect.source.text, "position": effect.source.position, **values, "acts_on": acts_on}
        place, feature = effect.source
        return {"hookpoint": str(place), "feature": feature, **values}


def explain(
    pipe: AnyFlux,
    saes: Saes,
    target: Target,
    *,
    prompt: str,
    seed: int,
    settings: GenerationSettings | None = None,
    snapshot: Snapshot | None = None,
    limit: int = 8,
    allow_mismatch: Collection[Mismatch] = (),
    on_pass: Callable[[int, int], None] | None = None,
) -> Explanation:
    """The words and earlier features that drive a feature at one step of the image of (prompt, seed).

    Effects are predicted by gradient times activation, with each SAE's reconstruction error kept in place. Then every
    content word, and the `limit` features that are predicted to matter most, are really taken away for this one
    step, one at a time, and the change is measured. A word is taken away by encoding the prompt without it.

    With a `snapshot` at the target's step (`noised_picture`) nothing is generated: a picture is explained.
    `on_pass(n, total)` is called after each pass, counted from 0, of `total` at most; it may raise to cancel.

    The gradient's memory grows with the blocks up to the target: about 0.9 GB a block for FLUX.1-dev at 1024 px.

    Raises:
        FluxSaeError: no SAE at the target, a feature, token or step that is not there, or an SAE of another ground.
    """
    settings = settings or default_settings(pipe)
    named = {SaeName.parse(name): sae for name, sae in saes.items()}
    # Another SAE of the target's own hook point reads the same tokens: nothing there comes earlier.
    place = target.hookpoint.place
    saes = {name: sae for name, sae in named.items() if name.place != place or name == target.hookpoint}
    _check_target(pipe, saes, target, settings, limit=limit, allow_mismatch=allow_mismatch)
    words = content_words(prompt)
    room = _trials_at_once(pipe, settings)
    before = target.step if snapshot is None else 0
    passes = _PassCounter(on_pass, before + 1 + len(words) + math.ceil((len(words) + 1 + limit) / room))
    if snapshot is None:
        snapshot = denoise_to(
            pipe, prompt, seeds=seed, settings=settings, step=target.step, on_step=lambda step, n_steps: passes.tell()
        )
    whole = _DifferentiatedPass(pipe, saes, target, snapshot)
    passes.tell()
    without = [_without(pipe, prompt, word, settings) for word in words]
    alone = {target.hookpoint: saes[target.hookpoint]}
    other_ends = []
    for gone in without:
        other_ends.append(_DifferentiatedPass(pipe, alone, target, snapshot, text=gone))
        passes.tell()
    features = whole.strongest_features(limit)
    trials = _Trials(pipe, saes, target, snapshot, allow_mismatch=allow_mismatch, passes=passes)
    empty = embed_prompts(pipe, [" "], settings)
    measured = trials.measure(
        [*((each, None) for each in without), (empty, None), *((None, source) for source in features)],
        watched=tuple(features),
    )
    of_words, nothing, of_features = measured[: len(words)], measured[len(words)], measured[len(words) + 1 :]
    return Explanation(
        target=target,
        sigma=schedule_sigmas(pipe, settings)[target.step],
        drive=trials.baseline,
        words=_largest_first(
            Effect(word, _word_effect(whole, other_end), found.effect, found.lost)
            for word, other_end, found in zip(words, other_ends, of_words, strict=True)
        ),
        features=_largest_first(
            Effect(source, predicted, found.effect)
            for (source, predicted), found in zip(features.items(), of_features, strict=True)
        ),
        without_prompt=trials.baseline - nothing.effect,
        unexplained={place: acts.error_effect() for place, acts in whole.acts.items()},
        explained={place: float(acts.effects().sum()) for place, acts in whole.acts.items()},
    )


def _word_effect(whole: "_DifferentiatedPass", without: "_DifferentiatedPass") -> float:
    """What the drive loses without a word, by the trapezoid rule."""
    change = Embeddings(
        (whole.text.prompt - without.text.prompt).detach(), (whole.text.pooled - without.text.pooled).detach()
    )
    return (whole.text_effect(change) + without.text_effect(change)) / 2


def content_words(prompt: str) -> list[Word]:
    """The words that may be sources, each occurrence by itself; stop words are left out."""
    found = re.finditer(r"[\w'\u2019-]+", prompt)
    words = [Word(match.group(), at, *match.span()) for at, match in enumerate(found)]
    return [word for word in words if word.text.lower() not in STOP_WORDS]


def _largest_first(effects: Iterable[Effect]) -> tuple[Effect, ...]:
    return tuple(sorted(effects, key=lambda effect: -effect.size))


def _check_target(
    pipe: AnyFlux,
    saes: Saes,
    target: Target,
    settings: GenerationSettings,
    *,
    limit: int,
    allow_mismatch: Collection[Mismatch],
) -> None:
    n_tokens = token_grid(pipe, settings).n_tokens
    if target.token is not None and not 0 <= target.token < n_tokens:
        raise FluxSaeError(f"token is {target.token}; this image has tokens 0 to {n_tokens - 1}.")
    if limit < 1:
        raise FluxSaeError(f"limit is {limit}; it is a whole number of at least 1.")
    # An identity edit is refused for the same reasons as the target: SAE, feature, step and ground.
    edit = SteeringEdit(target.hookpoint, target.feature, "scale", 1.0, steps=(target.step, target.step + 1))
    check_edits(pipe, saes, [edit], settings=settings, allow_mismatch=allow_mismatch)


def _without(pipe: AnyFlux, prompt: str, word: Word, settings: GenerationSettings) -> Embeddings:
    """The embeddings of a prompt without one word, laid out so that the other words keep their places.

    FLUX.1 gives all text tokens the same position, so there equal places are only needed to compare them with the
    whole prompt's; in FLUX.2 a token's place counts.
    """
    left = " ".join((prompt[: word.start] + prompt[word.stop :]).split()) or " "
    found = embed_prompts(pipe, [left], settings)
    whole, rest = (family_of(pipe).token_spans(pipe, text) for text in (prompt, left))
    first, behind = _tokens_of(word, whole)
    n_gone = len(whole) - len(rest)
    if n_gone != behind - first:  # the tokenizer splits the other words anew, so their places cannot be matched
        return found
    tail = found.prompt.shape[1] - n_gone
    order = [*range(first), *range(tail, tail + n_gone), *range(first, tail)]
    return replace(found, prompt=found.prompt[:, order])


def _tokens_of(word: Word, spans: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The places [first, behind) of a word's tokens."""
    own = [at for at, (start, stop) in enumerate(spans) if start < word.stop and stop > word.start]
    return (own[0], own[-1] + 1) if own else (0, 0)


def _trials_at_once(pipe: AnyFlux, settings: GenerationSettings) -> int:
    """Trials of one batch, beside the whole image."""
    return max(2, batch_within_memory(pipe, settings)) - 1


class _PassCounter:
    """Tells of every pass that is done."""

    def __init__(self, on_pass: Callable[[int, int], None] | None, total: int) -> None:
        self._on_pass, self._total, self._done = on_pass, total, 0

    def tell(self) -> None:
        """One more is done."""
        if self._on_pass is not None:
            self._on_pass(self._done, self._total)
        self._done += 1


class _DifferentiatedPass:
    """One pass of the transformer up to the target, with the gradient of its drive to everything before it."""

    def __init__(
        self, pipe: AnyFlux, saes: Saes, target: Target, snapshot: Snapshot, *, text: Embeddings | None = None
    ) -> None:
        given = text or snapshot.embeddings
        self.text = Embeddings(
            given.prompt.detach().clone().requires_grad_(), given.pooled.detach().clone().requires_grad_()
        )
        seen: dict[HookPoint, Tensor] = {}
        sigma = schedule_sigmas(pipe, snapshot.settings)[target.step]
        stop = StopGeneration()

        def keep(call: BlockCall) -> Tensor:
            # A copy has its own place in the graph, so the gradient to one stream of a shared tensor can be asked for.
            seen[call.hookpoint] = call.tokens.clone()
            if call.hookpoint == target.hookpoint:
                raise stop
            return seen[call.hookpoint]

        with torch.enable_grad(), _frozen(pipe.transformer):
            try:
                with block_hooks(pipe, dict.fromkeys(saes, keep)):
                    differentiable_velocity(
                        pipe, snapshot.latents, self.text, step=target.step, settings=snapshot.settings
                    )
            except StopGeneration as stopped:
                if stopped is not stop:
                    raise
                free_after_abort(pipe)
            drive = target.drive(saes[target.hookpoint], seen.pop(target.hookpoint), sigma=sigma).sum()
            sources = (self.text.prompt, self.text.pooled, *seen.values())
            gradients = torch.autograd.grad(drive, sources, allow_unused=True)
        self._of_text = gradients[:2]
        self.acts = {
            place: _SourceActs(saes[place], x.detach(), gradient, sigma)
            for (place, x), gradient in zip(seen.items(), gradients[2:], strict=True)
            if gradient is not None
        }

    def text_effect(self, change: Embeddings) -> float:
        """Gradient times a change of the embeddings."""
        pairs = zip(self._of_text, (change.prompt, change.pooled), strict=True)
        return sum(float((slope.float() * part).sum()) for slope, part in pairs if slope is not None)

    def strongest_features(self, limit: int) -> dict[tuple[HookPoint, int], float]:
        """The earlier features whose predicted effect is largest in size, with it."""
        found = {
            (place, int(feature)): float(effects[feature])
            for place, acts in self.acts.items()
            for effects in [acts.effects()]
            for feature in effects.abs().topk(min(limit, len(effects))).indices
            if effects[feature] != 0
        }
        return dict(sorted(found.items(), key=lambda item: -abs(item[1]))[:limit])


@dataclass(frozen=True, eq=False)
class _SourceActs:
    """An earlier hook point's tokens and the gradient of the drive to them."""

    sae: SparseAutoencoder
    x: Float[Tensor, "1 tokens d_model"]
    gradient: Float[Tensor, "1 tokens d_model"]
    sigma: float

    @torch.no_grad()
    def effects(self) -> Float[Tensor, " n_features"]:
        """Gradient times activation of every feature, summed over the tokens."""
        acts = self.sae.encode_sparse(self.x[0], sigma=self.sigma)
        gradient = self.gradient[0].to(self.sae.compute_dtype) * self.sae.input_scale
        W_dec = self.sae.W_dec.to(self.sae.compute_dtype)
        slopes = pair_products(gradient.contiguous(), acts.tokens, W_dec, acts.features)
        return W_dec.new_zeros(self.sae.config.n_features).index_add_(0, acts.features, acts.values * slopes)

    @torch.no_grad()
    def error_effect(self) -> float:
        """Gradient times what the SAE does not reconstruct."""
        missing = self.x.float() - self.sae.reconstruct(self.x, sigma=self.sigma)
        return float((self.gradient.float() * missing).sum())


@dataclass(frozen=True)
class _Trial:
    effect: float
    lost: dict[tuple[HookPoint, int], float]


class _Trials:
    """Passes with one source taken away, in batches of one size that each hold the whole image, too."""

    def __init__(
        self,
        pipe: AnyFlux,
        saes: Saes,
        target: Target,
        snapshot: Snapshot,
        *,
        allow_mismatch: Collection[Mismatch],
        passes: _PassCounter,
    ) -> None:
        self._pipe, self._saes, self._target, self._snapshot = pipe, saes, target, snapshot
        self._passes = passes
        self._allow_mismatch = allow_mismatch
        self.baseline = float("nan")

    def measure(
        self,
        trials: Sequence[tuple[Embeddings | None, tuple[HookPoint, int] | None]],
        *,
        watched: Sequence[tuple[HookPoint, int]],
    ) -> list[_Trial]:
        """What the drive loses, and which share of the watched features' summed acts, in each trial."""
        size = min(_trials_at_once(self._pipe, self._snapshot.settings), len(trials))
        found: list[_Trial] = []
        for start in range(0, len(trials), size):
            batch = list(trials[start : start + size])
            padded = [(None, None), *batch, *[(None, None)] * (size - len(batch))]
            found += self._measure_batch(padded, watched)[: len(batch)]
            self._passes.tell()
        return found

    @torch.no_grad()
    def _measure_batch(
        self,
        batch: Sequence[tuple[Embeddings | None, tuple[HookPoint, int] | None]],
        watched: Sequence[tuple[HookPoint, int]],
    ) -> list[_Trial]:
        whole, target = self._snapshot.embeddings, self._target
        embeddings = Embeddings(
            torch.cat([(each or whole).prompt for each, _ in batch]),
            torch.cat([(each or whole).pooled for each, _ in batch]),
        )
        window = (target.step, target.step + 1)
        edits = [[] if source is None else [SteeringEdit(*source, "ablate", 1.0, steps=window)] for _, source in batch]
        places = sorted({target.hookpoint, *(place for place, _ in watched)})
        with (
            capture(self._pipe, places, [target.step], stop_early=True) as captured,
            steer(self._pipe, self._saes, edits, allow_mismatch=self._allow_mismatch),
        ):
            latents = self._snapshot.latents.expand(len(batch), -1, -1)
            velocity(self._pipe, latents, embeddings, step=target.step, settings=self._snapshot.settings)
        sigma = captured.sigma(target.step)
        x = captured.get(target.hookpoint, target.step)
        drives = target.drive(self._saes[target.hookpoint], x, sigma=sigma).tolist()
        self.baseline = drives[0]
        sums = {
            (place, feature): self._saes[place]
            .encode_features(captured.get(place, target.step), [feature], sigma=sigma)
            .sum((1, 2))
            for place, feature in watched
        }
        return [
            _Trial(drives[0] - drive, {source: _share_lost(each, at) for source, each in sums.items()})
            for at, drive in enumerate(drives[1:], start=1)
        ]


def _share_lost(sums: Float[Tensor, " batch"], item: int) -> float:
    whole = float(sums[0])
    return (whole - float(sums[item])) / whole if whole > 0 else 0.0


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """While open, no parameter asks for a gradient, so that only what the sources need is kept."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
