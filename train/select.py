"""Judges the features of a run: coherence with a p-value, labels, and the images that stay silent.

python -m train.select --run RUN
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.artifacts import RunFolder
from fluxsae.errors import FluxSaeError
from fluxsae.hookpoints import HookPoint
from fluxsae.labels import CaptionLabeller, Label, Labeller, PhraseLabeller, caption_vocabulary, combined_label
from fluxsae.perceptual import load_embedder
from fluxsae.scores import ScoreMatrix
from fluxsae.selection import (
    FeatureCoherence,
    SelectionConfig,
    feature_coherence,
    nearest_silent_images,
    prompt_groups,
    select_features,
    top_unique,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which features and how they are judged."""

    run: Path
    """Run folder that was scored, analysed and embedded."""
    hookpoint: str | None = None
    """One hook point; all of the run's without it."""
    vocabulary: Path | None = None
    """Text file with a phrase a line for labels through CLIP; without it the words of the captions."""
    max_phrases: int = 2000
    """Phrases taken from the captions, the most frequent ones."""
    n_silent: int = 6
    """Nearest silent images kept a feature."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """How coherence and labels are computed."""


def main(config: Config) -> None:
    """Adds coherence, p-values, labels and silent images to features.parquet of each hook point."""
    run = RunFolder(config.run)
    hookpoints = run.hookpoints() if config.hookpoint is None else [run.check_hookpoint(config.hookpoint)]
    for path in (run.embeddings_path, *(run.features_path(hookpoint) for hookpoint in hookpoints)):
        if not path.is_file():
            raise FluxSaeError(f"{path} does not exist; run train.score, train.analyze and train.embed first")
    labellers = _labellers(run, config)
    for hookpoint in hookpoints:
        _select(run, hookpoint, labellers, config)


def _labellers(run: RunFolder, config: Config) -> list[Labeller]:
    prompts, vectors = run.load_images().prompts, _unit_vectors(run)
    phrases = _phrases(prompts, config)
    texts = load_embedder(run.load_embeddings().model).embed_texts(phrases)
    return [
        CaptionLabeller(prompts, config=config.selection),
        PhraseLabeller(phrases, texts, vectors, prompts, config=config.selection),
    ]


def _unit_vectors(run: RunFolder) -> Float[Tensor, "images width"]:
    """The run's embeddings in fp32, of length 1 again after the rounding of the file."""
    return normalize(torch.from_numpy(run.load_embeddings().vectors.astype(np.float32)), dim=1)


def _phrases(prompts: list[str], config: Config) -> list[str]:
    if config.vocabulary is None:
        return caption_vocabulary(prompts, limit=config.max_phrases)
    phrases = [line.strip() for line in config.vocabulary.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not phrases:
        raise FluxSaeError(f"{config.vocabulary} holds no phrase; write one a line")
    return phrases


def _select(run: RunFolder, hookpoint: HookPoint, labellers: list[Labeller], config: Config) -> None:
    scores = ScoreMatrix.load(run.scores_path(hookpoint)).tensor()
    prompts, embeddings = run.load_images().prompts, _unit_vectors(run)
    judged = feature_coherence(scores, embeddings, prompts, config=config.selection)
    named = [[labeller.label(column) for labeller in labellers] for column in scores.T.contiguous()]
    best = [combined_label(labels) for labels in named]
    groups = prompt_groups(prompts)
    silent = [
        nearest_silent_images(column, embeddings, top_unique(column, groups, n=config.selection.top_images)).tolist()
        for column in scores.T.contiguous()
    ]
    columns = {
        **_coherence_columns(judged, config.selection.max_p),
        "label": [label.text if label else None for label in best],
        "label_confidence": [label.confidence if label else None for label in best],
        "caption_words": [[label.text for label in labels[0]] for labels in named],
        "clip_phrases": [[label.text for label in labels[1]] for labels in named],
        "silent_images": [images[: config.n_silent] for images in silent],
    }
    run.save_features(hookpoint, run.load_features(hookpoint).with_columns(columns))
    _report(hookpoint, judged, best, config.selection.max_p)


def _coherence_columns(judged: FeatureCoherence, max_q: float) -> dict[str, list[Any]]:
    def known(values: np.ndarray) -> list[float | None]:
        return [None if np.isnan(value) else float(value) for value in values]

    return {
        "coherence": known(judged.coherence),
        "p_value": known(judged.p_value),
        "q_value": known(judged.q_value),
        "is_coherent": [bool(value <= max_q) for value in judged.q_value],
        "monosemanticity": known(judged.monosemanticity),
    }


def _report(hookpoint: HookPoint, judged: FeatureCoherence, best: list[Label | None], max_q: float) -> None:
    sure = np.array([label.confidence if label else np.nan for label in best])
    chosen = select_features(judged, sure, max_q=max_q)
    tested, named = int((~np.isnan(judged.p_value)).sum()), sum(label is not None for label in best)
    print(f"{hookpoint}: {len(chosen)} of {tested} tested features are coherent (FDR {max_q:g}), {named} have a label")
    for feature in chosen[:10]:
        label = best[feature]
        name = f"{label.text} ({label.confidence:.2f})" if label else "no label"
        print(f"  {feature:6d}  coherence {judged.coherence[feature]:.3f}  q {judged.q_value[feature]:.4f}  {name}")


if __name__ == "__main__":
    main(tyro.cli(Config))
