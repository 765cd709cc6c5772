"""One SAE in training: weights, Adam's moments, and one step."""

from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.sae.config import Precision, SaeConfig
from fluxsae.sae.kernels import default_precision, sparse_pays
from fluxsae.sae.kernels.adam import AdamStep, adam_
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.config import TrainConfig
from fluxsae.sae.training.gradients import BatchGradients, Situation, batch_gradients
from fluxsae.sae.training.processes import Processes

_BLOCK_BYTES = 4 << 20
_THRESHOLD_DECAY = 0.98
_LOSS_DECAY = 0.95
_KNOWN_AFTER = 0.4
"""Weight of the running mean of the loss from which on a spike can be told: ten steps."""


class SaeTrainer:
    """The training state of one SAE. `step` is one optimiser step; `state` and `load_state` are exact.

    Weights are updated a block of features at a time, right after that block's gradient is made: on a CPU the block is
    still in the cache, and without clipping no gradient of full size ever exists.
    """

    def __init__(
        self, sae: SparseAutoencoder, config: TrainConfig, *, n_steps: int, processes: Processes | None = None
    ) -> None:
        self.sae = sae.requires_grad_(False)
        self.config = config
        self.n_steps = n_steps
        self.processes = processes or Processes()
        self.device = sae.W_enc.device
        self.precision: Precision = default_precision(self.device) if config.precision == "auto" else config.precision
        self.is_sparse = _is_sparse(config, sae.config, self.device)
        self.step_count = torch.zeros((), device=self.device)
        self.moments = {
            name: (torch.zeros_like(parameter), torch.zeros_like(parameter))
            for name, parameter in sae.named_parameters()
        }
        n_features = sae.config.n_features
        self.tokens_since_fired = torch.zeros(n_features, dtype=torch.int64, device=self.device)
        self.dead: Tensor | None = None
        self.mean_loss = torch.zeros((), device=self.device)
        self.mean_loss_weight = torch.zeros((), device=self.device)
        self.smallest_act = torch.zeros((), device=self.device)
        self.smallest_act_weight = torch.zeros((), device=self.device)
        self.n_skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self._gradients: tuple[Tensor, Tensor] | None = None
        self._scratch: dict[str, Tensor] = {}

    def step(
        self, x_tilde: Float[Tensor, "tokens d_model"], step: int, *, sigmas: Float[Tensor, " tokens"] | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step on this process's share of a batch; what happened, as tensors on the device.

        `sigmas` are the noise levels of the rows, which an SAE with a `sigma_table` needs.
        `fault` is 1 where the batch was not finite, 2 where its loss was a spike; `is_skipped` says whether it counted.
        """
        self._refresh_dead(step)
        n_tokens = len(x_tilde) * self.processes.world_size
        gradients = batch_gradients(self.sae, x_tilde, self._situation(n_tokens, step), sigmas)
        report = self._summed_losses(gradients)
        fault = self._fault(report["loss"])
        rate = self.config.learning_rate(step, self.n_steps, self.sae.config.n_features)
        is_skipped = (fault == 1) | ((fault == 2) & (self.config.on_spike != "report"))
        is_skipped, norm = self._update(gradients, rate, is_skipped)
        self._remember(gradients, report["loss"], n_tokens, is_skipped)
        fault = torch.where(is_skipped & (fault == 0), 1, fault)
        return report | {"grad_norm": norm, "fault": fault, "is_skipped": is_skipped}

    def _situation(self, n_tokens: int, step: int) -> Situation:
        floor = self.smallest_act / self.smallest_act_weight.clamp(min=1e-12)
        return Situation(
            n_tokens=n_tokens,
            precision=self.precision,
            is_sparse=self.is_sparse,
            sparsity_share=self.config.sparsity_share(step, self.n_steps),
            dead=self.dead,
            selection_floor=floor if self.sae.config.kind.selects_over_batch and step > 0 else None,
            processes=self.processes,
            scratch=self._scratch,
        )

    def _refresh_dead(self, step: int) -> None:
        config = self.sae.config
        if config.k is None or config.auxk_coeff == 0 or step % self.config.dead_refresh_steps:
            return
        self.dead = (self.tokens_since_fired >= config.dead_after_tokens).nonzero()[:, 0]

    def _summed_losses(self, gradients: BatchGradients) -> dict[str, Tensor]:
        names = list(gradients.losses)
        values = self.processes.sum_(torch.stack([gradients.losses[name].float() for name in names]))
        report = dict(zip(names, values, strict=True))
        report["loss"] = torch.stack([value for name, value in report.items() if name != "l0"]).sum()
        return report

    def _fault(self, loss: Tensor) -> Tensor:
        mean = self.mean_loss / self.mean_loss_weight.clamp(min=1e-12)
        is_spike = (self.mean_loss_weight > _KNOWN_AFTER) & (loss > self.config.spike_factor * mean)
        return torch.where(torch.isfinite(loss), torch.where(is_spike, 2, 0), 1)

    def _update(self, gradients: BatchGradients, rate: float, is_skipped: Tensor) -> tuple[Tensor, Tensor]:
        """Adam on every weight; whether it was skipped, and the gradient's norm (NaN where it was not needed)."""
        for gradient in gradients.small.values():
            self.processes.sum_(gradient)
        norm, divisor = torch.full((), torch.nan, device=self.device), torch.ones((), device=self.device)
        if self.config.grad_clip is not None or self.processes.world_size > 1:
            norm = self._gather_whole_gradients(gradients)
            is_skipped = is_skipped | ~torch.isfinite(norm)
        if self.config.grad_clip is not None:
            divisor = (norm / self.config.grad_clip).clamp(min=1.0)
        if self.device.type == "cpu" and bool(is_skipped):
            return is_skipped, norm
        config = self.config
        step = AdamStep(self.step_count, rate, config.beta1, config.beta2, config.adam_eps, divisor, is_skipped.float())
        self.step_count += 1 - step.is_skipped
        for name, gradient in gradients.small.items():
            adam_(self.sae.get_parameter(name), gradient, *self.moments[name], step=step)
        for rows in self._blocks():
            for name, gradient in zip(("W_enc", "W_dec"), gradients.weight_rows(rows), strict=True):
                mean, square = (moment[rows] for moment in self.moments[name])
                weights = self.sae.get_parameter(name)[rows]
                adam_(weights, gradient, mean, square, step=step, is_unit=name == "W_dec")
        if self.sae.config.kind.threshold == "per feature":
            self.sae.threshold.clamp_(min=0)
        return is_skipped, norm

    def _gather_whole_gradients(self, gradients: BatchGradients) -> Tensor:
        """Makes both weight gradients in full, summed over all processes, in memory that is kept; the whole norm."""
        if self._gradients is None:
            self._gradients = (torch.empty_like(self.sae.W_enc), torch.empty_like(self.sae.W_dec))
        kept = self._gradients
        squares = [part.square().sum() for part in gradients.small.values()]
        for rows in self._blocks():
            for whole, part in zip(kept, gradients.weight_rows(rows), strict=True):
                whole[rows] = part
                if self.processes.world_size == 1:
                    squares.append(torch.linalg.vector_norm(part).square())
        if self.processes.world_size > 1:
            squares += [torch.linalg.vector_norm(self.processes.sum_(whole)).square() for whole in kept]
        gradients.weight_rows = lambda rows: (kept[0][rows], kept[1][rows])
        return torch.stack(squares).sum().sqrt()

    def _blocks(self) -> Iterator[slice]:
        config = self.sae.config
        size = config.n_features
        if self.device.type == "cpu":
            size = max(64, _BLOCK_BYTES // (4 * config.d_model))
        for start in range(0, config.n_features, size):
            yield slice(start, min(start + size, config.n_features))

    def _remember(self, gradients: BatchGradients, loss: Tensor, n_tokens: int, is_skipped: Tensor) -> None:
        fired = self.processes.any_(gradients.fired)
        self.tokens_since_fired += n_tokens * ~is_skipped
        self.tokens_since_fired[:] = torch.where(fired & ~is_skipped, 0, self.tokens_since_fired)
        self._average(self.mean_loss, self.mean_loss_weight, loss, _LOSS_DECAY, is_skipped)
        self.n_skipped += is_skipped
        if gradients.smallest_act is not None:
            self._average(
                self.smallest_act, self.smallest_act_weight, gradients.smallest_act, _THRESHOLD_DECAY, is_skipped
            )
            # Selected are the entries at least as large as the smallest one; the gate asks for larger than.
            average = self.smallest_act / self.smallest_act_weight.clamp(min=1e-12)
            self.sae.threshold.copy_(average)

    @staticmethod
    def _average(total: Tensor, weight: Tensor, value: Tensor, decay: float, is_skipped: Tensor) -> None:
        total.copy_(torch.where(is_skipped, total, decay * total + (1 - decay) * value))
        weight.copy_(torch.where(is_skipped, weight, decay * weight + (1 - decay)))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on, by name."""
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, (mean, square) in self.moments.items():
            tensors |= {f"mean.{name}": mean, f"square.{name}": square}
        dead = torch.zeros(0, dtype=torch.int64) if self.dead is None else self.dead
        tensors |= {name: getattr(self, name) for name in _SCALARS}
        return tensors | {"tokens_since_fired": self.tokens_since_fired, "dead": dead}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `state` gave.

        Raises:
            FluxSaeError: tensors are missing, unknown or of other shapes.
        """
        own = self.state()
        wrong = [
            name for name in own if name != "dead" and (name not in tensors or tensors[name].shape != own[name].shape)
        ]
        if wrong or set(tensors) != set(own):
            raise FluxSaeError(
                f"The checkpoint does not fit this SAE ({', '.join([*wrong, *sorted(set(tensors) - set(own))][:4])}). "
                "Delete it to start anew, or train with the settings it was made with."
            )
        for name, tensor in own.items():
            if name != "dead":
                tensor.copy_(tensors[name])
        self.dead = tensors["dead"].to(self.device)


_SCALARS = ("step_count", "mean_loss", "mean_loss_weight", "smallest_act", "smallest_act_weight", "n_skipped")


def _is_sparse(config: TrainConfig, sae: SaeConfig, device: torch.device) -> bool:
    """Only topk has a fixed number of active features, so only it has a sparse path."""
    if sae.architecture != "topk" or sae.k is None:
        if config.products == "sparse":
            raise FluxSaeError(
                f"products is sparse, but {sae.architecture} only trains on the dense path. Use products auto."
            )
        return False
    return config.products == "sparse" or (config.products == "auto" and sparse_pays(sae.k, sae.n_features, device))
