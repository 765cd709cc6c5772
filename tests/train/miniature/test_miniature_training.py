"""The miniature's training: where it begins, its clocks, its processes, its exam."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import nn

from fluxsae.errors import FluxSaeError
from fluxsae.miniature.captions import check_prompt, prompted_attributes
from fluxsae.miniature.drawing import SceneObject, is_held_out, render_scene, sample_scene
from fluxsae.sae.training.processes import Processes
from train.miniature import progress
from train.miniature.__main__ import MiniatureConfig, main
from train.miniature.bank import draw_bank
from train.miniature.exam import FIRST_PROMPTS, exam_prompts, format_tally, take_exam
from train.miniature.models import TEXT_TOKENS, build_tokenizer, load_autoencoder, load_generator, tokenize
from train.miniature.progress import Checkpoint, ConstantClock, StageClock, average_gradients, batch_seed
from train.miniature.stages import _begin


def test_other_words_are_refused_before_training(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["unicorn"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(FluxSaeError, match="other words"):
        load_generator(tmp_path)


def test_a_bank_holds_captions_of_its_scenes() -> None:
    bank = draw_bank(6, seed=1, device=torch.device("cpu"), workers=1)
    assert bank.images.shape == (6, 3, 128, 128)
    assert bank.captions.shape == (6, 6, TEXT_TOKENS)
    unknown = build_tokenizer().get_vocab()["[unknown]"]
    assert not (bank.captions == unknown).any()
    assert ((bank.centres > 20) & (bank.centres < 108)).all()


def test_training_waits_while_the_pause_file_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = tmp_path / "PAUSE"
    pause.touch()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            pause.unlink()

    monkeypatch.setattr("time.sleep", sleep)
    assert list(StageClock("flow", 2, None, pause=pause).ticks()) == [0, 1]
    assert len(waits) == 3


def test_a_constant_clock_keeps_its_rate_to_the_end() -> None:
    clock = ConstantClock("flow", 1000, None, step=999)
    assert clock.learning_rate(2e-3) == 2e-3
    clock.step = 30
    assert clock.learning_rate(2e-3) == pytest.approx(2e-4)  # 30 of 300 steps of warm-up


def test_a_stage_of_no_minutes_takes_no_step() -> None:
    assert list(StageClock("decoder", 10, 0.0).ticks()) == []


@dataclass
class OneOfTwo:
    """The second of two processes, whose peer has gradients of one everywhere and a clock that is at its end."""

    rank: int = 1
    world_size: int = 2
    waited: int = 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(1.0)

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> torch.Tensor:
        assert source == 0
        return tensor.fill_(1.0)

    def wait(self) -> None:
        self.waited += 1


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> OneOfTwo:
    peer = OneOfTwo()
    monkeypatch.setattr(progress.Processes, "current", classmethod(lambda _: peer))
    return peer


def test_gradients_are_averaged_over_the_processes(second: OneOfTwo) -> None:
    model = nn.Linear(2, 1)
    (3 * model(torch.ones(1, 2))).backward()
    average_gradients(model)
    # (3 + 1) / 2 = 2 for both weights and the bias
    assert torch.equal(model.weight.grad, torch.full((1, 2), 2.0))
    assert torch.equal(model.bias.grad, torch.full((1,), 2.0))


def test_one_process_keeps_its_gradients() -> None:
    model = nn.Linear(2, 1)
    model(torch.ones(1, 2)).backward()
    before = model.weight.grad.clone()
    average_gradients(model)
    assert torch.equal(model.weight.grad, before)


def test_the_first_processs_clock_ends_the_stage_for_all(second: OneOfTwo) -> None:
    assert list(StageClock("flow", 10, None).ticks()) == []


def test_only_the_first_process_writes_and_all_wait_for_the_last_file(second: OneOfTwo, tmp_path: Path) -> None:
    checkpoint, model = Checkpoint(tmp_path), nn.Linear(1, 1)
    checkpoint.save(model, {}, [], StageClock("flow", 1, None), finished=False)
    assert second.waited == 0
    checkpoint.save(model, {}, [], StageClock("flow", 1, None), finished=True)
    assert second.waited == 1
    assert not checkpoint.exists


def test_processes_draw_different_batches(second: OneOfTwo) -> None:
    other = batch_seed(3, 5)
    assert other != 3 * 1_000_003 + 5
    assert Processes().rank == 0


def test_exam_prompts_are_combinations_that_training_never_shows() -> None:
    prompts = exam_prompts(40)
    assert len(set(prompts)) == 40
    assert prompts[:10] == exam_prompts(10)
    for prompt in prompts:
        check_prompt(prompt)
        for wanted in prompted_attributes(prompt)[0]:
            named = {name: wanted[name] for name in ("thing", "colour", "texture")}
            assert is_held_out(SceneObject(**named, size="large", position="left", x=0, y=0, radius=1))


def test_first_prompts_are_understood() -> None:
    for prompt in FIRST_PROMPTS:
        check_prompt(prompt)


def test_a_perfect_painter_passes_and_a_blank_one_fails() -> None:
    rng = np.random.default_rng(90_000)
    scenes = [sample_scene(rng, n_objects=1, held_out=True)]

    def paint(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        return [Image.fromarray(render_scene(scenes[0])) for _ in prompts]

    tally = take_exam(paint, n_prompts=1)
    assert all(all(answers) for answers in tally.values())
    blank = take_exam(lambda prompts, seeds: [Image.new("RGB", (128, 128), "white")], n_prompts=1)
    assert not any(blank[1, name][0] for name in ("number", "thing", "colour", "texture"))
    assert "number" in format_tally(tally)


def test_the_training_goes_from_nothing_to_a_pipeline_that_can_be_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)
    moment = 1e-4
    config = MiniatureConfig(
        checkpoints=tmp_path / "checkpoints",
        output=tmp_path,
        scenes=4,
        autoencoder_minutes=moment,
        flow_minutes=moment,
        settle_minutes=moment,
        guidance_minutes=moment,
        decoder_minutes=moment,
        clip_minutes=moment,
        batch_size=2,
        n_prompts=2,
        n_scenes=2,
        device="cpu",
    )
    main(config)
    # Only the decoder has changed since the latents were made; stored in half precision.
    first, last = (load_autoencoder(folder) for folder in (config.checkpoints, tmp_path / "flux"))
    encoder = first.encoder.state_dict()
    assert all(torch.allclose(value, encoder[name], atol=2e-3) for name, value in last.encoder.state_dict().items())
    words = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(["two red cats"])
    assert words[0, :4].tolist() == [*tokenize(build_tokenizer(), ["two red cat"])[0, :4]]
    assert load_generator(tmp_path / "flux")["transformer"].config.guidance_embeds
    main(replace(config, action="examine"))
    assert "all prompted attributes of all prompts" in capsys.readouterr().out
    main(replace(config, action="export", output=tmp_path / "flow"))
    assert (tmp_path / "flow" / "flux" / "transformer" / "config.json").exists()


def test_a_stage_that_is_not_finished_is_refused_where_a_later_one_began(tmp_path: Path) -> None:
    for stage, finished in (("flow", False), ("guidance", True)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "clock.json").write_text(json.dumps({"step": 1, "elapsed": 1.0, "finished": finished}))
    with pytest.raises(FluxSaeError, match="Remove the folder guidance"):
        _begin(MiniatureConfig(checkpoints=tmp_path), "flow")
    assert _begin(MiniatureConfig(checkpoints=tmp_path), "guidance").is_finished
