"""Scores of a run's SAEs: reconstruction, transfer, flow loss and concepts, measured on images of their own."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fluxsae.errors import FluxSaeError
from fluxsae.evaluation.flow import FlowReport, drawn_images, evaluate_flow, own_images
from fluxsae.evaluation.reconstruction import (
    ReconstructionReport,
    TransferCell,
    evaluate_reconstruction,
    transfer_table,
)
from fluxsae.evaluation.stream import ImageSet, OnProgress, iter_activations
from fluxsae.features.scores import load_scores
from fluxsae.features.scoring import trained_steps
from fluxsae.flux import AnyFlux, execution_device, flux_identity, schedule_sigmas, settings_ground, token_grid
from fluxsae.flux.bad_numbers import LeftOut
from fluxsae.flux.hookpoints import HookPoint
from fluxsae.flux.settings import GenerationSettings
from fluxsae.laboratory.audit import AuditReport, run_audit
from fluxsae.laboratory.concept_report import ConceptReport
from fluxsae.laboratory.concepts import evaluate_concepts
from fluxsae.laboratory.config import EvaluationConfig
from fluxsae.laboratory.dictionaries import untrained_sae
from fluxsae.laboratory.matching import find_matches
from fluxsae.laboratory.pairs import PairsReport, run_pairs
from fluxsae.laboratory.sample import Sample, gather_sample
from fluxsae.laboratory.steering import candidate_features, run_laboratory
from fluxsae.laboratory.steering_report import LaboratoryReport
from fluxsae.laboratory.truths import CONCEPTS
from fluxsae.miniature.scenes import ATTRIBUTES
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.config import Mismatch
from fluxsae.sae.model import SparseAutoencoder

Part = Literal["reconstruction", "transfer", "flow", "concepts", "steering", "pairs", "audit"]
PARTS: tuple[Part, ...] = get_args(Part)
MINIATURE = "miniature"


@dataclass(frozen=True)
class Evaluation:
    """What was measured at one hook point; None where a part was not asked for."""

    reconstruction: ReconstructionReport | None = None
    transfer: tuple[TransferCell, ...] | None = None
    flow: FlowReport | None = None
    concepts: ConceptReport | None = None
    steering: LaboratoryReport | None = None
    """One laboratory for all hook points, since it chooses among them."""
    pairs: PairsReport | None = None
    audit: AuditReport | None = None

    def metrics(self) -> dict[str, Any]:
        """The keys that this evaluation gives metrics.json."""
        found: dict[str, Any] = {}
        for flat in (self.reconstruction, self.flow):
            found |= flat.to_dict() if flat is not None else {}
        if self.transfer is not None:
            found["transfer"] = [cell.to_dict() for cell in self.transfer]
        nested = {"concepts": self.concepts, "steering": self.steering, "pairs": self.pairs, "audit": self.audit}
        found |= {name: report.to_dict() for name, report in nested.items() if report is not None}
        return {name: _without_nan(value) for name, value in found.items()}


def _without_nan(value: Any) -> Any:
    """The same value with None for what too few images could not tell."""
    if isinstance(value, Mapping):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def evaluate(
    run: RunFolder,
    pipe: AnyFlux,
    *,
    parts: Sequence[Part] = PARTS,
    hookpoints: Sequence[HookPoint | str] = (),
    config: EvaluationConfig | None = None,
    write: bool = False,
    tell: Callable[[str], object] = lambda _: None,
    allow_mismatch: Collection[Mismatch] = (),
    on_progress: OnProgress | None = None,
) -> dict[HookPoint, Evaluation]:
    """Measures the run's SAEs; with `write` the results go into the metrics.json of each, part by part.

    `concepts`, `steering` and `pairs` need a run of the miniature, whose scenes can be read back from its images, and
    `steering` needs the concepts. `tell` gets a line on what each part costs before it starts, and one after it.

    Raises:
        FluxSaeError: an unknown part, a hook point without an SAE, another FLUX than the SAEs were trained on.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown or not parts:
        raise FluxSaeError(f"parts is {list(parts)}; allowed are {', '.join(PARTS)}, at least one.")
    work = _Work.plan(run, pipe, hookpoints, config or EvaluationConfig(), allow_mismatch=allow_mismatch)
    found: dict[Part, Mapping[HookPoint, Any]] = {}
    for part in sorted(parts, key=PARTS.index):
        began = time.monotonic()
        tell(f"{part}: {work.cost(part)}")
        found[part] = work.measured[part] = getattr(work, part)(on_progress)
        tell(f"{part}: took {time.monotonic() - began:.0f} s")
        for hookpoint, report in found[part].items() if write else ():
            alone: dict[str, Any] = {part: report}
            run.update_metrics(hookpoint, Evaluation(**alone).metrics())
    return {h: Evaluation(**{part: reports[h] for part, reports in found.items()}) for h in work.saes}


@dataclass(frozen=True, eq=False)
class _Work:
    """Everything the parts share."""

    run: RunFolder
    pipe: AnyFlux
    saes: dict[HookPoint, SparseAutoencoder]
    steps: dict[HookPoint, list[int]]
    settings: GenerationSettings
    config: EvaluationConfig
    allow_mismatch: Collection[Mismatch]
    measured: dict[Part, Mapping[HookPoint, Any]] = field(default_factory=dict)
    """What earlier parts of the same evaluation found."""
    _samples: dict[HookPoint, Sample] = field(default_factory=dict)

    @classmethod
    def plan(
        cls,
        run: RunFolder,
        pipe: AnyFlux,
        hookpoints: Sequence[HookPoint | str],
        config: EvaluationConfig,
        *,
        allow_mismatch: Collection[Mismatch],
    ) -> "_Work":
        settings = run.load_info().settings
        wanted: list[HookPoint] = [run.check_sae(name) for name in hookpoints] or [
            h for h in run.sae_names() if run.has_sae(h)
        ]
        missing = [str(hookpoint) for hookpoint in wanted if not run.has_sae(hookpoint)]
        if missing or not wanted:
            raise FluxSaeError(f"{run.path} has no SAE at {', '.join(missing) or 'any hook point'}. Train one first.")
        device = execution_device(pipe)
        saes = {h: SparseAutoencoder.from_pretrained(run.sae_path(h), device=device) for h in wanted}
        for hookpoint, sae in saes.items():
            sae.require_ground(settings_ground(pipe, settings, hookpoint), allow_mismatch=allow_mismatch)
        sigmas = schedule_sigmas(pipe, settings)
        steps = {h: list(config.steps or trained_steps(sae, sigmas)) for h, sae in saes.items()}
        return cls(run, pipe, saes, steps, settings, config, allow_mismatch)

    @property
    def is_miniature(self) -> bool:
        """Whether the images show scenes that can be drawn and read."""
        return flux_identity(self.pipe).flux_id == MINIATURE

    def _need_scenes(self, part: Part) -> None:
        if not self.is_miniature:
            raise FluxSaeError(
                f"True concepts are known for scenes of the miniature only, and this run is of "
                f"{flux_identity(self.pipe).flux_id}. Leave {part} out, or evaluate a run of the miniature."
            )

    def cost(self, part: Part) -> str:
        """What a part costs, in passes of the transformer over one image."""
        config, n_steps = self.config, self.settings.num_inference_steps
        until = max(max(steps) for steps in self.steps.values()) + 1
        n_seen = sum(map(len, self.steps.values()))
        scored = min(3 * config.n_images, len(self.run.load_images()))
        own = 0 if self.is_miniature else n_steps  # x0 has to be generated
        audit, laboratory = config.audit, config.laboratory
        sample = audit.n_images * (n_steps if self.is_miniature else until)
        passes: dict[Part, int] = {
            "reconstruction": config.n_images * until,
            "transfer": config.n_transfer_images * len(config.sizes or self._default_sizes()) * n_steps,
            "flow": config.n_flow_images * (3 * n_seen + own),
            "concepts": scored * (n_steps + until),
            "steering": laboratory.most_pictures(len(CONCEPTS)) * n_steps,
            "pairs": len(self.saes) * (sample + len(CONCEPTS) * config.n_pairs * (1 + len(ATTRIBUTES))),
            "audit": len(self.saes) * (sample + audit.n_training_images * until)
            + audit.n_flow_images * 9 * n_seen * (audit.n_seeds + 1),
        }
        held = {"pairs", "audit"} & {part}
        d_model = max(sae.config.d_model for sae in self.saes.values())
        n_values = audit.n_images * max(map(len, self.steps.values())) * token_grid(self.pipe, self.settings).n_tokens
        memory = f", {n_values * d_model * 4 / 1e9:.2g} GB of activations in memory" if held else ""
        return f"at most {passes[part]:,} passes of the transformer over one image{memory}"

    def fresh_images(self, count: int) -> ImageSet:
        """Prompts of the run with noise that no stage has used."""
        return ImageSet.fresh(self.run.load_images().prompts, count)

    def reconstruction(self, on_progress: OnProgress | None) -> dict[HookPoint, ReconstructionReport]:
        return evaluate_reconstruction(
            self.pipe,
            self.saes,
            self.fresh_images(self.config.n_images),
            self.steps,
            settings=self.settings,
            batch_size=self.config.batch_size,
            draws=self.config.draws,
            seed=self.config.seed,
            on_progress=on_progress,
        )

    def transfer(self, on_progress: OnProgress | None) -> dict[HookPoint, tuple[TransferCell, ...]]:
        tables = transfer_table(
            self.pipe,
            self.saes,
            self.fresh_images(self.config.n_transfer_images),
            settings=self.settings,
            sizes=self.config.sizes or self._default_sizes(),
            trained=self.steps,
            batch_size=self.config.batch_size,
            on_progress=on_progress,
        )
        return {hookpoint: tuple(cells) for hookpoint, cells in tables.items()}

    def _default_sizes(self) -> tuple[tuple[int, int], ...]:
        """Three quarters, the trained size, and five quarters of its width: smaller, equal and not square."""
        patch = 2 * self.pipe.vae_scale_factor
        height, width = self.settings.height, self.settings.width
        smaller = tuple(max(patch, side * 3 // 4 // patch * patch) for side in (height, width))
        return (smaller[0], smaller[1]), (height, width), (height, width * 5 // 4 // patch * patch)

    def flow(self, on_progress: OnProgress | None) -> dict[HookPoint, FlowReport]:
        count, seed = self.config.n_flow_images, self.config.seed
        if self.is_miniature:
            images = drawn_images(self.pipe, count, seed=seed)
        else:
            images = own_images(
                self.pipe, self.fresh_images(count), settings=self.settings, batch_size=self.config.batch_size
            )
        return evaluate_flow(
            self.pipe,
            self.saes,
            images,
            self.steps,
            settings=self.settings,
            batch_size=self.config.batch_size,
            draws=self.config.draws,
            seed=seed,
            on_progress=on_progress,
        )

    def concepts(self, on_progress: OnProgress | None) -> dict[HookPoint, ConceptReport]:
        self._need_scenes("concepts")
        table = self.run.load_images()
        return evaluate_concepts(
            self.pipe,
            self.saes,
            ImageSet(tuple(table.prompts), tuple(table.seeds)).first(3 * self.config.n_images),
            {hookpoint: self._scored_steps(hookpoint) for hookpoint in self.saes},
            settings=self.settings,
            labels={h: labels for h in self.saes if (labels := self._labels(h)) is not None},
            batch_size=self.config.batch_size,
            draws=self.config.draws,
            seed=self.config.seed,
            on_progress=on_progress,
        )

    def _scored_steps(self, hookpoint: HookPoint) -> list[int]:
        """The steps that the run's S is the maximum over, unless others were asked for."""
        path = self.run.scores_path(hookpoint)
        if self.config.steps or not path.is_file():
            return self.steps[hookpoint]
        return list(load_scores(self.run, hookpoint).steps)

    def steering(self, on_progress: OnProgress | None) -> dict[HookPoint, LaboratoryReport]:
        self._need_scenes("steering")
        features = {}
        for hookpoint in self.saes:
            report = self.measured.get("concepts", {}).get(hookpoint)
            concepts = report.to_dict() if report else self.run.load_metrics(hookpoint).get("concepts")
            if concepts is None:
                raise FluxSaeError(
                    f"Which features of {hookpoint} match which concept is not known yet. Add --concepts."
                )
            features[hookpoint] = candidate_features(concepts, limit=self.config.laboratory.n_candidates)
        report = run_laboratory(
            self.pipe,
            self.saes,
            features,
            settings=self.settings,
            config=self.config.laboratory,
            allow_mismatch=self.allow_mismatch,
            on_progress=on_progress,
        )
        return dict.fromkeys(self.saes, report)

    def pairs(self, on_progress: OnProgress | None) -> dict[HookPoint, PairsReport]:
        self._need_scenes("pairs")
        reports = {}
        for hookpoint, sae in self.saes.items():
            sample = self._sample(hookpoint, on_progress)
            assert sample.truth is not None
            saes = sae, untrained_sae(sae, sample.x.flatten(0, 2), seed=10_000 + self.config.seed)
            first, second = (
                find_matches(sample.truth.halves, sample.scores(each).double().numpy())[0] for each in saes
            )
            reports[hookpoint] = run_pairs(
                self.pipe, hookpoint, saes, (first, second), step=max(self.steps[hookpoint]), settings=self.settings,
                n_pairs=self.config.n_pairs, seed=self.config.seed, on_progress=on_progress,
            )  # fmt: skip
        return reports

    def audit(self, on_progress: OnProgress | None) -> dict[HookPoint, AuditReport]:
        reports = {}
        for hookpoint, sae in self.saes.items():
            images = (
                drawn_images(self.pipe, self.config.audit.n_flow_images, seed=self.config.seed)
                if self.is_miniature
                else own_images(
                    self.pipe, self.fresh_images(self.config.audit.n_flow_images), settings=self.settings,
                    batch_size=self.config.batch_size,
                )
            )  # fmt: skip
            reports[hookpoint] = run_audit(
                self.pipe, hookpoint, sae, self._sample(hookpoint, on_progress),
                rows=self._training_rows(hookpoint, on_progress), images=images, settings=self.settings,
                config=self.config.audit, on_progress=on_progress,
            )  # fmt: skip
        return reports

    def _sample(self, hookpoint: HookPoint, on_progress: OnProgress | None) -> Sample:
        """The first images of the run at one hook point, generated once for all parts."""
        if hookpoint not in self._samples:
            table, config = self.run.load_images(), self.config.audit
            images = ImageSet(tuple(table.prompts), tuple(table.seeds)).first(config.n_images)
            has_clip = self.run.embeddings_path.is_file()
            self._samples[hookpoint] = gather_sample(
                self.pipe, hookpoint, images, self.steps[hookpoint], settings=self.settings,
                embeddings=torch.tensor(self.run.load_embeddings().vectors[: len(images)]) if has_clip else None,
                can_read=self.is_miniature, batch_size=config.batch_size, seed=config.seed, on_progress=on_progress,
            )  # fmt: skip
        return self._samples[hookpoint]

    def _training_rows(self, hookpoint: HookPoint, on_progress: OnProgress | None) -> Float[Tensor, "rows d"]:
        """Tokens of images that the sample does not hold, of other prompts where the run has as many."""
        config, steps, parts = self.config.audit, self.steps[hookpoint], []
        prompts = self.run.load_images().prompts
        images = ImageSet.fresh(prompts[config.n_images :] or prompts, config.n_training_images)
        keep = max(1, config.n_rows // (len(images) * len(steps)))
        generator = torch.Generator().manual_seed(config.seed)
        for batch in iter_activations(
            self.pipe, images, {hookpoint: steps}, settings=self.settings, batch_size=config.batch_size,
            on_progress=on_progress, doing="rows to train on", left_out=LeftOut(len(images)),
        ):  # fmt: skip
            x = batch.tokens[hookpoint].cpu()
            parts.append(x[:, :, torch.randperm(x.shape[2], generator=generator)[:keep]].flatten(0, 2))
        return torch.cat(parts)

    def _labels(self, hookpoint: HookPoint) -> list[str | None] | None:
        if not self.run.features_path(hookpoint).is_file():
            return None
        features = self.run.load_features(hookpoint, given=False)  # names that were found are what is judged
        return list(features.column("label")) if "label" in features else None
