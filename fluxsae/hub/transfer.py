"""Checked transfer to and from the Hub.

`huggingface_hub` resolves, resumes, caches and renames; it does not look at the content of what arrived. So every file
is checked against its published hash here. Tokens are the client's affair (`hf auth login` or `HF_TOKEN`).
"""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import huggingface_hub as hf
from tqdm import tqdm

from fluxsae.errors import FluxSaeError
from fluxsae.files import check_free_space
from fluxsae.hub.faults import ask_hub

RepoType = Literal["model", "dataset", "space"]
T = TypeVar("T")

_log = logging.getLogger(__name__)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"\w[\w./+-]{0,199}")


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, and the folder in the Hub's cache where they lie (read-only)."""

    repo_id: str
    commit: str
    files: tuple[str, ...]
    folder: Path


@dataclass(frozen=True)
class Listing:
    """One commit of a repository and the paths of all its files."""

    commit: str
    files: tuple[str, ...]


class _NoBar(tqdm):  # type: ignore[type-arg]
    """No progress bar, for what takes no time."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})


def split_repo(text: str) -> tuple[str, str | None]:
    """The repository id and the revision in `user/name` or `user/name@revision`.

    Raises:
        FluxSaeError: it is neither.
    """
    repo_id, at, revision = text.partition("@")
    if not is_repo_id(repo_id) or (at and not _REVISION.fullmatch(revision)):
        raise FluxSaeError(
            f"{text[:120]!r} names no Hub repository. Write user/name, or user/name@revision with a branch, tag or "
            "commit id."
        )
    return repo_id, revision or None


def is_repo_id(text: str) -> bool:
    """Whether the text has the form `user/name`."""
    return bool(_REPO_ID.fullmatch(text)) and ".." not in text and "--" not in text


def check_repo_id(text: str) -> None:
    """Refuses what is not of the form `user/name`.

    Raises:
        FluxSaeError: it is not.
    """
    if not is_repo_id(text):
        raise FluxSaeError(f"{text[:120]!r} is no repository id. Write user/name.")


def list_files(repo_id: str, *, revision: str | None = None, repo_type: RepoType = "model") -> Listing:
    """A commit of the repository as the Hub lists it now.

    Raises:
        FluxSaeError: no such repository or revision, no access, or the Hub cannot be reached.
    """
    look = partial(hf.repo_info, repo_id, repo_type=repo_type, revision=revision)
    info = ask_hub(f"read {repo_id}", repo_id, look, revision=revision)
    return Listing(str(info.sha), tuple(file.rfilename for file in getattr(info, "siblings", None) or ()))


# Download


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: RepoType = "model",
    patterns: Sequence[str] = ("*",),
) -> Snapshot:
    """One commit's files (those that match `patterns`) in the Hub cache, every one checked against its published hash.

    What the cache holds is not fetched again, and a file whose content is wrong is fetched once more. A revision once
    downloaded needs no connection (`HF_HUB_OFFLINE=1`).

    Raises:
        FluxSaeError: no such repository, revision or file, no access, no connection, a full disk, or wrong content.
    """
    ask = partial(ask_hub, f"download {repo_id}", repo_id, revision=revision)
    resolved = ask(partial(hf.resolve_revision, repo_id, revision=revision, repo_type=repo_type))
    options = {"repo_type": repo_type, "revision": resolved, "allow_patterns": list(patterns)}
    fetch = partial(hf.snapshot_download, repo_id, **options)
    if not hf.is_offline_mode():
        plan: Any = ask(partial(fetch, dry_run=True, tqdm_class=_NoBar))
        missing = [file.file_size or 0 for file in plan if file.will_download]
        check_free_space(hf.constants.HF_HUB_CACHE, sum(missing), purpose=f"Downloading {repo_id}")
    for is_last in (False, True):
        folder = Path(ask(fetch))
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = [path.relative_to(folder).as_posix() for path in paths]
        names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not (wrong := _remove_damaged(folder, names)):
            break
        _refuse_damage(repo_id, wrong, is_last=is_last)
    if not names:
        raise FluxSaeError(
            f"{repo_id} at {resolved.resolved[:10]} has no file that matches {', '.join(patterns)}. "
            "Check the repository and the revision."
        )
    return Snapshot(repo_id, resolved.resolved, tuple(names), folder)


def _remove_damaged(folder: Path, names: Sequence[str]) -> list[str]:
    """The files of the cache whose content is not what was published; they are deleted."""
    wrong = failing(names, lambda name: _is_whole(folder / name))
    for path in (folder / name for name in wrong):
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return wrong


def _refuse_damage(repo_id: str, wrong: Sequence[str], *, is_last: bool) -> None:
    """Says what is to be done about files with the wrong hash, which are gone by now, unless they can be fetched."""
    names = ", ".join(wrong[:5])
    if hf.is_offline_mode():
        raise FluxSaeError(
            f"{names} of {repo_id} was damaged on this disk (wrong hash) and has been removed from the cache. "
            "Unset HF_HUB_OFFLINE and download it again."
        )
    if is_last:
        raise FluxSaeError(
            f"{names} of {repo_id} arrived twice with the wrong content (not of the published hash). It was not kept. "
            "Try another network, or tell its owner."
        )
    _log.warning("%s of %s has the wrong hash; fetching it once more", names, repo_id)


def failing(things: Iterable[T], check: Callable[[T], bool]) -> list[T]:
    """The things that do not pass a check, in order; on four threads, for checks that hash files."""
    things = list(things)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [thing for thing, passes in zip(things, pool.map(check, things), strict=True) if not passes]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(path: Path) -> str:
    """git's id of a file's content, in hex."""
    start = partial(hashlib.sha1, b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, start).hexdigest()


def _is_whole(path: Path) -> bool:
    """Whether a file of the cache has the hash after which the cache names its blob."""
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return sha256(blob) == blob.name
    # A cache without symbolic links has no such names and does not say what the content should be.
    return not re.fullmatch(r"[0-9a-f]{40}", blob.name) or git_sha1(blob) == blob.name


# Upload


def create_repo(
    repo_id: str, *, repo_type: RepoType = "model", private: bool | None = None, space_sdk: str | None = None
) -> None:
    """Makes the repository unless it exists.

    Raises:
        FluxSaeError: not logged in, no right to create it, or the Hub cannot be reached.
    """
    options = {"repo_type": repo_type, "private": private, "space_sdk": space_sdk, "exist_ok": True}
    ask_hub(f"create {repo_id}", repo_id, partial(hf.create_repo, repo_id, **options))  # type: ignore[arg-type]


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    message: str,
    parent: str | None = None,
    repo_type: RepoType = "model",
    deletions: Iterable[str] = (),
    tag: str | None = None,
) -> hf.CommitInfo:
    """All files (and deletions) in one commit, on top of `parent` (None: of the head, whatever it is), then tagged.

    Files that the Hub has already are not sent again.

    Raises:
        FluxSaeError: `parent` is no longer the head (then nothing is changed), no right to write, the tag exists, or
            the Hub fails.
    """
    if tag is not None:
        _check_tag(repo_id, tag, repo_type)
    operations: list[hf.CommitOperationAdd | hf.CommitOperationDelete] = [
        hf.CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.items())
    ]
    operations += [hf.CommitOperationDelete(path) for path in sorted(deletions)]
    commit = partial(
        hf.create_commit, repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=parent
    )
    made = ask_hub(f"write {repo_id}", repo_id, commit, again_after=(429, 503))
    if tag is not None:
        mark = partial(hf.create_tag, repo_id, tag=tag, revision=made.oid, repo_type=repo_type)
        ask_hub(f"tag {repo_id}", repo_id, mark)
    return made


def _check_tag(repo_id: str, tag: str, repo_type: RepoType) -> None:
    if not _REVISION.fullmatch(tag):
        raise FluxSaeError(f"{tag[:80]!r} is no tag. Use letters, digits, '.', '-', '_' and '/', for example v1.0.")
    refs = ask_hub(f"read {repo_id}", repo_id, partial(hf.list_repo_refs, repo_id, repo_type=repo_type))
    if tag in {known.name for known in refs.tags}:
        raise FluxSaeError(f"{repo_id} already has a tag {tag}. Tags stay where they are: choose another.")


def set_space_variables(repo_id: str, variables: Mapping[str, str]) -> None:
    """Sets a Space's public environment variables; the Space restarts.

    Raises:
        FluxSaeError: no such Space, no right to write, or the Hub cannot be reached.
    """
    for name, value in variables.items():
        ask_hub(f"set {name} of {repo_id}", repo_id, partial(hf.add_space_variable, repo_id, name, value))
