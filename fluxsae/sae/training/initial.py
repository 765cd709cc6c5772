"""What the data decide before the first step: input_mean, input_scale, the first b_dec, and resampled features."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.processes import Processes
from fluxsae.sae.training.trainer import SaeTrainer

_MEDIAN_ITERATIONS = 20
_RESAMPLED_ENCODER_NORM = 0.2


class Source(Protocol):
    """Where batches come from: shards through a mixing buffer, or FLUX itself."""

    d_model: int
    batch_size: int
    """Tokens of a batch over all processes."""

    @property
    def reads_ahead(self) -> bool:
        """Whether the next batch may be assembled in another thread while the last one is in use."""

    @property
    def order(self) -> str:
        """What decides the order of the rows beside epoch and cursor: a checkpoint continues in the same order only."""

    @property
    def n_batches(self) -> int:
        """Batches of one epoch."""

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        """This process's share of batches `cursor`, `cursor` + 1, ... of an epoch."""

    def sigmas(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        """The noise level of each row of those batches; asked only for SAEs with a `sigma_table`."""


def initialise(saes: Sequence[SparseAutoencoder], source: Source, *, n_rows: int, processes: Processes) -> None:
    """Sets input_mean and input_scale from the first rows, b_dec to their geometric median, thresholds to their start.

    Raises:
        FluxSaeError: those rows do not vary, or none of them is finite.
    """
    n_batches = min(source.n_batches, max(1, -(-n_rows // source.batch_size)))
    rows = torch.cat([batch.float() for batch in islice(source.batches(0), n_batches)])
    rows = rows[rows.isfinite().all(dim=1)]  # what is done about the others is decided when training comes to them
    count = int(processes.sum_(torch.tensor(len(rows))))
    mean = processes.sum_(rows.double().sum(0)) / count
    scale = (processes.sum_((rows - mean).square().sum()) / (count * source.d_model)).sqrt()
    if not bool(torch.isfinite(scale)) or not float(scale) > 0:
        raise FluxSaeError(
            f"The first {count} finite token rows have a standard deviation of {float(scale)}; it must be finite and "
            "above 0. Collect the activations again."
        )
    centre = _geometric_median((rows - mean.float()) / scale.float(), processes)
    for sae in saes:
        sae.input_mean.copy_(mean)
        sae.input_scale.copy_(scale)
        sae.b_dec.data.copy_(centre)
        if sae.config.kind.threshold == "per feature":
            sae.threshold.data.fill_(sae.config.bandwidth)


def _geometric_median(rows: Float[Tensor, "rows d_model"], processes: Processes) -> Float[Tensor, " d_model"]:
    """The point with the least summed distance to the rows of all processes, by Weiszfeld's iteration."""
    centre = torch.zeros(rows.shape[1])
    for _ in range(_MEDIAN_ITERATIONS):
        closeness = 1 / (rows - centre).norm(dim=1).clamp(min=1e-6)
        sums = processes.sum_(torch.cat([closeness @ rows, closeness.sum()[None]]))
        centre = sums[:-1] / sums[-1]
    return centre


def resample_dead(
    trainer: SaeTrainer,
    x_tilde: Float[Tensor, "tokens d_model"],
    *,
    step: int,
    processes: Processes,
    sigmas: Float[Tensor, " tokens"] | None = None,
) -> int:
    """Points dead features at badly reconstructed tokens (Bricken et al. 2023); how many features that were.

    Tokens are drawn with a probability proportional to their squared loss, in the same way in every process.
    """
    sae = trainer.sae
    dead = (trainer.tokens_since_fired >= sae.config.dead_after_tokens).nonzero()[:, 0]
    if not len(dead):
        return 0
    centred = sae.encoder_input(x_tilde, sigmas) - sae.b_dec
    error = x_tilde - (sae.activate(centred @ sae.W_enc.T + sae.b_enc) @ sae.W_dec + sae.b_dec)
    centred, losses = processes.gather(centred), processes.gather(error.double().square().sum(1))
    losses = losses.nan_to_num(nan=0.0, posinf=0.0)  # no feature is pointed at a token that is not finite
    generator = torch.Generator().manual_seed(trainer.config.seed * 1_000_003 + step)
    n_drawn = min(len(dead), int((losses > 0).sum()))
    if n_drawn == 0:
        return 0
    drawn = torch.multinomial(losses.square().cpu(), n_drawn, generator=generator).to(dead.device)
    dead = dead[:n_drawn]
    directions = torch.nn.functional.normalize(centred[drawn], dim=1)
    alive = trainer.tokens_since_fired < sae.config.dead_after_tokens
    size = sae.W_enc[alive].norm(dim=1).mean() if bool(alive.any()) else torch.ones((), device=dead.device)
    sae.W_dec[dead] = directions
    sae.W_enc[dead] = directions * size * _RESAMPLED_ENCODER_NORM
    sae.b_enc[dead] = 0
    for name in ("W_enc", "W_dec", "b_enc"):
        for moment in trainer.moments[name]:
            moment[dead] = 0
    trainer.tokens_since_fired[dead] = 0
    return n_drawn
