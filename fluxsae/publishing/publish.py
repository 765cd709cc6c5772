"""A run folder to the Hub and back: one commit, one revision, every file checked."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fluxsae.errors import FluxSaeError, maker
from fluxsae.files import check_free_space, read_json, write_json, write_text
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.hub import transfer
from fluxsae.publishing import Part
from fluxsae.publishing.checksums import is_inside, read_checksums, write_checksums, wrong_files
from fluxsae.publishing.model_card import build_card, build_sae_card, build_tables_card
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName


@dataclass(frozen=True)
class Published:
    """What a push made on the Hub."""

    repo_id: str
    commit: str
    url: str
    n_files: int
    tag: str | None = None
    tables: str | None = None
    """The dataset repository with the tables, if they were pushed."""


@dataclass(frozen=True)
class _Origin:
    """The commit that a folder was pulled from, or last pushed as."""

    repo_id: str
    commit: str
    hookpoints: tuple[str, ...] = ()
    """Of a partial pull; none where the folder is the whole run."""
    part: Part = "all"

    @property
    def is_partial(self) -> bool:
        """Whether the repository holds more than the folder."""
        return bool(self.hookpoints) or self.part != "all"


# Push


def push_run(
    run: RunFolder | str | Path,
    repo_id: str,
    *,
    tag: str | None = None,
    message: str | None = None,
    private: bool | None = None,
    tables_repo: str | None = None,
    onto: str | None = None,
) -> Published:
    """The run as one Hub repository, made if it does not exist: one commit with card and checksums, then the tag.

    The folder's own card and checksums are written too, so that folder and repository are equal. Where the folder was
    pulled from or pushed to this repository before, the commit is refused if the repository has changed since; `onto`
    (a commit id, or "head") names another state to build on. With `tables_repo` the parquet tables also go to that
    dataset repository.

    Raises:
        FluxSaeError: no run, a partial one, the repository has moved on, no right to write, or the Hub fails.
    """
    run = RunFolder(run)
    info = run.load_info()
    _check_repo_ids(repo_id, tables_repo)
    origin = _load_origin(run)
    if origin and origin.repo_id == repo_id and origin.is_partial:
        raise FluxSaeError(
            f"{run.path} holds only a part of {repo_id} (it was pulled with {_describe(origin)}), so pushing it there "
            "would remove the rest. Pull the whole run, or push to another repository."
        )
    run.remove_leftovers()
    run.save_index(info.hookpoints)
    write_text(run.card_path, build_card(run, repo_id, revision=tag, tables_repo=tables_repo))
    write_checksums(run)
    transfer.create_repo(repo_id, private=private)
    remote = transfer.list_files(repo_id)
    files: dict[str, Path | bytes] = {name: run.path / name for name in run.published_files()}
    made = transfer.upload(
        repo_id,
        files,
        message=message or f"Publish the run at {', '.join(info.hookpoints)}",
        parent=_parent(onto, origin, repo_id, remote.commit),
        deletions=_gone(repo_id, remote, files, run),
        tag=tag,
    )
    _save_origin(run, _Origin(repo_id, made.oid))
    if tables_repo:
        push_tables(run, tables_repo, model_repo=repo_id, private=private)
    return Published(repo_id, made.oid, made.commit_url, len(files), tag, tables_repo)


def push_sae(
    run: RunFolder | str | Path,
    hookpoint: HookPoint | str,
    repo_id: str,
    *,
    tag: str | None = None,
    private: bool | None = None,
) -> Published:
    """One SAE of the run alone, at the root of its own repository, in one commit with a card.

    Raises:
        FluxSaeError: the run has no such SAE, no right to write, or the Hub fails.
    """
    run = RunFolder(run)
    hookpoint = run.check_sae(hookpoint)
    _check_repo_ids(repo_id, None)
    if not run.has_sae(hookpoint):
        raise FluxSaeError(f"{run.path} holds no SAE for {hookpoint}. Train it first: {maker('fit')}.")
    folder = run.sae_path(hookpoint)
    plain = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files: dict[str, Path | bytes] = {path.name: path for path in plain}
    files[run.card_path.name] = build_sae_card(run, hookpoint, repo_id, revision=tag).encode()
    transfer.create_repo(repo_id, private=private)
    made = transfer.upload(repo_id, files, message=f"Publish the SAE of {hookpoint}", tag=tag)
    return Published(repo_id, made.oid, made.commit_url, len(files), tag)


def push_tables(
    run: RunFolder | str | Path, repo_id: str, *, model_repo: str, private: bool | None = None
) -> Published:
    """The run's parquet tables as a dataset repository that the Hub's viewer can show.

    Raises:
        FluxSaeError: the run has no tables yet, no right to write, or the Hub fails.
    """
    run = RunFolder(run)
    _check_repo_ids(repo_id, None)
    paths = {"images": run.images_path} | {str(name): run.features_path(name) for name in run.sae_names()}
    names = {name: path.relative_to(run.path).as_posix() for name, path in paths.items() if path.is_file()}
    if not names:
        raise FluxSaeError(f"{run.path} has no tables yet. Score images first: {maker('score')}.")
    files: dict[str, Path | bytes] = {name: run.path / name for name in names.values()}
    files[run.card_path.name] = build_tables_card(run, names, model_repo).encode()
    transfer.create_repo(repo_id, repo_type="dataset", private=private)
    made = transfer.upload(repo_id, files, message=f"Publish the tables of {model_repo}", repo_type="dataset")
    return Published(repo_id, made.oid, made.commit_url, len(files))


def _check_repo_ids(repo_id: str, tables_repo: str | None) -> None:
    for name in (repo_id, tables_repo):
        if name is not None:
            transfer.check_repo_id(name)
    if repo_id == tables_repo:
        raise FluxSaeError(f"The tables cannot go to {repo_id} itself. Name a dataset repository, as {repo_id}-tables.")


def _parent(onto: str | None, origin: _Origin | None, repo_id: str, head: str) -> str:
    """The commit that a push builds on."""
    if onto is not None:
        return head if onto == "head" else onto
    return origin.commit if origin and origin.repo_id == repo_id else head


def _gone(repo_id: str, remote: transfer.Listing, files: Mapping[str, Path | bytes], run: RunFolder) -> set[str]:
    """Files of an earlier push that the run no longer has; what others put into the repository stays."""
    sums = run.checksums_path.name
    if sums not in remote.files:
        return set()
    folder = transfer.download(repo_id, revision=remote.commit, patterns=[sums]).folder
    return set(read_checksums(folder / sums)).intersection(remote.files).difference(files)


# Pull


def pull_run(
    repo_id: str,
    *,
    revision: str | None = None,
    into: str | Path | None = None,
    hookpoints: Sequence[HookPoint | str] | None = None,
    part: Part = "all",
    overwrite: bool = False,
) -> RunFolder:
    """The run in a Hub repository, at one commit, every file checked against its published hash.

    Without `into` it lies in the Hub cache (read-only). With `into` it becomes a folder of its own, which appears whole
    or not at all. `hookpoints` leaves the others out; `part="browse"` leaves out what only scoring and steering need
    (SAE weights and S). A revision once pulled needs no connection (`HF_HUB_OFFLINE=1`).

    Raises:
        FluxSaeError: no such repository, revision or hook point, no access, no connection, a full disk, wrong content,
            or `into` exists.
    """
    repo_id, named = transfer.split_repo(repo_id)
    if into is not None:
        _check_target(Path(into), overwrite=overwrite)
    elif hookpoints is not None:
        raise FluxSaeError("A pull of some hook points needs a folder of its own. Say where with into=... (--into).")
    names = RunFolder("")
    patterns = [path.name for path in (names.index_path, names.info_path, names.checksums_path)]
    index = transfer.download(repo_id, revision=revision or named, patterns=patterns)
    source = RunFolder(index.folder)
    if not source.exists():
        raise FluxSaeError(
            f"{repo_id} holds no run (there is no {source.info_path.name}). A single SAE is loaded by "
            f'`SparseAutoencoder.from_pretrained("{repo_id}")`.'
        )
    chosen = _chosen(source, hookpoints)
    wanted = _wanted_files(source, chosen, part)
    # The commit, not the branch: what was asked for cannot change between the two downloads.
    snapshot = transfer.download(repo_id, revision=index.commit, patterns=wanted)
    _check_sums(RunFolder(snapshot.folder), wanted)
    if into is None:
        return RunFolder(snapshot.folder)
    origin = _Origin(repo_id, index.commit, tuple(map(str, chosen or ())), part)
    return _materialise(snapshot, Path(into), origin)


def _chosen(index: RunFolder, names: Sequence[HookPoint | str] | None) -> list[SaeName] | None:
    """The SAEs of a pull; None for all of them."""
    if names is None:
        return None
    wanted, present = [SaeName.parse(name) for name in names], index.indexed_saes()
    unknown = [str(name) for name in wanted if name not in present]
    if unknown:
        raise FluxSaeError(f"This run has no SAE {', '.join(unknown)}; it has {', '.join(map(str, present))}.")
    return wanted


def _wanted_files(run: RunFolder, chosen: Sequence[SaeName] | None, part: Part) -> list[str]:
    """The files of a pull, from the checksums; without checksums everything (`*`) is."""
    if not run.checksums_path.is_file():
        if chosen is not None or part != "all":
            raise FluxSaeError(
                f"This repository has no {run.checksums_path.name}, so it can only be pulled whole. Its owner adds one "
                "by pushing the run with fluxsae."
            )
        return ["*"]
    names = [*read_checksums(run.checksums_path), run.checksums_path.name]
    left_out = [name for name in run.indexed_saes() if chosen is not None and name not in chosen]
    if part == "browse":
        names = [name for name in names if not _is_heavy(run, name)]
    return [name for name in names if not any(_belongs_to(run, name, hookpoint) for hookpoint in left_out)]


def _is_heavy(run: RunFolder, name: str) -> bool:
    """Whether a file is one that browsing never reads: SAE weights and S."""
    path = run.path / name
    return any(
        path == run.scores_path(sae) or (path.parent == run.sae_path(sae) and path.suffix == ".safetensors")
        for sae in run.indexed_saes()
    )


def _belongs_to(run: RunFolder, name: str, hookpoint: SaeName) -> bool:
    """Whether a file is about this SAE alone."""
    path = run.path / name
    return str(hookpoint) in Path(name).parts[:-1] or path == run.directions_path(hookpoint)


def _check_sums(run: RunFolder, wanted: Sequence[str]) -> None:
    """Compares the files with the run's own checksums, which go with it wherever it is copied."""
    sums = read_checksums(run.checksums_path) if run.checksums_path.is_file() else {}
    wrong = wrong_files(run, {name: sums[name] for name in wanted if name in sums})
    if wrong:
        raise FluxSaeError(
            f"The repository is not whole: {', '.join(wrong[:5])} do not have the hashes in {run.checksums_path.name}. "
            "Somebody changed it outside fluxsae; choose another revision or tell its owner."
        )


def _check_target(into: Path, *, overwrite: bool) -> None:
    if into.is_symlink() or into.is_file():
        raise FluxSaeError(f"{into} is not a folder. Name a folder that does not exist yet.")
    if not into.is_dir() or not any(into.iterdir()):
        return
    if not overwrite:
        raise FluxSaeError(f"{into} is not empty. Name another folder, or replace it: overwrite=True, --overwrite.")
    if not RunFolder(into).exists():
        raise FluxSaeError(f"{into} holds something that is not a run, so it is not replaced. Name another folder.")


def _materialise(snapshot: transfer.Snapshot, into: Path, origin: _Origin) -> RunFolder:
    """Copies the snapshot's files into a folder that takes its name when it is complete."""
    files = [name for name in snapshot.files if not name.startswith(".") and is_inside(name)]
    into.parent.mkdir(parents=True, exist_ok=True)
    size = sum((snapshot.folder / name).stat().st_size for name in files)
    check_free_space(into.parent, size, purpose=f"Pulling {snapshot.repo_id}")
    with tempfile.TemporaryDirectory(prefix=f".{into.name}.", suffix=".pull", dir=into.parent) as scratch:
        run = RunFolder(Path(scratch, "new"))
        for name in files:
            target = run.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot.folder / name, target)
        if origin.is_partial:
            _narrow(run, origin)
        _save_origin(run, origin)
        if into.is_dir():
            into.replace(Path(scratch, "old"))
        run.path.replace(into)
    return RunFolder(into)


def _narrow(run: RunFolder, origin: _Origin) -> None:
    """Makes a part of a run say what it holds."""
    info = run.load_info()
    if origin.hookpoints:
        places = {str(SaeName.parse(name).place) for name in origin.hookpoints}
        info = replace(info, hookpoints=tuple(name for name in info.hookpoints if name in places))
    run.save_info(info)
    write_checksums(run)


def _load_origin(run: RunFolder) -> _Origin | None:
    if not run.origin_path.is_file():
        return None
    values = read_json(run.origin_path)
    try:
        return _Origin(**{**values, "hookpoints": tuple(values["hookpoints"])})
    except (KeyError, TypeError) as error:
        raise FluxSaeError(
            f"{run.origin_path} is damaged. Delete it: the next push then builds on the newest commit."
        ) from error


def _save_origin(run: RunFolder, origin: _Origin) -> None:
    write_json(run.origin_path, asdict(origin))


def _describe(origin: _Origin) -> str:
    return ", ".join([*origin.hookpoints, *([f"part={origin.part}"] if origin.part != "all" else [])])
