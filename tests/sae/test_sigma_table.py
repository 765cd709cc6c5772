"""One dictionary for all noise levels: tables over sigmas in the model, its files, its training and its uses."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_mixing import MANIFEST, write_all
from test_model import GROUND, build_config
from test_steering import ALL, DOUBLE, latents, random_sae, trained_on
from tiny_flux import SETTINGS
from torch import Tensor
from training_data import D_MODEL, MemorySource, sae_config, sparse_rows, write_collected_run

from fluxsae.activations.mixing import mixing_buffer
from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, capture, generate, schedule_sigmas
from fluxsae.miniature import miniature_path
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import ARCHITECTURES, MISMATCHES, Architecture, SaeConfig
from fluxsae.sae.metrics import fvu
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.sigma_table import table_places
from fluxsae.sae.training import HeldOut, TrainConfig, train
from fluxsae.steering.apply import EditedCall, edit_delta, steer
from fluxsae.steering.attribution import Target
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.measurements import EditRecorder, norm_and_residual
from train.fit import FitConfig, main

TABLE = (0.25, 0.5, 1.0)


def with_table(
    plain: SparseAutoencoder, *, table: tuple[float, ...] = TABLE, seed: int | None = None
) -> SparseAutoencoder:
    """The same SAE with a table: scale 1 and shift 0, or random ones."""
    sae = SparseAutoencoder(replace(plain.config, sigma_table=table))
    sae.load_state_dict(plain.state_dict(), strict=False)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        sae.sigma_scale.data += 0.5 * torch.rand(sae.sigma_scale.shape, generator=generator)
        sae.sigma_shift.data += torch.randn(sae.sigma_shift.shape, generator=generator)
    return sae.requires_grad_(False)


def plain_sae(architecture: Architecture = "topk") -> SparseAutoencoder:
    sae = SparseAutoencoder(build_config(architecture, trained_on=None))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in sae.state_dict().items():
        if name not in ("W_dec", "input_scale"):
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.3)
    sae.input_scale.fill_(1.7)
    return sae.requires_grad_(False)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sigma", [0.25, 0.4, torch.full((3, 5), 0.7)], ids=["level", "between", "one a token"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scale_1_and_shift_0_are_the_plain_sae_bit_by_bit(architecture: Architecture, sigma: float | Tensor) -> None:
    plain, x = plain_sae(architecture), tokens(3, 5)
    sae = with_table(plain)
    for found, expected in zip(sae(x, sigma=sigma), plain(x), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(sae.encode(x, sigma=sigma), plain.encode(x))
    assert torch.equal(sae.encode_features(x, [3, 7], sigma=sigma), plain.encode_features(x, [3, 7]))
    assert torch.equal(sae.reconstruct(x, sigma=sigma), plain.reconstruct(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_encoder_reads_what_the_formula_says_and_the_decoder_writes_as_before(architecture: Architecture) -> None:
    plain, x = plain_sae(architecture), tokens(4)
    sae = with_table(plain, seed=3)
    # 0.4 lies 0.6 of the way from 0.25 to 0.5
    scale, shift = (table[0] * 0.4 + table[1] * 0.6 for table in (sae.sigma_scale, sae.sigma_shift))
    x_tilde = (x - sae.input_mean) / sae.input_scale
    pre = (x_tilde * scale + shift - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(sae.pre_acts(x, sigma=0.4), pre)
    out = sae(x, sigma=0.4)
    torch.testing.assert_close(out.acts, plain.activate(pre))
    assert torch.equal(out.x_hat, plain.decode(out.acts)) or torch.allclose(out.x_hat, plain.decode(out.acts))
    assert not torch.allclose(out.acts, plain.encode(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_number_for_all_tokens_and_one_a_token_agree(
    architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, x = with_table(plain_sae(architecture), seed=3), tokens(2, 3, 5)
    levels = torch.tensor([0.25, 0.3, 0.9])[:, None]  # of (images, steps, tokens): one a step
    expected = torch.stack([sae.encode(x[:, step], sigma=float(level)) for step, level in enumerate(levels)], dim=1)
    torch.testing.assert_close(sae(x, sigma=levels).acts, expected)
    monkeypatch.setattr("fluxsae.sae.model.tokens_at_once", lambda *_: 4)  # chunks end inside an image and a step
    torch.testing.assert_close(sae.encode(x, sigma=levels), expected)
    torch.testing.assert_close(sae.encode_sparse(x, sigma=levels).dense(), expected)
    torch.testing.assert_close(sae.encode_features(x, [5, 2], sigma=levels), expected[..., [5, 2]])
    torch.testing.assert_close(sae.reconstruct(x, sigma=levels), sae.decode(expected))


def test_places_lie_on_between_and_beyond_the_levels() -> None:
    places = table_places(TABLE, torch.tensor([0.25, 0.5, 1.0, 0.75, 0.1, 1.2]))
    table = torch.tensor([[1.0], [2.0], [6.0]])
    assert places.interpolate(table)[:, 0].tolist() == [1.0, 2.0, 6.0, 4.0, 1.0, 6.0]
    assert table_places((0.5,), torch.tensor(0.9)).interpolate(table[:1]).tolist() == [1.0], "a table of one level"
    rows = torch.eye(6)
    spread = places.spread(rows, 3)  # row i of the table gets what is read from it
    torch.testing.assert_close(spread.T @ table, places.interpolate(table))


def test_a_missing_or_far_noise_level_is_refused_with_the_remedy() -> None:
    sae, x = with_table(plain_sae()), tokens(3)
    with pytest.raises(FluxSaeError, match=r"3 levels from 0.250 to 1.000.*encode\(x, sigma="):
        sae.encode(x)
    for use in (sae, sae.pre_acts, sae.encode_sparse, sae.reconstruct):
        with pytest.raises(FluxSaeError, match="sigma_table"):
            use(x)
    with pytest.raises(FluxSaeError, match="sigma_table"):
        sae.encode_features(x, [1])
    sae.encode(x, sigma=0.21)  # within 0.05
    with pytest.raises(FluxSaeError, match=r"sigma is 0.100. This SAE reads 0.200 to 1.050"):
        sae.encode(x, sigma=0.1)
    with pytest.raises(FluxSaeError, match=r"sigma is 0.300 to 1.200"):
        sae.encode(x, sigma=torch.tensor([0.3, 0.4, 1.2]))
    with pytest.raises(FluxSaeError, match="sigma is nan"):
        sae.encode(x, sigma=float("nan"))
    assert [sae.nearest_sigma(sigma) for sigma in (0.1, 0.3, 2.0)] == pytest.approx([0.2, 0.3, 1.05])
    assert plain_sae().nearest_sigma(0.1) == 0.1
    wide = with_table(SparseAutoencoder(build_config(trained_on=replace(GROUND, sigma_tolerance=0.2))))
    wide.encode(x, sigma=0.1)


# Files


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_table_survives_saving_and_loading(tmp_path: Path, architecture: Architecture) -> None:
    sae = with_table(plain_sae(architecture), seed=3)
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.config == sae.config
    assert again.config.sigma_table == TABLE
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in sae.state_dict().items())


def test_a_plain_sae_is_written_as_before_and_files_of_before_are_read(tmp_path: Path) -> None:
    plain_sae().save_pretrained(tmp_path)
    assert "sigma_table" not in json.loads((tmp_path / "config.json").read_text())
    shipped = SparseAutoencoder.from_pretrained(miniature_path("run"), subfolder="sae/transformer_blocks.3")
    assert shipped.config.sigma_table == ()


def test_a_table_without_its_tensors_is_refused(tmp_path: Path) -> None:
    plain_sae().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "sigma_table": [0.2, 0.8]}))
    with pytest.raises(FluxSaeError, match="lacks sigma_scale, sigma_shift"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("table", [(0.5, 0.25), (0.5, 0.5), (-0.1, 0.5)])
def test_a_table_that_does_not_rise_is_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(FluxSaeError, match="sigma_table"):
        build_config(sigma_table=table)


# Training


def rows_of_two_levels(n_rows: int = 3200) -> tuple[Tensor, Tensor]:
    """Rows whose directions are the same at both noise levels, around another mean and at another size."""
    levels = torch.where(torch.arange(n_rows) % 2 == 0, 0.25, 1.0)
    rows = sparse_rows(n_rows)
    return torch.where(levels[:, None] == 1.0, rows - 3 * rows.roll(1, dims=1).sign(), rows), levels


def test_a_learned_table_describes_two_noise_levels_better_than_a_plain_sae() -> None:
    rows, levels = rows_of_two_levels()
    source = MemorySource(rows, levels=levels)
    configs = {"plain": sae_config(), "table": sae_config(sigma_table=(0.25, 1.0))}
    saes = train(configs, source, TrainConfig(epochs=12, lr=3e-3, precision="float32")).saes
    scale, shift = saes["table"].sigma_scale, saes["table"].sigma_shift
    assert float((scale[0] - scale[1]).abs().max()) > 0.02
    assert float((shift[0] - shift[1]).abs().max()) > 0.02
    assert fvu(rows, saes["table"](rows, sigma=levels).x_hat) < fvu(rows, saes["plain"](rows).x_hat)


@pytest.mark.parametrize("architecture", ["topk", "l1"])
def test_training_with_a_table_stopped_midway_ends_with_the_same_bits(
    tmp_path: Path, architecture: Architecture
) -> None:
    rows, levels = rows_of_two_levels(640)
    source = MemorySource(rows, levels=levels)
    configs = {"a": sae_config(architecture, sigma_table=(0.25, 1.0), dead_after_tokens=200)}
    config = TrainConfig(epochs=2, lr=2e-3, checkpoint_minutes=0, log_every=7, resample_every=5)
    whole = train(configs, source, config).saes["a"]

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        train(configs, source, config, folder=tmp_path, on_step=stop)
    again = train(configs, source, config, folder=tmp_path).saes["a"]
    assert not torch.equal(whole.sigma_shift[0], whole.sigma_shift[1])
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in whole.state_dict().items())


def test_the_table_of_a_plain_neighbour_is_never_asked_for() -> None:
    source = MemorySource(sparse_rows(640))  # its `sigmas` fails
    train({"a": sae_config()}, source, TrainConfig())
    with pytest.raises(AssertionError, match="asks for no noise levels"):
        train({"a": sae_config(), "b": sae_config(sigma_table=TABLE)}, source, TrainConfig())


def test_fit_gives_the_table_the_noise_levels_of_its_steps(tmp_path: Path) -> None:
    run = write_collected_run(tmp_path / "run")
    config = FitConfig(run=run, sigma_conditioned=True, k=(3,), batch_size=64, epochs=2, device="cpu")
    assert main(config).word == "done"
    sae = SparseAutoencoder.from_pretrained(run, subfolder="sae/transformer_blocks.3.ff")
    assert sae.config.sigma_table == (0.7, 0.9)
    assert not torch.equal(sae.sigma_shift[0], sae.sigma_shift[1]), "learned from each level's own rows"
    assert RunFolder(run).load_metrics("layer3")["n_tokens"] == 4 * 2 * 16
    with pytest.raises(FluxSaeError, match="other settings"):
        main(replace(config, sigma_conditioned=False))


@pytest.mark.parametrize("buffer_rows", [40, 90, 10_000])
def test_noise_levels_come_in_the_order_of_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer_rows: int
) -> None:
    monkeypatch.setattr("fluxsae.activations.mixing._FEWEST_SHUFFLE_BYTES", 1)
    folder = write_all(tmp_path / "acts")  # rows that hold the position of their step
    for steps, rank, cursor in itertools.product((None, MANIFEST.steps[1:]), (0, 1), (0, 3)):
        options = {"batch_size": 10, "steps": steps, "rank": rank, "world_size": 2, "buffer_bytes": buffer_rows * 8}
        buffer = mixing_buffer(folder, **options)
        rows, levels = (list(each(1, cursor=cursor)) for each in (buffer.batches, buffer.sigmas))
        assert len(rows) == len(levels) == buffer.n_batches - cursor
        of_step = torch.tensor(MANIFEST.sigmas)
        assert all(torch.equal(of_step[x[:, 1].long()], sigmas) for x, sigmas in zip(rows, levels, strict=True))


def test_held_out_images_are_read_at_their_noise_levels() -> None:
    rows, levels = rows_of_two_levels(300)
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=D_MODEL, n_features=20, sigma_table=(0.25, 1.0)))
    sae.sigma_shift.data[1] = 5.0
    held_out = HeldOut(sae)
    held_out.add(rows, sigmas=levels)
    assert held_out.measure()["fvu"] == pytest.approx(fvu(rows, sae(rows, sigma=levels).x_hat), rel=1e-5)


# Use


def test_an_edit_acts_by_the_acts_of_its_step(tiny_flux: FluxPipeline) -> None:
    sae = with_table(random_sae(), table=(0.05, 1.0), seed=3)
    seen: list[EditedCall] = []
    with capture(tiny_flux, [DOUBLE]) as captured:
        latents(tiny_flux)
    steps = captured.steps[1:3]
    feature = int(sae.encode(captured.get(DOUBLE, steps[0]), sigma=captured.sigma(steps[0])).amax((0, 1)).argmax())
    edit = SteeringEdit(DOUBLE, feature, "ablate", 1.0, steps=(steps[0], steps[1] + 1))
    latents(tiny_flux, [edit], saes={DOUBLE: sae}, on_edit=seen.append)
    edited = [each for each in seen if each.delta.any()]
    assert [each.call.step for each in edited] == steps
    for each in edited:
        expected = edit_delta(edit, sae, each.call.tokens, sigma=each.call.sigma)
        torch.testing.assert_close(each.delta, expected)
        other = edit_delta(edit, sae, each.call.tokens, sigma=0.5)
        assert not torch.allclose(each.delta, other), "another noise level gives other acts"
        _, residual = norm_and_residual(each.call.tokens, sae, sigma=each.call.sigma)
        assert torch.isfinite(residual).all()


def test_a_feature_s_drive_is_that_of_its_noise_level() -> None:
    sae, x = with_table(plain_sae(), seed=3), tokens(2, 5)
    expected = sae.pre_acts(x, sigma=0.4)[..., 3].relu().sum(1)
    torch.testing.assert_close(Target(DOUBLE, 3, 1).drive(sae, x, sigma=0.4), expected)
    with pytest.raises(FluxSaeError, match="sigma_table"):
        Target(DOUBLE, 3, 1).drive(sae, x)


def test_a_measured_edit_of_two_steps_needs_no_table_of_the_others(tiny_flux: FluxPipeline) -> None:
    sigmas = schedule_sigmas(tiny_flux, SETTINGS)
    ground = trained_on(hookpoint=str(DOUBLE), sigmas=(sigmas[1], sigmas[2]))
    sae = with_table(random_sae(), table=(sigmas[2], sigmas[1]), seed=3).with_trained_on(ground)
    edit = SteeringEdit(DOUBLE, 3, "add", 2.0)
    recorder = EditRecorder(tiny_flux, {DOUBLE: sae}, [[], [edit]])
    options = {"settings": SETTINGS, "output_type": "latent"}
    with (
        recorder.watch(),
        steer(
            tiny_flux, {DOUBLE: sae}, [[], [edit]], allow_mismatch=MISMATCHES,
            on_edit=lambda edited: recorder.record(edited, 0),
        ),
    ):  # fmt: skip
        generate(tiny_flux, ["a red circle"] * 2, seeds=[0, 0], **options)
    assert recorder.recorded[1].n_edited == 2 * 16, "two steps of four"


def test_an_edit_far_outside_the_table_is_refused_before_a_block_runs(tiny_flux: FluxPipeline) -> None:
    sae = with_table(random_sae(), table=(0.05, 0.3))
    edit = SteeringEdit(DOUBLE, 3, "scale", 2.0, steps=ALL)
    with pytest.raises(FluxSaeError, match=r"sigma is 1.000. This SAE reads 0.000 to 0.350"):
        latents(tiny_flux, [edit], saes={DOUBLE: sae})
