"""Sparse autoencoders of FLUX activations: their description, their arithmetic, and their strict files on disk or Hub.

x~     = (x - input_mean) / input_scale
pre    = (x~ - b_dec) W_enc^T + b_enc
acts   = activation(pre)
x~_hat = acts W_dec + b_dec
x_hat  = x~_hat * input_scale + input_mean
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxsae.errors import FluxSaeError
from fluxsae.files import read_header, save_tensors, write_json
from fluxsae.sae.kernels import sparse_decode, sparse_pays, topk, topk_acts

Architecture = Literal["l1", "topk", "batchtopk", "jumprelu", "matryoshka"]

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
SCHEMA_VERSION = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"

_NEEDS_K: frozenset[Architecture] = frozenset({"topk", "batchtopk", "matryoshka"})
_HAS_THRESHOLD: frozenset[Architecture] = frozenset({"batchtopk", "matryoshka", "jumprelu"})
_FEW_FEATURES = 8


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """Where an SAE's activations came from: the ground on which its features mean what their cards say."""

    flux_id: str
    """Hub id or name of the FLUX model."""
    flux_revision: str | None = None
    """Commit of the FLUX model, or None for a local one."""
    hookpoint: str
    """Module path, as `str(HookPoint)` writes it."""
    steps: tuple[int, ...]
    """0-based steps of the full schedule."""
    sigmas: tuple[float, ...]
    """Noise level of each of `steps`."""
    height: int
    """Image height, pixels."""
    width: int
    """Image width, pixels."""
    guidance_scale: float
    """Distilled guidance of the generations."""
    n_tokens: int
    """Tokens an image (and step) gives at this hook point."""
    dataset_hash: str
    """Hash of the activation manifest or of the prompts."""
    sigma_tolerance: float = 0.05
    """How far from a trained sigma the SAE may be used."""

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.sigmas):
            raise FluxSaeError(
                f"trained_on has steps {self.steps} and sigmas {self.sigmas}. Give a sigma for each step."
            )

    def differences(self, **actual: Any) -> list[str]:
        """What differs between the training ground and `actual` (fields of this class by name), one sentence each."""
        known = {field.name for field in fields(self)}
        unknown = sorted(set(actual) - known)
        if unknown:
            raise FluxSaeError(f"Unknown fields {', '.join(unknown)}. Allowed are {', '.join(sorted(known))}.")
        return [
            f"{name} is {value!r}, but the SAE was trained on {getattr(self, name)!r}"
            for name, value in actual.items()
            if value != getattr(self, name)
        ]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The value that `asdict` and JSON turned into `values`.

        Raises:
            FluxSaeError: a field is missing, unknown or of the wrong type.
        """
        _check_fields(cls, values, where="trained_on")
        for name in ("flux_id", "flux_revision", "hookpoint", "dataset_hash"):
            if not isinstance(values[name], str) and (name != "flux_revision" or values[name] is not None):
                raise FluxSaeError(f"trained_on.{name} is {values[name]!r}. It must be text.")
        for name in ("height", "width", "n_tokens"):
            _check_size(f"trained_on.{name}", values[name], 1, 1 << 30)
        for name in ("guidance_scale", "sigma_tolerance"):
            _check_real(f"trained_on.{name}", values[name], 0.0)
        steps = _numbers("trained_on.steps", values["steps"], int)
        sigmas = _numbers("trained_on.sigmas", values["sigmas"], float)
        return cls(**{**values, "steps": tuple(int(step) for step in steps), "sigmas": sigmas})


@dataclass(frozen=True, kw_only=True)
class SaeConfig:
    """What an SAE is: architecture, sizes, the weights of its loss, and what it was trained on.

    Raises:
        FluxSaeError: a value out of range, or one that the architecture needs is missing.
    """

    architecture: Architecture
    """l1 (ReLU), topk, batchtopk, jumprelu or matryoshka."""
    d_model: int
    """Width of the activations."""
    n_features: int
    """Number of features."""
    k: int | None = None
    """Active features a token (topk), or on average a token (batchtopk, matryoshka)."""
    l1_coeff: float = 1e-3
    """l1: weight of mean over tokens of sum_f acts."""
    l0_coeff: float = 1e-3
    """jumprelu: weight of mean over tokens of the number of active features."""
    bandwidth: float = 0.1
    """jumprelu: width of the window through which the thresholds get their gradient, in units of pre_acts."""
    auxk_coeff: float = 1 / 32
    """topk, batchtopk, matryoshka: weight of the auxiliary loss of dead features (0 = off)."""
    auxk: int | None = None
    """Dead features a token in the auxiliary loss; None = half of d_model."""
    dead_after_tokens: int = 1_000_000
    """A feature is dead when it fired on none of this many tokens."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: nested dictionary sizes, rising, the last one n_features; () = eighths doubling."""
    trained_on: TrainedOn | None = None
    """The training ground; None = unknown."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise FluxSaeError(f"architecture is {self.architecture!r}. Allowed are {', '.join(ARCHITECTURES)}.")
        _check_size("d_model", self.d_model, 1, 1 << 20)
        _check_size("n_features", self.n_features, 1, 1 << 24)
        if self.architecture in _NEEDS_K:
            _check_size("k", self.k, 1, self.n_features)
        elif self.k is not None:
            raise FluxSaeError(f"k is {self.k}, but {self.architecture} has no k. Leave it out, or choose topk.")
        if self.auxk is not None:
            _check_size("auxk", self.auxk, 1, self.n_features)
        _check_size("dead_after_tokens", self.dead_after_tokens, 1, 1 << 50)
        for name in ("l1_coeff", "l0_coeff", "auxk_coeff"):
            _check_real(name, getattr(self, name), 0.0)
        _check_real("bandwidth", self.bandwidth, 1e-6)
        self._check_prefixes()

    def _check_prefixes(self) -> None:
        if not self.prefixes:
            return
        rising = all(low < high for low, high in zip((0, *self.prefixes), self.prefixes, strict=False))
        if self.architecture != "matryoshka" or not rising or self.prefixes[-1] != self.n_features:
            raise FluxSaeError(
                f"prefixes is {self.prefixes} for {self.architecture}. Allowed, with matryoshka only, are rising sizes "
                f"that end with n_features = {self.n_features}."
            )

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """The nested dictionary sizes of the matryoshka loss; one size for the other architectures."""
        if self.architecture != "matryoshka":
            return (self.n_features,)
        sizes = {max(1, self.n_features // fraction) for fraction in (8, 4, 2, 1)}
        return self.prefixes or tuple(sorted(sizes))

    @property
    def has_threshold(self) -> bool:
        """Whether the file holds a `threshold`: one number (batchtopk, matryoshka) or one a feature (jumprelu)."""
        return self.architecture in _HAS_THRESHOLD

    @property
    def expansion_factor(self) -> float:
        """n_features / d_model."""
        return self.n_features / self.d_model

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the file; all are float32."""
        rows, column = (self.n_features, self.d_model), (self.n_features,)
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": rows, "W_dec": rows, "b_enc": column, "b_dec": (self.d_model,),
            "input_mean": (self.d_model,), "input_scale": (), "reference_acts": column,
        }  # fmt: skip
        if self.has_threshold:
            shapes["threshold"] = column if self.architecture == "jumprelu" else ()
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, with the schema version."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` turned into `values`.

        Raises:
            FluxSaeError: a newer schema; a field missing, unknown or out of range.
        """
        values = dict(values)
        version = values.pop("schema_version", None)
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise FluxSaeError(f"schema_version is {version!r}. It must be a whole number from 1 to {SCHEMA_VERSION}.")
        if version > SCHEMA_VERSION:
            raise FluxSaeError(
                f"schema_version is {version}, written by a newer fluxsae; this one reads up to {SCHEMA_VERSION}. "
                "Upgrade fluxsae."
            )
        _check_fields(cls, values, where="the SAE's config")
        values["prefixes"] = _numbers("prefixes", values["prefixes"], int)
        if values["trained_on"] is not None:
            if not isinstance(values["trained_on"], Mapping):
                raise FluxSaeError(f"trained_on is {values['trained_on']!r}. It must be an object or null.")
            values["trained_on"] = TrainedOn.from_dict(values["trained_on"])
        return cls(**values)


class SaeOutput(NamedTuple):
    """What an SAE makes of tokens: reconstruction in raw FLUX units, acts, and the fp32 pre-activations."""

    x_hat: Float[Tensor, "*batch d_model"]
    acts: Float[Tensor, "*batch n_features"]
    pre_acts: Float[Tensor, "*batch n_features"]


class SparseActs(NamedTuple):
    """The active features of each token, unordered; entries with value 0 pad tokens that have fewer."""

    values: Float[Tensor, "*batch width"]
    indices: Int[Tensor, "*batch width"]


class SparseAutoencoder(nn.Module):
    """One SAE. `encode` and `decode` speak raw FLUX units; nothing depends on train or eval mode.

    Architectures: `l1` (Bricken et al. 2023); `topk` with AuxK (Gao et al. 2024, arXiv 2406.04093); `batchtopk`
    (Bussmann et al. 2024, arXiv 2412.06410); `jumprelu` (Rajamanoharan et al. 2024, arXiv 2407.14435); `matryoshka`
    (Bussmann et al. 2025, arXiv 2503.17547). batchtopk and matryoshka encode with the threshold found in training.
    Weights start from `seed`; with None they are left zero, for loading.
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
    reference_acts: Tensor
    """(n_features,): 99th percentile of each feature's positive acts on held-out images, 0 where unknown."""

    def __init__(self, config: SaeConfig, *, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        parameters = (
            "W_enc",
            "W_dec",
            "b_enc",
            "b_dec",
            *(("threshold",) if config.architecture == "jumprelu" else ()),
        )
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
        return (x.to(self.compute_dtype) - self.input_mean) / self.input_scale

    def pre_acts(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """Pre-activations of all features, in at least float32."""
        dtype = self.compute_dtype
        return nn.functional.linear(self.normalise(x) - self.b_dec, self.W_enc.to(dtype), self.b_enc.to(dtype))

    def activate(self, pre_acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch n_features"]:
        """The architecture's activation of all features' pre-activations; top-k ties go to the lower index."""
        if self.config.architecture == "topk":
            return topk_acts(pre_acts, self._k)
        return self._gate(pre_acts, self._threshold())

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_features"]:
        """Acts of all features, >= 0, for activations in raw FLUX units."""
        return self.activate(self.pre_acts(x))

    def encode_sparse(self, x: Float[Tensor, "*batch d_model"]) -> SparseActs:
        """The same acts as `encode`, without the silent ones; as wide as the busiest token (k for topk)."""
        pre_acts = self.pre_acts(x)
        if self.config.architecture == "topk":
            values, indices = topk(pre_acts, self._k)
            return SparseActs(values.relu(), indices)
        acts = self._gate(pre_acts, self._threshold())
        width = max(1, int((acts > 0).sum(-1).max())) if acts.numel() else 1
        return SparseActs(*acts.topk(width, dim=-1, sorted=False))

    def encode_features(
        self, x: Float[Tensor, "*batch d_model"], features: Sequence[int] | Int[Tensor, " chosen"]
    ) -> Float[Tensor, "*batch chosen"]:
        """Exact acts of some features, without decoding.

        For topk the gate counts the pre-activations that beat each chosen one, ties to the lower index; for the other
        architectures only the chosen encoder rows are read.

        Raises:
            FluxSaeError: a feature that the SAE does not have.
        """
        chosen = self._checked_features(features)
        if self.config.architecture == "topk":
            return self._topk_features(self.pre_acts(x), chosen)
        dtype = self.compute_dtype
        rows, biases = self.W_enc[chosen].to(dtype), self.b_enc[chosen].to(dtype)
        threshold = self._threshold()
        if threshold is not None and threshold.ndim:
            threshold = threshold[chosen]
        return self._gate(nn.functional.linear(self.normalise(x) - self.b_dec, rows, biases), threshold)

    def decode(self, acts: Float[Tensor, "*batch n_features"]) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction in raw FLUX units from dense acts."""
        return self._denormalise(acts.to(self.compute_dtype) @ self.W_dec.to(self.compute_dtype) + self.b_dec)

    def decode_sparse(self, acts: SparseActs) -> Float[Tensor, "*batch d_model"]:
        """Reconstruction in raw FLUX units from sparse acts; no (tokens * k, d_model) tensor is built."""
        return self._denormalise(
            sparse_decode(acts.values, acts.indices, self.W_dec.to(self.compute_dtype)) + self.b_dec
        )

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> SaeOutput:
        """Encode and decode."""
        pre_acts = self.pre_acts(x)
        if self.config.architecture == "topk" and sparse_pays(self._k, self.config.n_features, x.device):
            values, indices = topk(pre_acts, self._k)
            sparse = SparseActs(values.relu(), indices)
            acts = torch.zeros_like(pre_acts).scatter_(-1, indices, sparse.values)
            return SaeOutput(self.decode_sparse(sparse), acts, pre_acts)
        acts = self.activate(pre_acts)
        return SaeOutput(self.decode(acts), acts, pre_acts)

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
        chosen = torch.as_tensor(features, dtype=torch.int64, device=self.W_enc.device).reshape(-1)
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.config.n_features:
            raise FluxSaeError(
                f"Features {chosen.tolist()[:5]} were asked for. Allowed are 0 to {self.config.n_features - 1}."
            )
        return chosen

    def with_trained_on(self, trained_on: TrainedOn) -> Self:
        """This SAE, with its training ground recorded."""
        self.config = replace(self.config, trained_on=trained_on)
        return self

    def require_ground(self, *, allow_mismatch: bool = False, **actual: Any) -> list[str]:
        """The differences between the training ground and `actual` (fields of `TrainedOn`), to be shown.

        Raises:
            FluxSaeError: there are differences and `allow_mismatch` is off, or the training ground is unknown.
        """
        ground = self.config.trained_on
        found = ["the SAE does not say what it was trained on"] if ground is None else ground.differences(**actual)
        if found and not allow_mismatch:
            raise FluxSaeError(
                f"This SAE was trained elsewhere: {'; '.join(found)}. Use it there, or allow the mismatch explicitly."
            )
        return found

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
        tensors = _load_checked_tensors(folder / WEIGHTS_NAME, config)
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
            _check_finite(name, tensor, where="the SAE to be saved")
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


def find_sae_folder(path_or_repo: str | Path, *, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The local folder with the SAE's two files; those of a Hub repository are downloaded into the Hub's cache.

    Raises:
        FluxSaeError: neither a folder nor a repository that can be read.
    """
    local = Path(path_or_repo)
    if local.is_dir():
        return local / subfolder if subfolder else local
    name = str(path_or_repo)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FluxSaeError(
            f"{name!r} is neither a folder nor a Hub repository. Give an existing folder, or owner/name."
        )
    return _download(name, subfolder, revision)


def _download(repo: str, subfolder: str | None, revision: str | None) -> Path:
    from fluxsae.hub import transfer

    prefix = f"{subfolder}/" if subfolder else ""
    found = transfer.download(repo, revision=revision, patterns=[prefix + CONFIG_NAME, prefix + WEIGHTS_NAME])
    return found.folder / prefix


def load_sae_config(folder: str | Path) -> SaeConfig:
    """The checked `config.json` of an SAE folder, without its weights.

    Raises:
        FluxSaeError: missing, not JSON, doubled or unknown or missing fields, a newer schema, values out of range.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.is_file():
        raise FluxSaeError(f"{path} does not exist. Give the folder of an SAE (sae/<hookpoint> of a run).")
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object_of_unique_keys)
    except (json.JSONDecodeError, UnicodeDecodeError, _DoubledKeyError) as error:
        raise FluxSaeError(
            f"{path} is not a whole JSON file ({error}). Fetch it again or train the SAE again."
        ) from error
    if not isinstance(values, dict):
        raise FluxSaeError(f"{path} must hold a JSON object, not {type(values).__name__}.")
    try:
        return SaeConfig.from_dict(values)
    except FluxSaeError as error:
        raise FluxSaeError(f"{path}: {error}") from error


class _DoubledKeyError(ValueError):
    pass


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DoubledKeyError(f"{next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return values


def _load_checked_tensors(path: Path, config: SaeConfig) -> dict[str, Tensor]:
    header = read_header(path)
    _check_doubled_tensors(path)
    shapes = config.tensor_shapes()
    missing, extra = sorted(set(shapes) - set(header.shapes)), sorted(set(header.shapes) - set(shapes))
    if missing or extra:
        problem = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(extra)}"] * bool(extra)
        raise FluxSaeError(
            f"{path} {' and '.join(problem)}. An SAE of architecture {config.architecture} holds exactly "
            f"{', '.join(sorted(shapes))}."
        )
    for name, (dtype, shape) in header.shapes.items():
        if dtype != "F32" or shape != shapes[name]:
            raise FluxSaeError(
                f"{path}: {name} is {dtype} {list(shape)}. Its config asks for F32 {list(shapes[name])}."
            )
    tensors = load_file(path)
    for name, tensor in tensors.items():
        _check_finite(name, tensor, where=str(path))
    if not float(tensors["input_scale"]) > 0:
        raise FluxSaeError(f"{path}: input_scale is {float(tensors['input_scale'])}. It must be greater than 0.")
    return tensors


def _check_doubled_tensors(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    try:
        json.loads(header, object_pairs_hook=_object_of_unique_keys)
    except _DoubledKeyError as error:
        raise FluxSaeError(f"{path} is damaged: {error}. Fetch it again or train the SAE again.") from error


def _check_finite(name: str, tensor: Tensor, *, where: str) -> None:
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise FluxSaeError(
            f"{where}: {name} holds {wrong} values that are NaN or infinite. Fetch it again or train the SAE again."
        )


def _check_fields(cls: type, values: Mapping[str, Any], *, where: str) -> None:
    known = [field.name for field in fields(cls)]
    missing, unknown = [name for name in known if name not in values], sorted(set(values) - set(known))
    if missing or unknown:
        problem = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(
            unknown
        )
        raise FluxSaeError(f"{where} {' and '.join(problem)}. Its fields are exactly {', '.join(known)}.")


def _numbers(name: str, values: object, kind: type) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple) or not all(_is_number(value, kind) for value in values):
        raise FluxSaeError(f"{name} is {values!r}. It must be a list of finite numbers ({kind.__name__}).")
    return tuple(kind(value) for value in values)


def _is_number(value: object, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and isinstance(value, int | kind)


def _check_size(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FluxSaeError(f"{name} is {value!r}. Allowed is a whole number from {low} to {high}.")


def _check_real(name: str, value: object, low: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < low:
        raise FluxSaeError(f"{name} is {value!r}. Allowed is a finite number of at least {low:g}.")
