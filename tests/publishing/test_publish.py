"""A run to the Hub and back, over HTTP, between separate processes, with the unmodified client."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import whole_run
import yaml
from hub_driver import ROOT, CallError, HubProcess
from hub_server import Fault
from local_hub import LocalHub

from fluxsae.errors import FluxSaeError
from fluxsae.publishing.checksums import read_checksums
from fluxsae.publishing.model_card import build_card, build_sae_card, build_tables_card, licence_of
from fluxsae.publishing.publish import pull_run, push_run
from fluxsae.publishing.verify import verify_run
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder

EARLY, LATE = whole_run.EARLY, whole_run.LATE


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return whole_run.build(tmp_path_factory.mktemp("original") / "run")


@pytest.fixture
def run(original: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of the run that a test may change."""
    shutil.copytree(original.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture(autouse=True)
def no_faults(server: LocalHub) -> None:
    server.faults()
    server.log()


def contents(run: RunFolder) -> dict[str, bytes]:
    return {name: (run.path / name).read_bytes() for name in run.published_files()}


def script(server: LocalHub, home: Path, *arguments: str, offline: bool = False) -> str:
    """What `python -m ...` prints in a process of its own, on a machine of its own."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=server.environment(home, offline=offline),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert server.token not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_goes_to_the_hub_and_comes_back_in_another_process_and_works_offline(
    server: LocalHub, run: RunFolder, tmp_path: Path
) -> None:
    pushed = script(
        server, tmp_path / "a", "train.push", "--run", str(run.path), "--repo", "user/trip", "--tag", "v1",
        "--tables", "user/trip-tables",
    )  # fmt: skip
    assert "user/trip@v1" in pushed
    repo = server.repo("user/trip")
    assert [commit["title"] for commit in repo["commits"]][1:] == [f"Publish the run at {EARLY}, {LATE}"]
    assert repo["refs"]["v1"] == repo["commits"][-1]["id"]

    theirs = RunFolder(tmp_path / "theirs")
    script(server, tmp_path / "b", "train.pull", "--repo", "user/trip@v1", "--into", str(theirs.path))
    assert contents(theirs) == contents(run)
    x = torch.randn(64, whole_run.D_MODEL)
    for hookpoint in (EARLY, LATE):
        mine, other = (SparseAutoencoder.from_pretrained(folder.sae_path(hookpoint)) for folder in (run, theirs))
        assert torch.equal(mine(x).x_hat, other(x).x_hat)

    server.faults(Fault(".*", times=10**6, status=503))
    server.log()
    offline = tmp_path / "offline"
    script(server, tmp_path / "b", "train.pull", "--repo", "user/trip@v1", "--into", str(offline), offline=True)
    assert contents(RunFolder(offline)) == contents(run)
    assert server.log() == [], "HF_HUB_OFFLINE means that nobody is asked"


def test_without_a_connection_what_was_not_pulled_is_refused_and_makes_no_folder(
    machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/away", tag="v1")
    with pytest.raises(CallError, match="HF_HUB_OFFLINE is set"):
        machine.call(
            "fluxsae.publishing.publish:pull_run", "user/away@v1", into=tmp_path / "into", cache="away", offline=True
        )
    assert not (tmp_path / "into").exists()
    machine.call("fluxsae.publishing.publish:pull_run", "user/away@v1", cache="away", part="browse")
    with pytest.raises(CallError, match="does not hold all of it"):
        machine.call(
            "fluxsae.publishing.publish:pull_run", "user/away@v1", into=tmp_path / "into", cache="away", offline=True
        )
    assert not (tmp_path / "into").exists()


def test_verify_takes_a_repository(machine: HubProcess, run: RunFolder) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/verified", tag="v1")
    assert machine.call("upload_files:problems_of", "user/verified@v1") == []


def test_an_sae_loads_from_the_repository_of_its_run_and_from_its_own(machine: HubProcess, run: RunFolder) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/saes", tag="v1")
    machine.call("fluxsae.publishing.publish:push_sae", run.path, LATE, "user/alone", tag="v2")
    machine.call("upload_files:push_to_hub", run.sae_path(LATE), "user/method", subfolder="any", tag="v3")
    for repo, options in (
        ("user/saes", {"subfolder": f"sae/{LATE}", "revision": "v1"}),
        ("user/alone", {"revision": "v2"}),
        ("user/method", {"subfolder": "any", "revision": "v3"}),
    ):
        norm = machine.call("upload_files:reconstruction_norm", repo, cache=repo.replace("/", "-"), **options)
        own = (
            SparseAutoencoder.from_pretrained(run.sae_path(LATE))(torch.ones(4, whole_run.D_MODEL))
            .x_hat.detach()
            .norm()
        )
        assert norm == float(own)


def test_a_second_push_sends_only_what_changed_and_takes_away_what_is_gone(
    server: LocalHub, machine: HubProcess, run: RunFolder
) -> None:
    first = machine.call("fluxsae.publishing.publish:push_run", run.path, "user/again")
    same = machine.call("fluxsae.publishing.publish:push_run", run.path, "user/again")
    assert same["commit"] == first["commit"], "nothing changed, so there is no new commit"
    machine.call("upload_files:add_file", "user/again", "by-someone-else.txt", "keep me")
    run.directions_path(LATE).unlink()
    run.save_metrics(LATE, {"fvu": 0.5})
    server.log()
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/again", onto="head")
    assert not [entry for entry in server.log() if entry["method"] == "PUT"], "no large file is sent again"
    files = server.repo("user/again")["commits"][-1]["files"]
    assert f"directions/{LATE}.safetensors" not in files
    assert "by-someone-else.txt" in files
    assert set(files) - {".gitattributes", "by-someone-else.txt"} == set(run.published_files())


def test_a_folder_that_others_have_overtaken_is_not_pushed_over_their_work(
    server: LocalHub, machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/shared")
    pulled = RunFolder(tmp_path / "pulled")
    machine.call("fluxsae.publishing.publish:pull_run", "user/shared", into=pulled.path)
    run.save_metrics(LATE, {"fvu": 0.25})
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/shared")
    head = server.repo("user/shared")["refs"]["main"]
    pulled.save_metrics(LATE, {"fvu": 0.75})
    with pytest.raises(CallError, match=r"\(412\): somebody has pushed since"):
        machine.call("fluxsae.publishing.publish:push_run", pulled.path, "user/shared")
    assert server.repo("user/shared")["refs"]["main"] == head
    machine.call("fluxsae.publishing.publish:push_run", pulled.path, "user/shared", onto="head")
    assert server.repo("user/shared")["refs"]["main"] != head


def test_a_pull_of_one_hook_point_or_of_what_browsing_needs_is_a_run_of_its_own(
    server: LocalHub, machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/parts")
    server.log()
    target = tmp_path / "e"
    early = RunFolder(
        machine.call(
            "fluxsae.publishing.publish:pull_run", "user/parts", into=target, hookpoints=["layer1"], cache="early"
        )
    )
    assert [str(hookpoint) for hookpoint in early.hookpoints()] == [EARLY]
    assert verify_run(early).problems == ()
    assert not [name for name in early.published_files() if LATE in name]
    assert not [entry for entry in server.log() if "/resolve/" in entry["path"] and LATE in entry["path"]]

    browse = RunFolder(
        machine.call("fluxsae.publishing.publish:pull_run", "user/parts", into=tmp_path / "b", part="browse")
    )
    assert verify_run(browse).problems == ()
    assert set(run.published_files()) - set(browse.published_files()) == {
        name
        for hookpoint in (EARLY, LATE)
        for name in (f"sae/{hookpoint}/model.safetensors", f"scores/{hookpoint}/scores.safetensors")
    }
    assert browse.load_features(LATE)[3] == run.load_features(LATE)[3]
    for part, options in ((early, f"{EARLY}"), (browse, "part=browse")):
        with pytest.raises(CallError, match=f"holds only a part of user/parts .*{re.escape(options)}"):
            machine.call("fluxsae.publishing.publish:push_run", part.path, "user/parts")
    with pytest.raises(CallError, match=r"This run has no SAE transformer_blocks.2.ff; it has"):
        machine.call("fluxsae.publishing.publish:pull_run", "user/parts", into=tmp_path / "x", hookpoints=["layer2"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/_cdn/", method="GET", status=500, times=99),
        Fault("/resolve/.*README", status=500, times=99),
        Fault("/_cdn/", method="GET", corrupt=True, times=99),
    ],
    ids=["storage fails", "hub fails", "wrong bytes"],
)
def test_a_pull_that_fails_leaves_no_folder_and_the_next_one_succeeds(
    server: LocalHub, machine: HubProcess, run: RunFolder, tmp_path: Path, fault: Fault
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/fragile")
    into, cache = tmp_path / "into", tmp_path.name
    server.faults(fault)
    with pytest.raises(CallError) as error:
        machine.call("fluxsae.publishing.publish:pull_run", "user/fragile", into=into, cache=cache)
    assert error.value.kind == "FluxSaeError"
    assert not into.exists()
    server.faults()
    machine.call("fluxsae.publishing.publish:pull_run", "user/fragile", into=into, cache=cache)
    assert contents(RunFolder(into)) == contents(run)


def test_a_full_disk_leaves_no_folder(machine: HubProcess, run: RunFolder, tmp_path: Path) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/full")
    machine.call("fluxsae.publishing.publish:pull_run", "user/full", cache="full")
    with pytest.raises(CallError):
        machine.call(
            "fluxsae.publishing.publish:pull_run", "user/full", into=tmp_path / "into", cache="full", limit=4000
        )
    assert not (tmp_path / "into").exists()
    assert not list(tmp_path.glob(".into*"))


def test_a_pull_killed_in_the_middle_leaves_no_folder(
    server: LocalHub, machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/killed")
    server.faults(Fault("/_cdn/", method="GET", stall=30, times=99))
    server.log()
    arguments = [sys.executable, "-m", "train.pull", "--repo", "user/killed", "--into", str(tmp_path / "into")]
    process = subprocess.Popen(arguments, env=server.environment(tmp_path / "home"), cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(entry["path"].startswith("/_cdn/") for entry in server.log()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "into").exists()
    server.faults()
    machine.call("fluxsae.publishing.publish:pull_run", "user/killed", into=tmp_path / "into", cache="killed")
    assert contents(RunFolder(tmp_path / "into")) == contents(run)


def test_a_folder_with_something_else_in_it_is_never_replaced(
    machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/over")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    for overwrite, message in ((False, "is not empty"), (True, "is not a run, so it is not replaced")):
        with pytest.raises(FluxSaeError, match=message):
            pull_run("user/over", into=taken, overwrite=overwrite)
    old = RunFolder(tmp_path / "old")
    shutil.copytree(run.path, old.path)
    old.save_metrics(LATE, {"fvu": 1})
    machine.call("fluxsae.publishing.publish:pull_run", "user/over", into=old.path, overwrite=True)
    assert contents(old) == contents(run)
    assert not list(tmp_path.glob(".old*"))


def test_a_repository_without_a_run_and_bad_names_are_refused_in_words(machine: HubProcess, run: RunFolder) -> None:
    machine.call("fluxsae.publishing.publish:push_sae", run.path, LATE, "user/lone")
    with pytest.raises(CallError, match=r"user/lone holds no run .*SparseAutoencoder.from_pretrained"):
        machine.call("fluxsae.publishing.publish:pull_run", "user/lone")
    with pytest.raises(FluxSaeError, match=r"is no repository id. Write user/name"):
        push_run(run, "no-owner")
    with pytest.raises(FluxSaeError, match="The tables cannot go to user/x itself"):
        push_run(run, "user/x", tables_repo="user/x")
    with pytest.raises(FluxSaeError, match="needs a folder of its own"):
        pull_run("user/x", hookpoints=[LATE])


@pytest.mark.parametrize("stage", ["fit", "score", "pipeline"])
def test_push_to_a_name_that_cannot_be_meant_is_refused_before_the_work(
    run: RunFolder, stage: str, tmp_path: Path
) -> None:
    module = importlib.import_module(f"train.{stage}")
    config = next(value for name, value in vars(module).items() if name.lower() == f"{stage}config")
    before = contents(run)
    with pytest.raises(FluxSaeError, match=r"'no-owner' is no repository id. Write user/name"):
        module.main(config(run=run.path, push_to="no-owner"))
    assert contents(run) == before


def test_push_to_publishes_a_complete_stage(server: LocalHub, machine: HubProcess, run: RunFolder) -> None:
    machine.call("upload_files:push_complete", run.path, "user/staged")
    assert "run.json" in server.repo("user/staged")["commits"][-1]["files"]


def test_a_repository_changed_by_hand_is_noticed(machine: HubProcess, run: RunFolder, tmp_path: Path) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/touched")
    machine.call("upload_files:add_file", "user/touched", f"sae/{LATE}/metrics.json", '{"fvu": 0}')
    with pytest.raises(CallError, match=r"The repository is not whole: sae/.*metrics.json"):
        machine.call("fluxsae.publishing.publish:pull_run", "user/touched", into=tmp_path / "into")
    assert not (tmp_path / "into").exists()


def test_the_tables_are_a_dataset_that_the_viewer_can_show(
    server: LocalHub, machine: HubProcess, run: RunFolder, tmp_path: Path
) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/with", tables_repo="user/with-tables")
    files = server.repo("user/with-tables", kind="datasets")["commits"][-1]["files"]
    got = machine.call("fluxsae.hub.transfer:download", "user/with-tables", repo_type="dataset", cache="tables")
    folder = Path(got["folder"])
    front = yaml.safe_load(folder.joinpath("README.md").read_text().split("---")[1])
    assert {config["config_name"] for config in front["configs"]} == {"images", EARLY, LATE}
    for config in front["configs"]:
        assert config["data_files"][0]["path"] in files
    images = pq.read_schema(folder / "images" / "images.parquet")
    features = json.loads(images.metadata[b"huggingface"])["info"]["features"]
    assert features["thumbnail"] == {"_type": "Image"}
    assert {field.name for field in images.field("thumbnail").type} == {"bytes", "path"}
    assert pq.read_metadata(folder / "features" / LATE / "features.parquet").num_rows == whole_run.N_FEATURES


# The card


def front_matter(card: str) -> dict[str, object]:
    loaded = yaml.safe_load(card.split("---")[1])
    assert isinstance(loaded, dict)
    return loaded


def test_the_card_marks_measures_that_do_not_tell_trained_from_untrained(run: RunFolder) -> None:
    audit = {
        "images": 40,
        "values": {
            "trained": [{"FVU": 0.125, "L0": 7.5}, {"FVU": 0.375, "L0": 7.5}],
            "untrained": [{"FVU": 0.75, "L0": 7.5}],
            "PCA": [{"FVU": 0.5, "L0": None}],
        },
        "unseparated": ["L0"],
    }
    cells = [{"height": 96, "width": 128, "fvu": fvu} for fvu in (0.25, 0.125)]
    run.update_metrics(LATE, {"audit": audit, "transfer": cells})
    card = build_card(run, "user/name")
    assert "| share of variance not explained (FVU) | 0.0625" in card
    assert "| features active on a token (L0) † |" in card
    assert "| FVU | 0.25 | 0.75 | - | 0.5 |" in card
    assert "| L0 † | 7.5 | 7.5 | - | - |" in card
    assert "does not tell trained from untrained" in card
    assert "| FVU at 96 x 128 px, best to worst step | 0.125 to 0.25 |" in card


def test_every_figure_of_the_card_is_one_of_the_run(run: RunFolder) -> None:
    card = build_card(run, "user/name", revision="v1", tables_repo="user/name-tables")
    assert "| share of variance not explained (FVU) | 0.0625 (0.05 to 0.075) |" in card
    assert "| features active on a token (L0) | 7.5 |" in card
    assert "| tells true concepts, as a share of a linear probe (AUC above chance): SAE feature | 0.938 |" in card
    assert "splice error" not in card, "it was not measured"
    assert f"topk, {whole_run.N_FEATURES} features of width {whole_run.D_MODEL}, k = 4" in card
    assert f"{whole_run.N_FEATURES} features: {whole_run.N_FEATURES - 1} common, 1 dead." in card
    assert "128 x 128 px, 20 steps" in card
    assert f"sheets/{LATE}/features.png" in card
    front = front_matter(card)
    assert front["license"] == "apache-2.0"
    assert front["datasets"] == ["user/name-tables"]
    for hookpoint in (EARLY, LATE):
        assert f"## `{hookpoint}`" in card


def test_the_usage_snippet_of_the_card_is_python_that_pins_the_revision(run: RunFolder) -> None:
    card = build_card(run, "user/name", revision="v1")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(snippet, "card", "exec")
    assert snippet.count('revision="v1"') == 2
    assert "FLUXSAE_RUN=user/name@v1 make app" in card


def test_the_card_of_an_sae_with_a_table_says_that_it_needs_the_noise_level(run: RunFolder) -> None:
    plain = SparseAutoencoder.from_pretrained(run.sae_path(LATE))
    assert "sae.encode(x) " in build_sae_card(run, LATE, "user/name")
    SparseAutoencoder(replace(plain.config, sigma_table=(0.2, 0.8))).save_pretrained(run.sae_path(LATE))
    card = build_sae_card(run, LATE, "user/name")
    assert "acts = sae.encode(x, sigma=sigma) " in card
    assert "with a table of 2 noise levels" in card


@pytest.mark.parametrize(
    ("flux_id", "licence", "words"),
    [
        ("black-forest-labs/FLUX.1-dev", "flux-1-dev-non-commercial-license", "Non-Commercial License"),
        ("black-forest-labs/FLUX.1-Krea-dev", "flux-1-dev-non-commercial-license", "Non-Commercial License"),
        ("black-forest-labs/FLUX.1-schnell", "apache-2.0", "Apache License 2.0"),
        ("miniature", "apache-2.0", "Apache License 2.0"),
        ("black-forest-labs/FLUX.2-klein-4B", "apache-2.0", "Apache License 2.0"),
        ("black-forest-labs/FLUX.2-klein-9B", "other", "the terms of that model"),
        ("someone/flow", "other", "the terms of that model"),
    ],
)
def test_the_card_states_the_licence_of_the_flux_that_was_used(
    run: RunFolder, flux_id: str, licence: str, words: str
) -> None:
    run.save_info(replace(run.load_info(), flux_id=flux_id))
    card = build_card(run, "user/name")
    front = front_matter(card)
    assert front.get("license_name", front["license"]) == licence == licence_of(flux_id).name
    assert words in card
    assert front.get("base_model") == (flux_id if "/" in flux_id else None)
    assert front_matter(build_tables_card(run, {"images": "images/images.parquet"}, "user/name"))["configs"]


def test_labels_cannot_bring_markup_into_the_card(run: RunFolder) -> None:
    table = run.load_features(LATE)
    n = len(table)
    label = '<img src=x onerror="alert(1)"> | [a](javascript:b)\n# red circle'
    run.save_features(LATE, table.with_columns({"label": [label] * n, "coherence": [0.5] * n}))
    card = build_card(run, "user/name")
    assert "red circle" in card
    assert not {"<img", "](javascript", "\n# red"} & {
        part for part in ("<img", "](javascript", "\n# red") if part in card
    }


def test_the_pushed_folder_holds_the_card_and_the_checksums(machine: HubProcess, run: RunFolder) -> None:
    machine.call("fluxsae.publishing.publish:push_run", run.path, "user/sums")
    assert set(read_checksums(run.checksums_path)) == set(run.published_files()) - {"SHA256SUMS"}
    assert run.card_path.read_text().startswith("---\n")
    assert verify_run(run).is_whole
