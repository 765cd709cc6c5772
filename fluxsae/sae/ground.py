"""The one check of whether an SAE is used where it was trained."""

from collections.abc import Collection

from fluxsae.errors import FluxSaeError
from fluxsae.flux.ground import Ground
from fluxsae.flux.identity import FluxIdentity, identity_differences
from fluxsae.sae.config import MISMATCHES, Mismatch, TrainedOn


def trained_identity(trained_on: TrainedOn) -> FluxIdentity:
    """The FLUX that an SAE was trained on, as its record has it."""
    return FluxIdentity(
        trained_on.flux_id,
        trained_on.flux_revision,
        trained_on.flux_weights,
        trained_on.adapters,
        trained_on.is_exact,
    )


def ground_differences(trained_on: TrainedOn, ground: Ground) -> dict[Mismatch, str]:
    """What differs between training and use, in words; what one side does not know is no difference."""
    found: dict[Mismatch, str] = {}
    if ground.flux is not None:
        found.update(identity_differences(trained_identity(trained_on), ground.flux).items())
    size, trained_size = (ground.height, ground.width), (trained_on.height, trained_on.width)
    if any(map(_differ, trained_size, size)):
        found["size"] = f"images are {size[0]} x {size[1]} pixels, not {trained_size[0]} x {trained_size[1]}"
    names: tuple[Mismatch, ...] = ("hookpoint", "guidance_scale", "true_cfg_scale", "max_sequence_length")
    for name in names:
        trained_value, value = getattr(trained_on, name), getattr(ground, name)
        if _differ(trained_value, value):
            found[name] = f"{name} is {value}, not {trained_value}"
    return found


def check_ground(
    trained_on: TrainedOn | None, ground: Ground, *, allow_mismatch: Collection[Mismatch] = ()
) -> dict[Mismatch, str]:
    """The differences that `allow_mismatch` names, to be shown.

    Raises:
        FluxSaeError: others, or a name that no difference has.
    """
    check_names(allow_mismatch)
    found: dict[Mismatch, str] = {"unknown": "the SAE does not say what it was trained on"}
    if trained_on is not None:
        found = ground_differences(trained_on, ground)
    refused = [name for name in found if name not in allow_mismatch]
    if refused:
        place = "This SAE" if trained_on is None else f"The SAE of {trained_on.hookpoint}"
        raise FluxSaeError(
            f"{place} was trained elsewhere: {'; '.join(found[name] for name in refused)}. Use it as it was "
            f"trained, or allow what differs by name: {', '.join(refused)} (allow_mismatch)."
        )
    return found


def check_names(names: Collection[str]) -> None:
    """Raises a FluxSaeError for what names no difference."""
    is_list = not isinstance(names, str | bool)  # before, True allowed everything
    unknown = sorted(set(names) - set(MISMATCHES)) if is_list else [names]
    if unknown:
        raise FluxSaeError(
            f"allow_mismatch={', '.join(map(str, unknown))!r}: allowed is a list of {', '.join(MISMATCHES)}."
        )


def _differ(trained: object, actual: object) -> bool:
    if trained is None or actual is None:
        return False
    if isinstance(trained, float) and isinstance(actual, float):
        return abs(trained - actual) > 1e-3
    return trained != actual
