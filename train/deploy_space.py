"""Put the app, its requirements and a run on a Hugging Face Space, in one commit.

    python -m train.deploy_space --repo user/fluxsae                               # the embedded miniature
    python -m train.deploy_space --repo user/fluxsae --run user/name@v1            # a published run, pinned
    python -m train.deploy_space --repo user/fluxsae --run runs/mine               # a run folder, copied into the Space

Needs a token that may write: log in with `.venv/bin/hf auth login`, or set HF_TOKEN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxsae.errors import FluxSaeError
from train.command import start

if TYPE_CHECKING:
    import huggingface_hub as hf


ROOT = Path(__file__).resolve().parent.parent
RUN_FOLDER = "run"
RUN_VARIABLE = "FLUXSAE_RUN"
_TOP_FILES = ("app.py", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md")
_FOLDERS = ("fluxsae", "docs")
_FRONT_MATTER = ("title", "sdk", "sdk_version", "app_file", "python_version")


@dataclass(frozen=True)
class DeployConfig:
    """What runs where. Log in first with `.venv/bin/hf auth login`, or set HF_TOKEN."""

    repo: str
    """The Space, as user/name; made if it does not exist."""
    run: str | None = None
    """The run to show: a run folder (copied into the Space) or a Hub repository with a revision (user/name@revision);
    None shows the embedded miniature run."""
    private: bool = False
    """Make a new Space private."""
    source: Path = ROOT
    """The checkout that is deployed."""


def main(config: DeployConfig) -> hf.CommitInfo:
    """Deploys, and prints the Space's address and what is left to do."""
    from fluxsae.hub import transfer

    if not transfer.is_repo_id(config.repo):
        raise FluxSaeError(f"{config.repo!r} names no Space. Write user/name.")
    files: dict[str, Path | bytes] = dict(app_files(config.source))
    _check_readme(config.source / "README.md")
    variables = _add_run(files, config.run)
    transfer.create_repo(config.repo, repo_type="space", private=config.private or None, space_sdk="gradio")
    remote = transfer.list_files(config.repo, repo_type="space")
    made = transfer.upload(
        config.repo,
        files,
        parent=remote.commit,
        message=f"Deploy fluxsae with {config.run or 'the embedded miniature run'}",
        repo_type="space",
        deletions=[path for path in remote.files if path not in files and _is_ours(path)],
    )
    transfer.set_space_variables(config.repo, variables)
    print(f"{len(files)} files at {made.commit_url}")
    print(_remaining(config))
    return made


def app_files(source: Path) -> Iterator[tuple[str, Path]]:
    """Path in the Space -> file, of all that the app needs."""
    if not (source / "app.py").is_file():
        raise FluxSaeError(f"{source} is no checkout of fluxsae (it has no app.py). Run this in one, or give --source.")
    for name in _TOP_FILES:
        if (source / name).is_file():
            yield name, source / name
    for folder in _FOLDERS:
        for path in sorted((source / folder).rglob("*")):
            parts = path.relative_to(source).parts
            if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
                yield path.relative_to(source).as_posix(), path


def _check_readme(path: Path) -> None:
    """Refuses a README that a Space would not start with."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    front = text.split("---\n")[1] if text.startswith("---\n") and text.count("---\n") > 1 else ""
    missing = [name for name in _FRONT_MATTER if f"\n{name}:" not in f"\n{front}"]
    if missing:
        raise FluxSaeError(f"{path} lacks {', '.join(missing)} in its front matter, which the Space is started from.")


def _add_run(files: dict[str, Path | bytes], run: str | None) -> dict[str, str]:
    """Adds a run folder to the files; the variables that make the app show the run."""
    from fluxsae.hub import transfer
    from fluxsae.publishing.verify import verify_run
    from fluxsae.runs.folder import RunFolder

    if run is None:
        return {}
    if not Path(run).is_dir():
        repo_id, revision = transfer.split_repo(run)
        if revision is None:
            raise FluxSaeError(
                f"{run} names no revision, so the Space could change under its visitors. Write {run}@v1."
            )
        transfer.list_files(repo_id, revision=revision)
        return {RUN_VARIABLE: run}
    folder = RunFolder(run)
    problems = verify_run(folder).problems
    if problems:
        raise FluxSaeError(
            f"The run has {len(problems)} problems, the first: {problems[0]}. See python -m train.verify."
        )
    files |= {f"{RUN_FOLDER}/{name}": folder.path / name for name in folder.published_files()}
    return {RUN_VARIABLE: RUN_FOLDER}


def _is_ours(path: str) -> bool:
    """Whether an earlier deployment put this file there."""
    return path.partition("/")[0] in (*_TOP_FILES, *_FOLDERS, RUN_FOLDER)


def _remaining(config: DeployConfig) -> str:
    page = f"the settings page of the Space {config.repo}"
    hint = f"On {page}: choose ZeroGPU or another GPU for FLUX.1; set the secret HF_TOKEN where the model is gated."
    return hint + (" (Secrets are not copied when a Space is duplicated.)" if config.run else "")


if __name__ == "__main__":
    start(main, DeployConfig, __doc__)
