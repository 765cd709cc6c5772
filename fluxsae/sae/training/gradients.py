"""Loss and gradients of one batch, written out by hand so that they can be sparse and need no large temporary tensors.

With H[n] = dL/dx~_hat[n] the gradients are
    dL/dacts[n, f]  = <H[n], W_dec[f]> + penalty          dL/dW_dec[f] = sum_n acts[n, f] H[n]
    dL/dpre[n, f]   = dL/dacts[n, f] where f is active    dL/dW_enc[f] = sum_n dL/dpre[n, f] (x'[n] - b_dec)
    dL/dx'[n]       = sum_f dL/dpre[n, f] W_enc[f]        dL/dsigma_scale = x~ dL/dx', dL/dsigma_shift = dL/dx', summed
x' is what the encoder reads: x~, or with tables over noise levels x~ sigma_scale + sigma_shift, of each token's level.
The matryoshka loss is the mean over nested dictionaries, so H depends on the segment between two sizes that f lies in.
Both weight gradients are given a block of features at a time: the optimiser uses a block while it is in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fluxsae.sae.config import Precision
from fluxsae.sae.kernels import (
    PairsByFeature,
    bag_sums,
    exact_sum_product,
    lowered,
    pair_products,
    product,
    topk,
    topk_acts,
)
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.sigma_table import table_places
from fluxsae.sae.training.processes import Processes

RowGradients = Callable[[slice], tuple[Tensor, Tensor]]


@dataclass
class _Encoded:
    x_tilde: Tensor
    centred: Tensor
    """x' - b_dec."""
    pre_acts: Tensor


@dataclass
class BatchGradients:
    """What one batch gives; losses and gradients are this process's share of the sum over all processes."""

    losses: dict[str, Tensor]
    """Terms of the loss, weighted, by name: `mse`, `sparsity`, `auxk`; and `l0`, which is no term."""
    fired: Bool[Tensor, " n_features"]
    small: dict[str, Tensor]
    """Gradients of b_enc, b_dec and, where the SAE has them, threshold, sigma_scale and sigma_shift."""
    weight_rows: RowGradients
    """Gradients of the rows of W_enc and of W_dec, for a block of features."""
    smallest_act: Tensor | None = None
    """batchtopk, matryoshka: the smallest selected activation of the global batch."""
    d_input: Tensor | None = None
    """dL/dx' of every token, for the tables over noise levels; None in a plain SAE."""


@dataclass
class Situation:
    """What the gradients of a batch depend on beside the weights."""

    n_tokens: int
    """Tokens of the batch over all processes."""
    precision: Precision = "float32"
    is_sparse: bool = False
    sparsity_share: float = 1.0
    dead: Int[Tensor, " dead"] | None = None
    """Dead features, ascending; they get the auxiliary loss."""
    selection_floor: Tensor | None = None
    """batchtopk, matryoshka: a guess of the smallest selected activation, which makes the search short."""
    processes: Processes = field(default_factory=Processes)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    """Memory that is kept from step to step: fetching large pieces anew costs more than filling them."""

    def lowered(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the type it is multiplied in, in the scratch memory of that name."""
        if name not in self.scratch:
            self.scratch[name] = lowered(tensor, self.precision)
            return self.scratch[name]
        return lowered(tensor, self.precision, buffer=self.scratch[name])

    def gathered(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor in the type that is gathered fastest: on CUDA half the bytes are half the time."""
        return self.lowered(name, tensor) if tensor.is_cuda else tensor


def batch_gradients(
    sae: SparseAutoencoder,
    x_tilde: Float[Tensor, "tokens d_model"],
    situation: Situation,
    sigmas: Float[Tensor, " tokens"] | None = None,
) -> BatchGradients:
    """Loss and gradients of this process's tokens of a batch; an SAE with a `sigma_table` needs their noise levels."""
    with torch.no_grad():
        centred = sae.encoder_input(x_tilde, sigmas) - sae.b_dec
        pre_acts = _pre_acts(sae, centred, situation)
        encoded = _Encoded(x_tilde, centred, pre_acts)
        run = _sparse_gradients if situation.is_sparse else _dense_gradients
        result, residual = run(sae, encoded, situation)
        if situation.dead is not None and len(situation.dead) and sae.config.auxk_coeff > 0:
            _add_auxiliary_loss(result, sae, encoded, residual, situation)
        # b_dec is subtracted before the encoder: its gradient passes through every pre-activation.
        result.small["b_dec"] -= result.small["b_enc"] @ sae.W_enc
        if result.d_input is not None and sigmas is not None:
            table = sae.config.sigma_table
            places = table_places(table, sigmas)
            result.small["sigma_scale"] = places.spread(result.d_input * x_tilde, len(table))
            result.small["sigma_shift"] = places.spread(result.d_input, len(table))
        return result


def _pre_acts(sae: SparseAutoencoder, centred: Tensor, situation: Situation) -> Tensor:
    """Pre-activations with float32 sums; for `topk` on a CPU rounded to the type of the products: half the time.

    There the k largest are chosen among rounded values (equal ones go to the lower feature, as always). Selection over
    a batch, penalties and thresholds get them unrounded, and outside training they are float32 everywhere.
    """
    if sae.config.architecture == "topk" and centred.device.type == "cpu":
        encoder = situation.lowered("W_enc", sae.W_enc)
        bias = lowered(sae.b_enc, situation.precision)
        return torch.addmm(bias, lowered(centred, situation.precision), encoder.T)
    return exact_sum_product(centred, sae.W_enc.T, situation.precision).add_(sae.b_enc)


def select(sae: SparseAutoencoder, pre_acts: Tensor, situation: Situation) -> tuple[Tensor, Tensor | None]:
    """Dense acts in training, and the smallest selected activation where the architecture selects over the batch."""
    config = sae.config
    if config.kind.selects_over_batch:
        assert config.k is not None
        kept, smallest = _batch_topk(pre_acts, config.k * situation.n_tokens, situation)
        return lowered(pre_acts * kept, situation.precision), smallest
    if config.architecture == "topk":
        assert config.k is not None
        dtype = torch.bfloat16 if situation.precision == "bfloat16" else pre_acts.dtype
        return topk_acts(pre_acts, config.k, dtype=dtype), None
    return lowered(sae.activate(pre_acts), situation.precision), None


def _batch_topk(pre_acts: Tensor, n_kept: int, situation: Situation) -> tuple[Tensor, Tensor]:
    """Which positive pre-activations are among the `n_kept` largest of the global batch; the smallest of them.

    Equal values go to the earlier token, then to the lower feature, over all processes in the order of their ranks.
    """
    processes = situation.processes
    everywhere = _candidates(pre_acts, n_kept, situation)
    if processes.world_size > 1:
        padding = everywhere.new_zeros(min(n_kept, pre_acts.numel()) - len(everywhere))
        gathered = processes.gather(torch.cat([everywhere, padding]))
        everywhere = gathered[gathered > 0]
    if len(everywhere) < n_kept:
        smallest = everywhere.amin() if len(everywhere) else pre_acts.new_zeros(())
        return pre_acts > 0, smallest
    smallest = everywhere.topk(n_kept, sorted=False).values.amin()
    beats, ties = pre_acts > smallest, pre_acts == smallest
    counts = processes.gather(torch.stack([beats.sum(), ties.sum()])[None])
    room = n_kept - counts[:, 0].sum() - counts[: processes.rank, 1].sum()
    if int(counts[processes.rank, 1]) > int(room):
        ties &= (ties.flatten().cumsum(0) <= room).view_as(ties)
    return beats | ties, smallest


def _candidates(pre_acts: Tensor, n_kept: int, situation: Situation) -> Tensor:
    """The positive entries that may be selected: those above the floor, if all processes have enough, else all."""
    if situation.selection_floor is not None:
        above = pre_acts[pre_acts > (0.8 * situation.selection_floor).clamp(min=0)]
        if int(situation.processes.sum_(torch.tensor(len(above), device=above.device))) >= n_kept:
            return above.topk(min(n_kept, len(above)), sorted=False).values
    positive = pre_acts[pre_acts > 0]
    return positive.topk(min(n_kept, len(positive)), sorted=False).values


def _segments(sae: SparseAutoencoder) -> list[slice]:
    sizes = sae.config.nested_sizes
    return [slice(low, high) for low, high in zip((0, *sizes), sizes, strict=False)]


def _output_gradients(
    partial_sums: list[Tensor], x_tilde: Tensor, b_dec: Tensor, situation: Situation
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The reconstruction loss, H of each segment, and the residual of the whole dictionary."""
    scale = 1 / (situation.n_tokens * x_tilde.shape[1] * len(partial_sums))
    mse, total, errors = x_tilde.new_zeros(()), b_dec, []
    for part in partial_sums:
        total = part.add_(total)
        errors.append(total - x_tilde)
        mse = mse + torch.dot(errors[-1].flatten(), errors[-1].flatten()) * scale
    residual = -errors[-1]
    for error in errors:
        error.mul_(2 * scale)
    for segment in reversed(range(len(errors) - 1)):
        errors[segment] += errors[segment + 1]
    return mse, errors, residual


def _dense_gradients(sae: SparseAutoencoder, encoded: _Encoded, situation: Situation) -> tuple[BatchGradients, Tensor]:
    config, pre_acts = sae.config, encoded.pre_acts
    acts, smallest = select(sae, pre_acts, situation)
    W_dec, segments = situation.lowered("W_dec", sae.W_dec), _segments(sae)
    parts = [product(acts[:, s], W_dec[s]) for s in segments]
    mse, outputs, residual = _output_gradients(parts, encoded.x_tilde, sae.b_dec, situation)
    outputs = [lowered(output, situation.precision) for output in outputs]
    d_acts = _joined([product(h, W_dec[s].T, is_rounded=True) for h, s in zip(outputs, segments, strict=True)], dim=1)
    active = acts > 0
    losses = {"mse": mse, "l0": active.sum() / situation.n_tokens}
    small: dict[str, Tensor] = {}
    if config.architecture == "l1":
        weight = config.l1_coeff * situation.sparsity_share / situation.n_tokens
        losses["sparsity"] = pre_acts.relu().sum() * weight
        d_acts += weight
    if config.architecture == "jumprelu":
        weight = config.l0_coeff * situation.sparsity_share / situation.n_tokens
        losses["sparsity"] = active.sum() * weight
        small["threshold"] = _threshold_gradient(sae, pre_acts, d_acts, weight)
    d_pre, centred = d_acts.mul_(active), lowered(encoded.centred, situation.precision)
    small |= {"b_enc": _column_sums(d_pre, sae.b_enc), "b_dec": _column_sums(outputs[0], sae.b_dec)}

    def weight_rows(rows: slice) -> tuple[Tensor, Tensor]:
        overlaps = [(h, _overlap(rows, s)) for h, s in zip(outputs, segments, strict=True)]
        parts = [product(acts[:, part].T, h) for h, part in overlaps if part.start < part.stop]
        return product(d_pre[:, rows].T, centred), _joined(parts, dim=0)

    d_input = None
    if config.is_sigma_conditioned:
        d_input = product(d_pre, lowered(sae.W_enc, situation.precision))
    return BatchGradients(losses, active.any(0), small, weight_rows, smallest, d_input), residual


def _joined(parts: list[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def _column_sums(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.sum(0, dtype=like.dtype)


def _overlap(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _threshold_gradient(sae: SparseAutoencoder, pre_acts: Tensor, d_acts: Tensor, weight: float) -> Tensor:
    """The straight-through gradient of jumprelu's thresholds: a rectangle of width `bandwidth` (arXiv 2407.14435)."""
    near = ((pre_acts - sae.threshold).abs() < sae.config.bandwidth / 2) & (pre_acts > 0)
    per_entry = (d_acts * sae.threshold + weight) * near
    return -per_entry.sum(0) / sae.config.bandwidth


def _sparse_gradients(sae: SparseAutoencoder, encoded: _Encoded, situation: Situation) -> tuple[BatchGradients, Tensor]:
    """The same for `topk`, over the pairs (token, active feature) alone."""
    assert sae.config.k is not None
    n_tokens, n_features = encoded.pre_acts.shape
    values, indices = topk(encoded.pre_acts, sae.config.k)
    values, flat = values.relu().to(sae.b_enc.dtype).reshape(-1), indices.reshape(-1)
    starts = torch.arange(0, flat.numel(), sae.config.k, device=flat.device)
    tokens = torch.arange(n_tokens, device=flat.device).repeat_interleave(sae.config.k)
    W_dec = situation.gathered("W_dec", sae.W_dec)
    x_parts = [bag_sums(values, flat, starts, W_dec)]
    mse, (output,), residual = _output_gradients(x_parts, encoded.x_tilde, sae.b_dec, situation)
    output, centred = situation.gathered("output", output), situation.gathered("centred", encoded.centred)
    pairs = PairsByFeature(tokens, flat, n_features)
    values = values[pairs.order]
    active = values > 0
    d_pre = pair_products(output, pairs.tokens, W_dec, pairs.features).mul_(active)
    fired = torch.zeros(n_features, dtype=torch.int64, device=flat.device).scatter_add_(
        0, pairs.features, active.long()
    )
    losses = {"mse": mse, "l0": active.sum() / situation.n_tokens}
    b_enc = torch.zeros_like(sae.b_enc).scatter_add_(0, pairs.features, d_pre)

    def weight_rows(rows: slice) -> tuple[Tensor, Tensor]:
        for_encoder = pairs.feature_sums(d_pre, centred, rows, pairs.tokens)
        return for_encoder, pairs.feature_sums(values, output, rows, pairs.tokens)

    small = {"b_enc": b_enc, "b_dec": _column_sums(output, sae.b_dec)}
    result = BatchGradients(losses, fired > 0, small, weight_rows)
    if sae.config.is_sigma_conditioned:
        by_token = torch.empty_like(d_pre)
        by_token[pairs.order] = d_pre
        result.d_input = bag_sums(by_token, flat, starts, situation.gathered("W_enc rows", sae.W_enc))
    return result, residual


def _add_auxiliary_loss(
    result: BatchGradients, sae: SparseAutoencoder, encoded: _Encoded, residual: Tensor, situation: Situation
) -> None:
    """AuxK (Gao et al. 2024, appendix A.2): the dead features' top ones explain the residual, which is held fixed."""
    dead, config = situation.dead, sae.config
    assert dead is not None
    wanted = config.auxk or max(1, config.d_model // 2)
    width = min(wanted, len(dead))
    scale = config.auxk_coeff * width / wanted / (situation.n_tokens * config.d_model)
    acts = lowered(topk_acts(encoded.pre_acts[:, dead], width), situation.precision)
    directions = lowered(sae.W_dec[dead], situation.precision)
    error = product(acts, directions).sub_(residual)
    result.losses["auxk"] = error.square().sum() * scale
    output, centred = (lowered(t, situation.precision) for t in (error.mul_(2 * scale), encoded.centred))
    d_pre = product(output, directions.T, is_rounded=True).mul_(acts > 0)
    result.small["b_enc"].index_add_(0, dead, _column_sums(d_pre, sae.b_enc))
    if result.d_input is not None:
        result.d_input += product(d_pre, lowered(sae.W_enc[dead], situation.precision))
    for_encoder, for_decoder = product(d_pre.T, centred), product(acts.T, output)
    inner = result.weight_rows

    def weight_rows(rows: slice) -> tuple[Tensor, Tensor]:
        encoder_rows, decoder_rows = inner(rows)
        low, high = 0, len(dead)
        if (rows.start, rows.stop) != (0, config.n_features):
            low, high = (int(i) for i in torch.searchsorted(dead, dead.new_tensor([rows.start, rows.stop])))
        encoder_rows.index_add_(0, dead[low:high] - rows.start, for_encoder[low:high])
        decoder_rows.index_add_(0, dead[low:high] - rows.start, for_decoder[low:high])
        return encoder_rows, decoder_rows

    result.weight_rows = weight_rows
