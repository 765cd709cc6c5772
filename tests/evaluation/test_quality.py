"""Reconstruction, transfer and flow loss on a random tiny FLUX."""

import numpy as np
import pytest
import torch
from bad_images import spoil_in
from tiny_flux import D_MODEL, SETTINGS

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.flow import CleanImages, drawn_images, evaluate_flow, own_images
from fluxsae.evaluation.intervals import bootstrap_weights
from fluxsae.evaluation.reconstruction import ImageSums, evaluate_reconstruction, transfer_table
from fluxsae.evaluation.stream import ImageSet, iter_activations
from fluxsae.evaluation.tables import flow_text, reconstruction_text, transfer_text
from fluxsae.flux import FluxPipeline, capture, generate
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.miniature.captions import prompted_attributes
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.metrics import fvu, l0
from fluxsae.sae.model import SparseAutoencoder

LATE = HookPoint.parse("layer2")
IMAGES = ImageSet(("a red circle", "a blue star", "a small green ring", "two cats"), (1, 2, 3, 4))


def perfect_sae() -> SparseAutoencoder:
    """x_hat = x: features +e_i and -e_i of every channel."""
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=D_MODEL, n_features=2 * D_MODEL), seed=None)
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    with torch.no_grad():
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    return sae


def silent_sae(mean: torch.Tensor) -> SparseAutoencoder:
    """x_hat = the mean: no feature ever fires."""
    sae = SparseAutoencoder(SaeConfig(architecture="l1", d_model=D_MODEL, n_features=4), seed=None)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
        sae.input_mean.copy_(mean)
    return sae


def random_sae(**config: object) -> SparseAutoencoder:
    values = {"architecture": "topk", "d_model": D_MODEL, "n_features": 64, "k": 4, **config}
    return SparseAutoencoder(SaeConfig(**values), seed=3)


def captured_tokens(pipe: FluxPipeline, steps: list[int]) -> torch.Tensor:
    with capture(pipe, [LATE], steps) as captured:
        generate(pipe, IMAGES.prompts, seeds=IMAGES.seeds, settings=SETTINGS, output_type="latent")
    return torch.stack([captured.get(LATE, step) for step in steps], dim=1)


def test_the_stream_gives_what_capture_gives_whatever_the_batch(tiny_flux: FluxPipeline) -> None:
    expected = captured_tokens(tiny_flux, [1, 3])
    batches = list(iter_activations(tiny_flux, IMAGES, {LATE: [1, 3]}, settings=SETTINGS, batch_size=3))
    assert [batch.rows for batch in batches] == [[0, 1, 2], [3]]
    torch.testing.assert_close(torch.cat([b.tokens[LATE] for b in batches]), expected, atol=1e-4, rtol=1e-4)
    assert not batches[0].pictures


def test_with_pictures_every_image_is_decoded(tiny_flux: FluxPipeline) -> None:
    early = HookPoint.parse("layer0")
    done: list[tuple[str, int, int]] = []
    batch, *_ = iter_activations(
        tiny_flux, IMAGES.first(2), {LATE: [3], early: [0, 1]}, settings=SETTINGS, with_pictures=True,
        on_progress=lambda *at: done.append(at), doing="looking",
    )  # fmt: skip
    assert [picture.size for picture in batch.pictures] == [(32, 32), (32, 32)]
    assert (batch.tokens[LATE].shape[1], batch.tokens[early].shape[1]) == (1, 2)
    assert done == [("looking", 2, 2)]


def test_fresh_images_take_prompts_in_turn_and_seeds_no_stage_uses() -> None:
    fresh = ImageSet.fresh(["a", "b"], 5)
    assert fresh.prompts == ("a", "b", "a", "b", "a")
    assert len(set(fresh.seeds)) == 5
    assert min(fresh.seeds) > 2**32


def test_image_sums_give_the_fvu_of_all_tokens_and_of_any_resample() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 2, 7, 3, generator=generator) + 100
    x_hat = x + 0.3 * torch.randn(5, 2, 7, 3, generator=generator)
    sums = ImageSums()
    sums.update(x[:2], x_hat[:2], centre=torch.full((3,), 99.0))
    sums.update(x[2:], x_hat[2:], centre=torch.full((3,), 99.0))
    weights = bootstrap_weights(5, draws=4, seed=1)
    for row, value in zip(weights.astype(int), sums.fvu(weights), strict=True):
        again = torch.from_numpy(np.repeat(np.arange(5), row))
        assert value == pytest.approx(fvu(x[again].double(), x_hat[again].double()), rel=1e-6)
    assert sums.fvu(weights[:1], steps=[1])[0] == pytest.approx(fvu(x[:, 1].double(), x_hat[:, 1].double()), rel=1e-6)


def test_reconstruction_equals_the_metrics_on_the_same_tokens(tiny_flux: FluxPipeline) -> None:
    sae, x = random_sae(), captured_tokens(tiny_flux, [1, 3])
    report = evaluate_reconstruction(
        tiny_flux, {LATE: sae}, IMAGES, {LATE: [1, 3]}, settings=SETTINGS, batch_size=4, draws=20
    )[LATE]
    out = sae(x)
    assert report.fvu.value == pytest.approx(fvu(x, out.x_hat), rel=1e-5)
    assert report.l0.value == pytest.approx(l0(out.acts), rel=1e-6)
    assert report.dead_share == pytest.approx(float(((out.acts > 0).sum((0, 1, 2)) == 0).float().mean()))
    assert report.fvu_by_step[3].value == pytest.approx(fvu(x[:, 1], out.x_hat[:, 1]), rel=1e-5)
    assert report.fvu.low <= report.fvu.value <= report.fvu.high
    assert "FVU" in reconstruction_text(report)


def test_evaluations_leave_a_bad_image_out_and_count_it(
    tiny_flux: FluxPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    images, sae = ImageSet.fresh(["a red circle"], 20), random_sae()
    asked = {"settings": SETTINGS, "batch_size": 10, "draws": 20}
    expected = evaluate_reconstruction(tiny_flux, {LATE: sae}, images, {LATE: [0, 2]}, **asked)[LATE]
    with spoil_in(tiny_flux, 0, step=0):
        report = evaluate_reconstruction(tiny_flux, {LATE: sae}, images, {LATE: [0, 2]}, **asked)[LATE]
    assert (expected.n_images, report.n_images, report.n_tokens) == (20, 19, 19 * 2 * 16)
    assert report.fvu.value == pytest.approx(expected.fvu.value, rel=0.05)
    assert "image 1 of 20 is left out. At step 0 of transformer_blocks.2.ff" in caplog.text
    with (
        spoil_in(tiny_flux, step=0),
        pytest.raises(FluxSaeError, match="2 of 20 images would be left out"),
    ):
        transfer_table(
            tiny_flux, {LATE: sae}, images, settings=SETTINGS, sizes=[(32, 32)], trained={LATE: [0]}, batch_size=10
        )
    with (
        spoil_in(tiny_flux),
        pytest.raises(FluxSaeError, match=r"At step 1 of transformer_blocks.2.ff, the activations of seed 2 \('a blue"),
    ):
        list(iter_activations(tiny_flux, IMAGES, {LATE: [1]}, settings=SETTINGS))


def test_flow_leaves_an_image_out_whose_velocity_is_no_number(
    tiny_flux: FluxPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    latents = torch.randn(20, 16, 16, generator=torch.Generator().manual_seed(0))
    latents[3, 0, 0] = torch.nan
    images = CleanImages(("a red circle",) * 20, latents, are_true=True)
    asked = {"settings": SETTINGS, "batch_size": 10, "draws": 20}
    report = evaluate_flow(tiny_flux, {LATE: random_sae()}, images, {LATE: [2]}, **asked)[LATE]
    assert report.n_images == 19
    assert np.isfinite([report.overall.loss_clean, report.overall.splice_error.value]).all()
    assert "image 3 of 20 is left out. At step 2, a velocity of image 3" in caplog.text


def test_a_perfect_sae_recovers_all_of_the_flow_loss_and_the_mean_none(tiny_flux: FluxPipeline) -> None:
    x = captured_tokens(tiny_flux, [0, 2])
    images = own_images(tiny_flux, IMAGES, settings=SETTINGS, batch_size=2)
    for sae, recovered, splice_error in (
        (perfect_sae(), 1.0, 0.0),
        (silent_sae(x.mean((0, 1, 2))), 0.0, 1.0),
    ):
        if splice_error == 0.0:
            with torch.no_grad():
                sae.input_mean.copy_(x.mean((0, 1, 2)))
        report = evaluate_flow(
            tiny_flux, {LATE: sae}, images, {LATE: [0, 2]}, settings=SETTINGS, batch_size=2, draws=20
        )[LATE]
        assert report.overall.splice_error.value == pytest.approx(splice_error, abs=1e-5)
        if report.overall.recovered is not None:
            assert report.overall.recovered.value == pytest.approx(recovered, abs=1e-4)
        assert set(report.by_step) == {0, 2}
        assert not report.uses_true_latents
        assert "splice error" in flow_text(report)


def test_the_flow_loss_is_taken_without_guidance(tiny_flux: FluxPipeline) -> None:
    images = own_images(tiny_flux, IMAGES, settings=SETTINGS)
    asked = []
    watch = tiny_flux.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: asked.extend(kwargs["guidance"].tolist()), with_kwargs=True
    )
    try:
        reports = evaluate_flow(tiny_flux, {LATE: perfect_sae()}, images, {LATE: [1]}, settings=SETTINGS, draws=20)
    finally:
        watch.remove()
    assert set(asked) == {1.0}
    assert reports[LATE].guidance_scale == 1.0


def test_no_ratio_is_given_where_the_mean_does_no_harm(tiny_flux: FluxPipeline) -> None:
    class Shut(SparseAutoencoder):
        def forward(self, x: torch.Tensor, *, sigma=None):  # type: ignore[no-untyped-def]
            out = super().forward(x, sigma=sigma)
            return out._replace(x_hat=x)

    sae = Shut(SaeConfig(architecture="l1", d_model=D_MODEL, n_features=4), seed=None)
    images = own_images(tiny_flux, IMAGES, settings=SETTINGS)
    block = tiny_flux.transformer.transformer_blocks[LATE.block_index]
    hook = block.ff.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    try:
        report = evaluate_flow(tiny_flux, {LATE: sae}, images, {LATE: [1]}, settings=SETTINGS, draws=20)[LATE]
    finally:
        hook.remove()
    assert report.overall.recovered is None
    assert "not resolved" in flow_text(report)


def test_true_latents_are_those_of_drawn_scenes(tiny_flux: FluxPipeline) -> None:
    images = drawn_images(tiny_flux, 3, seed=5)
    assert images.are_true
    assert images.latents.shape == (3, (128 // 8) ** 2, 16)
    assert all(prompted_attributes(prompt)[1] for prompt in images.prompts)
    assert isinstance(images, CleanImages)


def test_the_transfer_table_has_every_step_and_size_and_marks_the_trained_ones(tiny_flux: FluxPipeline) -> None:
    cells = transfer_table(
        tiny_flux, {LATE: random_sae()}, IMAGES.first(2), settings=SETTINGS, sizes=[(32, 32), (32, 48)],
        trained={LATE: [1]},
    )[LATE]  # fmt: skip
    assert [(cell.step, cell.height, cell.width) for cell in cells] == [
        (step, 32, width) for width in (32, 48) for step in range(4)
    ]
    assert [(cell.step, cell.width) for cell in cells if cell.is_trained] == [(1, 32)]
    assert all(cell.fvu > 0 and cell.l0 <= 4 for cell in cells)
    assert transfer_text(cells).count("*") == 1


def test_an_empty_set_of_images_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="at least one image"):
        ImageSet((), ())
