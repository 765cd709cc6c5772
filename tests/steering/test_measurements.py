from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_steering import DOUBLE, SAES, SINGLE, alive_feature, n_hooks
from tiny_flux import D_MODEL, SETTINGS

from fluxsae.errors import FluxSaeError
from fluxsae.flux import FluxPipeline, block_hooks, capture, generate, token_grid
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.apply import EditedCall
from fluxsae.steering.edits import HeatmapRegion, SteeringEdit
from fluxsae.steering.measurements import (
    EditMeasurement,
    EditRecorder,
    RecordedEdit,
    TokenLimits,
    limits_of,
    measure_edit,
    measure_token_limits,
    norm_and_residual,
    random_directions,
    random_features,
    region_pixels,
)
from fluxsae.steering.sweeps import strength_variants, sweep

PROMPT, ALL = "a red circle", (0, SETTINGS.num_inference_steps)
BLOCK = HookPoint.parse("transformer_blocks.1")


class PixelDistance:
    """Mean absolute difference: a distance whose value is known without a network."""

    name = "mean absolute difference"

    def distance(self, first, second):
        return self.distance_map(first, second).mean(dim=(1, 2))

    def distance_map(self, first, second):
        pairs = [
            torch.stack([torch.tensor(list(image.convert("L").getdata())).float() / 255 for image in pair])
            for pair in zip(first, second, strict=True)
        ]
        side = first[0].size[::-1]
        return torch.stack([(pair[0] - pair[1]).abs().reshape(side) for pair in pairs])


def recorded_sweep(pipe: FluxPipeline, edits, strengths, *, max_batch: int = 3, on_edit=None, limits=None):
    variants = strength_variants(edits, strengths)
    recorder = EditRecorder(pipe, SAES, variants, limits=limits)

    def record(call: EditedCall, first: int) -> None:
        recorder.record(call, first)
        if on_edit is not None:
            on_edit(call, first)

    with recorder.watch():
        images = sweep(
            pipe, SAES, variants, prompt=PROMPT, seed=0, settings=SETTINGS, on_edit=record, max_batch=max_batch
        )
    return images, recorder


def measured(pipe: FluxPipeline, edits, strengths, **options) -> list[EditMeasurement]:
    images, recorder = recorded_sweep(pipe, edits, strengths, **options)
    return [
        measure_edit(
            images[0].image, image.image, seen, grid=token_grid(pipe, SETTINGS), distance=PixelDistance(), prompt=PROMPT
        )
        for image, seen in zip(images, recorder.recorded, strict=True)
    ]


def test_the_baseline_and_an_identity_measure_nothing(tiny_flux: FluxPipeline) -> None:
    edit = SteeringEdit(DOUBLE, alive_feature(tiny_flux, DOUBLE), "add", 1.0, steps=ALL)
    baseline, identity, _ = measured(tiny_flux, edit, [0.0, 3.0])
    for nothing in (baseline, identity):
        assert nothing.distance == 0
        assert nothing.edited_share == 0
        assert nothing.out_of_distribution == 0
        assert nothing.distance_inside is None
        assert nothing.relative_size is None


def test_a_stronger_edit_measures_more(tiny_flux: FluxPipeline) -> None:
    edit = SteeringEdit(DOUBLE, alive_feature(tiny_flux, DOUBLE), "add", 1.0, steps=(2, 4))
    _, weak, strong, wild = measured(tiny_flux, edit, [0.5, 4.0, 400.0], max_batch=2)
    assert 0 < weak.relative_size < strong.relative_size < wild.relative_size
    assert strong.activation_after > weak.activation_after > weak.activation_before >= 0
    assert wild.out_of_distribution == 1
    assert wild.out_of_distribution >= strong.out_of_distribution >= weak.out_of_distribution
    assert weak.edited_share == wild.edited_share == 1
    assert wild.distance > 0


def test_the_size_is_taken_behind_the_gate(tiny_flux: FluxPipeline) -> None:
    """Against the block's own outputs: with and without the edit they differ by exactly the gated delta."""
    edit = SteeringEdit(DOUBLE, 5, "add", 2.0, steps=(0, 1))
    _, recorder = recorded_sweep(tiny_flux, edit, [2.0])
    outputs: list[torch.Tensor] = []
    with block_hooks(tiny_flux, {BLOCK: lambda call: outputs.append(call.tokens.clone()) if call.step == 0 else None}):
        recorded_sweep(tiny_flux, edit, [2.0])
    clean, steered = outputs[0]
    expected = ((steered - clean).norm(dim=-1) / clean.norm(dim=-1)).mean()
    assert len(recorder.recorded[1].relative_sizes) == 1
    assert recorder.recorded[1].relative_sizes[0] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    "place", ["transformer_blocks.1", "transformer_blocks.1.attn:text", "single_transformer_blocks.1"]
)
def test_sizes_are_known_where_the_edit_is_added_to_the_stream(tiny_flux: FluxPipeline, place: str) -> None:
    edit = SteeringEdit(place, 5, "add", 2.0, steps=(1, 3))
    _, recorder = recorded_sweep(tiny_flux, edit, [2.0])
    assert len(recorder.recorded[1].relative_sizes) == 2
    assert all(size > 0 for size in recorder.recorded[1].relative_sizes)


def test_a_region_splits_the_picture(tiny_flux: FluxPipeline) -> None:
    region = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    edit = SteeringEdit(DOUBLE, 5, "add", 30.0, steps=ALL, region=region)
    _, steered = measured(tiny_flux, edit, [30.0])
    assert steered.edited_share == 4 / 16
    whole = steered.distance_inside * 0.25 + steered.distance_outside * 0.75
    assert whole == pytest.approx(steered.distance, rel=1e-4)


def test_pixels_follow_their_tokens() -> None:
    tokens = torch.tensor([True, False, False, False, False, True])
    pixels = region_pixels(tokens, TokenGrid(2, 3), height=4, width=6)
    expected = [[1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1]] * 2
    assert pixels.int().tolist() == expected
    assert region_pixels(torch.tensor([True, False]), TokenGrid(2, 3), height=2, width=3).all()


def test_the_recorder_leaves_the_images_and_the_model_as_they_are(tiny_flux: FluxPipeline) -> None:
    before = n_hooks(tiny_flux)
    edits = [
        SteeringEdit(DOUBLE, 5, "add", 1.0, steps=ALL),
        SteeringEdit(SINGLE, 5, "add", 1.0, steps=ALL, region=HeatmapRegion()),
    ]
    watched, _ = recorded_sweep(tiny_flux, edits, [4.0])
    plain = sweep(
        tiny_flux, SAES, strength_variants(edits, [4.0]), prompt=PROMPT, seed=0, settings=SETTINGS, max_batch=3
    )
    assert all(torch.equal(one.latents, other.latents) for one, other in zip(watched, plain, strict=True))
    assert n_hooks(tiny_flux) == before


def test_a_recorder_wants_the_baseline_first(tiny_flux: FluxPipeline) -> None:
    with pytest.raises(FluxSaeError, match="baseline"):
        EditRecorder(tiny_flux, SAES, [[SteeringEdit(DOUBLE, 5, "add", 1.0, steps=ALL)]])


def test_token_limits_call_few_clean_tokens_foreign_and_all_wild_ones(tiny_flux: FluxPipeline) -> None:
    prompts, seeds = ["a red circle", "a blue star", "a small green ring"] * 4, list(range(12))
    how = replace(SETTINGS, guidance_scale=3.5)
    limits = measure_token_limits(
        tiny_flux, SAES[DOUBLE], DOUBLE, prompts=prompts, seeds=seeds, settings=how, steps=[1, 2], quantile=0.98
    )
    assert len(limits.sigmas) == 2
    assert TokenLimits.from_dict(limits.to_dict()) == limits
    with capture(tiny_flux, [DOUBLE], steps=[2]) as captured:
        generate(tiny_flux, "a large cyan heart", seeds=77, settings=SETTINGS)
    clean, sigma = captured.get(DOUBLE, 2), captured.sigma(2)
    assert limits.is_outside(clean, SAES[DOUBLE], sigma=sigma).float().mean() < 0.4
    assert limits.is_outside(clean * 20, SAES[DOUBLE], sigma=sigma).all()
    assert limits.is_outside(clean * 0.01, SAES[DOUBLE], sigma=sigma).all()


def test_limits_are_quantiles() -> None:
    values = torch.stack([torch.arange(1001.0), 2 * torch.arange(1001.0)], dim=1)
    limits = limits_of({0.5: values, 0.9: values + 1}, quantile=0.9)
    assert limits.sigmas == (0.9, 0.5)
    assert limits.norm_low[1] == pytest.approx(100)
    assert limits.norm_high[1] == pytest.approx(900)
    assert limits.residual_high[1] == pytest.approx(1800)
    assert limits.norm_high[0] == pytest.approx(901)


def test_norm_and_residual_are_euclidean() -> None:
    x = torch.randn(3, D_MODEL, generator=torch.Generator().manual_seed(0))
    norm, residual = norm_and_residual(x, SAES[DOUBLE])
    torch.testing.assert_close(norm, (x**2).sum(-1).sqrt())
    torch.testing.assert_close(residual, ((x - SAES[DOUBLE](x).x_hat) ** 2).sum(-1).sqrt())


def test_norms_and_residuals_of_a_trainable_sae_hold_no_graph() -> None:
    trainable = SparseAutoencoder(SAES[DOUBLE].config, seed=0).requires_grad_()
    assert not any(found.requires_grad for found in norm_and_residual(torch.randn(3, D_MODEL), trainable))


def measurement(out_of_distribution: float, denoising_error_ratio: float | None = None) -> EditMeasurement:
    return EditMeasurement(0, 0, 0, "d", None, None, 0, 0, out_of_distribution, 0, 1, denoising_error_ratio)


@pytest.mark.parametrize(
    ("share", "ratio", "expected"),
    [(0.1, None, True), (0.1, 1.5, True), (0.0, 1.6, False), (0.2, 1.0, False), (0.2, None, False)],
)
def test_natural_is_what_stays_in_distribution_and_looks_like_flux(share, ratio, expected) -> None:
    assert measurement(share, ratio).looks_natural is expected


def test_controls_have_unit_norm_and_are_not_the_feature_itself() -> None:
    sae = SAES[DOUBLE]
    directions, features = random_directions(D_MODEL, 200, seed=3), random_features(sae, 5, 200, seed=3)
    for rows in (directions, features):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(200))
        assert ((rows @ sae.W_dec[5]) < 0.999).all()
    assert torch.equal(directions, random_directions(D_MODEL, 200, seed=3))


def test_measure_edit_reports_clip_where_there_is_one() -> None:
    class Embedder:
        name = "angles"

        def embed_images(self, images):
            return torch.tensor([[1.0, 0.0] if image.getpixel((0, 0))[0] else [0.6, 0.8] for image in images])

        def embed_texts(self, texts):
            return torch.tensor([[1.0, 0.0] for _ in texts])

        def unknown_words(self, text):
            return []

    black, white = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), (255, 255, 255))
    found = measure_edit(
        black,
        white,
        RecordedEdit(),
        grid=TokenGrid(4, 4),
        distance=PixelDistance(),
        embedder=Embedder(),
        prompt="white",
    )
    assert found.clip_change == pytest.approx(0.4)
    assert found.clip_prompt_change == pytest.approx(0.4)
    assert found.distance == pytest.approx(1.0)
