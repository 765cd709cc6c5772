"""What an SAE is and where its activations came from, as plain data that is checked when it is made."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import Field

from fluxsae.checked import FromList, checked, from_object
from fluxsae.errors import FluxSaeError

Architecture = Literal["l1", "topk", "batchtopk", "jumprelu", "matryoshka"]
Precision = Literal["float32", "bfloat16"]
Tool = Literal["saelens", "sparsify", "dictionary_learning", "overcomplete", "plain"]
"""Who wrote the files of an SAE from elsewhere; plain: a `.pt` checkpoint of a training script."""

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
    "sae",
    "unknown",
]
"""What may differ from the training ground, if it is named; `unknown`: the SAE has no record of its training; `sae`: a
recipe was made with another SAE."""
MISMATCHES: tuple[Mismatch, ...] = get_args(Mismatch)

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
SCHEMA_VERSION = 1

Size = Annotated[int, Field(ge=1, le=1 << 30)]
Weight = Annotated[float, Field(ge=0)]


class Kind(NamedTuple):
    """What sets an architecture apart, beside its formulas."""

    needs_k: bool = False
    """Whether the number of active features is given."""
    threshold: Literal["shared", "per feature"] | None = None
    """shared: one number, found in training; per feature: a trained parameter; None: the file holds no `threshold`."""
    selects_over_batch: bool = False
    """Whether training keeps the largest activations of the whole batch."""


KINDS: dict[Architecture, Kind] = {
    "l1": Kind(),
    "topk": Kind(needs_k=True),
    "batchtopk": Kind(needs_k=True, threshold="shared", selects_over_batch=True),
    "jumprelu": Kind(threshold="per feature"),
    "matryoshka": Kind(needs_k=True, threshold="shared", selects_over_batch=True),
}
_ADDED = ("sigma_table",)


@checked(kw_only=True)
class TrainedOn:
    """Where an SAE's activations came from: the ground on which its features mean what their cards say."""

    flux_id: str
    """Hub id or name of the FLUX model."""
    flux_revision: str | None = None
    """Commit of the FLUX model, or None for a local one."""
    hookpoint: str
    """Module path, as `str(HookPoint)` writes it."""
    steps: Annotated[tuple[int, ...], FromList]
    """0-based steps of the full schedule."""
    sigmas: Annotated[tuple[float, ...], FromList]
    """Noise level of each of `steps`."""
    height: Size
    """Image height, pixels."""
    width: Size
    """Image width, pixels."""
    guidance_scale: Weight
    """Distilled guidance of the generations."""
    n_tokens: Size
    """Tokens an image (and step) gives at this hook point."""
    dataset_hash: str
    """Hash of the activation manifest or of the prompts."""
    sigma_tolerance: Weight = 0.05
    """How far from a trained sigma the SAE may be used."""
    flux_weights: str | None = None
    """SHA-256 over the transformer's weight files; None = not recorded, as for the fields below."""
    adapters: Annotated[tuple[str, ...], FromList] | None = None
    """Hashes of the adapters (LoRAs) that were active or fused."""
    is_exact: bool | None = None
    """False where FLUX was quantised or cached."""
    max_sequence_length: Size | None = None
    """Text tokens a prompt was padded or cut to."""
    true_cfg_scale: Weight | None = None
    """Classifier-free guidance of the generations; 1 is off."""

    def __post_init__(self) -> None:
        if not self.steps or len(self.steps) != len(self.sigmas):
            raise FluxSaeError(
                f"trained_on has steps {self.steps} and sigmas {self.sigmas}. Give a sigma for each step."
            )


@checked(kw_only=True)
class SaeConfig:
    """What an SAE is: architecture, sizes, the weights of its loss, and what it was trained on.

    Raises:
        FluxSaeError: a value out of range, or one that the architecture needs is missing.
    """

    architecture: Architecture
    """l1 (ReLU), topk, batchtopk, jumprelu or matryoshka."""
    d_model: Annotated[int, Field(ge=1, le=1 << 20)]
    """Width of the activations."""
    n_features: Annotated[int, Field(ge=1, le=1 << 24)]
    """Number of features."""
    k: int | None = None
    """Active features a token (topk), or on average a token (batchtopk, matryoshka)."""
    l1_coeff: Weight = 1e-3
    """l1: weight of mean over tokens of sum_f acts."""
    l0_coeff: Weight = 1e-3
    """jumprelu: weight of mean over tokens of the number of active features."""
    bandwidth: Annotated[float, Field(ge=1e-6)] = 0.1
    """jumprelu: width of the window through which the thresholds get their gradient, in units of pre_acts."""
    auxk_coeff: Weight = 1 / 32
    """topk, batchtopk, matryoshka: weight of the auxiliary loss of dead features (0 = off)."""
    auxk: int | None = None
    """Dead features a token in the auxiliary loss; left out, half of d_model."""
    dead_after_tokens: Annotated[int, Field(ge=1, le=1 << 50)] = 1_000_000
    """A feature is dead when it fired on none of this many tokens."""
    prefixes: Annotated[tuple[int, ...], FromList] = ()
    """matryoshka: nested dictionary sizes, rising, the last one n_features; () = eighths doubling."""
    sigma_table: Annotated[tuple[Weight, ...], FromList] = ()
    """Noise levels, rising, at which the encoder's input has a scale and a shift of its own; () = a plain SAE."""
    trained_on: Annotated[TrainedOn, from_object(TrainedOn)] | None = None
    """The training ground; None = unknown."""

    def __post_init__(self) -> None:
        needs_k = self.kind.needs_k
        if self.k is not None and not needs_k:
            raise FluxSaeError(f"k is {self.k}, but {self.architecture} has no k. Leave it out, or choose topk.")
        for name, value, is_needed in (("k", self.k, needs_k), ("auxk", self.auxk, False)):
            if (value is None and is_needed) or (value is not None and not 1 <= value <= self.n_features):
                raise FluxSaeError(f"{name} is {value}. It must be a whole number from 1 to {self.n_features}.")
        self._check_prefixes()
        if any(low >= high for low, high in pairwise(self.sigma_table)):
            raise FluxSaeError(f"sigma_table is {self.sigma_table}. It must hold rising noise levels, each once.")

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
    def kind(self) -> Kind:
        """What sets the architecture apart."""
        return KINDS[self.architecture]

    @property
    def has_threshold(self) -> bool:
        """Whether the file holds a `threshold`: one number (batchtopk, matryoshka) or one a feature (jumprelu)."""
        return self.kind.threshold is not None

    @property
    def is_sigma_conditioned(self) -> bool:
        """Whether the encoder has to be given the noise level of what it reads."""
        return bool(self.sigma_table)

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
            shapes["threshold"] = () if self.kind.threshold == "shared" else column
        if self.sigma_table:
            shapes |= dict.fromkeys(("sigma_scale", "sigma_shift"), (len(self.sigma_table), self.d_model))
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, with the schema version."""
        values = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        # Not written where empty: versions that know no tables go on reading plain SAEs.
        return {name: value for name, value in values.items() if name not in _ADDED or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that `to_dict` turned into `values`.

        Raises:
            FluxSaeError: a newer schema; a field missing, unknown, of the wrong type or out of range.
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
        missing = [field.name for field in fields(cls) if field.name not in values and field.name not in _ADDED]
        if missing:
            raise FluxSaeError(f"The SAE's config lacks {', '.join(missing)}. Write it again with `save_pretrained`.")
        return cls(**values)
