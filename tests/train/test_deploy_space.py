"""`train.deploy_space` against the local Hub: what it puts there is the app, and it starts."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import whole_run
import yaml
from hub_driver import ROOT, CallError, HubProcess
from local_hub import LocalHub

from fluxsae.errors import FluxSaeError
from fluxsae.runs.folder import RunFolder
from train import deploy_space
from train.deploy_space import DeployConfig

README = """\
---
title: fluxsae
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
python_version: "3.12.12"
---
# fluxsae
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return whole_run.build(tmp_path_factory.mktemp("deployed") / "run")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkout."""
    folder = tmp_path / "checkout"
    for name, text in {
        "app.py": "print('app')\n",
        "README.md": README,
        "requirements.txt": "gradio[mcp]==6.31.0\n",
        "fluxsae/__init__.py": "",
        "fluxsae/ui/kit/app.css": "body {}\n",
        "fluxsae/__pycache__/x.pyc": "no",
        "tests/test_x.py": "no",
        "runs/mine/run.json": "no",
        ".git/config": "no",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def deploy(machine: HubProcess, **config: object) -> None:
    machine.call("upload_files:deploy", **{name: str(value) for name, value in config.items()})


def files_of(server: LocalHub, repo: str) -> set[str]:
    return set(server.repo(repo, kind="spaces")["commits"][-1]["files"]) - {".gitattributes"}


def test_a_space_holds_the_app_its_requirements_and_the_run_and_nothing_else(
    server: LocalHub, machine: HubProcess, source: Path, run: RunFolder
) -> None:
    deploy(machine, repo="user/space", source=source, run=run.path)
    own = {"app.py", "README.md", "requirements.txt", "fluxsae/__init__.py", "fluxsae/ui/kit/app.css"}
    assert files_of(server, "user/space") == own | {f"run/{name}" for name in run.published_files()}
    space = server.repo("user/space", kind="spaces")
    assert space["sdk"] == "gradio"
    assert space["variables"] == {"FLUXSAE_RUN": "run"}
    assert len(space["commits"]) == 2, "one commit on top of the first"


def test_a_second_deployment_replaces_the_first_and_leaves_what_others_added(
    server: LocalHub, machine: HubProcess, source: Path, run: RunFolder
) -> None:
    deploy(machine, repo="user/twice", source=source, run=run.path)
    machine.call("upload_files:add_file", "user/twice", "notes/todo.md", "mine", repo_type="space")
    (source / "fluxsae" / "ui" / "kit" / "app.css").unlink()
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/pinned", tag="v1")
    deploy(machine, repo="user/twice", source=source, run="user/pinned@v1")
    assert files_of(server, "user/twice") == {
        "app.py", "README.md", "requirements.txt", "fluxsae/__init__.py", "notes/todo.md",
    }  # fmt: skip
    assert server.repo("user/twice", kind="spaces")["variables"] == {"FLUXSAE_RUN": "user/pinned@v1"}


def test_what_a_visitor_would_see_broken_is_refused_before_anything_is_sent(
    server: LocalHub, machine: HubProcess, source: Path, tmp_path: Path
) -> None:
    whole = whole_run.build(tmp_path / "broken", n_images=8)
    whole.sheet_path(whole_run.LATE, "features").write_bytes(b"none")
    server.log()
    for config, message in (
        ({"repo": "user/bad", "run": whole.path}, r"The run has 1 problems, the first: sheets/.*features.png"),
        ({"repo": "user/bad", "run": "user/unpinned"}, r"names no revision, .* Write user/unpinned@v1"),
        ({"repo": "user/bad", "run": "user/none@v1"}, r"Could not read user/none \(404\)"),
        ({"repo": "bad"}, r"'bad' names no Space. Write user/name"),
    ):
        with pytest.raises(CallError, match=message):
            deploy(machine, source=source, **config)
    (source / "README.md").write_text("# no front matter\n")
    with pytest.raises(CallError, match=r"lacks title, sdk, sdk_version, app_file, python_version in its front matter"):
        deploy(machine, repo="user/bad", source=source)
    assert not [entry for entry in server.log() if entry["method"] == "POST"]
    with pytest.raises(FluxSaeError, match="is no checkout of fluxsae"):
        deploy_space.main(DeployConfig(repo="user/bad", source=tmp_path))


def test_what_was_deployed_serves_the_page(machine: HubProcess, tmp_path: Path) -> None:
    """Everything that the app needs is in the Space: it starts in a folder that holds nothing else."""
    deploy(machine, repo="user/served", source=ROOT)
    space = machine.call("fluxsae.hub.transfer:download", "user/served", repo_type="space", cache="space")
    shutil.copytree(space["folder"], tmp_path / "space")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "FLUXSAE_", "PYTHON"))}
    environment = kept | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path / "space", env=environment)
    try:
        page = ""
        while not page:
            assert process.poll() is None, "the app ended"
            with contextlib.suppress(OSError), urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
                page = response.read().decode()
            time.sleep(0.2)
        assert page.startswith("<!doctype html>")
        with urlopen(f"http://127.0.0.1:{port}/gradio_api/info", timeout=60) as response:
            assert {"/heatmap", "/feature", "/steer"} <= set(json.load(response)["named_endpoints"])
    finally:
        process.terminate()
        process.wait(timeout=100)


def test_this_checkout_is_ready_for_a_space() -> None:
    readme = (ROOT / "README.md").read_text()
    front = yaml.safe_load(readme.split("---\n")[1])
    pins = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line)
    assert front["sdk"] == "gradio"
    assert front["sdk_version"] == pins["gradio[mcp]"], "the Space's own gradio is the pinned one"
    assert front["app_file"] == "app.py"
    assert front["python_version"] == "3.12.12"
    assert pins["torch"] in ("2.8.0", "2.9.1", "2.10.0", "2.11.0"), "what ZeroGPU offers"
    sizes = {path: file.stat().st_size for path, file in deploy_space.app_files(ROOT)}
    assert {"app.py", "requirements.txt", "fluxsae/ui/build.py", "fluxsae/miniature/run/run.json"} <= set(sizes)
    assert max(sizes.values()) < 10_000_000, "Space repositories refuse larger files without LFS"
