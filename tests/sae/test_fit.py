"""`train.fit` as a user runs it, and beside other tools."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training_data import write_collected_run

from fluxsae.errors import FluxSaeError
from fluxsae.files import load_tensors
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training.processes import Processes
from train import fit
from train.fit import FitConfig, main


@pytest.fixture
def collected_run(tmp_path: Path) -> Path:
    return write_collected_run(tmp_path / "run")


def test_fit_writes_an_sae_that_knows_its_ground_and_skips_what_is_complete(collected_run: Path) -> None:
    config = FitConfig(
        run=collected_run, hookpoints=("layer3",), steps=(6,), k=(3, 5), batch_size=64, epochs=3, device="cpu"
    )
    assert main(config).word == "done"
    sae = SparseAutoencoder.from_pretrained(collected_run, subfolder="sae/transformer_blocks.3.ff@topk-3")
    assert sae.config.k == 3
    assert (sae.reference_acts > 0).any()
    ground = sae.config.trained_on
    assert ground is not None
    assert (ground.flux_id, ground.steps, ground.sigmas, ground.n_tokens) == ("tiny", (6,), (0.7,), 16)
    measured = RunFolder(collected_run).load_metrics("layer3@topk-3")
    assert measured["n_images"] == 4, "every tenth image is held out"
    assert measured["n_tokens"] == 64, "one step of the two"
    assert measured["l0"] == 3
    assert main(config).word == "skipped"
    with pytest.raises(FluxSaeError, match="other settings"):
        main(replace(config, lr=0.1))


class Apart(Processes):
    """A process of several that never has to talk to the others."""

    def wait(self) -> None:
        pass

    def sum_(self, tensor: Tensor) -> Tensor:
        raise AssertionError("SAEs that were dealt share nothing")


def test_saes_of_a_sweep_are_dealt_to_the_processes_and_come_out_the_same(tmp_path: Path) -> None:
    alone, dealt = (RunFolder(write_collected_run(tmp_path / name)) for name in ("alone", "dealt"))
    config = FitConfig(run=alone.path, k=(3, 5, 7), batch_size=64, epochs=2, device="cpu")
    main(config)
    for rank in (1, 0):
        peers = Apart(rank, 2)
        own = replace(config, run=dealt.path)
        place = HookPoint.parse("layer3")
        fit._fit(own, dealt, fit._from_disk(own, place, peers), fit._asked(own, dealt, None), peers)
    for name in ("layer3@topk-3", "layer3@topk-5", "layer3@topk-7"):
        one, other = (load_tensors(run.sae_path(name) / "model.safetensors") for run in (alone, dealt))
        assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)
        assert dealt.load_metrics(name) == alone.load_metrics(name)


def test_fit_refuses_what_cannot_be_trained(collected_run: Path) -> None:
    config = FitConfig(run=collected_run, batch_size=64, device="cpu")
    with pytest.raises(FluxSaeError, match="k is 500"):
        main(replace(config, k=(500,)))
    with pytest.raises(FluxSaeError, match="13"):
        main(replace(config, steps=(13,)))
    with pytest.raises(FluxSaeError, match="l1 has no k"):
        main(replace(config, arch="l1", k=(5,)))
    with pytest.raises(FluxSaeError, match="collect"):
        main(replace(config, hookpoints=("layer2",)))
    with pytest.raises(FluxSaeError, match="no activations"):
        main(replace(config, run=collected_run.parent / "elsewhere"))


@pytest.mark.bench
def test_speed_is_not_bought_with_quality() -> None:
    from train.benchmarks.options import QualityConfig
    from train.benchmarks.quality import final_ratio
    from train.benchmarks.quality import main as compare

    assert final_ratio(compare(QualityConfig())) < 1.01


@pytest.mark.bench
def test_training_is_faster_than_every_other_tool(tmp_path: Path) -> None:
    from train.benchmarks.options import TrainingConfig
    from train.benchmarks.training import Shape
    from train.benchmarks.training import main as benchmark

    results = benchmark(TrainingConfig(output=tmp_path / "results.json"))
    best: dict[tuple[Shape, bool], float] = {}
    for result in results:
        key = (result.shape, result.tool == "fluxsae")
        best[key] = min(best.get(key, float("inf")), result.median)
    ratios = {shape: best[shape, False] / best[shape, True] for shape, _ in best}
    print("\n".join(f"{shape}: {ratio:.2f} times the fastest other tool" for shape, ratio in ratios.items()))
    assert all(ratio > 1 for ratio in ratios.values())
