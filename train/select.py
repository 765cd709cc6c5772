"""Judges the features of a run: coherence with a p-value, labels, and the images that stay silent.

python -m train.select --run runs/miniature
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import SelectionConfig
from fluxsae.flux.hookpoints import HookPoint
from train.command import start
from train.prompts import BUNDLED_PROMPTS
from train.stages import StageResult, run_stage

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fluxsae.features.labels import CaptionLabeller, Label, Labeller
    from fluxsae.features.selection import FeatureCoherence
    from fluxsae.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Which features and how they are judged."""

    run: Path = Path("runs/miniature")
    """Run folder that was scored, analysed and embedded."""
    vocabulary: Path | None = None
    """Text file with a phrase a line for labels through CLIP; left out, the words of the captions (of
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
    from fluxsae.features.labels import CURVE_LEVELS
    from fluxsae.runs.folder import RunFolder

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
    from fluxsae.features.labels import CaptionLabeller, PhraseLabeller
    from fluxsae.pictures.perceptual import load_embedder

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
    import torch
    from torch.nn.functional import normalize

    return normalize(torch.from_numpy(run.load_embeddings().vectors.astype(np.float32)), dim=1)


def _stand_in_captions(model: str) -> list[str]:
    """Captions whose words name the features of pictures that have none."""
    from fluxsae.runs.prompts import load_prompts
    from train.flux_options import iter_captions

    return list(islice(iter_captions(0), 2000)) if model == "miniature" else load_prompts(BUNDLED_PROMPTS)


def _phrases(prompts: list[str], config: SelectConfig) -> list[str]:
    from fluxsae.features.labels import caption_vocabulary

    if config.vocabulary is None:
        return caption_vocabulary(prompts, limit=config.max_phrases)
    phrases = [line.strip() for line in config.vocabulary.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not phrases:
        raise FluxSaeError(f"{config.vocabulary} holds no phrase; write one a line")
    return phrases


def _select(run: RunFolder, hookpoint: HookPoint, labellers: list[Labeller], config: SelectConfig) -> None:
    from fluxsae.features.labels import CaptionLabeller, combined_label
    from fluxsae.features.scores import ScoreMatrix
    from fluxsae.features.selection import (
        feature_coherence,
        iter_columns,
        nearest_silent_images,
        prompt_groups,
        top_unique,
    )

    scores = ScoreMatrix.load(run.scores_path(hookpoint)).stored()
    subjects, embeddings = run.load_images().subjects, _unit_vectors(run)
    judged = feature_coherence(scores, embeddings, subjects, config=config.selection)
    captions = next(labeller for labeller in labellers if isinstance(labeller, CaptionLabeller))
    groups, n_top = prompt_groups(subjects), config.selection.top_images
    named, best, curves, silent = [], [], [], []
    for column in iter_columns(scores):
        named.append([labeller.label(column) for labeller in labellers])
        label = combined_label(named[-1])
        curves.append(_label_curve(column.numpy(), label, captions) if label else None)
        # one measure of how far to trust a name, whether at the feature's best or at less
        best.append(replace(label, confidence=curves[-1][-1]) if label and curves[-1] else None)
        top = top_unique(column, groups, n=n_top)
        silent.append(nearest_silent_images(column, embeddings, top, n=config.n_silent).tolist())
    columns = {
        **_coherence_columns(judged, config.selection.max_q),
        "label": [label.text if label else None for label in best],
        "label_confidence": [label.confidence if label else None for label in best],
        "label_curve": curves,
        "caption_words": [[label.text for label in labels[-2]] for labels in named],
        "clip_phrases": [[label.text for label in labels[-1]] for labels in named],
        "silent_images": silent,
    }
    run.save_features(hookpoint, run.load_features(hookpoint).with_columns(columns))
    _report(hookpoint, judged, best, config.selection.max_q)


def _label_curve(scores: Float[np.ndarray, " images"], label: Label, captions: CaptionLabeller) -> list[float]:
    """How far to trust a name at each level; a name that captions never hold is trusted in proportion."""
    from fluxsae.features.labels import CURVE_LEVELS, label_curve

    holds = captions.holds(label.text)
    if holds is None:
        return [float(value) for value in label.confidence * CURVE_LEVELS]
    return label_curve(scores, holds)


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
    from fluxsae.features.selection import select_features

    sure = np.array([label.confidence if label else np.nan for label in best])
    chosen = select_features(judged, sure, max_q=max_q)
    tested, named = int((~np.isnan(judged.p_value)).sum()), sum(label is not None for label in best)
    print(f"{hookpoint}: {len(chosen)} of {tested} tested features are coherent (FDR {max_q:g}), {named} have a label")
    for feature in chosen[:10]:
        label = best[feature]
        name = f"{label.text} ({label.confidence:.2f})" if label else "no label"
        print(f"  {feature:6d}  coherence {judged.coherence[feature]:.3f}  q {judged.q_value[feature]:.4f}  {name}")


if __name__ == "__main__":
    start(main, SelectConfig, __doc__)
