"""A finished run that grows: one more SAE, one more hook point, more images, names by people, an SAE from elsewhere."""

import csv
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fluxsae.activations.shards import ShardFolder
from fluxsae.errors import FluxSaeError
from fluxsae.features.cards import CardIndex
from fluxsae.features.scores import FeatureStats, ScoreMatrix
from fluxsae.files import load_tensors
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from train import adopt, analyze, collect, compare_layers, directions, fit, score
from train.adopt import AdoptConfig
from train.analyze import AnalyzeConfig
from train.collect import CollectConfig
from train.compare_layers import CompareLayersConfig
from train.directions import DirectionsConfig
from train.fit import FitConfig
from train.score import ScoreConfig

PLACE, OTHER, WIDE = "transformer_blocks.0.ff", "transformer_blocks.2.ff", "transformer_blocks.0.ff@wide"
STEPS = (1, 3)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"a {colour} star" for colour in ("red", "blue", "green", "pink", "cyan", "gray", "tan")))
    return path


class Stages:
    """The stages on a tiny FLUX, with the options that this file shares."""

    def __init__(self, flux: Path, prompts: Path, run: Path) -> None:
        self.run = RunFolder(run)
        self.flux = {"flux": str(flux), "prompts": prompts, "run": run}

    def collect(self, images: int = 8, hookpoints: tuple[str, ...] = (PLACE,)) -> str:
        config = CollectConfig(
            **self.flux, hookpoints=hookpoints, steps=STEPS, images=images, images_per_shard=6, batch_size=2,
            held_out_every=4, tokens_per_image=None,
        )  # fmt: skip
        return collect.main(config).word

    def fit(self, hookpoints: tuple[str, ...] = (PLACE,), **changes: object) -> str:
        config = FitConfig(**self.flux, hookpoints=hookpoints, epochs=2, batch_size=32, n_features=(48,), k=(4,))
        return fit.main(replace(config, **changes)).word  # type: ignore[arg-type]

    def score(self, images: int | None = 8, hookpoints: tuple[str, ...] = (), **changes: object) -> str:
        config = ScoreConfig(
            **self.flux, hookpoints=hookpoints, images=images, images_per_part=4, batch_size=4, n_top=3,
            thumbnail_side=32,
        )  # fmt: skip
        return score.main(replace(config, **changes)).word  # type: ignore[arg-type]

    def describe(self) -> list[str]:
        made = [
            analyze.main(AnalyzeConfig(run=self.run.path)),
            directions.main(DirectionsConfig(run=self.run.path, perplexity=5)),
        ]
        return [result.word for result in made]

    def finish(self) -> "Stages":
        self.collect()
        self.fit()
        self.score()
        self.describe()
        return self


@pytest.fixture(scope="module")
def base(tiny_flux_folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return Stages(tiny_flux_folder, prompts, tmp_path_factory.mktemp("runs") / "base").finish()


@pytest.fixture
def grown(base: Stages, tmp_path: Path) -> Stages:
    """A copy of the finished run."""
    shutil.copytree(base.run.path, tmp_path / "run")
    return Stages(Path(str(base.flux["flux"])), Path(str(base.flux["prompts"])), tmp_path / "run")


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from diffusers import AutoencoderTiny

    decoded: list[int] = []
    decode: Callable[..., object] = AutoencoderTiny.decode

    def counted(self: AutoencoderTiny, z: Tensor, *args: object, **options: object) -> object:
        decoded.append(len(z))
        return decode(self, z, *args, **options)

    monkeypatch.setattr(AutoencoderTiny, "decode", counted)
    return decoded


def scored(run: RunFolder, name: str) -> list[bytes]:
    return [path(name).read_bytes() for path in (run.scores_path, run.stats_path, run.heatmaps_path)]


def test_a_second_sae_is_scored_on_the_images_that_are_there(
    grown: Stages, base: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = grown.run, scored(base.run, PLACE)
    main_sae, images = run.sae_path(PLACE).joinpath("model.safetensors").read_bytes(), run.images_path.read_bytes()
    assert grown.fit((WIDE,), n_features=(64,)) == "done"
    decoded = count_decodes(monkeypatch)
    assert grown.score(None) == "done"
    assert decoded == []
    assert grown.score(None) == "skipped"
    assert grown.describe() == ["done", "done"]
    assert grown.describe() == ["skipped", "skipped"]
    assert scored(run, PLACE) == before
    assert run.images_path.read_bytes() == images
    assert run.sae_path(PLACE).joinpath("model.safetensors").read_bytes() == main_sae
    assert len(CardIndex(run, WIDE)) == 64
    at_once = Stages(Path(str(grown.flux["flux"])), Path(str(grown.flux["prompts"])), tmp_path / "at-once")
    at_once.collect()
    at_once.fit()
    at_once.fit((WIDE,), n_features=(64,))
    at_once.score()
    assert scored(at_once.run, WIDE) == scored(run, WIDE)
    compare_layers.main(CompareLayersConfig(run=run.path, first=PLACE, second=WIDE, min_images=1))
    assert run.comparison_path(PLACE, WIDE).is_file()


def test_a_run_without_its_parts_scores_a_second_sae_too(grown: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a pull from the Hub."""
    grown.fit((WIDE,), n_features=(64,))
    grown.score(None)
    expected = scored(grown.run, WIDE)
    shutil.rmtree(grown.run.work_path("score"))
    grown.run.scores_path(WIDE).unlink()
    decoded = count_decodes(monkeypatch)
    grown.score(None)
    assert decoded == []
    assert scored(grown.run, WIDE) == expected


def test_more_images_add_shards_and_parts_and_equal_a_run_made_at_once(
    grown: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = grown.run
    sae = run.sae_path(PLACE).joinpath("model.safetensors").read_bytes()
    first = ShardFolder(run.activations_folder(PLACE)).shards[0].path.read_bytes()
    assert grown.collect(14) == "done"
    assert grown.fit() == "skipped"  # the SAE that is there stays
    decoded = count_decodes(monkeypatch)
    assert grown.score(16) == "done"
    assert sum(decoded) == 8
    at_once = Stages(Path(str(grown.flux["flux"])), Path(str(grown.flux["prompts"])), tmp_path / "at-once")
    at_once.collect(14)
    at_once.run.sae_path(PLACE).mkdir(parents=True)
    shutil.copytree(run.sae_path(PLACE), at_once.run.sae_path(PLACE), dirs_exist_ok=True)
    at_once.score(16)
    folders = [ShardFolder(stages.run.activations_folder(PLACE)) for stages in (grown, at_once)]
    assert folders[0].manifest.dataset_hash == folders[1].manifest.dataset_hash
    for mine, other in zip(*(folder.shards for folder in folders), strict=True):
        for name, tensor in load_tensors(other.path).items():
            assert torch.equal(load_tensors(mine.path)[name], tensor)
    assert folders[0].shards[0].path.read_bytes() == first
    assert scored(run, PLACE) == scored(at_once.run, PLACE)
    assert FeatureStats.load(run.stats_path(PLACE)).n_images == 16
    tables = [stages.run.load_images() for stages in (grown, at_once)]
    assert (tables[0].prompts, tables[0].seeds) == (tables[1].prompts, tables[1].seeds)
    assert all(tables[0].thumbnail(i) == tables[1].thumbnail(i) for i in range(16))
    assert run.sae_path(PLACE).joinpath("model.safetensors").read_bytes() == sae
    with pytest.raises(FluxSaeError, match="images was 16, now 8"):
        grown.score(8)


def test_growth_that_was_interrupted_goes_on(grown: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    from fluxsae.features import scoring

    write_images = scoring.write_images
    monkeypatch.setattr(scoring, "write_images", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        grown.score(16)
    monkeypatch.setattr(scoring, "write_images", write_images)
    assert grown.score(16) == "done"
    assert ScoreMatrix.load(grown.run.scores_path(PLACE)).n_images == 16


def test_more_images_for_one_of_two_saes_are_refused(grown: Stages) -> None:
    grown.fit((WIDE,))
    grown.score(None)
    with pytest.raises(FluxSaeError, match=f"8 images would become 12, but {WIDE} would not be scored"):
        grown.score(12, (PLACE,))


def test_one_more_hook_point_leaves_the_first_alone(grown: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    before, info = scored(grown.run, PLACE), grown.run.load_info()
    assert grown.collect(hookpoints=(PLACE, OTHER)) == "done"
    assert grown.fit((PLACE, OTHER)) == "done"
    decoded = count_decodes(monkeypatch)
    assert grown.score(None) == "done"
    assert decoded == []
    assert scored(grown.run, PLACE) == before
    after = grown.run.load_info()
    assert after.prompts_hash == info.prompts_hash
    assert after.hookpoints == (PLACE, OTHER)


def test_an_sae_that_is_trained_anew_is_scored_anew(grown: Stages) -> None:
    before = grown.run.scores_path(PLACE).read_bytes()
    assert grown.fit(k=(6,), force=True) == "done"
    assert grown.score(None) == "done"
    assert grown.run.scores_path(PLACE).read_bytes() != before


def test_a_sweep_makes_every_sae_a_variant_with_one_table_and_one_plot(
    grown: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    main_sae = grown.run.sae_path(PLACE).joinpath("model.safetensors").read_bytes()
    assert grown.fit(k=(2, 4), n_features=(32, 48)) == "done"
    names = [f"{PLACE}@topk-{k}-of-{width}" for k in (2, 4) for width in (32, 48)]
    assert list(map(str, grown.run.sae_names())) == [PLACE, *names]
    table = capsys.readouterr().out.split("\n\n")[-2]
    assert [line.split()[0] for line in table.splitlines()] == ["SAE", PLACE, *names]
    assert grown.run.sheet_path(PLACE, "variants").is_file()
    assert grown.run.sae_path(PLACE).joinpath("model.safetensors").read_bytes() == main_sae
    assert grown.fit(k=(2, 4), n_features=(32, 48)) == "skipped"
    assert grown.fit(k=(2, 8), n_features=(32, 48)) == "done"
    assert SparseAutoencoder.from_pretrained(grown.run.sae_path(f"{PLACE}@topk-8-of-32")).config.k == 8
    with pytest.raises(FluxSaeError, match="no variant where values are swept"):
        grown.fit((WIDE,), k=(2, 4))


def write_labels(run: RunFolder, *rows: tuple[str, object, str]) -> None:
    with run.labels_path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("hookpoint", "feature", "label"), *rows])


def test_names_that_a_person_gave_stand_and_say_so(grown: Stages) -> None:
    write_labels(grown.run, ("layer0", 7, "a  red,\nround thing"), (PLACE, 8, ""))
    cards = CardIndex(grown.run, PLACE)
    assert (cards[7].label, cards[7].label_by, cards[7].label_confidence) == ("a red, round thing", "person", 1.0)
    assert (cards[8].label, cards[8].label_by) == (None, "person")
    assert cards[9].label_by is None
    assert "label_by" not in grown.run.load_features(PLACE, given=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((PLACE, 48, "x"), "names feature 48; features go from 0 to 47"),
        ((PLACE, "x", "x"), "line 2: feature is 'x'"),
        ((OTHER, 1, "x"), f"line 2: this run has no SAE {OTHER}"),
    ],
)
def test_a_wrong_line_of_names_is_refused_with_its_place(
    grown: Stages, row: tuple[str, object, str], message: str
) -> None:
    write_labels(grown.run, row)
    with pytest.raises(FluxSaeError, match=message):
        CardIndex(grown.run, PLACE)


# SAEs from elsewhere


def write_plain(sae: SparseAutoencoder, path: Path, *, scale: float = 1.0) -> None:
    """The checkpoint that a plain training script writes of this SAE; `scale` spoils it."""
    b_dec = sae.b_dec * sae.input_scale + sae.input_mean
    state = {
        "pre_bias": b_dec, "encoder.weight": sae.W_enc, "encoder.bias": sae.b_enc * sae.input_scale,
        "decoder.weight": scale * sae.W_dec.T,
    }  # fmt: skip
    torch.save(
        {
            "model_state_dict": {name: tensor.detach().clone() for name, tensor in state.items()},
            "config": {"input_dim": sae.config.d_model, "hidden_dim": sae.config.n_features, "use_topk": True, "k": 4},
        },
        path,
    )


def adopted(stages: Stages, source: Path, **changes: object) -> AdoptConfig:
    config = AdoptConfig(
        source=source, run=stages.run.path, hookpoint="layer0@theirs", flux=stages.run.load_info().flux_id,
        steps=STEPS, height=stages.run.load_info().settings.height, width=stages.run.load_info().settings.width,
    )  # fmt: skip
    return replace(config, **changes)  # type: ignore[arg-type]


def test_an_sae_from_elsewhere_is_measured_scored_and_shown(grown: Stages, tmp_path: Path) -> None:
    run, name = grown.run, f"{PLACE}@theirs"
    write_plain(SparseAutoencoder.from_pretrained(run.sae_path(PLACE)), tmp_path / "sae_best.pt")
    assert adopt.main(adopted(grown, tmp_path / "sae_best.pt")).word == "done"
    mine, theirs = run.load_metrics(PLACE), run.load_metrics(name)
    assert theirs["fvu"] == pytest.approx(mine["fvu"], abs=1e-5)
    assert bool((SparseAutoencoder.from_pretrained(run.sae_path(name)).reference_acts > 0).any())
    assert grown.score(None) == "done"
    grown.describe()
    ours, other = (ScoreMatrix.load(run.scores_path(each)).values for each in (PLACE, name))
    scale = float(SparseAutoencoder.from_pretrained(run.sae_path(PLACE)).input_scale)
    torch.testing.assert_close(torch.tensor(other).float(), torch.tensor(ours).float() * scale, rtol=2e-3, atol=1e-3)
    assert len(CardIndex(run, name)) == 48
    assert adopt.main(adopted(grown, tmp_path / "sae_best.pt")).word == "skipped"


def test_an_adopted_sae_has_the_ground_of_the_activations_it_was_measured_on(grown: Stages, tmp_path: Path) -> None:
    run, name = grown.run, f"{PLACE}@ground"
    write_plain(SparseAutoencoder.from_pretrained(run.sae_path(PLACE)), tmp_path / "sae.pt")
    adopt.main(adopted(grown, tmp_path / "sae.pt", hookpoint="layer0@ground"))
    mine, theirs = (SparseAutoencoder.from_pretrained(run.sae_path(n)).config.trained_on for n in (PLACE, name))
    assert mine is not None
    assert theirs is not None
    for field in ("is_exact", "max_sequence_length", "true_cfg_scale", "flux_weights", "adapters"):
        assert getattr(theirs, field) == getattr(mine, field), field
    shutil.rmtree(run.sae_path(name))


@pytest.mark.parametrize("sigmas", [(0.9,), (0.9, 0.8, 0.7)])
def test_noise_levels_that_contradict_the_steps_or_the_run_are_refused(
    grown: Stages, tmp_path: Path, sigmas: tuple[float, ...]
) -> None:
    RunFolder(tmp_path / "run").save_info(replace(grown.run.load_info(), stages={}))
    np.save(tmp_path / "rows.npy", np.zeros((2 * 16, 8), dtype=np.float32))
    config = adopted(grown, tmp_path / "rows.npy", run=tmp_path / "run", hookpoint="layer0")
    with pytest.raises(FluxSaeError, match=rf"--sigmas are {len(sigmas)} and --steps 2"):
        adopt.main(replace(config, sigmas=sigmas))
    own = dict(zip(grown.run.load_info().steps, grown.run.load_info().sigmas, strict=True))
    low_first = tuple(own[step] for step in reversed(STEPS))
    with pytest.raises(FluxSaeError, match=r"The noise levels of this run are"):
        adopt.main(replace(config, sigmas=low_first))
    with pytest.raises(FluxSaeError, match=r"--steps are \[3, 1\]; give them rising"):
        adopt.main(replace(config, steps=(3, 1)))


def test_what_no_file_says_is_asked_for(grown: Stages, tmp_path: Path) -> None:
    write_plain(SparseAutoencoder.from_pretrained(grown.run.sae_path(PLACE)), tmp_path / "sae.pt")
    with pytest.raises(FluxSaeError, match="give --steps, --width as whoever trained it says"):
        adopt.main(adopted(grown, tmp_path / "sae.pt", steps=(), width=None))
    with pytest.raises(FluxSaeError, match=r"no activations at steps \[2\]; it has \[1, 3\]"):
        adopt.main(adopted(grown, tmp_path / "sae.pt", steps=(2,)))
    with pytest.raises(FluxSaeError, match="is of other/FLUX, but this is a run of"):
        adopt.main(adopted(grown, tmp_path / "sae.pt", flux="other/FLUX"))
    with pytest.raises(FluxSaeError, match=f"has an SAE {PLACE}. Choose another"):
        adopt.main(adopted(grown, tmp_path / "sae.pt", hookpoint="layer0"))


def test_a_wrong_reading_is_noticed_by_its_fvu(grown: Stages, tmp_path: Path) -> None:
    write_plain(SparseAutoencoder.from_pretrained(grown.run.sae_path(PLACE)), tmp_path / "sae.pt", scale=-3.0)
    with pytest.raises(FluxSaeError, match="of this run's activations unexplained"):
        adopt.main(adopted(grown, tmp_path / "sae.pt"))
    assert not grown.run.has_sae(f"{PLACE}@theirs")
    assert adopt.main(adopted(grown, tmp_path / "sae.pt", allow_bad_fit=True)).word == "done"


def test_activations_that_another_script_wrote_train_an_sae(grown: Stages, tmp_path: Path) -> None:
    """The rows of this run, written as such a script writes them, give the SAE that this run trains on them."""
    folder = ShardFolder(grown.run.activations_folder(PLACE))
    rows = torch.cat([tokens.flatten(0, 1) for _, tokens, _ in folder.iter_images("all")]).float().numpy()
    np.save(tmp_path / "flux_activations_layer0.npy", rows)
    for name in ("fresh", "other"):
        RunFolder(tmp_path / name).save_info(replace(grown.run.load_info(), stages={}))
    source = tmp_path / "flux_activations_layer0.npy"
    config = adopted(grown, source, run=tmp_path / "fresh", hookpoint="layer0")
    assert adopt.main(config).word == "done"
    made = ShardFolder(RunFolder(tmp_path / "fresh").activations_folder(PLACE))
    for (_, mine, _), (_, theirs, _) in zip(made.iter_images("all"), folder.iter_images("all"), strict=True):
        assert torch.equal(mine, theirs)
    assert fit.main(FitConfig(run=tmp_path / "fresh", batch_size=32, epochs=1, n_features=(48,), k=(4,))).word == "done"
    own = dict(zip(STEPS, grown.run.load_info().sigmas, strict=True))
    with pytest.raises(FluxSaeError, match="no whole number of images of 3 steps"):
        adopt.main(replace(config, run=tmp_path / "other", steps=(0, 1, 3), sigmas=(1.0, own[1], own[3])))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(FluxSaeError, match=r"no \.npy file of plain numbers"):
        adopt.main(replace(config, source=tmp_path / "objects.npy", run=tmp_path / "other"))
