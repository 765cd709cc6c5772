"""What an SAE is and where its activations came from, as plain data that is checked when it is made."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from fluxsae.errors import FluxSaeError

Architecture = Literal["l1", "topk", "batchtopk", "jumprelu", "matryoshka"]

Mismatch = Literal[
    "flux",
    "adapters",
    "is_exact",
    "hookpoint",
    "size",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "sigmas",
    "unknown",
]
"""What may differ from the training ground, if it is named; `unknown`: the SAE has no record of its training."""
MISMATCHES: tuple[Mismatch, ...] = get_args(Mismatch)

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
SCHEMA_VERSION = 1

_NEEDS_K: frozenset[Architecture] = frozenset({"topk", "batchtopk", "matryoshka"})
# Fields of TrainedOn that SAEs written before them lack: nothing is known, and nothing refused for them.
_ADDED = ("flux_weights", "adapters", "is_exact", "max_sequence_length", "true_cfg_scale")
_HAS_THRESHOLD: frozenset[Architecture] = frozenset({"batchtopk", "matryoshka", "jumprelu"})


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
    flux_weights: str | None = None
    """SHA-256 over the transformer's weight files; None = not recorded, as for the fields below."""
    adapters: tuple[str, ...] | None = None
    """Hashes of the adapters (LoRAs) that were active or fused."""
    is_exact: bool | None = None
    """False where FLUX was quantised or cached."""
    max_sequence_length: int | None = None
    """Text tokens a prompt was padded or cut to."""
    true_cfg_scale: float | None = None
    """Classifier-free guidance of the generations; 1 is off."""

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.sigmas):
            raise FluxSaeError(
                f"trained_on has steps {self.steps} and sigmas {self.sigmas}. Give a sigma for each step."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The value that `asdict` and JSON turned into `values`.

        Raises:
            FluxSaeError: a field is missing, unknown or of the wrong type.
        """
        unrecorded = dict.fromkeys(_ADDED)  # SAEs of before these fields
        _check_fields(cls, unrecorded | dict(values), where="trained_on")
        for name in ("flux_id", "flux_revision", "hookpoint", "dataset_hash"):
            if not isinstance(values[name], str) and (name != "flux_revision" or values[name] is not None):
                raise FluxSaeError(f"trained_on.{name} is {values[name]!r}. It must be text.")
        for name in ("height", "width", "n_tokens"):
            _check_size(f"trained_on.{name}", values[name], 1, 1 << 30)
        for name in ("guidance_scale", "sigma_tolerance"):
            _check_real(f"trained_on.{name}", values[name], 0.0)
        steps = _numbers("trained_on.steps", values["steps"], int)
        sigmas = _numbers("trained_on.sigmas", values["sigmas"], float)
        adapters = values.get("adapters")
        texts = (values.get("flux_weights"), *(adapters if isinstance(adapters, list | tuple) else [adapters]))
        if not all(text is None or isinstance(text, str) for text in texts):
            raise FluxSaeError(f"trained_on.flux_weights and adapters are {texts}. They must be texts or null.")
        if not isinstance(values.get("is_exact"), bool | None):
            raise FluxSaeError(f"trained_on.is_exact is {values['is_exact']!r}. It must be true, false or null.")
        if values.get("max_sequence_length") is not None:
            _check_size("trained_on.max_sequence_length", values["max_sequence_length"], 1, 1 << 20)
        if values.get("true_cfg_scale") is not None:
            _check_real("trained_on.true_cfg_scale", values["true_cfg_scale"], 0.0)
        adapters = None if adapters is None else tuple(adapters)
        steps = tuple(int(step) for step in steps)
        return cls(**{**values, "steps": steps, "sigmas": sigmas, "adapters": adapters})


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
