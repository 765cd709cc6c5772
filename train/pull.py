"""Fetch a run from the Hub, whole or in part, every file checked against its published hash.

    python -m train.pull --repo user/name@v1 --into runs/theirs
    python -m train.pull --repo user/name --into runs/small --hookpoints layer15 --part browse

A private or gated repository needs a token: log in with `.venv/bin/hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.publishing import Part
from train.command import start

if TYPE_CHECKING:
    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True)
class PullConfig:
    """What to fetch, and where to."""

    repo: str
    """The Hub repository, as user/name or user/name@revision (a branch, tag or commit id)."""
    into: Path
    """The folder to make; it appears when everything has arrived."""
    hookpoints: tuple[str, ...] = ()
    """Only these hook points; left out, all."""
    part: Part = "all"
    """browse leaves out what only scoring and steering need: SAE weights and S."""
    overwrite: bool = False
    """Replace the run that is at `into`."""


def main(config: PullConfig) -> RunFolder:
    """Pulls, and prints what arrived."""
    from fluxsae.publishing.publish import pull_run

    run = pull_run(
        config.repo,
        into=config.into,
        hookpoints=config.hookpoints or None,
        part=config.part,
        overwrite=config.overwrite,
    )
    files = run.published_files()
    size = sum((run.path / name).stat().st_size for name in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB, in {run.path}: {', '.join(map(str, run.sae_names()))}")
    return run


if __name__ == "__main__":
    start(main, PullConfig, __doc__)
