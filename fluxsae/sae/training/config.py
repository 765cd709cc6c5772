"""How SAEs are trained: one frozen description shared by the command line, the pipeline and the tests."""

from dataclasses import dataclass, fields
from typing import Literal

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import Precision

Reaction = Literal["skip", "stop"]
SpikeReaction = Literal["report", "skip", "stop"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop's settings.

    Raises:
        FluxSaeError: a value out of range.
    """

    epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many batches, whatever the epochs; None = no limit."""
    lr: float | None = None
    """Peak learning rate; None = 2e-4 * sqrt(16384 / n_features) (Gao et al. 2024)."""
    warmup_steps: int = 100
    """Batches over which the learning rate rises from 0, a tenth of the run at most."""
    decay_fraction: float = 0.2
    """Last share of the steps over which the learning rate falls to 0."""
    sparsity_warmup_steps: int = 500
    """l1, jumprelu: batches over which the sparsity penalty rises from 0, a fifth of the run at most."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.999
    """Adam's decay of the squared gradient."""
    adam_eps: float = 1e-10
    """Adam's epsilon; gradients of a mean over tokens and dimensions are small."""
    grad_clip: float | None = 1.0
    """Largest norm of the whole gradient; None = no clipping, which saves memory and a pass over the gradients."""
    precision: Precision | Literal["auto"] = "auto"
    """Precision of the matrix products; weights, sums and the optimiser are always float32."""
    products: Literal["auto", "dense", "sparse"] = "auto"
    """Dense products or gathers over active features; auto = by k, n_features and device."""
    resample_every: int | None = None
    """l1: steps between resamplings of dead features; None = a tenth of the run (0 = never)."""
    resample_until: float = 0.6
    """l1: share of the run after which nothing is resampled any more."""
    dead_refresh_steps: int = 20
    """Steps between looks at which features are dead, for AuxK."""
    on_nan: Reaction = "skip"
    """What to do with a batch whose loss or gradient is not finite."""
    on_spike: SpikeReaction = "report"
    """What to do with a batch whose loss exceeds `spike_factor` times its running mean."""
    spike_factor: float = 10.0
    """How many times the running mean of the loss counts as a spike."""
    init_rows: int = 32_768
    """Token rows behind input_mean, input_scale and the first b_dec."""
    log_every: int = 20
    """Steps between lines of the metrics log."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    seed: int = 0
    """Decides the first weights and what is resampled; the order of the data is the source's own."""

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "warmup_steps": 0, "sparsity_warmup_steps": 0, "dead_refresh_steps": 1}
        at_least |= {"log_every": 1, "checkpoint_every": 1, "init_rows": 2, "seed": 0}
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise FluxSaeError(f"{name} is {getattr(self, name)}. It must be at least {low}.")
        for name in ("decay_fraction", "resample_until", "beta1", "beta2"):
            if not 0 <= getattr(self, name) <= 1:
                raise FluxSaeError(f"{name} is {getattr(self, name)}. Allowed is 0 to 1.")
        for name in ("lr", "grad_clip", "max_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise FluxSaeError(f"{name} is {value}. It must be greater than 0, or left out.")
        if self.resample_every is not None and self.resample_every < 0:
            raise FluxSaeError(f"resample_every is {self.resample_every}. It must be at least 0 (0 = never).")
        if self.spike_factor <= 1:
            raise FluxSaeError(f"spike_factor is {self.spike_factor}. It must be greater than 1.")

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
        free = {"log_every", "checkpoint_every", "on_nan", "on_spike"}
        differing = [name for name in (f.name for f in fields(self)) if getattr(self, name) != getattr(other, name)]
        reports = (self.on_spike == "report") != (other.on_spike == "report")
        return [name for name in differing if name not in free] + ["on_spike"] * reports
