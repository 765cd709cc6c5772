"""Publish a run on the Hub: one commit with model card and checksums, a tag, the tables as a dataset.

    python -m train.push --run runs/mine --repo user/name --tag v1 --tables user/name-tables
    python -m train.push --run runs/mine --repo user/name-sae --sae layer15          # one SAE alone

Needs a token that may write: log in with `.venv/bin/hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.command import start

if TYPE_CHECKING:
    from fluxsae.publishing.publish import Published


@dataclass(frozen=True)
class PushConfig:
    """What goes where. Log in first with `.venv/bin/hf auth login`, or set HF_TOKEN."""

    run: Path
    """The run folder."""
    repo: str
    """The Hub model repository, as user/name; made if it does not exist."""
    tag: str | None = None
    """A tag for the commit, so that others can pin it."""
    message: str | None = None
    """The commit's message."""
    private: bool = False
    """Make a new repository private."""
    tables: str | None = None
    """A dataset repository (user/name) that also gets the tables, for the Hub's viewer."""
    sae: str | None = None
    """Publish only the SAE of this hook point, at the root of the repository."""
    onto: str | None = None
    """Build on this commit, or on "head", even if the repository changed since this folder was pulled."""


def main(config: PushConfig) -> Published:
    """Pushes, and prints where it went."""
    from fluxsae.publishing.publish import push_run, push_sae

    private = config.private or None
    if config.sae is not None:
        made = push_sae(config.run, config.sae, config.repo, tag=config.tag, private=private)
    else:
        made = push_run(
            config.run,
            config.repo,
            tag=config.tag,
            message=config.message,
            private=private,
            tables_repo=config.tables,
            onto=config.onto,
        )
    print(f"{made.n_files} files at {made.repo_id}@{made.tag or made.commit}: {made.url}")
    if made.tables:
        print(f"Tables: datasets/{made.tables}")
    return made


if __name__ == "__main__":
    start(main, PushConfig, __doc__)
