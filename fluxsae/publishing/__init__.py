"""Runs and SAEs as Hub repositories: published in one commit, pulled back with every file checked."""

from typing import TYPE_CHECKING, Literal

from fluxsae.lazy import hand_on

if TYPE_CHECKING:
    from fluxsae.publishing.publish import pull_run, push_run, push_sae

Part = Literal["all", "browse"]
"""What is pulled of a run: all, or what browsing needs."""

__all__ = ["Part", "pull_run", "push_run", "push_sae"]

__getattr__, __dir__ = hand_on(
    __name__,
    {
        "pull_run": "publish",
        "push_run": "publish",
        "push_sae": "publish",
    },
)
