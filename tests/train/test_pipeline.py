"""The stages in one process: done once, skipped when complete, refused when they would become something else."""

import json
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fluxsae.errors import FluxSaeError
from fluxsae.features.scores import ScoreMatrix
from fluxsae.flux.settings import GenerationSettings
from fluxsae.runs.folder import RunFolder, RunInfo, StageRecord
from fluxsae.sae.model import SparseAutoencoder
from train import analyze, collect, embed, score
from train.flux_options import FluxOptions
from train.pipeline import PipelineConfig, choose_stages, main, parse_arguments
from train.recipes import RECIPES, SCRIPTS, build_recipe, build_stage_configs
from train.stages import STAGES, StageResult, format_table, run_stage, start_over

OPTIONS = (
    "collect.images=12", "collect.images_per_shard=5", "collect.batch_size=4", "fit.epochs=2", "fit.batch_size=64",
    "fit.n_features=48", "fit.k=4", "score.images=10", "score.images_per_part=4", "score.batch_size=4",
    "analyze.features.n_top_images=3", "directions.perplexity=5",
)  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"a {colour} star" for colour in ("red", "blue", "green", "pink", "cyan")))
    return path


def config_for(folder: Path, run: Path, prompts: Path, **changes: object) -> PipelineConfig:
    config = PipelineConfig(
        flux=str(folder),
        run=run,
        prompts=prompts,
        steps=(1, 3),
        set=OPTIONS,
        skip=("embed", "select", "render", "demos"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def words(results: Sequence[StageResult]) -> dict[str, str]:
    return {result.name: result.word for result in results}


@pytest.fixture(scope="module")
def finished(tiny_flux_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    config = config_for(tiny_flux_folder, tmp_path_factory.mktemp("runs") / "run", prompts)
    results = main(config)
    assert words(results) == dict.fromkeys(("collect", "fit", "score", "analyze", "directions"), "done")
    return config


def test_the_run_holds_what_browsing_needs(finished: PipelineConfig) -> None:
    assert finished.run is not None
    run = RunFolder(finished.run)
    assert [str(place) for place in run.hookpoints()] == ["transformer_blocks.0.ff", "transformer_blocks.2.ff"]
    assert len(run.load_images()) == 10
    for place in run.hookpoints():
        assert run.has_sae(place)
        assert len(run.load_features(place)) == 48
        assert ScoreMatrix.load(run.scores_path(place)).steps == (1, 3)
        assert run.load_directions(place)["positions"].shape == (48, 2)
        assert run.load_metrics(place)["fvu"] < 1
    index = json.loads(run.index_path.read_text())
    assert set(index["saes"]) == {str(place) for place in run.hookpoints()}
    assert not list(run.work_path("score").glob("images-*"))  # parts of S stay, since images may be added


def test_a_second_time_everything_is_skipped_and_says_so(
    finished: PipelineConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FluxOptions, "open", lambda _: pytest.fail("FLUX was opened for nothing"))
    assert set(words(main(finished)).values()) == {"skipped"}
    printed = capsys.readouterr().out
    assert "score: complete, skipped" in printed
    assert "stage" in printed
    assert "total" in printed


def test_other_options_for_a_complete_stage_are_refused_with_both_values(finished: PipelineConfig) -> None:
    with pytest.raises(FluxSaeError, match=r"images was 10, now 9\. Pass --force"):
        main(replace(finished, set=(*OPTIONS, "score.images=9"), only=("score",)))


def test_the_run_of_another_flux_is_refused_and_its_recipe_kept(finished: PipelineConfig) -> None:
    toml = RunFolder(finished.run).toml_path
    before = toml.read_text()
    with pytest.raises(FluxSaeError, match=r"is a run of .* not of another/flux"):
        main(replace(finished, flux="another/flux"))
    assert toml.read_text() == before


def test_a_stage_done_again_makes_the_later_ones_run_again(finished: PipelineConfig) -> None:
    assert words(main(replace(finished, only=("analyze",), force=True))) == {"analyze": "done"}
    assert words(main(replace(finished, from_="score"))) == {
        "score": "skipped", "analyze": "skipped", "directions": "done"
    }  # fmt: skip


def test_the_saved_run_toml_gives_the_same_run(finished: PipelineConfig) -> None:
    assert finished.run is not None
    path = RunFolder(finished.run).toml_path
    again = PipelineConfig.from_recipe(str(path), run=finished.run)
    assert set(words(main(again)).values()) == {"skipped"}
    assert tomllib.loads(path.read_text())["fit"]["k"] == 4


def test_an_export_holds_what_the_hub_would_have_and_replaces_an_older_run(
    finished: PipelineConfig, tmp_path: Path
) -> None:
    assert finished.run is not None
    run, copy = RunFolder(finished.run), RunFolder(tmp_path / "copy")
    place = run.hookpoints()[0]
    run.save_demos(place, [json.dumps({"recipe": {"saes": [{"hookpoint": str(place), "source": str(run.path)}]}})])
    for _ in range(2):
        main(replace(finished, export=copy.path))
        assert copy.published_files() == run.published_files()
        assert not copy.activations_path.exists()
        assert [path.name for path in tmp_path.iterdir()] == ["copy"]
        assert copy.load_demos(place)[0]["recipe"]["saes"][0]["source"] == str(copy.path)
    run.demos_path(place).unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("dear")
    with pytest.raises(FluxSaeError, match="holds something that is no run"):
        main(replace(finished, export=tmp_path / "other"))


def test_scoring_with_an_sae_of_another_size_is_refused(finished: PipelineConfig) -> None:
    with pytest.raises(FluxSaeError, match="trained elsewhere"):
        main(replace(finished, only=("score",), force=True, guidance_scale=1.0))


def test_one_step_alone_can_be_scored_where_the_sae_was_trained(finished: PipelineConfig) -> None:
    with pytest.raises(FluxSaeError, match="steps go from 0 to 3"):
        main(replace(finished, set=(*OPTIONS, "score.steps=9"), only=("score",), force=True))


# Options


def test_flags_override_the_file_and_set_overrides_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[flux]\nflux = "a/b"\nseed = 5\n[pipeline]\nsteps = [1]\n[fit]\nk = 8\nepochs = 3\n')
    config = parse_arguments(["--recipe", str(path), "--seed", "0", "--set", "fit.k=16", "score.steps=3"])
    assert (config.flux, config.seed, config.steps) == ("a/b", 0, (1,))
    recipe = build_recipe(config)
    (fit,) = build_stage_configs("fit", recipe, RunFolder("r"))
    assert (fit.k, fit.epochs, fit.seed, fit.flux) == ((16,), 3, 0, "a/b")
    assert build_stage_configs("collect", recipe, RunFolder("r"))[0].steps == (1,)
    assert build_stage_configs("score", recipe, RunFolder("r"))[0].steps == (3,)


def test_hook_points_may_have_saes_of_their_own(finished: PipelineConfig, tmp_path: Path) -> None:
    assert finished.run is not None
    shutil.copytree(finished.run / "activations", tmp_path / "run" / "activations")
    for name in ("run.json", "config.json"):
        shutil.copy(finished.run / name, tmp_path / "run")
    (tmp_path / "own.toml").write_text(
        '[pipeline]\nhookpoints = ["layer0", "layer2"]\n'
        '[[fit]]\nhookpoints = ["layer0"]\narch = "batchtopk"\n[[fit]]\nhookpoints = ["layer2"]\narch = "topk"\n'
    )
    config = PipelineConfig.from_recipe(
        str(tmp_path / "own.toml"), flux=finished.flux, prompts=finished.prompts, steps=finished.steps,
        set=OPTIONS, run=tmp_path / "run", only=("fit",),
    )  # fmt: skip
    assert [(result.name, result.word) for result in main(config)] == [("fit", "done")] * 2
    saes = [SparseAutoencoder.from_pretrained(tmp_path / "run" / "sae" / f"transformer_blocks.{i}.ff") for i in (0, 2)]
    assert [sae.config.architecture for sae in saes] == ["batchtopk", "topk"]
    assert [sae.config.k for sae in saes] == [4, 4]  # --set reaches every table
    record = RunFolder(tmp_path / "run").load_info().stages["fit"]
    assert set(record.config) == {"transformer_blocks.0.ff", "transformer_blocks.2.ff"}
    recipe = build_recipe(config)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    again = build_recipe(PipelineConfig.from_recipe(str(tmp_path / "again.toml")))
    assert list(again.stages["fit"]) == list(recipe.stages["fit"])


@pytest.mark.parametrize("name", RECIPES)
def test_every_bundled_recipe_is_valid(name: str) -> None:
    recipe = build_recipe(parse_arguments(["--recipe", name]))
    for stage in STAGES:
        build_stage_configs(stage, recipe, RunFolder("r"))
    (collected,) = build_stage_configs("collect", recipe, RunFolder("r"))
    fitted = [place for fit in build_stage_configs("fit", recipe, RunFolder("r")) for place in fit.hookpoints]
    assert fitted in ([], list(collected.hookpoints))


def test_the_miniature_s_recipe_is_taken_without_asking() -> None:
    asked, unasked = (build_recipe(parse_arguments(words)) for words in (["--recipe", "miniature"], []))
    assert asked == unasked


def test_an_unknown_recipe_is_refused_with_the_bundled_ones() -> None:
    with pytest.raises(
        FluxSaeError,
        match=r"no recipe flux-def. Bundled are flux-dev-evening, flux-dev, flux-schnell, flux2-klein",
    ):
        parse_arguments(["--recipe", "flux-def"])


def test_a_recipe_of_before_opens_under_the_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text(
        '[pipeline]\nhookpoints = ["layer0"]\n[collect]\nn_images = 7\n[[fit]]\nhookpoint = "layer0"\nstep = [1]\n'
        '[score]\nstep = 3\nn_images = 5\n[render]\nhookpoint = "layer0"\n'
    )
    recipe = build_recipe(parse_arguments(["--recipe", str(path)]))
    (collected,), (fitted,), (scored,), (rendered,) = (
        build_stage_configs(stage, recipe, RunFolder("r")) for stage in ("collect", "fit", "score", "render")
    )
    assert (collected.images, scored.images, scored.steps) == (7, 5, (3,))
    assert (fitted.hookpoints, fitted.steps, rendered.hookpoints) == (("layer0",), (1,), ("layer0",))
    assert "n_images" not in recipe.to_toml()


def test_a_stage_that_was_recorded_under_older_names_is_still_complete(
    finished: PipelineConfig, tmp_path: Path
) -> None:
    assert finished.run is not None
    shutil.copytree(finished.run, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    values = json.loads(run.info_path.read_text())
    for name in ("score", "analyze", "directions"):  # one config for all hook points
        record = values["stages"][name]
        digests = {place: own.pop("sae") for place, own in record["config"].items()} if name == "score" else {}
        record["config"] = next(iter(record["config"].values())) | ({"saes": digests} if digests else {})
    score_record = values["stages"]["score"]["config"]
    score_record["n_images"], score_record["step"] = score_record.pop("images"), None
    del score_record["steps"]
    for own in values["stages"]["fit"]["config"].values():
        own["step"] = own.pop("steps")
    run.info_path.write_text(json.dumps(values))
    assert set(words(main(replace(finished, run=run.path))).values()) == {"skipped"}


def test_scores_of_earlier_saes_are_not_described(finished: PipelineConfig, tmp_path: Path) -> None:
    assert finished.run is not None
    shutil.copytree(finished.run, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.save_info(run.load_info().without_stages(STAGES[STAGES.index("score") :]))  # as a new `fit` does
    with pytest.raises(FluxSaeError, match=r"analyze needs score.*python -m train\.score"):
        analyze.main(analyze.AnalyzeConfig(run=run.path))
    with pytest.raises(FluxSaeError, match=r"embed needs score.*python -m train\.score"):
        embed.main(embed.EmbedConfig(run=run.path))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ('[[fit]]\nhookpoints = ["layer0"]\n[[fit]]\nk = 4\n', ()),
        ('[[fit]]\nhookpoints = ["layer0"]\n[[fit]]\nhookpoints = ["layer0", "layer2"]\n', ()),
        ('[[fit]]\nhookpoints = ["layer0"]\n[[fit]]\nhookpoints = ["layer2"]\n', ("--hookpoints", "layer0", "layer1")),
    ],
)
def test_fits_that_do_not_share_out_the_hook_points_are_refused(
    text: str, flags: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[pipeline]\nhookpoints = ["layer0", "layer2"]\n' + text)
    config = parse_arguments(["--recipe", str(path), "--run", str(tmp_path / "run"), *flags])
    with pytest.raises(FluxSaeError, match="share out the hook points"):
        main(config)
    assert not (tmp_path / "run").exists()


def test_other_hook_points_than_the_bundled_recipe_s_need_a_recipe_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=r"hook points are transformer_blocks\.2\.ff.*a --recipe of your own"):
        main(parse_arguments(["--flux", "miniature", "--run", str(tmp_path / "run"), "--hookpoints", "layer2"]))


def test_collecting_again_without_names_means_the_run_s_own_hook_points(tmp_path: Path) -> None:
    record = StageRecord({"transformer_blocks.3": {}}, 1.0, 1.0)
    info = RunInfo(flux_id="tiny", settings=GenerationSettings(), hookpoints=("transformer_blocks.3",))
    config = collect.CollectConfig(run=tmp_path)
    assert collect._as_collected(config, info.with_stage("collect", record)).hookpoints == info.hookpoints
    unnamed = info.with_stage("collect", StageRecord({collect.UNNAMED: {}}, 1.0, 1.0))
    assert collect._as_collected(config, unnamed).hookpoints == ()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("fit", "no stage.option=value"),
        ("fit.k", "no stage.option=value"),
        ("cook.k=1", r"names cook, which does not exist. Allowed: collect, fit"),
        ("fit.kk=1", "names kk, which does not exist"),
        ("fit.epochs=many", "fit.epochs is 'many'. It must be a valid integer"),
        ("fit.epochs=true", "fit.epochs is True. It must be a valid integer"),
        ("fit.arch=relu", "fit.arch is 'relu'. It must be 'l1', 'topk'"),
        ("fit.seed=3", "fit.seed belongs to all stages"),
        ("analyze.features.rare_below=2", "rare_below is 2.0"),
        ("analyze.features.rarely=2", "names rarely"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(assignment: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FluxSaeError, match=message):
        main(PipelineConfig(run=tmp_path / "run", set=(assignment,)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[flux", "not valid TOML"),
        ("seed = 1", "must stand in a table"),
        ("[flux]\nsead = 1", "names sead"),
        ("fit = [1]", "must stand in a table"),
        ("[[score]]\nstep = 1", r"score stands several times; only \[\[fit\]\] may"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(FluxSaeError, match=message):
        PipelineConfig.from_recipe(str(tmp_path / "run.toml"))


def test_from_and_only_choose_the_stages() -> None:
    assert choose_stages(PipelineConfig(only=("render", "fit"))) == ["fit", "render"]
    assert choose_stages(PipelineConfig(from_="directions", skip=("demos",))) == ["directions", "render"]
    with pytest.raises(FluxSaeError, match="contradict"):
        choose_stages(PipelineConfig(only=("fit",), from_="fit"))


def test_every_stage_of_the_pipeline_is_known_in_its_order() -> None:
    assert tuple(SCRIPTS) == STAGES


# Single scripts


def test_scripts_say_which_stage_is_missing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.save_info(RunInfo(flux_id="tiny", settings=GenerationSettings(), hookpoints=("transformer_blocks.1.ff",)))
    with pytest.raises(FluxSaeError, match=r"has no SAE at transformer_blocks\.1\.ff. Train it first"):
        score.main(score.ScoreConfig(run=run.path))
    with pytest.raises(FluxSaeError, match=r"has no scores\. Score images first"):
        analyze.main(analyze.AnalyzeConfig(run=run.path))


def test_a_run_of_another_flux_is_not_written_into(tiny_flux_folder: Path, prompts: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(RunInfo(flux_id="other", settings=GenerationSettings(), hookpoints=("transformer_blocks.1.ff",)))
    with pytest.raises(
        FluxSaeError, match=r"is a run of something else: FLUX is tiny-flux .*, not other \(weights unknown\)"
    ):
        collect.main(collect.CollectConfig(flux=str(tiny_flux_folder), run=tmp_path, prompts=prompts, images=2))


def test_a_cached_flux_is_refused_unless_asked_for(tiny_flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxsae.flux.why_inexact", lambda _: "a step cache is enabled")
    with pytest.raises(FluxSaeError, match="not the model's own: a step cache is enabled"):
        FluxOptions(flux=str(tiny_flux_folder)).open()
    FluxOptions(flux=str(tiny_flux_folder), allow_inexact=True).open()


def test_the_table_sums_what_was_spent(tmp_path: Path) -> None:
    table = format_table([StageResult("fit", "done", 3.0, 1.5), StageResult("score", "skipped", 9.0, 2.0)])
    assert table.splitlines()[-1].split() == ["total", "3.0", "3.5"]


def test_a_stage_whose_files_were_deleted_runs_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(RunInfo(flux_id="tiny", settings=GenerationSettings(), hookpoints=()))
    output = tmp_path / "out.txt"

    def run_it() -> str:
        return run_stage(run, "fit", {"k": (1, 2)}, lambda _: output.touch(), outputs=lambda _: [output]).word

    assert [run_it(), run_it()] == ["done", "skipped"]
    output.unlink()
    assert run_it() == "done"


def test_a_stage_stopped_at_its_second_hook_point_is_not_mistaken_for_one_of_other_settings(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.save_info(RunInfo(flux_id="tiny", settings=GenerationSettings(), hookpoints=()))
    first, second = tmp_path / "first", tmp_path / "second"

    def run_it(name: str, output: Path, value: int = 1, *, work: object = None) -> str:
        act = work or (lambda _: output.touch())
        return run_stage(run, "fit", {name: {"k": value}}, act, outputs=lambda _: [output], by_name=True).word  # type: ignore[arg-type]

    def write_and_die(_: list[str]) -> None:
        second.touch()
        raise KeyboardInterrupt

    assert run_it("a", first) == "done"
    with pytest.raises(KeyboardInterrupt):
        run_it("b", second, work=write_and_die)
    assert [run_it("b", second), run_it("a", first), run_it("b", second)] == ["done", "skipped", "skipped"]
    with pytest.raises(FluxSaeError, match="fit is complete at b with other settings: k was 1, now 2"):
        run_it("b", second, 2)
    start_over(run, "fit", ["b"])
    assert [run_it("a", first), run_it("b", second)] == ["skipped", "done"]


def test_collection_fills_the_gaps_of_a_complete_stage(finished: PipelineConfig) -> None:
    assert finished.run is not None
    folder = RunFolder(finished.run).activations_folder("layer2")
    lost = sorted(folder.glob("shard-*"))[1]
    content = lost.read_bytes()
    lost.unlink()
    assert words(main(replace(finished, only=("collect",)))) == {"collect": "done"}
    assert lost.read_bytes() == content
    assert words(main(replace(finished, only=("collect",)))) == {"collect": "skipped"}
