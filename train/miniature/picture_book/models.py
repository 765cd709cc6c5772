"""The picture book's tokenizer, and the parts with which its training begins: weights that know simpler scenes."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from train.miniature.models import build_text_encoder, build_text_encoder_2, build_tokenizer
from train.miniature.picture_book.captions import folds, vocabulary

TWINS = {"thing": "shape"}
"""Word -> word of the earlier vocabulary that meant the same."""


def build_book_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the picture book's language."""
    return build_tokenizer(vocabulary(), folds())


def load_autoencoder(folder: Path) -> AutoencoderTiny:
    """The autoencoder of a pipeline folder, in fp32."""
    autoencoder: AutoencoderTiny = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return autoencoder


def load_generator(folder: Path) -> nn.ModuleDict:
    """Transformer and text encoders of a pipeline folder, in fp32; words that its tokenizer lacks get fresh rows."""
    before = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer").get_vocab()
    words = build_book_tokenizer().get_vocab()
    encoders: dict[str, nn.Module] = {}
    for name, kind, build in (
        ("text_encoder", CLIPTextModel, build_text_encoder),
        ("text_encoder_2", T5EncoderModel, build_text_encoder_2),
    ):
        known = kind.from_pretrained(folder / name, torch_dtype=torch.float32)
        encoders[name] = build(len(words))
        _take_over(known, encoders[name], before, words)
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    # On a CPU a step takes two thirds of the time: at 88 tokens the flash kernel's gradient costs more than all the rest.
    transformer.set_attention_backend("_native_math")
    return nn.ModuleDict({"transformer": transformer, **encoders})


@torch.no_grad()
def _take_over(known: nn.Module, encoder: nn.Module, before: dict[str, int], words: dict[str, int]) -> None:
    """Copies all weights, the embedding row by row: a word that is new gets a row as large as the known ones."""
    state = known.state_dict()
    for name, parameter in encoder.state_dict().items():
        if parameter.shape == state[name].shape:
            parameter.copy_(state[name])
            continue
        rows = state[name]
        parameter.normal_(float(rows.mean()), float(rows.std()))
        for word, index in words.items():
            source = before.get(word, before.get(TWINS.get(word, "")))
            if source is not None:
                parameter[index] = rows[source]
