"""Dictionaries that know nothing, one that knows the truth, and SAEs trained anew: what measures are audited with.

None of them has a table of noise levels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.laboratory.readouts import principal_components
from fluxsae.laboratory.sample import Sample
from fluxsae.laboratory.truths import CONCEPTS, COVERED
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import TrainConfig, train

RIDGE = 1e-3
"""Added to covariances, as a share of their mean diagonal."""
_REFERENCE_ROWS = 20_000


@dataclass(eq=False)
class Rows:
    """Token rows in memory as a source of training batches."""

    rows: Float[Tensor, "rows d"]
    batch_size: int
    seed: int
    reads_ahead: bool = False
    d_model: int = field(init=False)

    def __post_init__(self) -> None:
        self.d_model = self.rows.shape[1]

    @property
    def order(self) -> str:
        """What decides the order of the rows."""
        return f"rows in memory, seed {self.seed}"

    @property
    def n_batches(self) -> int:
        """Whole batches of one epoch."""
        return len(self.rows) // self.batch_size

    def sigmas(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        """Never asked for, since no dictionary here has a table of noise levels."""
        raise AssertionError("rows in memory have no noise levels")

    def batches(self, epoch: int, *, cursor: int = 0) -> Iterator[Tensor]:
        """The rows in an order of each epoch's own."""
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
        for place in range(cursor, self.n_batches):
            yield self.rows[order[place * self.batch_size : (place + 1) * self.batch_size]]


def trained_sae(like: SparseAutoencoder, rows: Float[Tensor, "rows d"], config: TrainConfig) -> SparseAutoencoder:
    """An SAE of the same kind, trained anew; the config's seed decides its first weights and the order of the rows."""
    kind = replace(like.config, sigma_table=(), dead_after_tokens=max(1, min(like.config.dead_after_tokens, len(rows))))
    found = train({"sae": kind}, Rows(rows, min(2048, len(rows) // 20), config.seed), config).saes["sae"]
    return _with_references(found.requires_grad_(False), rows)


def untrained_sae(like: SparseAutoencoder, rows: Float[Tensor, "rows d"], *, seed: int) -> SparseAutoencoder:
    """An SAE of the same kind with its first, random weights: units, centre and threshold as those of a trained one."""
    sae = SparseAutoencoder(replace(like.config, sigma_table=()), seed=seed).requires_grad_(False)
    for name in ("input_mean", "input_scale", "b_dec"):
        getattr(sae, name).copy_(getattr(like, name))
    if like.config.has_threshold:
        sae.threshold.copy_(like.threshold)
    return _with_references(sae, rows)


def permuted_decoder(sae: SparseAutoencoder, *, seed: int) -> SparseAutoencoder:
    """The same encoder with the decoder rows of other features."""
    permuted = SparseAutoencoder(sae.config, seed=None).requires_grad_(False)
    permuted.load_state_dict(sae.state_dict())
    order = torch.randperm(sae.config.n_features, generator=torch.Generator().manual_seed(seed))
    permuted.W_dec.copy_(sae.W_dec[order])
    return permuted


def pca_sae(like: SparseAutoencoder, rows: Float[Tensor, "rows d"]) -> SparseAutoencoder:
    """All principal components, each sign a feature, of which the largest k fire on a token as in the SAE."""
    both = principal_components(like, rows[:_REFERENCE_ROWS]).directions
    k = min(like.config.k or like.config.d_model, len(both))
    config = SaeConfig(architecture="topk", d_model=like.config.d_model, n_features=len(both), k=k)
    sae = SparseAutoencoder(config, seed=None).requires_grad_(False)
    sae.input_mean.copy_(rows.double().mean(0).float())
    sae.input_scale.copy_(like.input_scale)
    sae.W_enc.copy_(both)
    sae.W_dec.copy_(both)
    return _with_references(sae, rows)


def oracle_sae(like: SparseAutoencoder, sample: Sample) -> SparseAutoencoder:
    """One feature a true concept, planted from the masks of the first half's images (a linear discriminant each).

    It fires where the discriminant is nearer to the concept's mean than to the others', and writes what best rebuilds
    the tokens from all of its features (ridge regression).
    """
    assert sample.truth is not None
    halves = sample.truth.halves
    x = like.normalise(sample.x[halves.first]).double()
    n_steps = x.shape[1]
    covers = torch.from_numpy(sample.truth.covers[halves.first] > COVERED)[:, :, None].expand(-1, -1, n_steps, -1)
    inside = covers.permute(1, 0, 2, 3).reshape(len(CONCEPTS), -1).double()
    tokens = x.reshape(-1, x.shape[-1])
    known = (inside.sum(1) > 0) & (inside.sum(1) < len(tokens))
    inside, mean = inside[known], tokens.mean(0)
    covariance = (tokens - mean).T @ (tokens - mean) / len(tokens)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=torch.float64)
    own = inside @ tokens / inside.sum(1, keepdim=True)
    rest = (1 - inside) @ tokens / (1 - inside).sum(1, keepdim=True)
    encoder = torch.linalg.solve(covariance, (own - rest).T).T
    bias = -(encoder * (own + rest) / 2).sum(1)
    acts = (tokens @ encoder.T + bias).clamp(min=0)
    centred = acts - acts.mean(0)
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    decoder = torch.linalg.solve(gram, centred.T @ (tokens - mean))
    lengths = decoder.norm(dim=1).clamp(min=1e-9)
    sae = SparseAutoencoder(
        SaeConfig(architecture="l1", d_model=like.config.d_model, n_features=len(encoder)), seed=None
    ).requires_grad_(False)
    sae.input_mean.copy_(like.input_mean)
    sae.input_scale.copy_(like.input_scale)
    offset = mean - acts.mean(0) @ decoder  # read and written at b_dec alike
    sae.b_dec.copy_(offset.float())
    sae.W_enc.copy_((encoder * lengths[:, None]).float())
    sae.b_enc.copy_((lengths * (bias + encoder @ offset)).float())
    sae.W_dec.copy_((decoder / lengths[:, None]).float())
    return _with_references(sae, sample.x.flatten(0, 2))


@torch.no_grad()
def _with_references(sae: SparseAutoencoder, rows: Float[Tensor, "rows d"]) -> SparseAutoencoder:
    """Fills in each feature's reference activation: the 99th percentile of its positive acts."""
    acts = sae.encode(rows[torch.linspace(0, len(rows) - 1, min(len(rows), _REFERENCE_ROWS)).long()])
    positive = torch.where(acts > 0, acts, torch.nan)
    sae.reference_acts.copy_(positive.nanquantile(0.99, dim=0).nan_to_num(0.0))
    return sae
