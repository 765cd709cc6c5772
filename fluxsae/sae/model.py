"""Sparse autoencoders of FLUX activations: their description, their arithmetic, and their strict files on disk or Hub.

x~     = (x - input_mean) / input_scale
x'     = x~ * sigma_scale(sigma) + sigma_shift(sigma)     where the SAE has a table of noise levels, else x~
pre    = (x' - b_dec) W_enc^T + b_enc
acts   = activation(pre)
x~_hat = acts W_dec + b_dec
x_hat  = x~_hat * input_scale + input_mean
"""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available

from fluxsae.errors import FluxSaeError
from fluxsae.files import save_tensors, write_json
from fluxsae.flux.ground import Ground
from fluxsae.sae.acts import SparseActs, tokens_at_once
from fluxsae.sae.config import Mismatch, SaeConfig, TrainedOn
from fluxsae.sae.files import (
    CONFIG_NAME,
    check_finite_weights,
    find_sae_folder,
    load_checked_tensors,
    load_sae_config,
)
from fluxsae.sae.fingerprint import WEIGHTS_NAME, tensors_fingerprint
from fluxsae.sae.ground import check_ground
from fluxsae.sae.kernels import sparse_decode, sparse_pays, topk, topk_acts
from fluxsae.sae.sigma_table import table_places

_FEW_FEATURES = 8
_SIGMA_TOLERANCE = 0.05  # of tables whose SAE does not say what it was trained on
_ROUNDING = 1e-6  # schedules hold their noise levels in fp32


class SaeOutput(NamedTuple):
    """What an SAE makes of tokens: reconstruction in raw FLUX units, acts, and the fp32 pre-activations."""

    x_hat: Float[Tensor, "*batch d_model"]
    acts: Float[Tensor, "*batch n_features"]
    pre_acts: Float[Tensor, "*batch n_features"]


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products as they are written: autocast would round pre-activations to bfloat16, and other features would fire."""
    if not is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class SparseAutoencoder(nn.Module):
    """One SAE. `encode` and `decode` speak raw FLUX units; nothing depends on train or eval mode.

    Architectures: `l1` (Bricken et al. 2023); `topk` with AuxK (Gao et al. 2024, arXiv 2406.04093); `batchtopk`
    (Bussmann et al. 2024, arXiv 2412.06410); `jumprelu` (Rajamanoharan et al. 2024, arXiv 2407.14435); `matryoshka`
    (Bussmann et al. 2025, arXiv 2503.17547). batchtopk and matryoshka encode with the threshold found in training.
    Weights start from `seed`; with None they are left zero, for loading.

    One dictionary for all noise levels has tables of scales and shifts (`config.sigma_table`): whatever encodes then
    needs `sigma`, a number or one that broadcasts to x without its last axis. A plain SAE does not look at `sigma`.
    """

    W_enc: nn.Parameter
    """(n_features, d_model): row f reads feature f."""
    W_dec: nn.Parameter
    """(n_features, d_model): row f writes feature f, unit norm."""
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    threshold: Tensor
    """One number (batchtopk, matryoshka) or one a feature (jumprelu, a parameter); absent otherwise."""
    input_mean: Tensor
    input_scale: Tensor
    sigma_scale: nn.Parameter
    """(n_sigmas, d_model), with `sigma_table` only; as `sigma_shift`."""
    sigma_shift: nn.Parameter
    reference_acts: Tensor
    """(n_features,): 99th percentile of each feature's positive acts on held-out images, 0 where unknown."""

    def __init__(self, config: SaeConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        trained = ("threshold",) if config.kind.threshold == "per feature" else ()
        parameters = ("W_enc", "W_dec", "b_enc", "b_dec", "sigma_scale", "sigma_shift", *trained)
        for name, shape in config.tensor_shapes().items():
            tensor = torch.zeros(shape)
            if name in parameters:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.input_scale.fill_(1.0)
        if seed is not None:
            self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random unit decoder rows and an encoder tied to them, so that a feature first reads what it writes."""
        rows = torch.randn(self.W_dec.shape, generator=generator, dtype=torch.float32)
        self.W_dec.copy_(nn.functional.normalize(rows, dim=1))
        self.W_enc.copy_(self.W_dec)
        if self.config.is_sigma_conditioned:
            self.sigma_scale.fill_(1.0)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type encode computes in: at least float32, so that top-k gates are exact."""
        return torch.promote_types(self.W_enc.dtype, torch.float32)

    def normalise(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x~: centred and scaled so that E||x~||^2 = d_model on the training set."""
        if x.shape[-1] != self.config.d_model:
            raise FluxSaeError(
                f"The activations have width {x.shape[-1]}, but this SAE reads width {self.config.d_model}. "
                "Use the hook point it was trained on."
            )
        self._follow(x)
        return (x.to(self.compute_dtype) - self.input_mean) / self.input_scale

    def _follow(self, x: Tensor) -> None:
        """Puts this SAE beside what it reads: activations stay where FLUX made them, an SAE is loaded anywhere."""
        if self.W_enc.device != x.device:
            self.to(x.device)

    def encoder_input(
        self, x_tilde: Float[Tensor, "*batch d_model"], sigma: float | Tensor | None
    ) -> Float[Tensor, "*batch d_model"]:
        """x~ as the encoder reads it at a noise level, b_dec not yet taken off; x~ itself in a plain SAE.

        Between two noise levels of the table, scale and shift are interpolated; beyond its ends they stay.
        """
        if not self.config.is_sigma_conditioned:
            return x_tilde
        places = table_places(self.config.sigma_table, torch.as_tensor(sigma, device=x_tilde.device))
        return x_tilde * places.interpolate(self.sigma_scale) + places.interpolate(self.sigma_shift)

    def check_sigma(self, sigma: float | Tensor | None) -> None:
        """Refuses noise levels that a table cannot be read at.

        Raises:
            FluxSaeError: none is given, or one lies further outside the table than the SAE's tolerance.
        """
        table = self.config.sigma_table
        if not table:
            return
        if sigma is None:
            raise FluxSaeError(
                f"This SAE reads each noise level in its own way (sigma_table, {len(table)} levels from {table[0]:.3f} "
                f"to {table[-1]:.3f}). Give that of the activations: encode(x, sigma=captured.sigma(step))."
            )
        values = sigma if isinstance(sigma, Tensor) else torch.tensor(sigma, dtype=torch.float64)
        low, high = (float(each) for each in values.aminmax())
        known_low, known_high = self._readable_sigmas()
        if not known_low - _ROUNDING <= low <= high <= known_high + _ROUNDING:
            raise FluxSaeError(
                f"sigma is {low:.3f}{'' if low == high else f' to {high:.3f}'}. This SAE reads {known_low:.3f} to "
                f"{known_high:.3f}: its sigma_table and its tolerance beyond. Use steps whose noise level lies there, "
                "or train it on more steps."
            )

    def nearest_sigma(self, sigma: float) -> float:
        """The noise level nearest to `sigma` at which this SAE can be read; `sigma` itself for a plain SAE."""
        low, high = self._readable_sigmas()
        return min(max(sigma, low), high) if self.config.is_sigma_conditioned else sigma

    def _readable_sigmas(self) -> tuple[float, float]:
        table, ground = self.config.sigma_table or (0.0, 1.0), self.config.trained_on
        tolerance = _SIGMA_TOLERANCE if ground is None else ground.sigma_tolerance
        return table[0] - tolerance, table[-1] + tolerance

    def _centred(self, x: Tensor, sigma: float | Tensor | None) -> Tensor:
        self.check_sigma(sigma)
        return self.encoder_input(self.normalise(x), sigma) - self.b_dec

    def pre_acts(
        self, x: Float[Tensor, "*batch d_model"], *, sigma: float | Tensor | None = None
    ) -> Float[Tensor, "*batch n_features"]:
        """Pre-activations of all features, in at least float32."""
        dtype = self.compute_dtype
        with _without_autocast(x.device):
            return nn.functional.linear(self._centred(x, sigma), self.W_enc.to(dtype), self.b_enc.to(dtype))

    def activate(self, pre_acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch n_features"]:
        """The architecture's activation of all features' pre-activations; top-k ties go to the lower index."""
        if self.config.architecture == "topk":
            return topk_acts(pre_acts, self._k)
        return self._gate(pre_acts, self._threshold())

    def encode(
        self, x: Float[Tensor, "*batch d_model"], *, sigma: float | Tensor | None = None
    ) -> Float[Tensor, "*batch n_features"]:
        """Acts of all features, >= 0, for activations in raw FLUX units."""
        return self._by_chunk(x, sigma, lambda rows, level: self.activate(self.pre_acts(rows, sigma=level)))

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"], *, sigma: float | Tensor | None = None) -> SparseActs:
        """The same acts as `encode`, without the silent ones; the acts of all features are held for a chunk alone."""
        parts = [self._fired(self.pre_acts(rows, sigma=level)) for rows, level in self._chunks(x, sigma)]
        return SparseActs.joined(parts, (*x.shape[:-1], self.config.n_features))

    def encode_features(
        self,
        x: Float[Tensor, "*batch d_model"],
        features: Sequence[int] | Int[Tensor, " chosen"],
        *,
        sigma: float | Tensor | None = None,
    ) -> Float[Tensor, "*batch chosen"]:
        """Exact acts of some features, without decoding.

        For topk the gate counts the pre-activations that beat each chosen one, ties to the lower index; for the other
        architectures only the chosen encoder rows are read.

        Raises:
            FluxSaeError: a feature that the SAE does not have.
        """
        self._follow(x)
        chosen = self._checked_features(features)
        if self.config.architecture == "topk":
            return self._by_chunk(
                x, sigma, lambda rows, level: self._topk_features(self.pre_acts(rows, sigma=level), chosen)
            )
        dtype = self.compute_dtype
        weights, biases = self.W_enc[chosen].to(dtype), self.b_enc[chosen].to(dtype)
        threshold = self._threshold()
        if threshold is not None and threshold.ndim:
            threshold = threshold[chosen]

        def acts(rows: Tensor, level: float | Tensor | None) -> Tensor:
            with _without_autocast(rows.device):
                pre_acts = nn.functional.linear(self._centred(rows, level), weights, biases)
            return self._gate(pre_acts, threshold)

        return self._by_chunk(x, sigma, acts)

    def decode(self, acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction in raw FLUX units from dense acts."""
        self._follow(acts)
        with _without_autocast(acts.device):
            return self._denormalise(acts.to(self.compute_dtype) @ self.W_dec.to(self.compute_dtype) + self.b_dec)

    def decode_sparse(self, acts: SparseActs) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction in raw FLUX units from sparse acts, by whichever product is faster for so many of them."""
        self._follow(acts.values)
        mean_active = len(acts.values) / max(1, acts.n_tokens)
        if sparse_pays(mean_active, acts.n_features, acts.values.device):
            W_dec = self.W_dec.to(self.compute_dtype)
            x_tilde = sparse_decode(acts.tokens, acts.features, acts.values, W_dec, n_tokens=acts.n_tokens)
            x_hat = self._denormalise(x_tilde + self.b_dec)
        else:
            at_once = tokens_at_once(acts.n_features, acts.values.device)
            x_hat = _joined([self.decode(part.dense()) for part in acts.split(at_once)])
        return x_hat.reshape(*acts.shape[:-1], self.config.d_model)

    def reconstruct(
        self, x: Float[Tensor, "*batch d_model"], *, sigma: float | Tensor | None = None
    ) -> Float[Tensor, "*batch d_model"]:
        """`sae(x).x_hat`, with the acts of all features held for a chunk alone."""
        if self._is_sparse(x.device):
            return self.decode_sparse(self.encode_sparse(x, sigma=sigma))
        return self._by_chunk(x, sigma, lambda rows, level: self(rows, sigma=level).x_hat)

    def forward(self, x: Float[Tensor, "*batch d_model"], *, sigma: float | Tensor | None = None) -> SaeOutput:
        """Encode and decode, all features' acts of all tokens held; for many tokens see `reconstruct`."""
        pre_acts = self.pre_acts(x, sigma=sigma)
        if self._is_sparse(x.device):
            fired = self._fired(pre_acts)
            return SaeOutput(self.decode_sparse(fired), fired.dense(), pre_acts)
        acts = self.activate(pre_acts)
        return SaeOutput(self.decode(acts), acts, pre_acts)

    def _is_sparse(self, device: torch.device) -> bool:
        return self.config.architecture == "topk" and sparse_pays(self._k, self.config.n_features, device)

    def _fired(self, pre_acts: Tensor) -> SparseActs:
        rows = pre_acts.reshape(-1, self.config.n_features)
        if self.config.architecture == "topk":
            values, features = topk(rows, self._k)
            fires = values > 0
            tokens = fires.nonzero(as_tuple=True)[0]
            return SparseActs(tokens, features[fires], values[fires], tuple(pre_acts.shape))
        threshold = self._threshold()
        fires = rows > (0.0 if threshold is None else threshold.clamp(min=0))
        tokens, features = fires.nonzero(as_tuple=True)
        return SparseActs(tokens, features, rows[tokens, features], tuple(pre_acts.shape))

    def _chunks(self, x: Tensor, sigma: float | Tensor | None) -> Iterator[tuple[Tensor, float | Tensor | None]]:
        size = tokens_at_once(self.config.n_features, self.W_enc.device)
        levels: Iterable[float | Tensor | None] = repeat(sigma)
        if self.config.is_sigma_conditioned and isinstance(sigma, Tensor) and sigma.ndim:
            levels = sigma.to(x.device).expand(x.shape[:-1]).reshape(-1).split(size)
        return zip(x.reshape(-1, x.shape[-1]).split(size), levels, strict=False)

    def _by_chunk(
        self,
        x: Tensor,
        sigma: float | Tensor | None,
        function: Callable[[Tensor, float | Tensor | None], Tensor],
    ) -> Tensor:
        found = _joined([function(rows, level) for rows, level in self._chunks(x, sigma)])
        return found.reshape(*x.shape[:-1], found.shape[-1])

    @property
    def _k(self) -> int:
        assert self.config.k is not None
        return self.config.k

    def _threshold(self) -> Tensor | None:
        return self.threshold if self.config.has_threshold else None

    @staticmethod
    def _gate(pre_acts: Tensor, threshold: Tensor | None) -> Tensor:
        acts = pre_acts.relu()
        return acts if threshold is None else acts * (pre_acts > threshold)

    def _denormalise(self, x_tilde: Tensor) -> Tensor:
        return x_tilde * self.input_scale + self.input_mean

    def _topk_features(self, pre_acts: Tensor, chosen: Tensor) -> Tensor:
        if len(chosen) > _FEW_FEATURES:
            return self.activate(pre_acts)[..., chosen]
        columns = []
        for feature in chosen.tolist():
            own = pre_acts[..., feature : feature + 1]
            beating = (pre_acts > own).sum(-1) + (pre_acts[..., :feature] == own).sum(-1)
            columns.append(own[..., 0].relu() * (beating < self._k))
        return torch.stack(columns, dim=-1) if columns else pre_acts[..., :0]

    def _checked_features(self, features: Sequence[int] | Tensor) -> Tensor:
        chosen = torch.as_tensor(features, dtype=torch.int64).reshape(-1)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.config.n_features:
            raise FluxSaeError(
                f"Features {chosen.tolist()[:5]} were asked for. Allowed are 0 to {self.config.n_features - 1}."
            )
        return chosen.to(self.W_enc.device)

    def with_trained_on(self, trained_on: TrainedOn) -> Self:
        """This SAE, with its training ground recorded."""
        self.config = replace(self.config, trained_on=trained_on)
        return self

    @property
    def fingerprint(self) -> str | None:
        """What tells it from another SAE of the same name, as `fluxsae.sae.fingerprint` reads it from its file."""
        return tensors_fingerprint(self.state_dict())

    def require_ground(self, ground: Ground, *, allow_mismatch: Collection[Mismatch] = ()) -> dict[Mismatch, str]:
        """The differences between the training ground and `ground`, to be shown.

        Raises:
            FluxSaeError: there are differences that `allow_mismatch` does not name.
        """
        return check_ground(self.config.trained_on, ground, allow_mismatch=allow_mismatch)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        device: str | torch.device = "cpu",
    ) -> Self:
        """An SAE from a folder, or from a Hub repository (`owner/name`), checked to the last tensor.

        Raises:
            FluxSaeError: not found, or anything but exactly the tensors that its config announces, finite and float32.
        """
        folder = find_sae_folder(path_or_repo, subfolder=subfolder, revision=revision)
        config = load_sae_config(folder)
        tensors = load_checked_tensors(folder / WEIGHTS_NAME, config)
        sae = cls(config, seed=None)
        sae.load_state_dict(tensors, strict=True)
        return sae.to(device)

    def save_pretrained(self, path: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, each whole or not at all.

        Raises:
            FluxSaeError: a tensor holds NaN or infinity; nothing is written.
        """
        tensors = {name: tensor.detach().float().cpu() for name, tensor in self.state_dict().items()}
        for name, tensor in tensors.items():
            check_finite_weights(name, tensor, where="the SAE to be saved")
        folder = Path(path)
        save_tensors(folder / WEIGHTS_NAME, tensors)
        write_json(folder / CONFIG_NAME, self.config.to_dict())

    def push_to_hub(
        self, repo: str, *, subfolder: str = "", tag: str | None = None, private: bool | None = None
    ) -> str:
        """Uploads this SAE into a Hub model repository, made if it does not exist; the new commit's id.

        Raises:
            FluxSaeError: no right to write, the tag exists, or the Hub fails.
        """
        from fluxsae.hub import transfer

        transfer.create_repo(repo, private=private)
        parent = transfer.list_files(repo).commit
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            prefix = f"{subfolder}/" if subfolder else ""
            files: dict[str, Path | bytes] = {
                prefix + name: Path(folder) / name for name in (CONFIG_NAME, WEIGHTS_NAME)
            }
            message = f"Upload {self.config.architecture} SAE"
            return transfer.upload(repo, files, parent=parent, message=message, tag=tag).oid


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
