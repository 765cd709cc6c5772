"""Transfer to and from the Hub, over HTTP, with the unmodified client against a local server."""

import os
from pathlib import Path
from typing import Any

import pytest
from hub_driver import CallError, HubProcess
from hub_server import Fault
from hypothesis import given
from hypothesis import strategies as st
from local_hub import LocalHub

from fluxsae.errors import FluxSaeError
from fluxsae.hub import transfer
from fluxsae.hub.faults import redact

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_faults(server: LocalHub) -> None:
    server.faults()
    server.log()


def make_repo(machine: HubProcess, repo_id: str, folder: Path, files: dict[str, bytes], **options: Any) -> Any:
    """A repository with these files in one commit."""
    paths = {}
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        paths[name] = path
    machine.call("fluxsae.hub.transfer:create_repo", repo_id)
    head = machine.call("fluxsae.hub.transfer:list_files", repo_id)["commit"]
    return machine.call("upload_files:upload_paths", repo_id, paths, parent=head, message="files", **options)


@pytest.fixture(scope="module")
def faulty_repo(server: LocalHub, machine: HubProcess, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a.bin of user/faulty holds."""
    server.faults()  # this runs before no_faults does
    content = b"content" * 99
    make_repo(machine, "user/faulty", tmp_path_factory.mktemp("faulty"), {"a.bin": content})
    return content


def snapshot_path(snapshot: Any, name: str) -> Path:
    return Path(snapshot["folder"]) / name


def test_files_come_back_identical_by_tag_by_commit_and_by_branch(
    server: LocalHub, machine: HubProcess, tmp_path: Path
) -> None:
    files = {"config.json": b"{}", "sae/model.safetensors": os.urandom(50_000), "empty.txt": b""}
    made = make_repo(machine, "user/plain", tmp_path, files, tag="v1")
    for revision in ("v1", made["oid"], None):
        got = machine.call("fluxsae.hub.transfer:download", "user/plain", revision=revision, cache=f"plain-{revision}")
        assert got["commit"] == made["oid"]
        assert {name: snapshot_path(got, name).read_bytes() for name in files} == files
    assert [commit["title"] for commit in server.repo("user/plain")["commits"]] == ["initial commit", "files"]


def test_only_files_that_match_the_patterns_are_fetched(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    make_repo(machine, "user/part", tmp_path, {"a/x.bin": b"1" * 99, "b/x.bin": b"2" * 99, "config.json": b"{}"})
    server.log()
    got = machine.call("fluxsae.hub.transfer:download", "user/part", patterns=["a/*", "config.json"], cache="part")
    assert got["files"] == ["a/x.bin", "config.json"]
    fetched = [entry["path"] for entry in server.log() if "/resolve/" in entry["path"]]
    assert fetched
    assert not [path for path in fetched if path.endswith("b/x.bin")]
    with pytest.raises(CallError, match="has no file that matches nothing"):
        machine.call("fluxsae.hub.transfer:download", "user/part", patterns=["nothing"], cache="part")


def test_a_download_cut_in_the_middle_goes_on_where_it_stopped(
    server: LocalHub, machine: HubProcess, tmp_path: Path
) -> None:
    content = os.urandom(25 * MEGABYTE)
    make_repo(machine, "user/large", tmp_path, {"large.bin": content})
    server.log()
    server.faults(Fault("/_cdn/", method="GET", cut_after=15 * MEGABYTE))
    got = machine.call("fluxsae.hub.transfer:download", "user/large", cache="large")
    assert snapshot_path(got, "large.bin").read_bytes() == content
    ranges = [entry["range"] for entry in server.log() if entry["path"].startswith("/_cdn/")]
    assert ranges == [None, f"bytes={10 * MEGABYTE}-"]


def test_a_revision_once_downloaded_needs_no_connection(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    make_repo(machine, "user/kept", tmp_path, {"a.bin": b"kept", "b.bin": b"other"}, tag="v1")
    wanted = {"revision": "v1", "patterns": ["a.bin"], "cache": "kept"}
    machine.call("fluxsae.hub.transfer:download", "user/kept", **wanted)
    server.log()
    got = machine.call("fluxsae.hub.transfer:download", "user/kept", **wanted, offline=True)
    assert snapshot_path(got, "a.bin").read_bytes() == b"kept"
    for other in ({"patterns": ["*"]}, {"revision": "main"}):
        with pytest.raises(CallError, match=r"HF_HUB_OFFLINE is set.* does not hold all of it") as error:
            machine.call("fluxsae.hub.transfer:download", "user/kept", **(wanted | other), offline=True)
        assert error.value.kind == "FluxSaeError"
    snapshot_path(got, "a.bin").resolve().write_bytes(b"bent")
    with pytest.raises(CallError, match="was damaged on this disk"):
        machine.call("fluxsae.hub.transfer:download", "user/kept", **wanted, offline=True)
    assert not server.log()


def test_a_file_damaged_on_disk_is_fetched_again(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    make_repo(machine, "user/bent", tmp_path, {"a.bin": b"a" * 99, "b.txt": b"b" * 99})
    got = machine.call("fluxsae.hub.transfer:download", "user/bent", cache="bent")
    for name in ("a.bin", "b.txt"):
        snapshot_path(got, name).resolve().write_bytes(b"c" * 99)
    again = machine.call("fluxsae.hub.transfer:download", "user/bent", cache="bent")
    assert snapshot_path(again, "a.bin").read_bytes() == b"a" * 99
    assert snapshot_path(again, "b.txt").read_bytes() == b"b" * 99


def test_a_cached_commit_is_used_when_the_hub_is_down(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    made = make_repo(machine, "user/down", tmp_path, {"a.bin": b"kept"})
    machine.call("fluxsae.hub.transfer:download", "user/down", cache="down")
    server.faults(Fault(".*", times=1000, status=503))
    got = machine.call("fluxsae.hub.transfer:download", "user/down", cache="down")
    assert got["commit"] == made["oid"]
    assert snapshot_path(got, "a.bin").read_bytes() == b"kept"


FAULTS = [
    (Fault("/api/models/user/faulty", status=429, headers={"Retry-After": "7"}), True, ""),
    (Fault("/api/models/user/faulty", status=500), True, ""),
    (Fault("/api/models/user/faulty", status=503, times=2), True, ""),
    (Fault("/resolve/", status=500, times=2), True, ""),
    (Fault("/_cdn/", status=502), True, ""),
    (Fault("/_cdn/", method="GET", corrupt=True), True, ""),
    (Fault("/_cdn/", method="GET", cut_after=3), True, ""),
    (Fault("/api/models/user/faulty", status=429, times=99), False, r"\(429\): the Hub limits the rate"),
    (Fault("/resolve/", status=500, times=99), False, r"\(500\): the Hub has an error of its own"),
    (Fault("/api/models/user/faulty", status=403, times=99), False, r"\(403\): the token in use may not"),
    (Fault("/api/models/user/faulty", status=401, times=99), False, r"\(401\): it does not exist, is private, or"),
    (Fault("/_cdn/", method="GET", corrupt=True, times=99), False, "arrived twice with the wrong content"),
    (Fault("/_cdn/", method="GET", cut_after=3, times=99), False, "cannot be reached"),
]


@pytest.mark.parametrize(
    "number", range(len(FAULTS)), ids=[f"{f.path}-{f.status or 'bytes'}-{f.times}" for f, *_ in FAULTS]
)
def test_a_fault_is_healed_or_explained_and_never_leaves_half_a_file(
    server: LocalHub, machine: HubProcess, faulty_repo: bytes, number: int
) -> None:
    fault, is_healed, message = FAULTS[number]
    server.faults(fault)
    cache = f"fault-{number}"
    if is_healed:
        got = machine.call("fluxsae.hub.transfer:download", "user/faulty", cache=cache)
        assert snapshot_path(got, "a.bin").read_bytes() == faulty_repo
        if fault.headers:
            assert 7 in machine.sleeps, "the wait that the Hub asked for"
    else:
        with pytest.raises(CallError, match=message) as error:
            machine.call("fluxsae.hub.transfer:download", "user/faulty", cache=cache)
        assert error.value.kind == "FluxSaeError"
        assert not [path for path in (machine.home / cache).rglob("a.bin") if path.exists()]
        server.faults()
        got = machine.call("fluxsae.hub.transfer:download", "user/faulty", cache=cache)
        assert snapshot_path(got, "a.bin").read_bytes() == faulty_repo, "the next try finds nothing broken"


def test_what_is_missing_is_named(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    make_repo(machine, "user/named", tmp_path, {"a.bin": b"a"})
    with pytest.raises(CallError, match=r"user/named has no revision 'v9'"):
        machine.call("fluxsae.hub.transfer:download", "user/named", revision="v9")
    with pytest.raises(CallError, match=r"Could not download user/nowhere \(404\): there is no such repository"):
        machine.call("fluxsae.hub.transfer:download", "user/nowhere")
    with pytest.raises(CallError, match=r"Could not create other/name \(403\).*role write"):
        machine.call("fluxsae.hub.transfer:create_repo", "other/name")
    server.repo("user/named", gated=True)
    with pytest.raises(CallError, match=r"user/named is gated. Open .*/user/named, accept its terms"):
        machine.call("fluxsae.hub.transfer:download", "user/named", cache="stranger", token=None)
    with pytest.raises(CallError, match=r"\(401\): it does not exist, is private, or the token is missing"):
        machine.call("fluxsae.hub.transfer:create_repo", "user/mine", token=None)
    with pytest.raises(CallError, match=r"\(401\).*HF_TOKEN") as error:
        machine.call("fluxsae.hub.transfer:download", "user/named", cache="expired", token="hf_ExpiredExpiredExpired")
    assert "Expired" not in error.value.message


def test_a_disk_too_small_is_refused_before_the_first_byte_and_a_full_one_leaves_nothing(
    server: LocalHub, machine: HubProcess, tmp_path: Path
) -> None:
    make_repo(machine, "user/big", tmp_path, {"big.bin": os.urandom(3 * MEGABYTE)})
    server.log()
    with pytest.raises(CallError, match=r"Downloading user/big needs 0.00 GB .* but only 0.00 GB are free"):
        machine.call("upload_files:download_on_a_small_disk", "user/big", free=1000, cache="small")
    assert not [entry for entry in server.log() if "/resolve/" in entry["path"] and entry["method"] == "GET"]
    with pytest.raises(CallError, match="The disk is full: could not download user/big"):
        machine.call("fluxsae.hub.transfer:download", "user/big", cache="full", limit=MEGABYTE)
    assert not [path for path in (machine.home / "full").rglob("*.bin") if path.exists()]
    got = machine.call("fluxsae.hub.transfer:download", "user/big", cache="full")
    assert snapshot_path(got, "big.bin").stat().st_size == 3 * MEGABYTE


def test_a_commit_on_a_stale_parent_changes_nothing(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    made = make_repo(machine, "user/raced", tmp_path, {"a.bin": b"first"})
    (tmp_path / "a.bin").write_bytes(b"second")
    paths = {"a.bin": tmp_path / "a.bin"}
    machine.call("upload_files:upload_paths", "user/raced", paths, parent=made["oid"], message="second")
    before = server.repo("user/raced")["refs"]
    (tmp_path / "a.bin").write_bytes(b"third")
    with pytest.raises(CallError, match=r"\(412\): somebody has pushed since .* Nothing was changed"):
        machine.call("upload_files:upload_paths", "user/raced", paths, parent=made["oid"], message="third", tag="v3")
    assert server.repo("user/raced")["refs"] == before


def test_a_tag_stays_where_it_is(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    made = make_repo(machine, "user/tagged", tmp_path, {"a.bin": b"first"}, tag="v1")
    paths = {"a.bin": tmp_path / "a.bin"}
    for tag, message in (("v1", "already has a tag v1"), ("a b", "'a b' is no tag")):
        with pytest.raises(CallError, match=message):
            machine.call("upload_files:upload_paths", "user/tagged", paths, parent=made["oid"], message="m", tag=tag)
    assert server.repo("user/tagged")["refs"] == {"main": made["oid"], "v1": made["oid"]}


def test_an_upload_survives_a_busy_hub(server: LocalHub, machine: HubProcess, tmp_path: Path) -> None:
    server.faults(
        Fault("/preupload/", status=503),
        Fault("/objects/batch", status=429, headers={"Retry-After": "1"}),
        Fault("/_cdn/", method="PUT", status=500),
        Fault("/commit/", method="POST", status=503),
        Fault("/tag/", method="POST", status=500),
    )
    made = make_repo(machine, "user/busy", tmp_path, {"a.bin": b"first", "b.txt": b"second"}, tag="v1")
    repo = server.repo("user/busy")
    assert len(repo["commits"]) == 2
    assert repo["refs"]["v1"] == made["oid"]


def test_tokens_appear_in_no_output_and_are_sent_to_the_hub_only(
    server: LocalHub, machine: HubProcess, tmp_path: Path
) -> None:
    make_repo(machine, "user/secret", tmp_path, {"a.bin": b"first" * 999})
    machine.call("fluxsae.hub.transfer:download", "user/secret", cache="secret")
    log = server.log()
    storage = [entry for entry in log if entry["path"].startswith("/_cdn/")]
    assert storage
    assert not any(entry["has_token"] for entry in storage)
    assert all(entry["has_token"] for entry in log if entry["path"].startswith("/api/"))
    server.faults(Fault("/api/", status=400, times=9))
    with pytest.raises(CallError):
        machine.call("fluxsae.hub.transfer:list_files", "user/secret")
    output = machine.output()
    assert "Traceback" in output
    assert "user/secret" in output
    assert server.token not in output
    assert server.token[3:] not in output


def test_redact_takes_tokens_out_and_leaves_the_rest() -> None:
    assert redact("Bearer hf_abcdefgh12345678 for user/hf_data") == "Bearer hf_*** for user/hf_data"


@given(
    st.from_regex(r"[a-z0-9]{1,9}/[a-zA-Z0-9_.]{1,9}", fullmatch=True), st.sampled_from(["", "main", "v1.0", "a" * 40])
)
def test_a_repository_and_its_revision_are_told_apart(repo_id: str, revision: str) -> None:
    if transfer.is_repo_id(repo_id):
        assert transfer.split_repo(f"{repo_id}@{revision}" if revision else repo_id) == (repo_id, revision or None)


@pytest.mark.parametrize(
    "text", ["", "name", "a/b/c", "../x", "a/..", "user/name@", "/etc/passwd", "http://x/y", "a b/c"]
)
def test_what_is_no_repository_is_refused(text: str) -> None:
    with pytest.raises(FluxSaeError, match=r"names no Hub repository. Write user/name"):
        transfer.split_repo(text)


def test_hashes_are_those_of_git_and_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello\n")
    assert transfer.git_sha1(path) == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
    assert transfer.sha256(path) == "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
