from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import train.analyze
import train.heatmap
import train.score
from fluxsae.errors import FluxSaeError
from fluxsae.flux import block_hooks, default_settings, flux_identity, load_flux, schedule_sigmas
from fluxsae.flux.hookpoints import HookPoint, TokenGrid
from fluxsae.pictures.heatmaps import (
    HEAT,
    NAMED_COLOURS,
    NEUTRAL_COLOUR,
    SheetCell,
    SheetRow,
    contact_sheet,
    enlarge,
    feature_colour,
    font,
    heat_colours,
    legend,
    names_colour,
    overlay,
    token_heatmap,
    with_legend,
    wrap,
)
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.sae.config import SaeConfig, TrainedOn
from fluxsae.sae.model import SparseAutoencoder


def picture(width: int = 96, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_heatmap_is_the_acts_as_fractions_of_the_reference_row_by_row() -> None:
    # reference 4: 1/4, 2/4, 4/4 / 8/4 is clipped, 0, 0
    heatmap = token_heatmap(torch.tensor([1.0, 2.0, 4.0, 8.0, 0.0, 0.0]), TokenGrid(2, 3), reference=4.0)
    assert heatmap.tolist() == [[0.25, 0.5, 1.0], [1.0, 0.0, 0.0]]


def test_the_same_activation_looks_the_same_in_every_image_at_a_shared_reference() -> None:
    calm, busy = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 5.0])
    grid = TokenGrid(1, 2)
    first, second = (token_heatmap(acts, grid, reference=5.0) for acts in (calm, busy))
    assert first[0, 0] == second[0, 0]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=12, max_size=12), st.floats(0, 1e6))
def test_heatmaps_stay_in_zero_to_one(acts: list[float], reference: float) -> None:
    heatmap = token_heatmap(torch.tensor(acts), TokenGrid(3, 4), reference=reference)
    assert heatmap.shape == (3, 4)
    assert heatmap.min() >= 0
    assert heatmap.max() <= 1


@pytest.mark.parametrize(
    ("acts", "reference", "named"),
    [
        (torch.zeros(7), 1.0, "7 tokens"),
        (torch.full((6,), torch.nan), 1.0, "NaN"),
        (torch.zeros(6), -1.0, "reference"),
        (torch.zeros(6), float("inf"), "reference"),
    ],
)
def test_what_is_no_heatmap_is_refused_by_name(acts: torch.Tensor, reference: float, named: str) -> None:
    with pytest.raises(FluxSaeError, match=named):
        token_heatmap(acts, TokenGrid(2, 3), reference=reference)


def test_opacity_zero_gives_the_picture_back() -> None:
    image = picture()
    shown = overlay(image, np.ones((4, 6), np.float32), opacity=0.0)
    assert np.array_equal(np.asarray(shown), np.asarray(image))


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("width", "height"), [(96, 64), (30, 50)])
def test_heat_lies_on_the_token_that_fires_at_any_size_and_grid(width: int, height: int, *, smooth: bool) -> None:
    heatmap = np.zeros((2, 3), np.float32)
    heatmap[1, 2] = 1.0
    plain = Image.new("RGB", (width, height), (90, 90, 90))
    shown = np.asarray(overlay(plain, heatmap, smooth=smooth), dtype=np.float32)
    row, column = np.unravel_index(shown.sum(axis=2).argmax(), shown.shape[:2])
    assert row >= height / 2
    assert column >= 2 * width / 3
    assert np.ptp(shown[: height // 4, : width // 4].reshape(-1, 3), axis=0).max() == 0


def test_where_nothing_fires_the_picture_keeps_its_colours_a_little_darker() -> None:
    shown = np.asarray(overlay(picture(), np.zeros((4, 6), np.float32), opacity=1.0), dtype=float)
    assert np.abs(shown - HEAT.dimming * np.asarray(picture(), dtype=float)).max() <= 0.5
    assert 0.6 < HEAT.dimming < 1


def test_heat_below_the_threshold_is_not_shown() -> None:
    weak = np.full((4, 6), 0.2, np.float32)
    silent = overlay(picture(), np.zeros((4, 6), np.float32))
    assert np.array_equal(np.asarray(overlay(picture(), weak, threshold=0.3)), np.asarray(silent))
    assert not np.array_equal(np.asarray(overlay(picture(), weak, threshold=0.1)), np.asarray(silent))


@pytest.mark.parametrize("setting", [{"opacity": 1.2}, {"opacity": float("nan")}, {"threshold": -0.1}])
def test_settings_outside_their_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(FluxSaeError, match=f"{next(iter(setting))}.*between 0 and 1"):
        overlay(picture(), np.zeros((4, 6), np.float32), **setting)


def test_a_heatmap_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(FluxSaeError, match="token_heatmap"):
        overlay(picture(), np.full((4, 6), 1.5, np.float32))


def test_enlarged_pictures_are_pixel_crisp() -> None:
    image = picture(5, 3)
    large = enlarge(image, min_side=32)
    assert large.size == (35, 21)
    assert np.array_equal(np.asarray(large)[::7, ::7], np.asarray(image))
    assert len({tuple(pixel) for pixel in np.asarray(large).reshape(-1, 3)}) <= 15


def test_more_heat_is_always_lighter_so_that_no_hue_need_be_told_apart() -> None:
    colours = heat_colours(np.linspace(0, 1, 64, dtype=np.float32)[None])[0].astype(float) / 255
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    luminance = linear @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(luminance) > 0).all()


def test_the_legend_names_its_maximum_and_fits_under_any_picture() -> None:
    assert legend(300, maximum=2.5).width == 300
    assert np.asarray(legend(300, maximum=2.5)).tobytes() != np.asarray(legend(300, maximum=3.5)).tobytes()
    assert with_legend(picture(), maximum="this image's maximum").width == 96


def test_a_label_that_names_a_colour_wears_it_and_no_other_does() -> None:
    assert feature_colour("large red") == feature_colour("red, striped") == NAMED_COLOURS["red"]
    assert feature_colour(None) == feature_colour("circle") == NEUTRAL_COLOUR
    assert names_colour("white background")
    assert not names_colour("reddish")
    assert not names_colour(None)


def test_a_contact_sheet_shows_every_feature_and_grows_by_a_row_a_feature() -> None:
    heatmap = np.eye(4, dtype=np.float32)
    row = SheetRow(
        3, "a label that is rather long for its place", "fires often", [SheetCell(picture(), heatmap, "x")] * 3
    )
    one, two = contact_sheet([row], columns=3), contact_sheet([row, row], columns=3)
    assert two.width == one.width
    assert two.height > one.height
    assert np.asarray(two).std() > 10


def test_a_contact_sheet_without_pictures_is_refused() -> None:
    for rows in ([], [SheetRow(0, "", "", [])]):
        with pytest.raises(FluxSaeError, match="at least one feature"):
            contact_sheet(rows)


def test_wrapped_lines_fit_their_width() -> None:
    face = font(12)
    lines = wrap("a sheet of incomprehensibilities_without_any_space_inside and more", face, 80)
    assert all(face.getlength(line) <= 80 for line in lines)
    assert lines[-1].endswith("more")


@pytest.fixture(scope="module")
def tiny_run(tiny_flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A scored and analysed run of the random tiny FLUX."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    prompts = folder.with_suffix(".txt")
    prompts.write_text("a red star\na blue ring\na large green heart\na small cross on the left\n")
    run = RunFolder(folder)
    pipe = load_flux(str(tiny_flux_folder), device="cpu")
    settings = replace(default_settings(pipe), height=32, width=48)
    identity, sigmas = flux_identity(pipe), schedule_sigmas(pipe, settings)
    info = RunInfo(identity.flux_id, settings, ("transformer_blocks.1.ff",), flux_revision=identity.revision)
    run.save_info(info)
    ground = TrainedOn(
        flux_id=identity.flux_id,
        flux_revision=identity.revision,
        hookpoint="transformer_blocks.1.ff",
        steps=(1, 2),
        sigmas=(sigmas[1], sigmas[2]),
        height=settings.height,
        width=settings.width,
        guidance_scale=settings.guidance_scale,
        n_tokens=24,
        dataset_hash="",
    )
    config = SaeConfig(
        architecture="topk", d_model=32, n_features=64, k=4, sigma_table=(sigmas[2], sigmas[1]), trained_on=ground
    )
    SparseAutoencoder(config).save_pretrained(run.sae_path("layer1"))
    options = train.score.ScoreConfig(
        run=folder, flux=str(tiny_flux_folder), prompts=prompts, images=4, height=32, width=48, device="cpu"
    )
    train.score.main(options)
    train.analyze.main(train.analyze.AnalyzeConfig(run=folder))
    return run


def test_the_heatmap_script_shows_one_feature_of_one_image(
    tiny_run: RunFolder, tiny_flux_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "heatmap.png"
    config = train.heatmap.HeatmapConfig(
        prompt="a red star", run=tiny_run.path, flux=str(tiny_flux_folder), why=True, out=out, device="cpu"
    )
    train.heatmap.main(config)
    printed = capsys.readouterr().out
    assert "highest activation" in printed
    assert "without 'star'" in printed
    picture = Image.open(out)
    assert picture.width > 2 * 512
    assert np.asarray(picture).std() > 5


def test_the_heatmap_script_refuses_activations_that_are_no_numbers(
    tiny_run: RunFolder, tiny_flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = load_flux(str(tiny_flux_folder), device="cpu")
    monkeypatch.setattr("fluxsae.flux.load_flux", lambda *_, **__: pipe)
    out = tmp_path / "heatmap.png"
    config = train.heatmap.HeatmapConfig(prompt="a red star", run=tiny_run.path, out=out)
    with (
        block_hooks(pipe, {HookPoint.parse("layer0"): lambda call: call.tokens / 0}),
        pytest.raises(FluxSaeError, match=r"At step 1 of transformer_blocks.1.ff, .* of this image hold NaN"),
    ):
        train.heatmap.main(config)
    assert not out.exists()


def test_the_heatmap_script_refuses_what_does_not_exist_before_any_model_work(
    tiny_run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxsae.flux.load_flux", lambda *_, **__: pytest.fail("FLUX was loaded"))
    good = train.heatmap.HeatmapConfig(prompt="a star", run=tiny_run.path)
    for wrong, named in (
        (replace(good, feature=64), "0 to 63"),
        (replace(good, hookpoint="layer7"), "no SAE"),
        (replace(good, run=Path("nowhere")), "nowhere"),
    ):
        with pytest.raises(FluxSaeError, match=named):
            train.heatmap.main(wrong)
