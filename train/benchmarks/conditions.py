"""Can an edit be left on? Edits that suppress a concept, with a condition on it, measured on the miniature.

    python -m train.benchmarks conditions

The condition of each concept is chosen by `fluxsae.steering.choosing` on unedited images of their own, so that it holds
in 2 % of the images without the concept, and in as many with it as that leaves. Then each edit is tried on other
images, with its condition and without, by what is read back from them. Images without the concept should stay
bit-identical; on the others the edit should do what it does without the condition.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from train.benchmarks.options import ConditionsConfig

if TYPE_CHECKING:
    from fluxsae.flux.hookpoints import HookPoint
    from fluxsae.laboratory.truths import Concept
    from fluxsae.miniature.scenes import Scene
    from fluxsae.sae.model import SparseAutoencoder
    from fluxsae.steering.choosing import ChosenCondition
    from fluxsae.steering.edits import SteeringEdit

BATCH = 16


@dataclass(frozen=True)
class Trial:
    """One image of the report."""

    concept: str
    attribute: str
    is_present: bool
    """Whether the unedited image shows the concept."""
    is_identical: bool
    """Whether no bit of the latents changes with the condition."""
    is_success: bool = False
    """Whether the concept, which was there, is gone with the condition, while the image still shows something."""
    is_plain_success: bool = False
    """The same without the condition."""


def main(config: ConditionsConfig) -> list[Trial]:
    """Chooses, measures and prints the table."""
    from fluxsae.flux import load_flux
    from fluxsae.laboratory.config import LaboratoryConfig
    from fluxsae.laboratory.steering import candidate_features
    from fluxsae.miniature import miniature_path
    from fluxsae.runs.folder import RunFolder
    from fluxsae.sae.model import SparseAutoencoder

    run, usual = RunFolder(config.run or miniature_path("run")), LaboratoryConfig()
    place = run.hookpoints()[-1]
    features = candidate_features(run.load_metrics(place)["concepts"], limit=max(usual.together))
    concepts = [concept for concept in features if concept.attribute in usual.attributes]
    work = _Work(load_flux("miniature"), place, SparseAutoencoder.from_pretrained(run.sae_path(place)), config)
    chosen = work.choose(concepts)
    trials: list[Trial] = []
    for concept in concepts:
        if concept in chosen:
            trials += work.try_concept(concept, features[concept], chosen[concept])
            print(f"{concept}: done, {len(trials)} images", flush=True)
    print(table(trials, draws=config.draws, seed=config.seed))
    return trials


@dataclass(frozen=True, eq=False)
class _Work:
    pipe: Any
    place: "HookPoint"
    sae: "SparseAutoencoder"
    config: ConditionsConfig

    @property
    def window(self) -> tuple[int, int]:
        """The steps of the edits."""
        from fluxsae.flux import default_settings

        n_steps = default_settings(self.pipe).num_inference_steps
        return round(self.config.start * n_steps), n_steps

    def choose(self, concepts: "Sequence[Concept]") -> "dict[Concept, ChosenCondition]":
        """The condition of each concept that enough unedited images show and lack."""
        from fluxsae.errors import FluxSaeError
        from fluxsae.steering.choosing import choose_condition

        acts, scenes = self._development()
        found: dict[Concept, ChosenCondition] = {}
        for concept in concepts:
            is_present = np.array([(concept.attribute, concept.value) in scene.concepts() for scene in scenes])
            try:
                found[concept] = choose_condition(
                    acts,
                    is_present,
                    features=range(acts.shape[-1]),
                    reference_acts=self.sae.reference_acts.numpy(),
                    label=str(concept),
                )
            except FluxSaeError as error:
                print(f"{concept}: left out. {error}", flush=True)
                continue
            one = found[concept]
            print(
                f"{concept}: {len(one.condition.features)} features above {one.condition.above:.2f}, detected "
                f"{one.detected:.2f} of {is_present.sum()}, false alarms {one.false_alarms:.3f}",
                flush=True,
            )
        return found

    def _development(self) -> "tuple[np.ndarray, list[Scene]]":
        """Acts of unedited images in every second step of the window, and what the images show."""
        import torch

        from fluxsae.flux import capture, default_settings, generate, schedule_sigmas
        from fluxsae.laboratory.halves import LEAST_CONFIDENCE
        from fluxsae.miniature.scenes import caption_scene, read_scene, sample_scene

        rng, steps = np.random.default_rng([self.config.seed, 1]), range(*self.window, 2)
        sigmas = schedule_sigmas(self.pipe, default_settings(self.pipe))
        acts, scenes = [], []
        for start in range(0, self.config.development, BATCH):
            drawn = [sample_scene(rng, n_objects=1, held_out=None) for _ in range(BATCH)]
            with torch.no_grad(), capture(self.pipe, hookpoints=[self.place], steps=steps) as captured:
                images = generate(
                    self.pipe,
                    [caption_scene(scene, rng, keep=1.0) for scene in drawn],
                    seeds=[self.config.seed + start + offset for offset in range(BATCH)],
                )
            with torch.no_grad():
                found = torch.stack(
                    [self.sae.encode(captured.get(self.place, step), sigma=float(sigmas[step])) for step in steps], 1
                )
            read = [read_scene(image) for image in images]
            is_clear = np.array([len(one.objects) == 1 and one.confidence >= LEAST_CONFIDENCE for one in read])
            acts.append(found.half().numpy()[is_clear])
            scenes += [one for one, clear in zip(read, is_clear, strict=True) if clear]
            print(f"images for choosing: {start + BATCH}", flush=True)
        return np.concatenate(acts), scenes

    def try_concept(self, concept: "Concept", features: Sequence[int], chosen: "ChosenCondition") -> list[Trial]:
        """Every image of the report of one concept."""
        from fluxsae.laboratory.config import LaboratoryConfig
        from fluxsae.steering.edits import SteeringEdit

        strength = LaboratoryConfig().clamp[0]
        known = [feature for feature in features if float(self.sae.reference_acts[feature]) > 0]
        plain = tuple(SteeringEdit(self.place, feature, "clamp", strength, steps=self.window) for feature in known)
        conditional = tuple(replace(edit, when=chosen.condition) for edit in plain)
        return [
            trial
            for has_concept in (True, False)
            for at in range(self.config.pictures)
            for trial in self._try_image(concept, plain, conditional, at=at, has_concept=has_concept)
        ]

    def _try_image(
        self,
        concept: "Concept",
        plain: "Sequence[SteeringEdit]",
        conditional: "Sequence[SteeringEdit]",
        *,
        at: int,
        has_concept: bool,
    ) -> list[Trial]:
        """The image's trial; none where what is read of it is not what was asked for."""
        from fluxsae.laboratory.halves import LEAST_CONFIDENCE
        from fluxsae.laboratory.outcomes import compare_scenes, draw_subject
        from fluxsae.miniature.scenes import read_scene
        from fluxsae.sae.config import MISMATCHES
        from fluxsae.steering.sweeps import sweep

        # far from the seeds of the images for choosing
        subject = draw_subject(concept, has_concept=has_concept, seed=self.config.seed + (1 << 20) + at)
        variants = [(), conditional, plain] if has_concept else [(), conditional]
        made = sweep(
            self.pipe, {self.place: self.sae}, variants, prompt=subject.prompt, seed=subject.seed,
            allow_mismatch=MISMATCHES,
        )  # fmt: skip
        before = read_scene(made[0].image)
        is_present = (concept.attribute, concept.value) in before.concepts()
        if is_present != has_concept or len(before.objects) != 1 or before.confidence < LEAST_CONFIDENCE:
            return []
        is_gone = [
            compare_scenes(before, read_scene(one.image), concept).is_success(wanted=False)
            for one in made[1:]
            if has_concept
        ]
        is_identical = bool((made[1].latents == made[0].latents).all())
        return [Trial(str(concept), concept.attribute, has_concept, is_identical, *is_gone)]


def table(trials: Sequence[Trial], *, draws: int, seed: int) -> str:
    """The report, by attribute and over all."""
    lines = [f"{'':<12} {'without: identical':>26} {'with: success':>26} {'without the condition':>26}"]
    for attribute in (*dict.fromkeys(trial.attribute for trial in trials), "all"):
        chosen = [trial for trial in trials if attribute in (trial.attribute, "all")]
        present = [trial for trial in chosen if trial.is_present]
        columns: Mapping[str, list[bool]] = {
            "identical": [trial.is_identical for trial in chosen if not trial.is_present],
            "success": [trial.is_success for trial in present],
            "plain": [trial.is_plain_success for trial in present],
        }
        cells = [f"{_share(hits, draws=draws, seed=seed):>26}" for hits in columns.values()]
        lines.append(f"{attribute:<12} {' '.join(cells)}")
    return "\n".join(lines)


def _share(hits: Sequence[bool], *, draws: int, seed: int) -> str:
    from fluxsae.evaluation.intervals import bootstrap_weights, interval, weighted_mean

    if not hits:
        return "-"
    found = interval(weighted_mean(np.array(hits, dtype=float), bootstrap_weights(len(hits), draws=draws, seed=seed)))
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] n={len(hits)}"
