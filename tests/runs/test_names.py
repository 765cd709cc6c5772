"""Names of SAEs: hook points and their variants."""

from pathlib import Path

import pytest
from synthetic_run import build

from fluxsae.errors import FluxSaeError
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.names import SaeName

PLACE = "transformer_blocks.1.ff"


@pytest.mark.parametrize(
    ("text", "written", "variant"),
    [
        ("layer1", PLACE, ""),
        ("layer1@l1", f"{PLACE}@l1", "l1"),
        ("single_transformer_blocks.7:text@topk-1200", "single_transformer_blocks.7.text@topk-1200", "topk-1200"),
        (f"{PLACE}@l1-1e-05", f"{PLACE}@l1-1e-05", "l1-1e-05"),
    ],
)
def test_a_name_is_read_as_it_is_written(text: str, written: str, variant: str) -> None:
    name = SaeName.parse(text)
    assert (str(name), name.variant) == (written, variant)
    assert SaeName.parse(str(name)) == name
    assert name.place == HookPoint.parse(text.split("@", maxsplit=1)[0])
    assert type(name.place) is HookPoint


@pytest.mark.parametrize(
    "text", ["layer1@", "@l1", "layer1@../up", "layer1@a/b", "layer1@Top", "layer1@a@b", "layer1@."]
)
def test_a_name_that_is_no_folder_everywhere_is_refused(text: str) -> None:
    with pytest.raises(FluxSaeError):
        SaeName.parse(text)


def test_a_main_sae_has_the_name_of_its_hook_point_and_a_variant_has_not() -> None:
    main, variant, place = SaeName.parse("layer1"), SaeName.parse("layer1@l1"), HookPoint.parse("layer1")
    assert main == place
    assert hash(main) == hash(place)
    assert {place: 1}[main] == 1
    assert variant != place
    assert place not in {variant: 1}
    names = [SaeName.parse("layer2"), variant, place, SaeName.parse("layer1@k16")]
    assert list(map(str, sorted(names))) == [PLACE, f"{PLACE}@k16", f"{PLACE}@l1", "transformer_blocks.2.ff"]
    with pytest.raises(FluxSaeError, match="names no hook point"):
        HookPoint.parse("layer1@l1")


def test_a_run_names_its_saes_and_finds_their_files(tmp_path: Path) -> None:
    run = build(tmp_path / "run", n_images=12).run
    place = run.hookpoints()[0]
    variant = SaeName.parse(f"{place}@small")
    run.sae_path(variant).mkdir(parents=True)
    for path in run.sae_path(place).iterdir():
        (run.sae_path(variant) / path.name).write_bytes(path.read_bytes())
    assert variant in run.sae_names()
    assert run.check_sae(str(variant)) == variant
    assert run.default_sae() == run.hookpoints()[-1]
    assert run.scores_path(variant).parent.name == str(variant)
    assert run.activations_folder(variant) == run.activations_folder(place)
    run.save_info(run.load_info())
    assert variant in RunFolder(run.path).indexed_saes()
    with pytest.raises(FluxSaeError, match=f"This run has no SAE {place}@none; it has {place}, {variant}"):
        run.check_sae(f"{place}@none")
