"""`python -m train.evaluate` on a run of a random tiny FLUX."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tiny_flux import D_MODEL, SETTINGS

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, flux_identity, schedule_sigmas
from fluxsae.laboratory.config import AuditConfig, EvaluationConfig
from fluxsae.laboratory.evaluate import evaluate
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import ImageRow
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder
from train.evaluate import EvaluateConfig, main

HERE = "transformer_blocks.2.ff"
SMALL = EvaluationConfig(n_images=4, n_flow_images=3, n_transfer_images=2, batch_size=2, draws=10)


@pytest.fixture
def run(tiny_flux: FluxPipeline, tmp_path: Path) -> RunFolder:
    """A run with an SAE of random weights and two images."""
    run = RunFolder(tmp_path / "run")
    identity = flux_identity(tiny_flux)
    run.save_info(RunInfo(flux_id=identity.flux_id, settings=SETTINGS, hookpoints=(HERE,), rows=4, cols=4))
    ground = TrainedOn(
        flux_id=identity.flux_id, flux_revision=identity.revision, hookpoint=HERE, steps=(1, 3),
        sigmas=tuple(schedule_sigmas(tiny_flux, SETTINGS)[step] for step in (1, 3)), height=32, width=32,
        guidance_scale=SETTINGS.guidance_scale, n_tokens=16, dataset_hash="",
    )  # fmt: skip
    config = SaeConfig(architecture="topk", d_model=D_MODEL, n_features=48, k=4, trained_on=ground)
    SparseAutoencoder(config).save_pretrained(run.sae_path(HERE))
    webp = io.BytesIO()
    Image.new("RGB", (32, 32)).save(webp, format="WEBP")
    run.save_images(ImageRow(i, f"a red circle {i}", i, webp.getvalue()) for i in range(2))
    return run


def test_the_script_prints_the_tables_and_writes_metrics(
    run: RunFolder, tiny_flux: FluxPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save_metrics(HERE, {"kept": 1})
    main(EvaluateConfig(run=run.path, settings=SMALL, write=True), pipe=tiny_flux)
    printed = capsys.readouterr().out
    for words in ("FVU", "splice error", "32 x 40", "the model's own samples", HERE):
        assert words in printed
    metrics = run.load_metrics(HERE)
    assert metrics["kept"] == 1
    assert {"value", "low", "high"} == set(metrics["fvu"]) == set(metrics["splice_error"])
    assert len(metrics["transfer"]) == 3 * SETTINGS.num_inference_steps
    assert "concepts" not in metrics
    assert "NaN" not in json.dumps(metrics)


def test_only_what_is_asked_for_is_measured(run: RunFolder, tiny_flux: FluxPipeline) -> None:
    asked = EvaluateConfig(run=run.path, reconstruction=True, settings=SMALL, write=True)
    (found,) = main(asked, pipe=tiny_flux).values()
    assert found.reconstruction is not None
    assert found.flow is None
    assert found.transfer is None
    assert "splice_error" not in run.load_metrics(HERE)


def test_measuring_changes_no_file_unless_asked_and_says_what_it_costs(
    run: RunFolder, tiny_flux: FluxPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, tuple[int, bytes]]:
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.path.rglob("*") if path.is_file()}

    before = files()
    main(EvaluateConfig(run=run.path, settings=SMALL), pipe=tiny_flux)
    assert files() == before
    printed = capsys.readouterr().out
    assert "not written (--write does)" in printed
    assert "reconstruction: at most 16 passes of the transformer" in printed  # 4 images up to step 3
    assert "transfer: at most 24 passes" in printed  # 2 images, 3 sizes, 4 steps
    assert "flow: at most 30 passes" in printed  # 3 images: 3 velocities at 2 steps, and 4 steps to make each
    assert "flow: took" in printed


def test_the_audit_runs_on_any_flux(
    run: RunFolder, tiny_flux: FluxPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    audit = AuditConfig(n_images=2, n_training_images=24, n_flow_images=2, n_seeds=2, epochs=1, batch_size=4)
    asked = EvaluateConfig(run=run.path, audit=True, settings=replace(SMALL, audit=audit), write=True)
    (found,) = main(asked, pipe=tiny_flux).values()
    assert found.audit is not None
    assert [len(some) for some in found.audit.values.values()] == [2, 2, 2, 1]  # no oracle without known scenes
    assert {"FVU", "L0", "dead share", "splice error"} <= set(found.audit.measures())
    assert "concept AUC" not in found.audit.measures()
    assert run.load_metrics(HERE)["audit"]["unseparated"] == found.audit.unseparated()
    assert "GB of activations in memory" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["concepts", "steering", "pairs"])
def test_scenes_of_another_flux_are_refused(run: RunFolder, tiny_flux: FluxPipeline, part: str) -> None:
    with pytest.raises(FluxSaeError, match=f"scenes of the miniature only.* Leave {part} out"):
        main(EvaluateConfig(run=run.path, settings=SMALL, **{part: True}), pipe=tiny_flux)


def test_a_run_without_saes_or_a_wrong_part_is_refused(run: RunFolder, tiny_flux: FluxPipeline) -> None:
    with pytest.raises(FluxSaeError, match="allowed are reconstruction, transfer, flow, concepts"):
        evaluate(run, tiny_flux, parts=[])
    with pytest.raises(FluxSaeError, match="no SAE"):
        evaluate(run, tiny_flux, hookpoints=["layer1"])
    (run.sae_path(HERE) / "model.safetensors").unlink()
    with pytest.raises(FluxSaeError, match=r"no SAE at .*Train one first"):
        evaluate(run, tiny_flux)


def test_an_sae_of_another_size_is_refused_unless_allowed(run: RunFolder, tiny_flux: FluxPipeline) -> None:
    sae = SparseAutoencoder.from_pretrained(run.sae_path(HERE))
    assert sae.config.trained_on is not None
    other = TrainedOn(**{**vars(sae.config.trained_on), "height": 64})
    sae.with_trained_on(other).save_pretrained(run.sae_path(HERE))
    asked = EvaluateConfig(run=run.path, reconstruction=True, settings=SMALL)
    with pytest.raises(FluxSaeError, match="images are 32 x 32 pixels, not 64 x 32"):
        main(asked, pipe=tiny_flux)
    main(EvaluateConfig(run=run.path, reconstruction=True, allow_mismatch=("size",), settings=SMALL), pipe=tiny_flux)


@pytest.mark.parametrize("field", ["n_images", "batch_size", "draws"])
def test_numbers_below_one_are_refused(field: str) -> None:
    with pytest.raises(FluxSaeError, match=f"{field} is 0"):
        EvaluationConfig(**{field: 0})
