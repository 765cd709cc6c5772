"""One strict schema an endpoint: its name, description, arguments, defaults and results, stated once.

The page, HTTP and MCP are checked against it before any model work; signature, API page and About tab are made of it.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, ValidationError, WithJsonSchema

from fluxsae.errors import FluxSaeError
from fluxsae.runs.names import SaeName
from fluxsae.steering.edits import SteeringEdit
from fluxsae.ui.serve.arguments import (
    FIRST_HOOKPOINT,
    RUN_HOOKPOINT,
    RUN_STEPS,
    BestImages,
    Caption,
    Change,
    Column,
    Edits,
    Feature,
    HookPointPath,
    Label,
    Limit,
    Limits,
    Mode,
    OfRun,
    OneStep,
    OtherHookPoint,
    PatchColumn,
    PatchRow,
    Picture,
    PictureOrNone,
    Prompt,
    PromptOrCaption,
    Query,
    RegionField,
    Row,
    Seed,
    Step,
    Steps,
    Strengths,
    TakenWords,
    TriedFeatures,
    Window,
    shortened,
)


class RequestError(FluxSaeError):
    """A refused request; `problems` maps each refused field to its message."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(problems.values()))
        self.problems = dict(problems)


class Result(NamedTuple):
    """One of the things that an endpoint returns."""

    name: str
    kind: Literal["image", "gallery", "json", "plot"]
    description: str


class Request(BaseModel):
    """A checked request; its docstring is the endpoint's description, its fields are the arguments in order."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
    endpoint: ClassVar[str]
    results: ClassVar[tuple[Result, ...]]
    uses_flux: ClassVar[bool] = False

    @classmethod
    def parse(cls, limits: Limits, **values: Any) -> Self:
        """The request, checked against what the run allows; what is left out has its default.

        Raises:
            RequestError: a value is out of range; the message names field, value and allowed range.
        """
        decided = {name for name, field in cls.model_fields.items() if isinstance(field.default, OfRun)}
        given = {name: value for name, value in values.items() if value is not None or name not in decided}
        try:
            return cls.model_validate({**cls.defaults(limits), **given}, context=limits)
        except ValidationError as error:
            raise RequestError({str(item["loc"][0]): _message(item) for item in error.errors()}) from None

    @classmethod
    def pick(cls, limits: Limits, values: Mapping[str, Any]) -> Self:
        """The request that is made of those of some values that are arguments, such as those of a link."""
        return cls.parse(limits, **{name: values[name] for name in cls.model_fields if name in values})

    @classmethod
    def defaults(cls, limits: Limits) -> dict[str, Any]:
        """Argument -> default in the served run; required ones are missing."""
        given = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        return {
            name: getattr(limits, value.name) if isinstance(value, OfRun) else value for name, value in given.items()
        }

    @classmethod
    def fixed_defaults(cls) -> dict[str, Any]:
        """Argument -> default, of those that are the same in every run."""
        given = {name: field.default for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in given.items() if not isinstance(value, OfRun)}

    @classmethod
    def properties(cls) -> dict[str, dict[str, Any]]:
        """Argument -> its JSON schema with description."""
        return {
            name: dict(described.json_schema or {})
            for name, field in cls.model_fields.items()
            for described in field.metadata
            if isinstance(described, WithJsonSchema)
        }

    @classmethod
    def description(cls) -> str:
        """What the endpoint does, in a sentence."""
        return inspect.getdoc(cls) or ""

    @classmethod
    def result_names(cls) -> str:
        """The results as Python names on the left of a call."""
        return ", ".join(result.name for result in cls.results)


class PictureRequest(Request):
    """A request for an image that FLUX makes."""

    uses_flux = True
    if TYPE_CHECKING:  # every one has these, each in its own order
        prompt: Prompt
        seed: Seed
        num_inference_steps: Steps

    @property
    def made_from(self) -> tuple[str, int, int]:
        """Prompt, seed and number of denoising steps."""
        return self.prompt, self.seed, self.num_inference_steps


def _message(item: Mapping[str, Any]) -> str:
    name = shortened(str(item["loc"][0])).strip("'")
    match item["type"]:
        case "value_error":
            return str(item["ctx"]["error"])
        case "extra_forbidden":
            return f"{name} is not an argument of this endpoint; leave it out."
        case "missing":
            return f"{name} is missing; this endpoint needs it."
    return f"{name} is {shortened(item['input'])}; {item['msg']}."


FEATURES = "Ranked features with label, statistics and activation."


class HeatmapRequest(PictureRequest):
    """Makes an image, ranks the features that fire in it, and shows where each fires."""

    endpoint = "heatmap"
    results = (
        Result("image", "image", "The image."),
        Result("features", "json", FEATURES),
        Result("overlays", "gallery", "The image with the heatmap of each of the first 16 features."),
    )
    prompt: Prompt
    hookpoint: HookPointPath = RUN_HOOKPOINT
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS
    step: Step = None
    limit: Limit = 8


class ReadPictureRequest(Request):
    """Reads your own picture with FLUX, without painting: ranks the features that fire and shows where each does."""

    endpoint = "read_picture"
    uses_flux = True
    results = (
        Result("features", "json", FEATURES),
        Result("overlays", "gallery", "The picture with the heatmap of each of the first 16 features."),
        Result("familiarity", "json", "Whether the picture is like the run's own; if not, no name is sure."),
    )
    picture: Picture
    prompt: Caption = ""
    hookpoint: HookPointPath = RUN_HOOKPOINT
    step: Step = None
    seed: Seed = 0
    limit: Limit = 8


class FeaturesAtRequest(PictureRequest):
    """Ranks the features that fire at one patch of an image, or of your own picture."""

    endpoint = "features_at"
    results = (Result("features", "json", FEATURES),)
    prompt: PromptOrCaption
    hookpoint: HookPointPath = RUN_HOOKPOINT
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS
    step: Step = None
    row: Row
    column: Column
    limit: Limit = 8
    picture: PictureOrNone = None


class ExplainRequest(PictureRequest):
    """Measures which words of the prompt and which earlier features make a feature fire, at one step."""

    endpoint = "explain"
    results = (
        Result(
            "explanation",
            "json",
            "Words and earlier features by effect, as shares of the feature's drive: each was taken away for this step "
            "alone, and the drive measured anew. The drive is the pre-activation at the patch, or the sum of the "
            "positive ones over the image.",
        ),
    )
    prompt: PromptOrCaption
    hookpoint: HookPointPath = RUN_HOOKPOINT
    feature: Feature
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS
    step: OneStep = None
    row: PatchRow = None
    column: PatchColumn = None
    limit: TriedFeatures = 8
    picture: PictureOrNone = None


class SearchRequest(Request):
    """Finds features by number, by label, or by any words, which CLIP compares with the features' images."""

    endpoint = "search_features"
    results = (
        Result(
            "features",
            "json",
            "Features with label, statistics, reason and score, best first; none if no word is known.",
        ),
    )
    query: Query = ""
    hookpoint: HookPointPath = RUN_HOOKPOINT
    limit: Limit = 20


class FeatureRequest(Request):
    """Gives one feature's card: label, statistics, neighbours, and its top images with heatmaps."""

    endpoint = "feature"
    results = (
        Result("card", "json", "The card."),
        Result("top_images", "gallery", "The feature's top images with its heatmap on each."),
    )
    hookpoint: HookPointPath = RUN_HOOKPOINT
    feature: Feature


class DirectionsRequest(Request):
    """Finds the features that write in a similar direction, and draws them on the map of all directions."""

    endpoint = "directions"
    results = (
        Result("neighbours", "json", "The nearest features with their cosines, nearest first."),
        Result("plot", "plot", "The map."),
    )
    hookpoint: HookPointPath = RUN_HOOKPOINT
    feature: Feature
    n_neighbours: Limit = 12


class LayersRequest(Request):
    """Matches the features of two hook points by the images that they fire on, and names what each has alone."""

    endpoint = "layers"
    results = (
        Result(
            "comparison",
            "json",
            "Matched features with their correlation, features of each hook point without a counterpart, how many of "
            "each there are, and the correlation by chance.",
        ),
    )
    first: HookPointPath = FIRST_HOOKPOINT
    second: OtherHookPoint = RUN_HOOKPOINT
    limit: Limit = 20


class CompareRequest(PictureRequest):
    """Makes the images of two prompts at one seed, and finds the features that differ most between them."""

    endpoint = "compare"
    results = (
        Result("features", "json", "Features with their share of their maximum in each image; most different first."),
        Result("image", "image", "The image of the first prompt."),
        Result("other_image", "image", "The image of the other prompt."),
    )
    prompt: Prompt
    other: Prompt
    hookpoint: HookPointPath = RUN_HOOKPOINT
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS
    limit: Limit = 12


class SilenceRequest(Request):
    """Makes some of a feature's best images again without each word in turn, and measures what is left of it."""

    endpoint = "silence"
    results = (
        Result(
            "words",
            "json",
            "A verdict in words, and for each image its prompt, seed, and the share of the feature's peak that is left "
            "without each word.",
        ),
        Result("images", "gallery", "Each image of a whole prompt, then those without each of its words."),
    )
    uses_flux = True
    hookpoint: HookPointPath = RUN_HOOKPOINT
    feature: Feature
    limit: TakenWords = 12
    n_images: BestImages = 3


class SwapRequest(PictureRequest):
    """Finds edits that put one name in place of another in an image, and makes the image with the best of them."""

    endpoint = "swap"
    results = (
        Result("before", "image", "The image without edits."),
        Result("after", "image", "The image with edits."),
        Result(
            "recipe_and_measurements",
            "json",
            "The recipe that makes the image again, the measurements, and whether CLIP recognises the new name.",
        ),
    )
    prompt: Prompt
    old: Label
    new: Label
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS


class SteerRequest(PictureRequest):
    """Makes an image, or paints on from your own picture, without and with edits, and measures what they changed."""

    endpoint = "steer"
    results = (
        Result("before", "image", "The image without edits."),
        Result("after", "image", "The image with edits."),
        Result("recipe_and_measurements", "json", "The recipe that makes the image again, and the measurements."),
    )
    prompt: PromptOrCaption
    edits: Edits
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS
    picture: PictureOrNone = None
    change: Change = 0.6


class SweepRequest(PictureRequest):
    """Makes an image at several strengths of one feature, and measures what each changed."""

    endpoint = "sweep"
    results = (
        Result("grid", "gallery", "One image for each strength."),
        Result("measurements", "json", "The measurements at each strength."),
    )
    prompt: Prompt
    hookpoint: HookPointPath = RUN_HOOKPOINT
    feature: Feature
    mode: Mode = "add"
    strengths: Strengths
    steps: Window = None
    region: RegionField = None
    seed: Seed = 0
    num_inference_steps: Steps = RUN_STEPS

    def edits(self) -> tuple[SteeringEdit, ...]:
        """One edit for each strength."""
        place = SaeName.parse(self.hookpoint)
        return tuple(
            SteeringEdit(place, self.feature, self.mode, strength, steps=self.steps, region=self.region)
            for strength in self.strengths
        )
