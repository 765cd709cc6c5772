"""Calls that `hub_driver` makes: what cannot be said in JSON."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import huggingface_hub as hf
import torch

from fluxsae.hub import transfer
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from train import deploy_space, stages, verify


def upload_paths(repo_id: str, paths: dict[str, str], **options: Any) -> hf.CommitInfo:
    """`transfer.upload` of files on this disk."""
    return transfer.upload(repo_id, {name: Path(path) for name, path in paths.items()}, **options)


def download_on_a_small_disk(repo_id: str, *, free: int) -> transfer.Snapshot:
    """`transfer.download` where only `free` bytes are left."""
    with mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=free)):
        return transfer.download(repo_id)


def add_file(repo_id: str, name: str, text: str, repo_type: transfer.RepoType = "model") -> hf.CommitInfo:
    """One file more in a repository, as someone does by hand."""
    head = transfer.list_files(repo_id, repo_type=repo_type).commit
    return transfer.upload(repo_id, {name: text.encode()}, parent=head, message="by hand", repo_type=repo_type)


def reconstruction_norm(repo_id: str, **options: Any) -> float:
    """The norm of what an SAE on the Hub makes of four ones."""
    sae = SparseAutoencoder.from_pretrained(repo_id, **options)
    return float(sae(torch.ones(4, sae.config.d_model)).x_hat.norm())


def problems_of(run: str) -> list[str]:
    """What `train.verify` finds wrong."""
    return [str(problem) for problem in verify.main(verify.VerifyConfig(run=run)).problems]


def push_to_hub(folder: str, repo_id: str, **options: Any) -> str:
    """`SparseAutoencoder.push_to_hub` of the SAE in a folder."""
    return SparseAutoencoder.from_pretrained(folder).push_to_hub(repo_id, **options)


def deploy(*, source: str, **config: Any) -> hf.CommitInfo:
    """`train.deploy_space` of a checkout."""
    return deploy_space.main(deploy_space.DeployConfig(source=Path(source), **config))


def push_complete(run: str, repo_id: str) -> None:
    """What `--push-to` does when a stage is complete."""
    stages.push_complete(RunFolder(run), repo_id)
