"""Verified, resumable transfer to and from the Hub, through the `huggingface_hub` client.

Nothing here knows what a run is. Tokens are the client's affair (`hf auth login` or `HF_TOKEN`).
"""

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Literal

import huggingface_hub as hf
from huggingface_hub import errors as hf_errors

from fluxsae.errors import FluxSaeError
from fluxsae.files import check_free_space
from fluxsae.hub.faults import explained, why_unreachable, with_retries

RepoType = Literal["model", "dataset", "space"]

_log = logging.getLogger(__name__)
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_REVISION = re.compile(r"\w[\w./+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit, as the Hub lists it."""

    path: str
    size: int
    sha256: str | None
    """Of the content, where the Hub keeps the file in large-file storage."""
    blob_id: str
    """git's id of the content, or of its pointer where `sha256` is given."""

    def matches(self, content: Path | bytes) -> bool:
        """Whether a local file, or bytes, are this very content."""
        if isinstance(content, Path) and (not content.is_file() or content.stat().st_size != self.size):
            return False
        return sha256(content) == self.sha256 if self.sha256 else git_sha1(content) == self.blob_id


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository: its id, files, and the folder where they lie (read-only) if they were fetched."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    folder: Path


@dataclass(frozen=True)
class Listing:
    """One commit of a repository and all its files."""

    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Commit:
    """What an upload made."""

    repo_id: str
    oid: str
    url: str


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


def sha256(content: Path | bytes) -> str:
    """The SHA-256 of a file or of bytes, in hex."""
    with _opened(content) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_sha1(content: Path | bytes) -> str:
    """git's id of a file's content, in hex."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    begun = partial(hashlib.sha1, b"blob %d\0" % size, usedforsecurity=False)
    with _opened(content) as file:
        return hashlib.file_digest(file, begun).hexdigest()


def _opened(content: Path | bytes) -> io.BytesIO | io.BufferedReader:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def list_files(repo_id: str, *, revision: str | None = None, repo_type: RepoType = "model") -> Listing:
    """A commit of the repository as the Hub lists it now.

    Raises:
        FluxSaeError: no such repository or revision, no access, or the Hub cannot be reached.
    """
    with explained(f"read {repo_id}", repo_id, revision):
        api = hf.HfApi()
        commit = str(with_retries(lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision)).sha)
        entries = with_retries(
            lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=repo_type))
        )
    return Listing(commit, tuple(_remote_file(entry) for entry in entries if isinstance(entry, hf.hf_api.RepoFile)))


def _remote_file(entry: "hf.hf_api.RepoFile") -> RemoteFile:
    return RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)


def list_tags(repo_id: str, *, repo_type: RepoType = "model") -> dict[str, str]:
    """The repository's tags and the commits that they name.

    Raises:
        FluxSaeError: no such repository, no access, or the Hub cannot be reached.
    """
    with explained(f"read {repo_id}", repo_id):
        refs = with_retries(lambda: hf.HfApi().list_repo_refs(repo_id, repo_type=repo_type))
    return {tag.name: tag.target_commit for tag in refs.tags}


# Download


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: RepoType = "model",
    patterns: Sequence[str] | None = None,
    cache_dir: Path | None = None,
) -> Snapshot:
    """One commit's files (those that match `patterns`) in the Hub cache, every one checked against its published hash.

    What the cache holds is not fetched again, a cut transfer goes on where it stopped, and a file whose content is
    wrong is fetched once more. A revision once downloaded needs no connection (`HF_HUB_OFFLINE=1`).

    Raises:
        FluxSaeError: no such repository, revision or file, no access, no connection, a full disk, or wrong content.
    """
    source = _Source(repo_id, repo_type, cache_dir)
    with explained(f"download {repo_id}", repo_id, revision):
        resolved = with_retries(
            lambda: hf.HfApi().resolve_revision(repo_id, revision=revision, repo_type=repo_type, cache_dir=cache_dir)
        )
        folder = source.cached_folder(resolved, patterns) or source.fetch(resolved, patterns)
    files = [file for file in _cached_files(folder) if _is_wanted(file.path, patterns)]
    if not files:
        raise FluxSaeError(
            f"{repo_id} at {resolved.resolved[:10]} has no file that matches {', '.join(patterns or ['*'])}. "
            "Check the repository and the revision."
        )
    for file in damaged_files(folder, files):
        source.fetch_again(resolved.resolved, file, folder)
    return Snapshot(repo_id, resolved.resolved, tuple(files), folder)


@dataclass(frozen=True)
class _Source:
    """Where a download comes from and is kept."""

    repo_id: str
    repo_type: RepoType
    cache_dir: Path | None

    def cached_folder(self, revision: str, patterns: Sequence[str] | None) -> Path | None:
        """The snapshot's folder, if the cache knows the commit's listing and holds all wanted files."""
        where = {"repo_type": self.repo_type, "revision": revision, "cache_dir": self.cache_dir}
        try:
            hf.get_cached_repo_tree(self.repo_id, **where)  # type: ignore[arg-type]
            return Path(
                hf.snapshot_download(self.repo_id, **where, allow_patterns=_as_list(patterns), local_files_only=True)  # type: ignore[call-overload]
            )
        except (hf_errors.CachedRepoTreeNotFoundError, hf_errors.LocalEntryNotFoundError):
            return None

    def fetch(self, revision: "hf.ResolvedRevision", patterns: Sequence[str] | None) -> Path:
        """Downloads what is missing; the snapshot's folder."""
        if hf.is_offline_mode():
            raise FluxSaeError(f"Could not download {self.repo_id} at {revision}: {why_unreachable()}")
        self._check_space(revision.resolved, patterns)
        return Path(
            with_retries(
                lambda: hf.snapshot_download(
                    self.repo_id,
                    repo_type=self.repo_type,
                    revision=revision,
                    cache_dir=self.cache_dir,
                    allow_patterns=_as_list(patterns),
                )
            )
        )

    def _check_space(self, commit: str, patterns: Sequence[str] | None) -> None:
        listing = list_files(self.repo_id, revision=commit, repo_type=self.repo_type)
        missing = [
            file.size for file in listing.files if _is_wanted(file.path, patterns) and not self._has(commit, file)
        ]
        check_free_space(
            self.cache_dir or hf.constants.HF_HUB_CACHE, sum(missing), purpose=f"Downloading {self.repo_id}"
        )

    def _has(self, commit: str, file: RemoteFile) -> bool:
        found = hf.try_to_load_from_cache(
            self.repo_id, file.path, cache_dir=self.cache_dir, revision=commit, repo_type=self.repo_type
        )
        return isinstance(found, str)

    def fetch_again(self, commit: str, file: RemoteFile, folder: Path) -> None:
        """Replaces a damaged file of the cache; it is gone if the second copy is wrong too."""
        _drop(folder / file.path)
        if hf.is_offline_mode():
            raise FluxSaeError(
                f"{file.path} of {self.repo_id} was damaged on this disk (wrong hash) and has been removed from the "
                "cache. Unset HF_HUB_OFFLINE and download it again."
            )
        _log.warning("%s of %s has the wrong hash; fetching it once more", file.path, self.repo_id)
        with explained(f"download {self.repo_id}", self.repo_id, commit):
            with_retries(
                lambda: hf.hf_hub_download(
                    self.repo_id, file.path, revision=commit, repo_type=self.repo_type, cache_dir=self.cache_dir
                )
            )
        if damaged_files(folder, [file]):
            _drop(folder / file.path)
            raise FluxSaeError(
                f"{file.path} of {self.repo_id} arrived twice with the wrong content (expected the hash "
                f"{file.sha256 or file.blob_id}). It was not kept. Try another network, or tell its owner."
            )


def damaged_files(folder: Path, files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files whose content in `folder` does not have its hash."""
    files = list(files)
    with ThreadPoolExecutor(max_workers=4) as pool:
        is_whole = list(pool.map(lambda file: file.matches(folder / file.path), files))
    return [file for file, whole in zip(files, is_whole, strict=True) if not whole]


def _cached_files(folder: Path) -> list[RemoteFile]:
    """A snapshot's files with their hashes, by which the cache names its blobs."""
    return [
        _cached_file(folder, path.relative_to(folder).as_posix())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _cached_file(folder: Path, name: str) -> RemoteFile:
    blob = (folder / name).resolve()
    size = blob.stat().st_size
    if _SHA256.fullmatch(blob.name):
        return RemoteFile(name, size, blob.name, "")
    # A cache without symbolic links does not say what the content should be.
    return RemoteFile(name, size, None, blob.name if _SHA1.fullmatch(blob.name) else git_sha1(blob))


def _drop(pointer: Path) -> None:
    pointer.resolve().unlink(missing_ok=True)
    pointer.unlink(missing_ok=True)


def _is_wanted(path: str, patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(path, pattern) for pattern in patterns)


def _as_list(patterns: Sequence[str] | None) -> list[str] | None:
    return None if patterns is None else list(patterns)


# Upload


def create_repo(
    repo_id: str, *, repo_type: RepoType = "model", private: bool | None = None, space_sdk: str | None = None
) -> None:
    """Makes the repository unless it exists.

    Raises:
        FluxSaeError: not logged in, no right to create it, or the Hub cannot be reached.
    """
    with explained(f"create {repo_id}", repo_id):
        with_retries(
            lambda: hf.HfApi().create_repo(
                repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=space_sdk
            )
        )


def upload(
    repo_id: str,
    files: Mapping[str, Path | bytes],
    *,
    parent: str,
    message: str,
    repo_type: RepoType = "model",
    deletions: Sequence[str] = (),
    tag: str | None = None,
) -> Commit:
    """All files (and deletions) in one commit on top of `parent`, checked after arrival, then tagged.

    Files that the Hub has already are not sent again.

    Raises:
        FluxSaeError: `parent` is no longer the head (then nothing is changed), no right to write, the tag exists, the
            Hub fails, or what arrived is not what was sent.
    """
    if tag is not None:
        _check_tag(repo_id, tag, repo_type)
    operations: list[hf.CommitOperationAdd | hf.CommitOperationDelete] = [
        hf.CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
        for path, content in sorted(files.items())
    ]
    operations += [hf.CommitOperationDelete(path) for path in sorted(deletions)]
    with explained(f"write {repo_id}", repo_id):
        made = with_retries(
            lambda: hf.HfApi().create_commit(
                repo_id, operations, commit_message=message, repo_type=repo_type, parent_commit=parent
            ),
            statuses=(429, 503),
        )
    _check_arrival(repo_id, made.oid, files, repo_type)
    if tag is not None:
        with explained(f"tag {repo_id}", repo_id):
            with_retries(lambda: hf.HfApi().create_tag(repo_id, tag=tag, revision=made.oid, repo_type=repo_type))
    return Commit(repo_id, made.oid, str(made.commit_url))


def _check_tag(repo_id: str, tag: str, repo_type: RepoType) -> None:
    if not _REVISION.fullmatch(tag):
        raise FluxSaeError(f"{tag[:80]!r} is no tag. Use letters, digits, '.', '-', '_' and '/', for example v1.0.")
    if tag in list_tags(repo_id, repo_type=repo_type):
        raise FluxSaeError(f"{repo_id} already has a tag {tag}. Tags stay where they are: choose another.")


def _check_arrival(repo_id: str, commit: str, files: Mapping[str, Path | bytes], repo_type: RepoType) -> None:
    """Compares the commit's listing with what was sent."""
    arrived = {file.path: file for file in list_files(repo_id, revision=commit, repo_type=repo_type).files}
    wrong = [path for path, content in files.items() if path not in arrived or not arrived[path].matches(content)]
    if wrong:
        raise FluxSaeError(
            f"Commit {commit[:10]} of {repo_id} does not hold what was sent: {', '.join(wrong[:5])}. Did these files "
            "change while they were uploaded? Push again when nothing writes to the folder."
        )


def set_space_variables(repo_id: str, variables: Mapping[str, str]) -> None:
    """Sets a Space's public environment variables; the Space restarts.

    Raises:
        FluxSaeError: no such Space, no right to write, or the Hub cannot be reached.
    """
    for name, value in variables.items():
        with explained(f"set {name} of {repo_id}", repo_id):
            with_retries(lambda name=name, value=value: hf.HfApi().add_space_variable(repo_id, name, value))  # type: ignore[misc]
