"""Judges the features of a run: coherence with a p-value, labels, and the images that stay silent.

python -m train.select --run runs/miniature
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from fluxsae.errors import FluxSaeError
from fluxsae.features.labels import (
    CURVE_LEVELS,
    CaptionLabeller,
    Label,
    Labeller,
    PhraseLabeller,
    caption_vocabulary,
    combined_label,
    label_curve,
)
from fluxsae.features.scores import ScoreMatrix
from fluxsae.features.selection import (
    FeatureCoherence,
    SelectionConfig,
    feature_coherence,
    nearest_silent_images,
    prompt_groups,
    select_features,
    top_unique,
)
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.pictures.perceptual import load_embedder
from fluxsae.runs.folder import RunFolder
from fluxsae.runs.prompts import load_prompts
from train.flux_options import iter_captions
from train.prompts import BUNDLED_PROMPTS
from train.stages import StageResult, run_stage


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which features and how they are judged."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored, analysed and embedded."""
    vocabulary: Path | None = None
    """Text file with a phrase a line for labels through CLIP; without it the words of the captions (of
    pictures without any: of prompts of our own)."""
    max_phrases: int = 2000
    """Phrases taken from the captions, the most frequent ones."""
    n_silent: int = 6
    """Nearest silent images kept a feature."""
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    """How coherence and labels are computed."""
    force: bool = False
    """Do it again, also where it is complete."""


def main(config: SelectConfig, *, labellers: Sequence[Labeller] = ()) -> StageResult:
    """Adds coherence, p-values, labels and silent images to features.parquet of each hook point.

    `labellers` are further sources of names, asked before the captions and CLIP.
    """
    run = RunFolder(config.run)
    hookpoints = [hookpoint for hookpoint in run.hookpoints() if run.features_path(hookpoint).is_file()]
    if not hookpoints or not run.embeddings_path.is_file():
        raise FluxSaeError(f"{run.path} is not analysed or not embedded; run train.analyze and train.embed first")
    settings = {
        **asdict(config.selection),
        "vocabulary": str(config.vocabulary) if config.vocabulary else None,
        "max_phrases": config.max_phrases,
        "n_silent": config.n_silent,
        "label_levels": len(CURVE_LEVELS),
    }
    return run_stage(
        run,
        "select",
        settings,
        lambda: _select_all(run, hookpoints, config, labellers),
        outputs=lambda: [run.features_path(hookpoint) for hookpoint in hookpoints],
        force=config.force,
    )


def _select_all(run: RunFolder, hookpoints: list[HookPoint], config: SelectConfig, others: Sequence[Labeller]) -> None:
    labellers = [*others, *_labellers(run, config)]
    for hookpoint in hookpoints:
        _select(run, hookpoint, labellers, config)


def _labellers(run: RunFolder, config: SelectConfig) -> list[Labeller]:
    images, vectors = run.load_images(), _unit_vectors(run)
    model = run.load_embeddings().model
    phrases = _phrases([prompt for prompt in images.prompts if prompt] or _stand_in_captions(model), config)
    texts = load_embedder(model).embed_texts(phrases)
    return [
        CaptionLabeller(images.prompts, config=config.selection),
        PhraseLabeller(phrases, texts, vectors, images.subjects, config=config.selection),
    ]


def _unit_vectors(run: RunFolder) -> Float[Tensor, "images width"]:
    """The run's embeddings in fp32, of length 1 again after the rounding of the file."""
    return normalize(torch.from_numpy(run.load_embeddings().vectors.astype(np.float32)), dim=1)


def _stand_in_captions(model: str) -> list[str]:
    """Captions whose words name the features of pictures that have none."""
    return list(islice(iter_captions(0), 2000)) if model == "miniature" else load_prompts(BUNDLED_PROMPTS)


def _phrases(prompts: list[str], config: SelectConfig) -> list[str]:
    if config.vocabulary is None:
        return caption_vocabulary(prompts, limit=config.max_phrases)
    phrases = [line.strip() for line in config.vocabulary.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not phrases:
        raise FluxSaeError(f"{config.vocabulary} holds no phrase; write one a line")
    return phrases


def _select(run: RunFolder, hookpoint: HookPoint, labellers: list[Labeller], config: SelectConfig) -> None:
    scores = ScoreMatrix.load(run.scores_path(hookpoint)).tensor()
    subjects, embeddings = run.load_images().subjects, _unit_vectors(run)
    judged = feature_coherence(scores, embeddings, subjects, config=config.selection)
    named = [[labeller.label(column) for labeller in labellers] for column in scores.T.contiguous()]
    captions = next(labeller for labeller in labellers if isinstance(labeller, CaptionLabeller))
    drawn = [combined_label(labels) for labels in named]
    curves = _label_curves(scores.numpy(), drawn, captions)
    # one measure of how far to trust a name, whether at the feature's best or at less
    best = [
        replace(label, confidence=curve[-1]) if label and curve else None
        for label, curve in zip(drawn, curves, strict=True)
    ]
    groups = prompt_groups(subjects)
    silent = [
        nearest_silent_images(column, embeddings, top_unique(column, groups, n=config.selection.top_images)).tolist()
        for column in scores.T.contiguous()
    ]
    columns = {
        **_coherence_columns(judged, config.selection.max_q),
        "label": [label.text if label else None for label in best],
        "label_confidence": [label.confidence if label else None for label in best],
        "label_curve": curves,
        "caption_words": [[label.text for label in labels[-2]] for labels in named],
        "clip_phrases": [[label.text for label in labels[-1]] for labels in named],
        "silent_images": [images[: config.n_silent] for images in silent],
    }
    run.save_features(hookpoint, run.load_features(hookpoint).with_columns(columns))
    _report(hookpoint, judged, best, config.selection.max_q)


def _label_curves(
    scores: Float[np.ndarray, "images features"], labels: Sequence[Label | None], captions: CaptionLabeller
) -> list[list[float] | None]:
    """How far to trust each name at each level; a name that captions never hold is trusted in proportion."""
    curves: list[list[float] | None] = []
    for label, column in zip(labels, scores.T, strict=True):
        holds = captions.holds(label.text) if label else None
        if label is None:
            curves.append(None)
        elif holds is None:
            curves.append([float(value) for value in label.confidence * CURVE_LEVELS])
        else:
            curves.append(label_curve(column, holds))
    return curves


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
    main(tyro.cli(SelectConfig, description=__doc__))
