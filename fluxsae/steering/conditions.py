"""When an edit acts: a concept that is there before it does."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, GetPydanticSchema

from fluxsae.checked import FromList, checked
from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint

if TYPE_CHECKING:  # edits are data, which loads without torch
    from jaxtyping import Bool, Float
    from torch import Tensor

Extent = Literal["image", "token"]


@checked()
class Condition:
    """A concept is present: any of its features fires above a level, in the activations before the edit.

    Args:
        features: of the SAE that the edit uses; any of them will do.
        above: multiples of a feature's reference activation; 0: it fires at all.
        at: `image`: anywhere in the image, at a step of the edit's window; from that step on the edit acts to the
            window's end, also if it takes the concept away. `token`: token by token, anew at each step.
        label: what the features stand for. Given alone, the run says which features carry it: `with_features`.

    Raises:
        FluxSaeError: neither features nor a label, or a value out of range.
    """

    features: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...], FromList] = ()
    above: Annotated[float, Field(ge=0, le=100)] = 0.5
    at: Annotated[str, GetPydanticSchema(lambda _, schema: schema(Extent))] = "image"
    label: Annotated[str, Field(max_length=200)] = ""

    def __post_init__(self) -> None:
        if not self.features and not self.label.strip():
            raise FluxSaeError('A condition names features or a label, for example {"label": "red"}.')

    def to_dict(self) -> dict[str, Any]:
        """The condition as JSON values."""
        return {"features": list(self.features), "above": self.above, "at": self.at, "label": self.label}

    def where_present(
        self,
        acts: 'Mapping[int, Float[Tensor, "*tokens"]]',
        reference_acts: 'Float[Tensor, " n_features"]',
    ) -> 'Bool[Tensor, "*tokens"]':
        """The tokens at which any of the features is above the level; those of unknown reference need level 0."""
        hits = [
            (acts[feature] > self.above * reference) & ((reference > 0) | (self.above == 0))
            for feature in self.features
            for reference in [reference_acts[feature].to(acts[feature])]
        ]
        return functools.reduce(operator.or_, hits)

    def check(self, reference_acts: 'Float[Tensor, " n_features"]', *, hookpoint: HookPoint) -> None:
        """Raises a FluxSaeError where the SAE at `hookpoint` cannot tell whether the condition holds."""
        if not self.features:
            raise FluxSaeError(
                f"The condition names the label {self.label!r} without its features. Give their numbers, or fill them "
                "in from the run with fluxsae.steering.with_features."
            )
        if max(self.features) >= len(reference_acts):
            raise FluxSaeError(
                f"The condition names feature {max(self.features)}; the SAE at {hookpoint} has features 0 to "
                f"{len(reference_acts) - 1}."
            )
        if self.above > 0 and not bool((reference_acts[list(self.features)] > 0).any()):
            raise FluxSaeError(
                f"The condition's level {self.above:g} is in multiples of the reference activation, which is unknown "
                f"for feature {', '.join(map(str, self.features[:5]))} at {hookpoint}. Use above=0 or other features."
            )


FeaturesOf = Callable[[HookPoint, str], Sequence[int]]
"""(hook point, label) -> the features that carry the label there."""


def filled_in(condition: Condition, features_of: FeaturesOf, *, hookpoint: HookPoint) -> Condition:
    """The condition with the features of its label.

    Raises:
        FluxSaeError: no feature carries the label.
    """
    if condition.features:
        return condition
    features = tuple(features_of(hookpoint, condition.label))
    if not features:
        raise FluxSaeError(
            f"No feature at {hookpoint} has the label {condition.label!r}. Search for a label that there is, or name "
            "features."
        )
    return replace(condition, features=features)
