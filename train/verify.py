"""Say what is wrong with a run folder or a Hub repository: schema, shapes, finite values, hashes, dangling ids.

python -m train.verify runs/mine
python -m train.verify user/name@v1
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fluxsae.artifacts import RunFolder
from fluxsae.errors import FluxSaeError
from fluxsae.hub import is_repo_id
from fluxsae.publish import pull_run
from fluxsae.verification import Verdict, verify_run


@dataclass(frozen=True)
class VerifyConfig:
    """What to check."""

    run: tyro.conf.Positional[str]
    """A run folder, or a Hub repository as user/name or user/name@revision."""


def main(config: VerifyConfig) -> Verdict:
    """Checks, and prints every problem."""
    run = _find_run(config.run)
    verdict = verify_run(run)
    for problem in verdict.problems:
        print(f"WRONG   {problem}")
    for part in verdict.absent:
        print(f"absent  {part}")
    found = f"{len(verdict.problems)} problem{'s' * (len(verdict.problems) != 1)}"
    print(f"{verdict.n_files} files, hook points {', '.join(verdict.hookpoints)}: {found}")
    return verdict


def _find_run(text: str) -> RunFolder:
    """The folder, or the repository in the Hub cache."""
    if Path(text).is_dir():
        return RunFolder(text)
    if is_repo_id(text.partition("@")[0]):
        return pull_run(text)
    raise FluxSaeError(f"There is no folder {text}, and it is no Hub repository (user/name or user/name@revision).")


if __name__ == "__main__":
    sys.exit(0 if main(tyro.cli(VerifyConfig, description=__doc__)).is_whole else 1)
