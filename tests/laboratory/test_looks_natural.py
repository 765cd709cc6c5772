"""How often `looks_natural` is wrong: on unedited pictures, and on edited ones that the reader judges (`-m bench`)."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from fluxsae.evaluation.intervals import bootstrap_weights, interval
from fluxsae.flux import FluxPipeline, default_settings, generate
from fluxsae.laboratory.halves import LEAST_CONFIDENCE
from fluxsae.miniature import miniature_path
from fluxsae.miniature.scenes import Scene, caption_scene, read_scene, sample_scene
from fluxsae.pictures.perceptual import load_distance
from fluxsae.runs.folder import RunFolder
from fluxsae.sae.model import SparseAutoencoder
from fluxsae.steering.demos import load_limits, measured_sweep
from fluxsae.steering.edits import SteeringEdit
from fluxsae.steering.measurements import EditMeasurement, measure_unedited
from fluxsae.steering.naturalness import FALSE_ALARMS, calibrated_range

pytestmark = pytest.mark.bench

N_PICTURES, N_PAIRS, SEED = 100, 80, 161_803
STRENGTHS = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Judged:
    """An edited picture: what the reader says of it beside the unedited one, and what was measured."""

    picture: int
    verdict: str
    measured: EditMeasurement


def verdict(before: Scene, after: Scene) -> str:
    """What became of a picture, by the reader alone."""
    if len(after.objects) != len(before.objects):
        return "another number of things"
    return "unreadable" if after.confidence < LEAST_CONFIDENCE else "as many things, readable"


def share(flags: list[tuple[int, bool]], what: str) -> float:
    """Prints and gives the share of pictures flagged, with an interval over the unedited pictures they come from."""
    flagged, every = np.zeros(N_PICTURES), np.zeros(N_PICTURES)
    for picture, flag in flags:
        flagged[picture] += flag
        every[picture] += 1
    weights = bootstrap_weights(N_PICTURES, draws=2000, seed=0)
    found = interval((weights @ flagged) / np.maximum(weights @ every, 1e-9))
    print(f"{what}: {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of {len(flags)} flagged")
    return found.value


def test_broken_pictures_are_flagged_and_unedited_ones_are_not(miniature: FluxPipeline) -> None:
    run, rng = RunFolder(miniature_path("run")), np.random.default_rng(SEED)
    place, settings, images = run.hookpoints()[-1], default_settings(miniature), run.load_images()
    sae = SparseAutoencoder.from_pretrained(run.sae_path(place))
    limits = load_limits(run, place)
    assert limits is not None
    own = {"prompts": images.prompts[:N_PAIRS], "seeds": images.seeds[:N_PAIRS], "settings": settings}
    natural = limits.natural
    if natural.false_alarms is None:  # a run of before the calibration
        natural = calibrated_range(measure_unedited(miniature, sae, place, limits, **own))
    limits = replace(limits, natural=natural)
    print(f"\n\n{place}: {natural}")
    alive = (sae.reference_acts > 0).nonzero().flatten().numpy()
    distance, judged = load_distance("random-features"), list[Judged]()
    while len({each.picture for each in judged}) < N_PICTURES:
        picture = len({each.picture for each in judged})
        prompt, seed = caption_scene(sample_scene(rng), rng, keep=0.8), SEED + picture
        feature = int(rng.choice(alive))
        edits = [(SteeringEdit(place, feature, "add", strength),) for strength in STRENGTHS]
        (plain,) = generate(miniature, prompt, seeds=seed, settings=settings)
        before = read_scene(plain)
        if prompt in images.prompts or before.confidence < LEAST_CONFIDENCE:
            continue
        found, measured = measured_sweep(
            miniature,
            {place: sae},
            edits,
            prompt=prompt,
            seed=seed,
            settings=settings,
            distance=distance,
            limits={place: limits},
            baseline=plain,
        )
        scenes = [read_scene(variant.image) for variant in found]
        judged += [Judged(picture, verdict(before, s), m) for s, m in zip(scenes, measured, strict=True)]
    flags = {
        word: [(each.picture, not each.measured.looks_natural) for each in judged if each.verdict == word]
        for word in ("unreadable", "another number of things", "as many things, readable")
    }
    shares = {word: share(found, word) for word, found in flags.items() if found}
    broken = share([*flags["unreadable"], *flags["another number of things"]], "broken")
    fresh = [caption_scene(sample_scene(rng), rng, keep=0.8) for _ in range(N_PICTURES)]
    further = {"prompts": fresh, "seeds": [2 * SEED + i for i in range(len(fresh))], "settings": settings}
    unedited = enumerate(measure_unedited(miniature, sae, place, limits, **further))
    alarms = share([(picture, not natural.holds(*pair)) for picture, pair in unedited], "unedited")
    assert alarms <= 2 * FALSE_ALARMS
    assert broken > 2 * shares["as many things, readable"]
