"""Calls that `hub_driver` makes: what cannot be said in JSON."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from fluxsae import hub


def upload_paths(repo_id: str, paths: dict[str, str], **options: Any) -> hub.Commit:
    """`hub.upload` of files on this disk."""
    return hub.upload(repo_id, {name: Path(path) for name, path in paths.items()}, **options)


def upload_while_it_changes(repo_id: str, path: str, *, parent: str) -> hub.Commit:
    """`hub.upload` of a file that another process writes to after it was sent."""
    listed = hub.list_files

    def write_then_list(*args: Any, **kwargs: Any) -> hub.Listing:
        Path(path).write_bytes(b"changed in between")
        return listed(*args, **kwargs)

    with mock.patch.object(hub, "list_files", write_then_list):
        return hub.upload(repo_id, {"a.bin": Path(path)}, parent=parent, message="moving")


def download_on_a_small_disk(repo_id: str, *, free: int) -> hub.Snapshot:
    """`hub.download` where only `free` bytes are left."""
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=free)):
        return hub.download(repo_id)
