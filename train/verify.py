"""Say what is wrong with a run folder or a Hub repository: schema, shapes, finite values, hashes, dangling ids.

    python -m train.verify --run runs/mine
    python -m train.verify --run runs/mine --write-checksums     # writes the hashes of a sound folder that has none
    python -m train.verify --run user/name@v1

`--run` may be left out before the name. Nothing in the run is changed unless asked for. The exit status is 1 where
something is wrong.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from fluxsae.errors import FluxSaeError
from train.command import start

if TYPE_CHECKING:
    from fluxsae.publishing.verify import Verdict
    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True)
class VerifyConfig:
    """What to check."""

    run: str | None = None
    """A run folder, or a Hub repository as user/name or user/name@revision."""
    place: tyro.conf.Positional[str | None] = None
    """The same, without --run."""
    write_checksums: bool = False
    """Write the hash of every file (SHA256SUMS) where there are none yet and nothing is wrong."""


def main(config: VerifyConfig) -> Verdict:
    """Checks, and prints every problem, and what was checked and what could not be."""
    from fluxsae.publishing.checksums import write_checksums
    from fluxsae.publishing.verify import verify_run

    place = config.run or config.place
    if place is None or None not in (config.run, config.place):
        raise FluxSaeError("Name one run: --run with a folder, or with a Hub repository as user/name.")
    if config.write_checksums and not Path(place).is_dir():
        raise FluxSaeError(f"{place} is no folder; --write-checksums is for a run folder on this machine.")
    run = _find_run(place)
    verdict = verify_run(run)
    for problem in verdict.problems:
        print(f"WRONG   {problem}")
    for part in verdict.absent:
        print(f"absent  {part}")
    found = f"{len(verdict.problems)} problem{'s' * (len(verdict.problems) != 1)}"
    print(f"{verdict.n_files} files, hook points {', '.join(verdict.hookpoints)}: {found}")
    structure = "schema, shapes, finite values, and numbers of images and features that exist"
    sums = run.checksums_path.name
    if sums not in verdict.absent:
        print(f"Checked: every file against its hash; {structure}.")
        return verdict
    print(f"Checked: {structure}.")
    print(f"Not checked: whether a file was changed since it was written, because there is no {sums}.")
    if config.write_checksums and verdict.is_whole:
        write_checksums(run)
        print(f"Wrote {run.checksums_path}: from now on every file is checked against its hash.")
    else:
        print("--write-checksums makes one for a folder without problems; train.push makes one with every push.")
    return verdict


def _find_run(text: str) -> RunFolder:
    """The folder, or the repository in the Hub cache."""
    from fluxsae.hub.transfer import is_repo_id
    from fluxsae.publishing.publish import pull_run
    from fluxsae.runs.folder import RunFolder

    if Path(text).is_dir():
        return RunFolder(text)
    if is_repo_id(text.partition("@")[0]):
        return pull_run(text)
    raise FluxSaeError(f"There is no folder {text}, and it is no Hub repository (user/name or user/name@revision).")


if __name__ == "__main__":
    sys.exit(0 if start(main, VerifyConfig, __doc__).is_whole else 1)
