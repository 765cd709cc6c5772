"""Faults that a user can mend."""


class FluxSaeError(ValueError):
    """What was given, what is allowed and what to do, in words that may be shown to a user as they are."""
