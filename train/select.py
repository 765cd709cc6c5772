"""Judges the features of a run: coherence with a p-value, labels, and the images that stay silent.

python -m train.select --run runs/miniature
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxsae.errors import FluxSaeError
from fluxsae.features.config import SelectionConfig
from train.command import start
from train.prompts import BUNDLED_PROMPTS
from train.stages import StageResult, run_stage

RANDOM_FEATURES = 256
"""Features that are shuffled to find how many would get a name by chance."""

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fluxsae.features.labels import Labeller
    from fluxsae.features.naming import NameCheck, NameChecker
    from fluxsae.features.scores import ScoreMatrix
    from fluxsae.features.selection import FeatureCoherence
    from fluxsae.miniature.scenes import Scene
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
    names = [name for name in run.sae_names() if run.features_path(name).is_file()]
    if not names or not run.embeddings_path.is_file():
        raise FluxSaeError(f"{run.path} is not analysed or not embedded; run train.analyze and train.embed first")
    settings = {
        **asdict(config.selection),
        "vocabulary": str(config.vocabulary) if config.vocabulary else None,
        "max_phrases": config.max_phrases,
        "n_silent": config.n_silent,
        "label_levels": len(CURVE_LEVELS),
        "names": "held out",
    }
    return run_stage(
        run,
        "select",
        dict.fromkeys(map(str, names), settings),
        lambda todo: _select_all(run, todo, config, labellers),
        outputs=lambda asked: [run.features_path(name) for name in asked],
        force=config.force,
        by_name=True,
    )


def _select_all(run: RunFolder, names: Sequence[str], config: SelectConfig, others: Sequence[Labeller]) -> None:
    checker, scenes = _checker(run, config, others), _scenes(run)
    for name in names:
        _select(run, name, checker, scenes, config)


def _checker(run: RunFolder, config: SelectConfig, others: Sequence[Labeller]) -> NameChecker:
    from fluxsae.features.naming import NameChecker
    from fluxsae.pictures.perceptual import load_embedder

    images, model = run.load_images(), run.load_embeddings().model
    phrases = _phrases([prompt for prompt in images.prompts if prompt] or _stand_in_captions(model), config)
    return NameChecker(
        images.prompts,
        images.subjects,
        vocabulary=phrases,
        texts=load_embedder(model).embed_texts(phrases),
        images=_unit_vectors(run),
        others=others,
        config=config.selection,
    )


def _scenes(run: RunFolder) -> dict[int, Scene]:
    """Image id -> what it shows, of the miniature's images that are read surely; empty for other models."""
    from fluxsae.laboratory.halves import LEAST_CONFIDENCE
    from fluxsae.miniature.scenes import read_scene

    if run.load_info().flux_id != "miniature":
        return {}
    images = run.load_images()
    read = {image: read_scene(images.picture(image)) for image in images.image_ids}
    return {image: scene for image, scene in read.items() if scene.confidence >= LEAST_CONFIDENCE}


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
    try:
        lines = config.vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FluxSaeError(
            f"{config.vocabulary} cannot be read as text ({error}). Name a UTF-8 file with one phrase a line."
        ) from error
    phrases = [line.strip() for line in lines if line.strip()]
    if not phrases:
        raise FluxSaeError(f"{config.vocabulary} holds no phrase; write one a line")
    return phrases


def _select(
    run: RunFolder, hookpoint: str, checker: NameChecker, scenes: dict[int, Scene], config: SelectConfig
) -> None:
    import torch

    from fluxsae.features.naming import kept_names, name_columns, random_named
    from fluxsae.features.scores import load_scores
    from fluxsae.features.selection import (
        feature_coherence,
        iter_columns,
        nearest_silent_images,
        prompt_groups,
        top_unique,
    )

    matrix = load_scores(run, hookpoint)
    scores, subjects, embeddings = matrix.stored(), run.load_images().subjects, _unit_vectors(run)
    judged = feature_coherence(scores, embeddings, subjects, config=config.selection)
    groups, n_top = prompt_groups(subjects), config.selection.top_images
    left_out = torch.tensor(matrix.left_out, dtype=torch.long)
    proposed, checks, silent = [], [], []
    for column in iter_columns(scores):
        proposed.append(checker.propose(column))
        checks.append(checker.check(column, proposed[-1]))
        top = top_unique(column, groups, n=n_top)
        known = column.index_fill(0, left_out, 1.0)  # nobody knows whether the feature is silent in those
        silent.append(nearest_silent_images(known, embeddings, top, n=config.n_silent).tolist())
    names = kept_names(checks, max_q=config.selection.max_q)
    alive = [scores[:, f].float() for f in np.flatnonzero([name is not None for name in checks])[:RANDOM_FEATURES]]
    by_chance = random_named(checker, alive, names, seed=config.selection.seed)
    if scenes:
        names = [_placed(name, matrix, f, scenes, checker.held_out) for f, name in enumerate(names)]
    columns = {
        **_coherence_columns(judged, config.selection.max_q),
        **name_columns(names),
        "caption_words": [[label.text for label in captions] for captions, _ in proposed],
        "clip_phrases": [[label.text for label in phrases] for _, phrases in proposed],
        "silent_images": silent,
    }
    run.save_features(hookpoint, run.load_features(hookpoint, given=False).with_columns(columns))
    _report(hookpoint, judged, names, config.selection.max_q)
    print(f"  of {len(alive)} of these features with their images shuffled, {by_chance:.1%} would get a name")


def _placed(
    name: NameCheck | None, matrix: ScoreMatrix, feature: int, scenes: dict[int, Scene], held_out: np.ndarray
) -> NameCheck | None:
    """A name with where its feature fires beside what it names, where enough images show that."""
    from fluxsae.laboratory.naming import find_place

    if name is None:
        return None
    scores, tokens = matrix.feature(feature).numpy(), np.asarray(matrix.argmax_token[:, feature])
    return name.at(find_place(name.label.text, scores, tokens, scenes, grid=matrix.grid, held_out=held_out))


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


def _report(hookpoint: str, judged: FeatureCoherence, best: list[NameCheck | None], max_q: float) -> None:
    from fluxsae.features.selection import select_features

    sure = np.array([label.confidence if label else np.nan for label in best])
    chosen = select_features(judged, sure, max_q=max_q)
    tested, named = int((~np.isnan(judged.p_value)).sum()), sum(label is not None for label in best)
    print(f"{hookpoint}: {len(chosen)} of {tested} tested features are coherent (FDR {max_q:g}), {named} have a label")
    for feature in chosen[:10]:
        label = best[feature]
        name = f"{label.label.text} ({label.confidence:.2f})" if label else "no label"
        print(f"  {feature:6d}  coherence {judged.coherence[feature]:.3f}  q {judged.q_value[feature]:.4f}  {name}")


if __name__ == "__main__":
    start(main, SelectConfig, __doc__)
