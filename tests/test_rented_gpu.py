"""What goes wrong first on a rented GPU: numbers that are none, and pictures from batches of other sizes."""

from pathlib import Path

import pytest
import torch
import whole_run
from test_demos import CONFIG, copy_of, search
from test_demos import features as features  # noqa: PLC0414  (a fixture)
from test_demos import run as run  # noqa: PLC0414  (a fixture)
from tiny_flux import SETTINGS

from fluxsae.activations.shards import ActivationManifest, ShardWriter
from fluxsae.files import load_tensors, read_header, save_tensors
from fluxsae.flux import FluxPipeline
from fluxsae.publishing.verify import verify_run
from fluxsae.runs.folder import RunFolder
from fluxsae.steering.demos import measured
from fluxsae.steering.demos import search as demo_search


@pytest.fixture
def whole(tmp_path: Path) -> RunFolder:
    return whole_run.build(tmp_path / "run")


@pytest.mark.parametrize("name", ["sums", "square_sums", "maxima", "step_sums", "places"])
def test_stats_that_are_no_numbers_are_found(whole: RunFolder, name: str) -> None:
    path = whole.stats_path(whole.hookpoints()[0])
    metadata, tensors = read_header(path).metadata, load_tensors(path)
    tensors[name].view(-1)[0] = torch.nan
    save_tensors(path, tensors, metadata=metadata)
    assert [p.text for p in verify_run(whole).problems] == [
        f"has values of {name} that are negative or not finite. Score the images again."
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_found_by_shard_and_image(whole: RunFolder, value: float) -> None:
    place = whole.hookpoints()[0]
    manifest = ActivationManifest(
        hookpoint=str(place), d_model=4, flux_id="tiny", flux_revision=None, settings=SETTINGS, steps=(1,),
        sigmas=(0.5,), n_tokens=3, tokens_per_image=2, n_images=4, images_per_shard=2, prompts_hash="0", seed=0,
    )  # fmt: skip
    writer = ShardWriter(whole.activations_folder(place), manifest)
    tokens, index = torch.ones(2, 1, 2, 4, dtype=torch.bfloat16), torch.zeros(2, 1, 2, dtype=torch.int32)
    writer.write(0, tokens, index)
    assert verify_run(whole).problems == ()  # the second shard is still to come: no fault
    tokens[1, 0, 0, 0] = value
    writer.write(1, tokens, index)
    assert [p.text for p in verify_run(whole).problems] == [
        "shard-00001.safetensors holds NaN or infinite numbers of images [3]. Delete the file and collect again, in "
        "bfloat16 or float32."
    ]


def test_a_demo_search_compares_with_a_baseline_of_the_same_batch(
    run: RunFolder, tiny_flux: FluxPipeline, features: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two features share an image: the second one's batch needs an unedited image of its own."""
    swept = []

    def watch(pipe, saes, variants, **options):
        swept.append((variants[0], len(variants), options.get("baseline")))
        return measured.measured_sweep(pipe, saes, variants, **options)

    monkeypatch.setattr(demo_search, "measured_sweep", watch)
    search(copy_of(run, tmp_path), tiny_flux, features)
    n_edits = len(CONFIG.suppress) + len(CONFIG.amplify)
    assert len(swept) >= 2 * CONFIG.n_candidates
    assert set(swept) == {((), n_edits + 1, None)}
