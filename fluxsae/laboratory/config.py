"""How much is measured: options that load nothing heavy."""

from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from fluxsae.errors import FluxSaeError, check_positive

Direction = Literal["amplify", "suppress"]

DIRECTIONS: Final[tuple[Direction, ...]] = ("amplify", "suppress")

Method = Literal["features", "difference of means", "means, rivals away", "LEACE"]
"""Features, and what they compete with: linear edits that know the labels of the pictures for choosing."""

METHODS: Final[tuple[Method, ...]] = get_args(Method)

Control = Literal["random direction", "random feature"]

TARGET_ATTRIBUTES: Final = ("colour", "texture", "background")

Way = tuple[str, float, int, bool]
"""Mode, strength, how many features together, whether rivals are taken away."""

Where = Literal["everywhere", "painted", "all of it"]
"""Whether an edit acts on the whole picture, or where the attribute lies in the unedited one: what a person who
steers would paint, the object for its attributes, all else for the background. All of it: for the background also the
patches that it shares with the object's edge."""


@dataclass(frozen=True, kw_only=True)
class LaboratoryConfig:
    """How much is tried."""

    n_select: int = 3
    """Pictures a concept and direction on which hook point, mode, strength, window and feature are chosen."""
    n_report: int = 6
    """Further pictures a concept and direction on which the chosen settings are reported."""
    add: tuple[float, ...] = (0.35,)
    """Strengths of mode add that are tried: above 0 to turn a feature up, below to turn it down."""
    clamp: tuple[float, ...] = (-0.25,)
    """Strengths of mode clamp that are tried: above 0 to turn a feature up, below to turn it down."""
    scale: tuple[float, ...] = ()
    """Strengths of mode scale that are tried to turn a feature down."""
    project_out: tuple[float, ...] = ()
    """Strengths of mode project_out that are tried to turn a feature down."""
    starts: tuple[float, ...] = (0.3,)
    """Where windows start, as fractions of the schedule."""
    stop: float = 1.0
    """Where they end."""
    where: tuple[Where, ...] = ("painted", "all of it")
    """Whether edits act on the whole picture, or where the attribute lies in the unedited one."""
    n_features: int = 1
    """Matched features of a concept that are tried alone, the best by AUC first."""
    together: tuple[int, ...] = (4,)
    """How many matched features of a concept are turned at once at most, the best by AUC first; 1 tries each alone."""
    profile: tuple[float, ...] = (1.0, 1.5)
    """How far the features that tell a concept most are set towards their mean acts on it: 1 is all the way."""
    profile_features: tuple[int, ...] = (12,)
    """How many features are set so at once."""
    n_others: int = 1
    """To turn a value down, so many of the attribute's other values are turned up instead, those that come best."""
    linear: tuple[float, ...] = (1.0,)
    """How far the linear edits go: 1 is from the mean of the other values to the concept's, or the way back."""
    controls: tuple[Control, ...] = ("random direction",)
    """Edits of equal norm that are reported beside the features'."""
    rivals_alone: bool = False
    """Whether only taking the rivals away is reported too, where that is part of an edit."""
    methods: tuple[Method, ...] = METHODS
    """What is compared."""
    attributes: tuple[str, ...] = TARGET_ATTRIBUTES
    """Attributes whose concepts are steered."""
    directions: tuple[Direction, ...] = DIRECTIONS
    """Whether concepts are turned up, down, or both; a swap needs the settings that turn them up."""
    n_swaps: int = 48
    """Swaps of each attribute: one of two objects gets another value, drawn from all."""
    swap_attributes: tuple[str, ...] = ("colour",)
    """Attributes whose values are swapped."""
    without_rivals: tuple[bool, ...] = (True,)
    """Whether, to turn a feature up, the matched features of the attribute's other values are taken away (scale 0)."""
    n_rivals: int = 3
    """Matched features of each other value that are taken away, the best by AUC first."""
    named: float = 1.0
    """Share of the attributes an edit is not about that its prompt names; what is left open may be drawn either way."""
    n_moment_images: int = 400
    """Drawn scenes, read as pictures, from which the mean acts and the linear edits come."""
    curve: tuple[float, ...] = ()
    """Multiples of the chosen strength's distance from no change, beside 1, on the dose-response curve."""
    batch_size: int = 64
    """Pictures generated together."""
    readers: int = 0
    """Processes that read pictures back; 0 reads in this one."""
    seed: int = 0
    """Decides subjects and control directions."""

    def __post_init__(self) -> None:
        check_positive(self, "n_select", "n_report", "n_features", "n_rivals", "n_moment_images", "batch_size")
        unknown = set(self.methods) - set(METHODS)
        if unknown or "features" not in self.methods:
            raise FluxSaeError(f"methods is {self.methods}; allowed are {', '.join(METHODS)}, features among them.")
        if not self.starts or not all(0 <= start < self.stop <= 1 for start in self.starts):
            raise FluxSaeError(
                f"starts is {self.starts} and stop {self.stop}; they are fractions of the schedule: "
                "at least one start, each at least 0 and below stop, and stop at most 1."
            )
        if not 0 <= self.named <= 1:
            raise FluxSaeError(f"named is {self.named}; it is a share of the attributes, from 0 to 1.")
        if not self.where or not self.without_rivals:
            raise FluxSaeError("where or without_rivals is empty; name at least one way of each.")
        if not self.together or min(self.together) < 1:
            raise FluxSaeError(f"together is {self.together}; give numbers of features, each at least 1.")
        if self.n_swaps and "amplify" not in self.directions:
            raise FluxSaeError("Swaps need what turns a concept up: add amplify to directions, or set n_swaps to 0.")
        for direction in DIRECTIONS:
            if not self.ways("features", direction):
                raise FluxSaeError(
                    f"No strength is left to {direction} with; give one of add, clamp, scale, project_out, profile."
                )

    @property
    def n_candidates(self) -> int:
        """Matched features of a concept that any of the ways needs."""
        return max(self.n_features, self.n_rivals, *self.together)

    def most_pictures(self, n_concepts: int) -> int:
        """Pictures that are made at most."""
        per_concept = 0
        for direction in self.directions:
            n_ways = sum(len(self.ways(method, direction)) + 1 for method in self.methods)
            choosing = self.n_select * n_ways * len(self.where) * len(self.starts)
            per_concept += choosing + self.n_report * (len(self.methods) + 4 + len(self.curve))
        return n_concepts * per_concept + self.n_swaps * len(self.swap_attributes) * (len(self.methods) + 4)

    def ways(self, method: Method, direction: Direction) -> list[Way]:
        """What a method tries in one direction."""
        if method == "difference of means":
            return [("add", share if direction == "amplify" else -share, 1, False) for share in self.linear]
        if method != "features":
            return [("scale", 1 - share, 1, False) for share in self.linear]
        without = self.without_rivals if direction == "amplify" else (False,)
        plain = [
            (mode, strength, together, alone)
            for together in self.together
            for alone in without
            for mode, strength in self.modes(direction)
        ]
        plain += [("profile", share, n, False) for n in self.profile_features for share in self.profile]
        return plain + [
            ("swap", float(rank), 1, False) for rank in range(1, self.n_others + 1) if direction == "suppress"
        ]

    def modes(self, direction: Direction) -> list[tuple[str, float]]:
        """(mode, strength) pairs that are tried in one direction."""
        signed = [(name, strength) for name in ("add", "clamp") for strength in getattr(self, name)]
        if direction == "amplify":
            return [(name, strength) for name, strength in signed if strength > 0]
        down = [(name, strength) for name in ("scale", "project_out") for strength in getattr(self, name)]
        return down + [(name, strength) for name, strength in signed if strength < 0]


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """How our own measures are audited."""

    n_images: int = 240
    """Images of the run that dictionaries are measured on; all their activations are held in memory."""
    n_training_images: int = 300
    """Images that SAEs are trained anew on."""
    n_rows: int = 200_000
    """Token rows kept of them at most."""
    n_flow_images: int = 12
    """Images for the flow loss."""
    n_seeds: int = 5
    """Trained, untrained and permuted dictionaries."""
    epochs: int = 16
    """Passes over the rows in each training."""
    lr: float = 3e-3
    """Learning rate of each training."""
    steers: bool = True
    """Whether steering is measured, where scenes can be read back."""
    n_steered: int = 1
    """Pictures a concept and direction for choosing how to steer; twice as many report it."""
    batch_size: int = 32
    """Images generated together."""
    seed: int = 0
    """Decides halves, pictures and directions."""

    def __post_init__(self) -> None:
        check_positive(self, "n_images", "n_training_images", "n_rows", "n_flow_images", "epochs", "n_steered")
        if self.n_seeds < 2:
            raise FluxSaeError(f"n_seeds is {self.n_seeds}; a spread between seeds needs at least 2.")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How much is measured, and how sure."""

    n_images: int = 256
    """Fresh images for the reconstruction; the concepts look at the run's own images, at most three times as many."""
    n_flow_images: int = 64
    """Images for the flow loss: drawn scenes for the miniature, else the model's own samples."""
    n_transfer_images: int = 8
    """Images for each size of the transfer table."""
    batch_size: int = 8
    """Images generated together."""
    draws: int = 500
    """Resamples of the images behind each interval."""
    seed: int = 0
    """Decides noise, halves, random directions and resamples."""
    steps: tuple[int, ...] = ()
    """Steps to look at; left out, those that each SAE was trained on (for the concepts: that S was scored at)."""
    laboratory: LaboratoryConfig = field(default_factory=LaboratoryConfig)
    """How much the steering laboratory tries."""
    audit: AuditConfig = field(default_factory=AuditConfig)
    """How our own measures are audited."""
    n_pairs: int = 6
    """Pairs of drawn scenes for each concept and attribute."""
    sizes: tuple[tuple[int, int], ...] = ()
    """Sizes (height, width) of the transfer table, pixels; left out, a smaller one, the trained one and a wider one."""

    def __post_init__(self) -> None:
        check_positive(self, "n_images", "n_flow_images", "n_transfer_images", "batch_size", "draws", "n_pairs")
