"""How SAEs are trained: one frozen description shared by the command line, the pipeline and the tests."""

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field

from fluxsae.checked import Share, Whole, checked
from fluxsae.sae.config import Precision

Reaction = Literal["skip", "stop"]
SpikeReaction = Literal["report", "skip", "stop"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


@checked(kw_only=True)
class TrainConfig:
    """The training loop's settings.

    Raises:
        FluxSaeError: a value out of range.
    """

    epochs: Whole = 1
    """Passes over the data."""
    max_steps: Whole | None = None
    """Stop after this many batches, whatever the epochs; left out, no limit."""
    lr: Positive | None = None
    """Peak learning rate; left out, 2e-4 * sqrt(16384 / n_features) (Gao et al. 2024)."""
    warmup_steps: Count = 100
    """Batches over which the learning rate rises from 0, a tenth of the run at most."""
    decay_fraction: Share = 0.2
    """Last share of the steps over which the learning rate falls to 0."""
    sparsity_warmup_steps: Count = 500
    """l1, jumprelu: batches over which the sparsity penalty rises from 0, a fifth of the run at most."""
    beta1: Share = 0.9
    """Adam's decay of the mean gradient."""
    beta2: Share = 0.999
    """Adam's decay of the squared gradient."""
    adam_eps: float = 1e-10
    """Adam's epsilon; gradients of a mean over tokens and dimensions are small."""
    grad_clip: Positive | None = 1.0
    """Largest norm of the whole gradient; None switches clipping off, which saves memory and time."""
    precision: Precision | Literal["auto"] = "auto"
    """Precision of the matrix products; weights, sums and the optimiser are always float32."""
    products: Literal["auto", "dense", "sparse"] = "auto"
    """dense: all features are multiplied; sparse: only the active ones; auto: the faster one."""
    resample_every: Count | None = None
    """l1: steps between resamplings of dead features, 0 for never; left out, a tenth of the run."""
    resample_until: Share = 0.6
    """l1: share of the run after which nothing is resampled any more."""
    dead_refresh_steps: Whole = 20
    """Steps after which the dead features are counted again, for AuxK (the auxiliary loss that revives them)."""
    on_nan: Reaction = "skip"
    """What to do with a batch whose loss or gradient is not finite."""
    on_spike: SpikeReaction = "report"
    """What to do with a batch whose loss exceeds `spike_factor` times its running mean."""
    spike_factor: Annotated[float, Field(gt=1)] = 10.0
    """How many times the running mean of the loss counts as a spike."""
    init_rows: Annotated[int, Field(ge=2)] = 32_768
    """Token rows from which input_mean, input_scale and the first b_dec (the decoder's bias) are computed."""
    log_every: Whole = 20
    """Steps between lines of the metrics log."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between checkpoints, which are written with a line of the log."""
    seed: Count = 0
    """Decides the first weights and what is resampled; the order of the data is the source's own."""

    def n_steps(self, n_batches: int) -> int:
        """Batches of the whole run, for a source with `n_batches` an epoch."""
        n_steps = self.epochs * n_batches
        return n_steps if self.max_steps is None else min(n_steps, self.max_steps)

    def learning_rate(self, step: int, n_steps: int, n_features: int) -> float:
        """The learning rate of a step: a linear rise, a plateau, a linear fall that ends above 0."""
        peak = self.lr or 2e-4 * (16_384 / n_features) ** 0.5
        rise = min(1.0, (step + 1) / (min(self.warmup_steps, n_steps // 10) + 1))
        falling = max(1.0, self.decay_fraction * n_steps)
        fall = min(1.0, (n_steps - step) / falling) if self.decay_fraction else 1.0
        return peak * rise * fall

    def sparsity_share(self, step: int, n_steps: int) -> float:
        """The share of the sparsity penalty that counts at a step."""
        return min(1.0, (step + 1) / (min(self.sparsity_warmup_steps, n_steps // 5) + 1))

    def resamples_at(self, step: int, n_steps: int) -> bool:
        """Whether dead features of an `l1` SAE are resampled after this step."""
        every = max(1, n_steps // 10) if self.resample_every is None else self.resample_every
        return every > 0 and (step + 1) % every == 0 and step + 1 <= self.resample_until * n_steps

    def changed(self, other: "TrainConfig") -> list[str]:
        """Names of the settings that decide the weights and differ, so that a checkpoint of `other` cannot go on.

        Whether a bad batch is skipped or stops the run is none of them: up to that batch the weights are the same.
        """
        free = {"log_every", "checkpoint_minutes", "on_nan", "on_spike"}
        differing = [name for name in (f.name for f in fields(self)) if getattr(self, name) != getattr(other, name)]
        reports = (self.on_spike == "report") != (other.on_spike == "report")
        return [name for name in differing if name not in free] + ["on_spike"] * reports
