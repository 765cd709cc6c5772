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
        features: of the SAE that the edit uses; any of them will do, unless there are weights.
        above: multiples of a feature's reference activation; 0: it fires at all.
        at: `image`: anywhere in the image, at a step of the edit's window; from that step on the edit acts to the
            window's end, also if it takes the concept away. `token`: token by token, anew at each step.
        label: what the features stand for. Given alone, the run says which features carry it: `with_features`.
        weights: one for each feature: present is where the weighted sum of their activations, each in multiples of its
            reference activation, is above the level. `fluxsae.steering.choosing` finds such weights.
        least: without weights, how many of the features have to be above the level at one token.

    Raises:
        FluxSaeError: neither features nor a label, weights or `least` for other features, or a value out of range.
    """

    features: Annotated[tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...], FromList] = ()
    above: Annotated[float, Field(ge=0, le=100)] = 0.5
    at: Annotated[str, GetPydanticSchema(lambda _, schema: schema(Extent))] = "image"
    label: Annotated[str, Field(max_length=200)] = ""
    weights: Annotated[tuple[Annotated[float, Field(ge=-100, le=100)], ...], FromList] = ()
    least: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        if not self.features and not self.label.strip():
            raise FluxSaeError('A condition names features or a label, for example {"label": "red"}.')
        if self.weights and len(self.weights) != len(self.features):
            raise FluxSaeError(
                f"The condition has {len(self.weights)} weights for {len(self.features)} features. Give one weight a "
                "feature, or none."
            )
        if self.least > 1 and (self.weights or self.least > len(self.features)):
            raise FluxSaeError(
                f"least is {self.least} with {len(self.features)} features and {len(self.weights)} weights. It is at "
                "most the number of features, and 1 where there are weights."
            )

    def to_dict(self) -> dict[str, Any]:
        """The condition as JSON values; `weights` and `least` are there where they say something."""
        return {
            "features": list(self.features),
            "above": self.above,
            "at": self.at,
            "label": self.label,
            **({"weights": list(self.weights)} if self.weights else {}),
            **({"least": self.least} if self.least > 1 else {}),
        }

    def where_present(
        self,
        acts: 'Mapping[int, Float[Tensor, "*tokens"]]',
        reference_acts: 'Float[Tensor, " n_features"]',
    ) -> 'Bool[Tensor, "*tokens"]':
        """The tokens at which enough of the features, or their weighted sum, are above the level.

        Features of unknown reference need level 0, and count for nothing in a sum.
        """
        if self.weights:
            known = [pair for pair in zip(self.features, self.weights, strict=True) if reference_acts[pair[0]] > 0]
            terms = [acts[f].float() * (weight / reference_acts[f].to(acts[f].device)) for f, weight in known]
            return functools.reduce(operator.add, terms) > self.above
        hits = [
            ((acts[feature] > self.above * reference) & ((reference > 0) | (self.above == 0))).int()
            for feature in self.features
            for reference in [reference_acts[feature].to(acts[feature])]
        ]
        return functools.reduce(operator.add, hits) >= self.least

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
        needs_reference = self.above > 0 or bool(self.weights)
        if needs_reference and not bool((reference_acts[list(self.features)] > 0).any()):
            raise FluxSaeError(
                f"The condition's level {self.above:g} is in multiples of the reference activation, which is unknown "
                f"for feature {', '.join(map(str, self.features[:5]))} at {hookpoint}. Use above=0 without weights, or "
                "other features."
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
