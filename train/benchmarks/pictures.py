"""Drawn scenes read as pictures: what the features tell of them, an SAE of pictures beside one of generations, seconds.

python -m train.benchmarks pictures

The miniature's scenes are known exactly. For each concept (shape, colour, texture, background) the feature with the
best AUC on one half of the pictures is reported on the other half.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from fluxsae.activations.shards import ShardFolder
from fluxsae.evaluation.intervals import auc_table
from fluxsae.evaluation.tables import text_table
from fluxsae.flux import capture, generate, load_flux, read_picture
from fluxsae.laboratory.truths import CONCEPTS, HEADLINE_ATTRIBUTES, attribute_mean, truth_table
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, caption_scene, render_scene, sample_scene
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.sae.training import HeldOut
from train import collect, fit
from train.benchmarks.options import PicturesConfig


def main(config: PicturesConfig) -> None:
    """Prints the three measurements."""
    pipe = load_flux("miniature")
    rng = np.random.default_rng(config.seed)
    scenes = [sample_scene(rng) for _ in range(config.n_scenes)]
    captions = [caption_scene(scene, rng) for scene in scenes]
    pictures = [Image.fromarray(np.asarray(render_scene(scene))) for scene in scenes]
    sae = SparseAutoencoder.from_pretrained(RunFolder(miniature_path("run")).sae_path(config.hookpoint))
    for name, prompts in (("with captions", captions), ("without", [""] * len(captions))):
        scores = read_scores(pipe, sae, pictures, prompts, config)
        print(f"{name}: {describe(best_feature_auc(scores, scenes, seed=config.seed))}")
    print(seconds(pipe, pictures[: config.batch_size], captions[: config.batch_size], config))
    with tempfile.TemporaryDirectory() as scratch:
        print(cross_table(Path(scratch), pictures, captions, config))


def read_scores(
    pipe: Any, sae: SparseAutoencoder, pictures: Sequence[Image.Image], prompts: Sequence[str], config: PicturesConfig
) -> Float[np.ndarray, "pictures features"]:
    """S of pictures that are read at one step."""
    rows = []
    for start in range(0, len(pictures), config.batch_size):
        stop = start + config.batch_size
        captured = read_picture(
            pipe, pictures[start:stop], prompt=prompts[start:stop], hookpoints=[config.hookpoint], steps=[config.step],
            seeds=list(range(start, start + len(pictures[start:stop]))),
        )  # fmt: skip
        rows.append(sae.encode(captured.get(config.hookpoint, config.step)).amax(1).detach())
    return torch.cat(rows).float().numpy()


def best_feature_auc(
    scores: Float[np.ndarray, "pictures features"], scenes: Sequence[Scene], *, seed: int
) -> Float[np.ndarray, " concepts"]:
    """For each concept the AUC on one half of the feature that is best on the other; NaN where a half has none."""
    order = np.random.default_rng(seed).permutation(len(scenes))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    truth = truth_table(scenes)
    best = np.nan_to_num(auc_table(scores[first], truth[first]), nan=-1.0).argmax(axis=1)
    found: Float[np.ndarray, " concepts"] = auc_table(scores[second], truth[second])[np.arange(len(CONCEPTS)), best]
    return found


def describe(found: Float[np.ndarray, " concepts"]) -> str:
    """The mean over the attributes' values, and each attribute's own."""
    is_headline = np.array([concept.attribute in HEADLINE_ATTRIBUTES for concept in CONCEPTS])
    own = ", ".join(f"{name} {attribute_mean(found, name):.3f}" for name in HEADLINE_ATTRIBUTES)
    return f"mean AUC {np.nanmean(found[is_headline]):.3f} ({own})"


def seconds(pipe: Any, pictures: Sequence[Image.Image], captions: Sequence[str], config: PicturesConfig) -> str:
    """Seconds a picture of reading it, and of generating one up to the same step and block."""
    place, step, n = config.hookpoint, config.step, len(pictures)

    def read() -> None:
        read_picture(pipe, pictures, prompt=captions, hookpoints=[place], steps=[step], seeds=list(range(n)))

    def make() -> None:
        with capture(pipe, [place], [step], stop_early=True):
            generate(pipe, list(captions), seeds=list(range(n)), output_type="latent")

    times = {name: _median_seconds(work, config.repeats) / n for name, work in (("read", read), ("generated", make))}
    return (
        f"seconds a picture at step {step}, {n} together: read {times['read']:.4f}, generated with early exit "
        f"{times['generated']:.4f}: 1/{times['generated'] / times['read']:.1f}"
    )


def _median_seconds(work: Any, repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def cross_table(folder: Path, pictures: Sequence[Image.Image], captions: Sequence[str], config: PicturesConfig) -> str:
    """FVU and L0 on held-out activations of pictures and of generations, of an SAE trained on either."""
    (folder / "pictures").mkdir()
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        picture.save(folder / "pictures" / f"{number:05d}.png")
        (folder / "pictures" / f"{number:05d}.txt").write_text(caption)
    (folder / "captions.txt").write_text("\n".join(captions))
    sources: dict[str, dict[str, Path]] = {
        "pictures": {"pictures": folder / "pictures"},
        "generations": {"prompts": folder / "captions.txt"},
    }
    saes, rows = {}, {}
    for name, source in sources.items():
        shared: dict[str, Any] = {
            "run": folder / name,
            "hookpoints": (config.hookpoint,),
            "steps": (config.step,),
            **source,
        }
        collect.main(collect.CollectConfig(**shared, images=config.n_collected, batch_size=config.batch_size))
        fit.main(fit.FitConfig(**shared, n_features=(512,), k=(10,), epochs=config.epochs, lr=3e-3, batch_size=512))
        run = RunFolder(folder / name)
        saes[name] = SparseAutoencoder.from_pretrained(run.sae_path(config.hookpoint))
        rows[name] = ShardFolder(run.activations_folder(config.hookpoint))
    lines = [[f"trained on {name}", *(_measured(sae, rows[other]) for other in sources)] for name, sae in saes.items()]
    return text_table(["FVU (L0)", *(f"on {name}" for name in sources)], lines)


def _measured(sae: SparseAutoencoder, folder: ShardFolder) -> str:
    measure = HeldOut(sae)
    for _, tokens, _ in folder.iter_images("held_out"):
        measure.add(tokens.flatten(0, 1))
    found = measure.measure()
    return f"{found['fvu']:.3f} ({found['l0']:.1f})"
