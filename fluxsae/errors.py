"""Faults that a user can mend."""


class FluxSaeError(ValueError):
    """What was given, what is allowed and what to do, in words that may be shown to a user as they are."""


def check_positive(config: object, *names: str) -> None:
    """Refuses a config whose counts of these names are not all at least 1.

    Raises:
        FluxSaeError: one is below 1.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise FluxSaeError(f"{name} is {getattr(config, name)}; it must be at least 1.")
