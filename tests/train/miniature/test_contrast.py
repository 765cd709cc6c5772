"""The training of the miniature's CLIP: captions changed in one word, the loss, the norms, and what it then reads."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fluxsae.miniature.drawing import ATTRIBUTES
from fluxsae.pictures.perceptual import load_embedder
from train.miniature.bank import draw_bank
from train.miniature.contrast import (
    CHANGED_KINDS,
    WordChanger,
    contrastive_loss,
    load_trained_clip,
)
from train.miniature.exam import reading_shares
from train.miniature.models import build_clip, build_tokenizer, tokenize
from train.miniature.progress import Checkpoint, StageClock, start_average


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def test_a_changed_caption_differs_in_one_word_of_its_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    captions = ["a small red striped cat in a meadow", "two dotted fish", "a boat on a gray background"] * 40
    tokens = tokenize(tokenizer, captions).long()
    change, generator = WordChanger(tokenizer, torch.device("cpu")), torch.Generator().manual_seed(0)
    changed = change(tokens, generator)
    kind_of = {word: kind for kind in CHANGED_KINDS for word in ATTRIBUTES[kind]}
    seen: set[str] = set()
    for before, after in zip(tokens, changed, strict=True):
        (place,) = (before != after).nonzero()
        old, new = tokenizer.convert_ids_to_tokens([int(before[place]), int(after[place])])
        assert kind_of[old] == kind_of[new]
        seen.add(kind_of[old])
    assert seen == set(CHANGED_KINDS)
    assert len(changed.unique(dim=0)) > 20


def test_a_caption_without_such_a_word_stays(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize(tokenizer, ["a thing on the left"]).long()
    change = WordChanger(tokenizer, torch.device("cpu"))
    assert torch.equal(change(tokens, torch.Generator().manual_seed(0)), tokens)


def test_a_changed_caption_counts_as_wrong_and_an_unchanged_one_as_right(tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    clip = build_clip().eval()
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    tokens = tokenize(tokenizer, ["a red cat", "a blue dog"]).long()
    changed = tokenize(tokenizer, ["a red car", "a blue dog"]).long()
    with torch.no_grad():
        pictures, own, other = (
            clip.encode_image(images, normalize=True),
            clip.encode_text(tokens, normalize=True),
            clip.encode_text(changed, normalize=True),
        )
        logits = clip.logit_scale.exp() * pictures @ torch.cat([own, other]).T
        # the first picture: its caption among (both captions, its changed one); the second: its caption is there twice
        first = -logits[0, [0, 1, 2]].log_softmax(0)[0]
        second = -logits[1, [0, 1, 3]].log_softmax(0)[[1, 2]].mean()
        by_text = -logits[:, :2].T.log_softmax(1).diagonal().mean()
        expected = 0.5 * ((first + second) / 2 + by_text)
        assert contrastive_loss(clip, images, tokens, [changed]).item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_norms_are_measured_on_drawn_scenes(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("clip")
    clip, checkpoint = build_clip(), Checkpoint(folder)
    checkpoint.save(clip, start_average(clip), [], StageClock("clip", 1, None), finished=True)
    bank = draw_bank(4, seed=1, device=torch.device("cpu"), workers=1)
    load_trained_clip(bank, clip, checkpoint)
    assert not clip.training
    mean = dict(clip.visual.named_buffers())["bn1.running_mean"]
    assert mean.abs().max() > 0


def test_the_committed_clip_reads_held_out_scenes() -> None:
    shares = reading_shares(load_embedder(), n_scenes=120)
    assert shares["thing"] >= 0.85, shares
    assert min(shares.values()) >= 0.8, shares
