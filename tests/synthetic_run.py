"""A run folder made of drawn scenes whose features are the true concepts, noise, and one that is dead."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fluxsae.features.scores import merge_score_files
from fluxsae.files import save_tensors
from fluxsae.flux.hookpoints import TokenGrid
from fluxsae.flux.settings import GenerationSettings
from fluxsae.miniature.captions import caption_scene
from fluxsae.miniature.drawing import ATTRIBUTES, Scene, object_mask, render_scene, sample_scene
from fluxsae.miniature.reader import read_scene
from fluxsae.runs.folder import RunFolder, RunInfo
from fluxsae.runs.tables import Embeddings, FeatureRow, FeatureTable, ImageRow, encode_webp
from fluxsae.sae.config import SaeConfig
from fluxsae.sae.model import SparseAutoencoder

GRID = TokenGrid(16, 16)
HOOKPOINT = "transformer_blocks.3.ff"
CONCEPTS = [(name, value) for name in ("thing", "colour", "texture", "background") for value in ATTRIBUTES[name]]
N_NOISE = 12
FEATURES: list[tuple[str, str] | None] = [None, *CONCEPTS, *[None] * N_NOISE]
"""Feature 0 is dead, then one a concept, then noise."""
TOP = 8


class SceneEmbedder:
    """Pictures and texts by the concepts they show or name, on top of a direction that all share."""

    name = "scene-reader"

    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        return torch.stack([self.embed_scene(read_scene(image)) for image in images])

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        named = [[value in text.split() for _, value in CONCEPTS] for text in texts]
        return self._unit(torch.tensor(named, dtype=torch.float32))

    def unknown_words(self, text: str) -> list[str]:
        return [word for word in text.split() if word not in {value for _, value in CONCEPTS}]

    def embed_scene(self, scene: Scene) -> torch.Tensor:
        shown = [[concept in scene.concepts() for concept in CONCEPTS]]
        return self._unit(torch.tensor(shown, dtype=torch.float32))[0]

    @staticmethod
    def _unit(flags: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.cat([flags, torch.ones(len(flags), 1)], dim=1), dim=1)


@dataclass(frozen=True)
class Synthetic:
    run: RunFolder
    scenes: list[Scene]
    prompts: list[str]
    acts: torch.Tensor
    """(images, features, tokens)"""
    scores: torch.Tensor
    argmax: torch.Tensor
    embeddings: torch.Tensor


def build(path: Path, *, n_images: int = 240, seed: int = 0) -> Synthetic:
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng, n_objects=1) for _ in range(n_images)]
    prompts = [caption_scene(scene, rng) for scene in scenes]
    acts = torch.tensor(np.stack([_acts(scene, rng) for scene in scenes]))
    scores, argmax = acts.max(dim=2)
    embedder = SceneEmbedder()
    embeddings = torch.stack([embedder.embed_scene(scene) for scene in scenes])
    synthetic = Synthetic(RunFolder(path), scenes, prompts, acts, scores, argmax, embeddings)
    _write(synthetic)
    return synthetic


def _acts(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    acts = np.zeros((len(FEATURES), GRID.n_tokens), dtype=np.float32)
    thing = scene.objects[0]
    inside = object_mask(thing).reshape(16, 8, 16, 8).mean(axis=(1, 3)).astype(np.float32)
    strength = rng.uniform(0.6, 1.0, len(FEATURES)).astype(np.float32)
    for feature, concept in enumerate(FEATURES):
        if concept is not None and concept in scene.concepts():
            mask = 1 - inside if concept[0] == "background" else inside
            acts[feature] = 3 * strength[feature] * mask.ravel()
        elif feature > len(CONCEPTS) and rng.random() < 0.3:
            acts[feature, rng.integers(GRID.n_tokens, size=5)] = strength[feature]
    return acts


def _write(synthetic: Synthetic) -> None:
    run = synthetic.run
    run.save_info(
        RunInfo(
            flux_id="miniature",
            settings=GenerationSettings(height=128, width=128, num_inference_steps=20, max_sequence_length=32),
            hookpoints=(HOOKPOINT,),
            steps=(8, 16),
            sigmas=(0.6, 0.2),
            rows=GRID.rows,
            cols=GRID.cols,
        )
    )
    pictures = [Image.fromarray(render_scene(scene)) for scene in synthetic.scenes]
    webps = [encode_webp(picture, longest_side=128) for picture in pictures]
    run.save_images(
        ImageRow(i, prompt, i, webp) for i, (prompt, webp) in enumerate(zip(synthetic.prompts, webps, strict=True))
    )
    run.save_embeddings(Embeddings(synthetic.embeddings.numpy(), SceneEmbedder.name))
    rows = [_feature_row(synthetic, feature) for feature in range(len(FEATURES))]
    metadata = {"steps": "[8, 16]", "quantile_levels": "[0.5, 0.9]", "histogram_edges": "[0.01, 0.1, 1.0, 10.0]"}
    run.save_features(HOOKPOINT, FeatureTable.from_rows(rows, metadata=metadata))
    _write_heatmaps(synthetic, rows)
    part = run.work_path("score") / "part.safetensors"
    save_tensors(part, {"S": synthetic.scores, "argmax_token": synthetic.argmax.to(torch.int32)})
    merge_score_files(run.scores_path(HOOKPOINT), [part], steps=(8, 16), grid=GRID)
    sae = SparseAutoencoder(SaeConfig(architecture="topk", d_model=24, n_features=len(FEATURES), k=4))
    sae.save_pretrained(run.sae_path(HOOKPOINT))


def _feature_row(synthetic: Synthetic, feature: int) -> FeatureRow:
    column, acts = synthetic.scores[:, feature], synthetic.acts[:, feature]
    active = acts[acts > 0]
    best = torch.argsort(column, descending=True, stable=True)[: min(TOP, int((column > 0).sum()))]
    return FeatureRow(
        feature=feature,
        feature_class="dead" if not len(active) else "common",
        density=float((acts > 0).float().mean()),
        image_density=float((column > 0).float().mean()),
        mean_act=float(active.mean()) if len(active) else 0.0,
        max_act=float(column.max()),
        quantiles=[0.0, 0.0],
        spatial_spread=0.5,
        step_profile=[0.1, 0.2],
        histogram=[1, 2, 3],
        top_images=best.tolist(),
        top_scores=column[best].tolist(),
        top_tokens=synthetic.argmax[best, feature].tolist(),
        neighbours=[(feature + 1) % len(FEATURES)],
        neighbour_similarities=[0.5],
        family=-1,
    )


def _write_heatmaps(synthetic: Synthetic, rows: Sequence[FeatureRow]) -> None:
    alive = [row for row in rows if row.top_images]
    values = torch.zeros(len(alive), TOP, GRID.n_tokens, dtype=torch.uint8)
    ids = torch.full((len(alive), TOP), -1, dtype=torch.int32)
    for position, row in enumerate(alive):
        for rank, image in enumerate(row.top_images):
            values[position, rank] = (synthetic.acts[image, row.feature] / row.max_act * 255).round().to(torch.uint8)
            ids[position, rank] = image
    tensors = {
        "features": torch.tensor([row.feature for row in alive], dtype=torch.int32),
        "image_ids": ids,
        "values": values,
        "scale": torch.tensor([row.max_act for row in alive]),
    }
    path = synthetic.run.heatmaps_path(HOOKPOINT)
    save_tensors(path, tensors, metadata={"rows": str(GRID.rows), "cols": str(GRID.cols)})
